"""Labelling an image in other ways than at once: in overlapping windows, averaged over scales and flips."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grid import Grid
from inference import Inference
from runtime import distributed
from runtime.command import stop_flag

TTA_SCALES = (0.75, 1.0, 1.25)


class View(NamedTuple):
    """How an image is looked at: averaged over scales and flips, in windows of so many pixels, or neither."""

    tta: bool = False
    window: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the image is looked at as a whole, once."""
        return not self.tta and self.window is None


def sliding_logits(classify: Callable[[Tensor], Tensor], images: Tensor, window: int, grid: Grid) -> Tensor:
    """Logits (1, C, h, w) on the grid of padded images (1, 3, H, W): the weighted mean over overlapping windows.

    classify: images to logits on their grid. window: pixels, such as the grid pads to; windows overlap by at least
    half, begin on grid cells, so that their cells coincide, and the last one of a row or column ends with the image.
    A cell's weight falls linearly towards the window's border, where it sees less of what is around it.
    """
    counts = [grid.cells(length) for length in images.shape[-2:]]
    sizes = [min(grid.cells(window), count) for count in counts]
    hats = [_hat(size, images.device) for size in sizes]
    weight = hats[0][:, None] * hats[1]
    tops, lefts = (_starts(count, size) for count, size in zip(counts, sizes, strict=True))
    total = seen = torch.zeros((), device=images.device)
    for top in tops:
        for left in lefts:
            if distributed.world_size() == 1:
                stop_flag.raise_if_set()
            rows, columns = grid.window(top, sizes[0]), grid.window(left, sizes[1])
            logits = classify(images[..., rows, columns])
            around = [left, counts[1] - left - sizes[1], top, counts[0] - top - sizes[0]]
            total = total + F.pad(logits * weight, around)
            seen = seen + F.pad(weight, around)
    return total / seen


def _hat(cells: int, device: torch.device) -> Tensor:
    index = torch.arange(cells, device=device)
    return torch.minimum(index + 1, cells - index).float()


def _starts(count: int, size: int) -> list[int]:
    """The first cells of windows of `size` cells over `count`."""
    step = max(1, (size - 1) // 2)
    return sorted({*range(0, count - size, step), count - size})


def tta_logits(classify: Callable[[Tensor], Tensor], images: Tensor, grid: Grid) -> Tensor:
    """Mean probabilities (1, C, H, W) over scales and horizontal flips of padded images (1, 3, H, W)."""
    total = torch.zeros((), device=images.device)
    for scale in TTA_SCALES:
        scaled = grid.upsample(images, [grid.scaled(length, scale) for length in images.shape[-2:]])
        for flipped in (False, True):
            logits = classify(scaled.flip(3)).flip(3) if flipped else classify(scaled)
            total = total + grid.upsample(logits.float().softmax(1), images.shape[-2:])
    return total / (2 * len(TTA_SCALES))


def label_image(inference: Inference, image: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    """Classes (1, H, W) of an image (1, 3, H, W), and its distances (1, P, h, w) if it was seen as a whole."""
    grid, size = inference.grid, image.shape[-2:]
    if view.is_plain:
        output = inference.output(image)
        return inference.classes(output.logits, size), output.distances

    def classify(images: Tensor) -> Tensor:
        return inference.output(images).logits

    def classify_windows(images: Tensor) -> Tensor:
        return sliding_logits(classify, images, view.window or 0, grid)

    padded = grid.pad(image, 0.0)
    way = classify_windows if view.window else classify
    if not view.tta:
        return inference.classes(way(padded), size), None
    return tta_logits(way, padded, grid)[..., : size[0], : size[1]].argmax(1), None
