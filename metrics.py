"""Segmentation metrics, all from one confusion matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from config import IGNORE


class ConfusionMatrix:
    """Counts of (true class, predicted class) over any number of images.

    `counts` (C, C) int64: rows are truth, columns predictions. It stays on its device until it is read, and matrices
    of parts of a data set add up to that of the whole, in any order.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Count classes predicted against labels, both integer of the same shape; labels of 255 do not count."""
        num_classes = len(self.counts)
        # What does not count goes into a bin of its own, which is cut off: no boolean indexing, no waiting for a GPU.
        pairs = torch.where(labels == IGNORE, num_classes**2, labels.long() * num_classes + predictions)
        self.counts += torch.bincount(pairs.flatten(), minlength=num_classes**2 + 1)[:-1].view_as(self.counts)

    def iou(self) -> Tensor:
        """Intersection over union of each class, (C,) float64 in 0..1; NaN if neither truth nor prediction has it."""
        counts = self.counts.double().cpu()
        hits = counts.diagonal()
        return hits / (counts.sum(0) + counts.sum(1) - hits)

    def accuracy(self) -> Tensor:
        """Share of each class's pixels that are found, (C,) float64 in 0..1; NaN where the truth lacks the class."""
        counts = self.counts.double().cpu()
        return counts.diagonal() / counts.sum(1)

    def summary(self) -> dict[str, float]:
        """miou, mean_accuracy and pixel_accuracy in 0..1; classes that are NaN above are left out of the means.

        Without any counted pixel all three are 0.
        """
        counts = self.counts.double().cpu()
        return {
            "miou": _mean(self.iou()),
            "mean_accuracy": _mean(self.accuracy()),
            "pixel_accuracy": float(counts.diagonal().sum() / counts.sum().clamp(min=1)),
        }


def _mean(values: Tensor) -> float:
    return float(values.nanmean().nan_to_num(0.0))
