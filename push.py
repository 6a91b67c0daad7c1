"""The push: replace every prototype by the nearest training patch of its own class, and remember where it is from.

Search, change and bookkeeping are separate: `nearest_patches` is the pure search in one batch, `find_nearest` runs
it over a data set, `push_prototypes` projects, merges duplicates and returns the provenance records.
Source: Sacha et al., "ProtoSeg" (WACV 2023), section 3.3, after Chen et al., "This Looks Like That" (NeurIPS 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SegmentationDataset, own_images
from grid import IGNORE
from model import PPNet, cell_labels, pad_to_grid
from runtime import distributed


class Nearest(NamedTuple):
    """The nearest own-class cell of every prototype in a data set.

    distance (P,) float32, inf where the class never occurs; image (P,) index in the data set, -1 where none;
    cell (P, 2) row and column; vector (P, D) the features there.
    """

    distance: Tensor
    image: Tensor
    cell: Tensor
    vector: Tensor


class PushReport(NamedTuple):
    """records: one per remaining prototype (see `push_prototypes`); merged: how many duplicates were removed;
    not_found: prototypes whose class never occurs; moved: the mean distance that the prototypes jumped."""

    records: list[dict]
    merged: int
    not_found: list[int]
    moved: float


def nearest_patches(distances: Tensor, labels: Tensor, prototype_class: Tensor) -> tuple[Tensor, Tensor]:
    """For each prototype the nearest cell of its own class in a batch.

    distances (B, P, h, w), labels (B, h, w), prototype_class (P,) -> distance (P,), inf where there is no such cell,
    and index (P,) int64, flat over B*h*w. Of equal distances the first cell wins.
    """
    is_own = labels[:, None] == prototype_class[:, None, None]
    own = distances.masked_fill(~is_own, torch.inf)
    return own.transpose(0, 1).flatten(1).min(dim=1)


@torch.no_grad()
def find_nearest(model: PPNet, dataset: SegmentationDataset, device: torch.device, num_workers: int = 0) -> Nearest:
    """Search the whole data set, image by image at native size, in evaluation mode; memory is that of one image."""
    model.eval()
    count, depth = model.prototype_vectors.shape[:2]
    best = Nearest(
        torch.full((count,), torch.inf, device=device),
        torch.full((count,), -1, device=device),
        torch.zeros(count, 2, dtype=torch.long, device=device),
        torch.zeros(count, depth, device=device),
    )
    for index, image, label in own_images(dataset, num_workers, "push"):
        features = model.conv_features(pad_to_grid(image.to(device), 0.0, model.output_stride)).float()
        distances = model.classify(features).distances
        cells = cell_labels(label.to(device), distances.shape[2:], model.output_stride)
        distance, flat = nearest_patches(distances, cells, model.prototype_class)
        closer = distance < best.distance
        width = distances.shape[3]
        found = Nearest(
            distance,
            torch.full_like(flat, index),
            torch.stack((flat // width, flat % width), dim=1),
            features[0].flatten(1).T[flat],
        )
        best = Nearest(*(torch.where(_like(closer, new), new, old) for new, old in zip(found, best, strict=True)))
    return _nearest_of_all(best)


def _nearest_of_all(own: Nearest) -> Nearest:
    """The nearest of what all processes found; of equal distances the earlier image wins, as in one process."""
    if distributed.world_size() == 1:
        return own
    found = Nearest(*(distributed.all_gather(values) for values in own))
    last = torch.iinfo(torch.int64).max
    image = torch.where(found.image < 0, last, found.image)
    image = torch.where(found.distance == found.distance.amin(0), image, last)
    winner = image.argmin(0)
    return Nearest(*(values[winner, torch.arange(len(winner), device=winner.device)] for values in found))


class Neighbours(NamedTuple):
    """The k patches of a data set that are nearest to each prototype, at most one an image, nearest first.

    distance (P, k) float32, inf where the data set has fewer images; image (P, k) index in the data set, -1 there;
    cell (P, k, 2) row and column; label (P, k) the class of the cell, 255 there.
    """

    distance: Tensor
    image: Tensor
    cell: Tensor
    label: Tensor


def no_neighbours(count: int, k: int, device: torch.device) -> Neighbours:
    """What `count` prototypes have before the first image."""
    return Neighbours(
        torch.full((count, k), torch.inf, device=device),
        torch.full((count, k), -1, device=device),
        torch.zeros(count, k, 2, dtype=torch.long, device=device),
        torch.full((count, k), IGNORE, device=device),
    )


def nearer(best: Neighbours, distances: Tensor, cells: Tensor, index: int) -> Neighbours:
    """The neighbours after one more image: distances (1, P, h, w), cells (1, h, w) labels, index of the image."""
    distance, flat = distances.masked_fill(cells[:, None] == IGNORE, torch.inf)[0].flatten(1).min(dim=1)
    width = distances.shape[3]
    found = Neighbours(
        distance,
        torch.where(distance.isinf(), -1, index),
        torch.stack((flat // width, flat % width), dim=1),
        cells.flatten()[flat],
    )
    both = [torch.cat((old, new[:, None]), dim=1) for old, new in zip(best, found, strict=True)]
    order = both[0].sort(dim=1, stable=True).indices[:, :-1]  # of equal distances the earlier image wins
    return Neighbours(*(values[torch.arange(len(order), device=order.device)[:, None], order] for values in both))


@torch.no_grad()
def find_neighbours(
    model: PPNet, dataset: SegmentationDataset, device: torch.device, k: int = 6, num_workers: int = 0
) -> Neighbours:
    """Search the whole data set for each prototype's k nearest labelled cells of any class, one pass, bounded memory.

    The share of them that has the prototype's own class is its purity; pruning keeps a prototype for it
    (Sacha et al. 2023, section 3.4: k = 6).
    """
    model.eval()
    best = no_neighbours(len(model.prototype_class), k, device)
    for index, image, label in own_images(dataset, num_workers, "search"):
        distances = model(pad_to_grid(image.to(device), 0.0, model.output_stride)).distances
        cells = cell_labels(label.to(device), distances.shape[2:], model.output_stride)
        best = nearer(best, distances, cells, index)
    return neighbours_of_all(best)


def neighbours_of_all(own: Neighbours) -> Neighbours:
    """The nearest of what all processes found, as one process would have found them."""
    if distributed.world_size() == 1:
        return own
    found = Neighbours(*(torch.cat(list(distributed.all_gather(values)), dim=1) for values in own))
    by_image = found.image.where(found.image >= 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    rows = torch.arange(len(by_image), device=by_image.device)[:, None]
    found = Neighbours(*(values[rows, by_image] for values in found))
    nearest = found.distance.argsort(dim=1, stable=True)[:, : own.distance.shape[1]]
    return Neighbours(*(values[rows, nearest] for values in found))


@torch.no_grad()
def push_prototypes(
    model: PPNet, dataset: SegmentationDataset, device: torch.device, num_workers: int = 0
) -> PushReport:
    """Project every prototype onto its nearest own-class training patch; merge those that become the same patch.

    A merged prototype's last-layer column is added to that of the one that stays, so that merging changes no logit.
    A prototype whose class never occurs in the data stays as it is. Records, one per prototype that is left:

        prototype   its index now           class       class index          class_name
        image       image id, or None       split, image_index               where that image is
        cell        [row, column]           pixel       [x, y] it looks at
        distance    squared L2 distance that it jumped
        merged      indices, before the push, of the prototypes that it stands for
    """
    nearest = find_nearest(model, dataset, device, num_workers)
    was_found = nearest.image >= 0
    vectors = torch.where(was_found[:, None], nearest.vector, model.prototype_vectors.flatten(1))
    model.project_prototypes(vectors)

    groups: dict[tuple, list[int]] = {}  # the prototypes that became one patch, by class and patch
    places = torch.cat((model.prototype_class[:, None], nearest.image[:, None], nearest.cell), dim=1).tolist()
    for p, (class_index, image, row, column) in enumerate(places):
        groups.setdefault((class_index, image, row, column) if image >= 0 else (class_index, -1, p, p), []).append(p)
    weight = model.last_layer.weight
    for kept, *others in groups.values():
        weight[:, kept] += weight[:, others].sum(1)
    distances = nearest.distance.tolist()
    records = [
        _record(new, key, members, distances[members[0]], dataset, model.output_stride)
        for new, (key, members) in enumerate(groups.items())
    ]
    model.keep_prototypes(torch.tensor([members[0] for members in groups.values()]))
    return PushReport(
        records,
        merged=len(places) - len(records),
        not_found=[r["prototype"] for r in records if r["image"] is None],
        moved=float(nearest.distance[was_found].mean()) if was_found.any() else 0.0,
    )


def _record(new: int, key: tuple, members: list[int], distance: float, dataset, stride: int) -> dict:
    class_index, image, row, column = key
    where = dict.fromkeys(("image", "image_index", "split", "cell", "pixel", "distance"))
    if image >= 0:
        where = {
            "image": dataset.image_id(image),
            "image_index": image,
            "split": dataset.split,
            "cell": [row, column],
            "pixel": [column * stride, row * stride],
            "distance": distance,
        }
    name = dataset.mapping.names[class_index]
    return {"prototype": new, "class": class_index, "class_name": name, **where, "merged": members}


def patch_box(activation: Tensor, cell: list[int], image_size: tuple[int, int], stride: int = 8) -> list[int]:
    """The pixels that a prototype's picture frames: [x0, y0, x1, y1), a box in an image of (width, height).

    It is the region around `cell` in which the activation (h, w) stays within the highest 5 % of the image, the
    rule of the published code, but connected to the cell that the prototype was taken from.
    """
    height, width = activation.shape
    allowed = (activation >= torch.quantile(activation.float(), 0.95)).float()[None, None]
    region = torch.zeros_like(allowed)
    region[0, 0, cell[0], cell[1]] = 1
    for _ in range(height + width):
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * allowed
        grown[0, 0, cell[0], cell[1]] = 1
        if torch.equal(grown, region):
            break
        region = grown
    rows, columns = (region[0, 0].amax(dim).nonzero().flatten() for dim in (1, 0))
    half = stride // 2
    corner = (int(columns[0]) * stride - half, int(rows[0]) * stride - half)
    end = (int(columns[-1]) * stride + half, int(rows[-1]) * stride + half)
    return [*(max(0, c) for c in corner), *(min(e, length) for e, length in zip(end, image_size, strict=True))]


def _like(mask: Tensor, values: Tensor) -> Tensor:
    return mask.view(-1, *[1] * (values.dim() - 1))
