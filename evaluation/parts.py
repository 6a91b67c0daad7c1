"""Whether a prototype stands for a part of an object: consistency and stability, measured with part labels.

A data set's `part_label` names the file of an image, as it is published (github.com/pmeletis/panoptic_parts). A pixel
is semantic id (1-2 digits), then instance (3 digits), then part (2 digits); without a part it has no more than five
digits. What counts as an object is decided by the data set's own labels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.base import DatasetError, check_regular
from grid import IGNORE, Grid
from runtime import distributed
from runtime.errors import UserError

QUANTILE = 0.8  # of a prototype's activations on the pixels of its class: what is above is where it looks
CONSISTENT = 0.8  # a prototype that hits the same part in a larger share of the images is consistent
MAX_PARTS = 100  # part ids have two digits


def read_parts(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The part ids (H, W) of a panoptic parts file, 0 where there is no part. size: (width, height) of the image."""
    check_regular(path, "file of part labels")
    try:
        with Image.open(path) as file:
            ids = (
                np.array(file) if file.size == size else np.empty(file.size[::-1], dtype=int)
            )  # too large a one unread
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: cannot read these part labels ({error})") from None
    if ids.dtype.kind not in "iu" or ids.shape != size[::-1]:
        raise DatasetError(f"{path}: want whole numbers, {size[0]}x{size[1]}; got {ids.dtype}, shape {ids.shape}")
    return np.where(ids >= 100_000, ids % 100, 0)


def part_centroids(parts: np.ndarray, mask: np.ndarray) -> list[tuple[int, int, int]]:
    """(part, row, column) of the centroid of every 8-connected component of every part inside `mask` (H, W) bool."""
    try:
        from scipy import ndimage
    except ImportError:
        raise UserError("the metrics with part labels need scipy: pip install scipy") from None
    found = []
    inside = np.where(mask, parts, 0)
    for part in np.unique(inside[inside > 0]).tolist():
        components, count = ndimage.label(inside == part, structure=np.ones((3, 3)))
        centres = ndimage.center_of_mass(components > 0, components, range(1, count + 1))
        found += [(part, round(row), round(column)) for row, column in centres]
    return found


def part_hits(activations: Tensor, mask: Tensor, centroids: list[tuple[int, int, int]], grid: Grid) -> Tensor:
    """Which parts each prototype of a class looks at in an image: (K, MAX_PARTS) bool.

    activations (K, h, w) of the class's prototypes, mask (H, W) bool of its pixels. A prototype looks where its
    activation, upsampled to the nearest cell, exceeds its 0.8 quantile over the pixels of the class; a part is hit if
    one of its centroids lies there.
    """
    rows, columns = (
        grid.nearest(length, cells).to(mask.device)
        for length, cells in zip(mask.shape, activations.shape[1:], strict=True)
    )
    upsampled = activations[:, rows[:, None], columns]  # (K, H, W)
    values = upsampled[:, mask]
    rank = max(1, round(QUANTILE * values.shape[1]))
    looks = (upsampled > values.kthvalue(rank, dim=1).values[:, None, None]) & mask
    hits = torch.zeros(len(activations), MAX_PARTS, dtype=torch.bool, device=mask.device)
    for part, row, column in centroids:
        hits[:, part] |= looks[:, row, column]
    return hits


class PartMetrics:
    """Consistency and stability as ScaleProtoSeg measures them (analysis/metrics of its repository), after Huang et
    al., "Evaluation and Improvement of Interpretability for Self-Explainable Part-Prototype Networks" (ICCV 2023).

    Their helper that takes the quantile is not published; here it is that of the class's own pixels.
    """

    def __init__(self, prototype_class: Tensor, grid: Grid):
        self.prototype_class, self.grid = prototype_class, grid
        table = torch.zeros(len(prototype_class), MAX_PARTS, device=prototype_class.device)
        count = torch.zeros((), dtype=torch.int64)
        self.sums = {"hits": table, "images": table.clone(), "stable": count, "compared": count.clone()}

    def update(self, clean: Tensor, noisy: Tensor, labels: Tensor, parts: np.ndarray) -> None:
        """Add an image: activations (P, h, w) of it and of it with noise, labels (H, W), part ids (H, W)."""
        for class_index in labels.unique().tolist():
            members = (self.prototype_class == class_index).nonzero().flatten()
            mask = labels == class_index
            if class_index == IGNORE or not len(members):
                continue
            centroids = part_centroids(parts, mask.cpu().numpy())
            if not centroids:
                continue
            hits, noisy_hits = (part_hits(values[members], mask, centroids, self.grid) for values in (clean, noisy))
            present = sorted({part for part, _, _ in centroids})
            self.sums["hits"][members] += hits
            self.sums["images"][members[:, None], torch.tensor(present, device=members.device)] += 1
            self.sums["stable"] += int((hits == noisy_hits).all(dim=1).sum())
            self.sums["compared"] += len(members)

    def merge(self) -> None:
        """Add up what the processes of a run have seen; all of them have to call it."""
        for values in self.sums.values():
            distributed.all_reduce(values)

    def summary(self) -> dict | None:
        """None if no labelled part was seen, else

        consistency   share of the prototypes that hit one and the same part in more than 80 % of the images with it;
                      prototypes of classes without parts do not count
        stability     share of (prototype, image) that hit exactly the same parts under noise of 0.2 deviations
        """
        hits, images, stable, compared = self.sums.values()
        if not compared:
            return None
        seen = images.sum(1) > 0
        consistent = (hits / images.clamp(min=1) > CONSISTENT).any(dim=1)
        return {
            "consistency": float(consistent[seen].double().mean()),
            "consistent": consistent.nonzero().flatten().tolist(),
            "part_stability": int(stable) / int(compared),
        }
