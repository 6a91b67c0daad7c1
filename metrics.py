"""Segmentation metrics, all from one confusion matrix, and the interval of a difference between two models."""

from __future__ import annotations

import torch
from torch import Tensor

from grid import IGNORE


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

    def tallies(self) -> Tensor:
        """Pixels of each class that are right, that it has in truth, and that are predicted as it: (3, C) int64.

        All that the IoU needs, in a size in which it can be kept for every image.
        """
        return torch.stack((self.counts.diagonal(), self.counts.sum(1), self.counts.sum(0)))

    def iou(self) -> Tensor:
        """Intersection over union of each class, (C,) float64 in 0..1; NaN if neither truth nor prediction has it."""
        return iou_of_tallies(self.tallies())

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


def iou_of_tallies(tallies: Tensor) -> Tensor:
    """Intersection over union (..., C) float64 in 0..1 from `ConfusionMatrix.tallies` (..., 3, C); NaN as in `iou`."""
    right, truth, predicted = tallies.cpu().double().unbind(-2)
    return right / (truth + predicted - right)


def bootstrap_difference(first: Tensor, second: Tensor, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of mIoU(second) - mIoU(first) over which images happened to be in the data set.

    first, second: tallies (N, 3, C) of two models on the same N images. Paired percentile bootstrap: N images are
    drawn with replacement, the same for both models, and the mIoU of each draw comes from its summed tallies.
    Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    count = len(first)
    drawn = torch.randint(count, (samples, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(samples, count, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    mious = (
        iou_of_tallies((times @ tallies.double().flatten(1)).unflatten(1, tallies.shape[1:])).nanmean(-1)
        for tallies in (first, second)
    )
    low, high = (-torch.sub(*mious)).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _mean(values: Tensor) -> float:
    return float(values.nanmean().nan_to_num(0.0))
