"""The push: replace every prototype by the nearest training patch of its own class, and remember where it is from.

Search, change and bookkeeping are separate: `nearest_patches` is the pure search in one batch, `find_neighbours` runs
it over a data set, `push_prototypes` projects, merges duplicates and returns the provenance records.
Source: Sacha et al., "ProtoSeg" (WACV 2023), section 3.3, after Chen et al., "This Looks Like That" (NeurIPS 2019).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from datasets.base import SegmentationDataset
from datasets.batches import own_images
from grid import IGNORE, Grid
from inference import Inference
from runtime import distributed


class PushReport(NamedTuple):
    """records: one per remaining prototype (see `push_prototypes`); merged: how many duplicates were removed;
    not_found: prototypes whose class no cell of the data has; moved: the mean distance that the prototypes jumped."""

    records: list[dict]
    merged: int
    not_found: list[int]
    moved: float


def nearest_patches(distances: Tensor, labels: Tensor, prototype_class: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each prototype the nearest cell of its own class in a batch; without classes, of any class.

    distances (B, P, h, w), labels (B, h, w), prototype_class (P,) -> distance (P,), inf where there is no such cell,
    and index (P,) int64, flat over B*h*w. Of equal distances the first cell wins.
    """
    labels = labels[:, None]
    allowed = labels != IGNORE if prototype_class is None else labels == prototype_class[:, None, None]
    return distances.masked_fill(~allowed, torch.inf).transpose(0, 1).flatten(1).min(dim=1)


class Neighbours(NamedTuple):
    """The k patches of a data set that are nearest to each prototype, at most one an image, nearest first.

    distance (P, k) float32, inf where the data set has fewer; image (P, k) index in the data set, -1 there;
    cell (P, k, 2) row and column; label (P, k) the class of the cell, 255 there; vector (P, k, D) the features there.
    """

    distance: Tensor
    image: Tensor
    cell: Tensor
    label: Tensor
    vector: Tensor

    @classmethod
    def none(cls, count: int, k: int, depth: int, device: torch.device) -> Neighbours:
        """What `count` prototypes have before the first image; depth 0 where nobody asks for the features."""
        return cls(
            torch.full((count, k), torch.inf, device=device),
            torch.full((count, k), -1, device=device),
            torch.zeros(count, k, 2, dtype=torch.long, device=device),
            torch.full((count, k), IGNORE, device=device),
            torch.zeros(count, k, depth, device=device),
        )

    def updated(
        self,
        index: int,
        distances: Tensor,
        labels: Tensor,
        prototype_class: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Neighbours:
        """With the nearest patches of one more image: its index in the data set, and (1, ., h, w) as it was seen."""
        distance, flat = nearest_patches(distances, labels, prototype_class)
        width = distances.shape[3]
        found = Neighbours(
            distance,
            torch.where(distance.isinf(), -1, index),
            torch.stack((flat // width, flat % width), dim=1),
            labels.flatten()[flat],
            self.vector[:, 0] if features is None else features[0].flatten(1).T[flat],
        )
        both = [torch.cat((old, new[:, None]), dim=1) for old, new in zip(self, found, strict=True)]
        order = both[0].sort(dim=1, stable=True).indices[:, :-1]  # of equal distances the earlier image wins
        return Neighbours(*(values[torch.arange(len(order), device=order.device)[:, None], order] for values in both))

    def of_all_processes(self) -> Neighbours:
        """The nearest of what all processes found, as one process would have found them."""
        if distributed.world_size() == 1:
            return self
        found = Neighbours(*(torch.cat(list(distributed.all_gather(values)), dim=1) for values in self))
        by_image = found.image.where(found.image >= 0, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        rows = torch.arange(len(by_image), device=by_image.device)[:, None]
        found = Neighbours(*(values[rows, by_image] for values in found))
        nearest = found.distance.argsort(dim=1, stable=True)[:, : self.distance.shape[1]]
        return Neighbours(*(values[rows, nearest] for values in found))


@torch.no_grad()
def find_neighbours(
    inference: Inference, dataset: SegmentationDataset, k: int = 6, own_class: bool = False, num_workers: int = 0
) -> Neighbours:
    """Search a whole data set at native size, in one pass, for each prototype's k nearest labelled cells.

    own_class: of the prototype's own class alone, as for the push; else of any class: then the share of them that has
    the prototype's own class is its purity, and pruning keeps a prototype for it (Sacha et al. 2023, section 3.4:
    k = 6). Memory is that of one image.
    """
    model = inference.ppnet
    classes = model.prototype_class if own_class else None
    count, depth = model.prototype_vectors.shape[:2]
    best = Neighbours.none(count, k, depth, inference.device)
    for index, image, label in own_images(dataset, num_workers, "push" if own_class else "search"):
        features = inference.features(image)
        distances = model.distances(features)
        cells = inference.grid.labels(label.to(inference.device), distances.shape[2:])
        best = best.updated(index, distances, cells, classes, features)
    return best.of_all_processes()


@torch.no_grad()
def push_prototypes(inference: Inference, dataset: SegmentationDataset, num_workers: int = 0) -> PushReport:
    """Project every prototype onto its nearest own-class training patch; merge those that become the same patch.

    A merged prototype's last-layer column is added to that of the one that stays, so that merging changes no logit.
    A prototype whose class no cell of the data has stays as it is. Records, one per prototype that is left:

        prototype   its index now           class       class index          class_name
        image       image id, or None       split, image_index, image_size   where that image is, its [width, height]
        cell        [row, column]           pixel       [x, y] it looks at
        distance    squared L2 distance that it jumped
        merged      indices, before the push, of the prototypes that it stands for
    """
    model = inference.ppnet
    nearest = find_neighbours(inference, dataset, 1, own_class=True, num_workers=num_workers)
    distance, image, cell, _, vector = (values[:, 0] for values in nearest)
    was_found = image >= 0
    model.project_prototypes(torch.where(was_found[:, None], vector, model.prototype_vectors.flatten(1)))

    groups: dict[tuple, list[int]] = {}  # the prototypes that became one patch, by class and patch
    places = torch.cat((model.prototype_class[:, None], image[:, None], cell), dim=1).tolist()
    for p, (class_index, index, row, column) in enumerate(places):
        groups.setdefault((class_index, index, row, column) if index >= 0 else (class_index, -1, p, p), []).append(p)
    distances = distance.tolist()
    records = [
        _record(new, key, members, distances[members[0]], dataset, inference.grid)
        for new, (key, members) in enumerate(groups.items())
    ]
    model.merge_prototypes(list(groups.values()))
    return PushReport(
        records,
        merged=len(places) - len(records),
        not_found=[r["prototype"] for r in records if r["image"] is None],
        moved=float(distance[was_found].mean()) if was_found.any() else 0.0,
    )


def _record(
    new: int, key: tuple, members: list[int], distance: float, dataset: SegmentationDataset, grid: Grid
) -> dict:
    class_index, image, row, column = key
    where = dict.fromkeys(("image", "image_index", "image_size", "split", "cell", "pixel", "distance"))
    if image >= 0:
        where = {
            "image": dataset.image_id(image),
            "image_index": image,
            "image_size": list(dataset.read(image)[0].size),
            "split": dataset.split,
            "cell": [row, column],
            "pixel": [grid.pixel(column), grid.pixel(row)],
            "distance": distance,
        }
    name = dataset.mapping.names[class_index]
    return {"prototype": new, "class": class_index, "class_name": name, **where, "merged": members}
