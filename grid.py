"""Which pixel a feature cell looks at: the only place with stride arithmetic.

Two kinds of features are known. Convolutions that pad symmetrically look, with cell i, at pixel s i: a side of
s k + 1 pixels has k + 1 cells, the first on its first pixel and the last on its last. Patch embeddings (ViT, Swin,
ConvNeXt) cut a side of s k pixels into k cells, whose centres lie between pixels, at s i + (s - 1) / 2.
B images, C channels, (h, w) cells, (H, W) pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255  # the label of a pixel that counts nowhere: not in the losses, not in the metrics, not in the push


@dataclass(frozen=True)
class Grid:
    """Cell i of a side is centred on pixel stride * i + offset.

    stride: pixels from cell to cell. offset: 0 (convolutions) or (stride - 1) / 2 (patches). Raises ValueError for
    another one: then no resizing keeps cells and pixels together.
    """

    stride: int = 8
    offset: float = 0.0

    def __post_init__(self):
        if self.stride < 1 or self.offset not in (0, (self.stride - 1) / 2):
            raise ValueError(f"{self}: want a stride of at least 1 and an offset of 0 or {(self.stride - 1) / 2:g}")

    # --- sides: pixels and cells along one of them ---

    def cells(self, length: int) -> int:
        """How many cells a side of `length` pixels has, once it is padded."""
        return max(0, -((self._rest - length) // self.stride)) + 1

    def length(self, cells: int) -> int:
        """How many pixels a padded side of so many cells has."""
        return self.stride * (cells - 1) + self._rest

    def fits(self, length: int) -> bool:
        """Whether a side needs no padding."""
        return self.length(self.cells(length)) == length

    def scaled(self, length: int, scale: float) -> int:
        """How long a side becomes at an input scale: whole cells again, at least two (one of patches)."""
        least = 1 if self.offset == 0 else 0
        return max(least, round((length - self._rest) * scale / self.stride)) * self.stride + self._rest

    def pixel(self, cell: int) -> int:
        """The pixel that a cell looks at; of two equally near ones the later."""
        return int(self.stride * cell + self.offset + 0.5)

    def cell(self, pixel: float) -> float:
        """Where a place in pixels lies among the cells: the inverse of stride * i + offset."""
        return (pixel - self.offset) / self.stride

    def steps(self, pixels: int) -> int:
        """How many cells a distance is, at least 1."""
        return max(1, round(pixels / self.stride))

    def visible(self, length: int) -> int:
        """How many cells look at a pixel of a side of `length` pixels, not at its padding."""
        return max(0, -((self.pixel(0) - length) // self.stride))

    def window(self, first: int, cells: int) -> slice:
        """The pixels of a padded side whose own grid is the cells first..first + cells - 1."""
        start = self.stride * first
        return slice(start, start + self.length(cells))

    def nearest(self, length: int, cells: int) -> Tensor:
        """For each pixel of a side the cell that looks nearest to it, (length,) int64 in 0..cells-1."""
        places = (torch.arange(length, dtype=torch.float64) - self.offset) / self.stride
        return (places + 0.5).floor().long().clamp(0, cells - 1)

    def box(self, first: int, last: int, length: int) -> tuple[int, int]:
        """The pixels [start, end) of the cells first..last: half a stride around each, inside a side of `length`."""
        half = self.stride // 2
        return max(0, self.pixel(first) - half), min(length, self.pixel(last) + half)

    # --- tensors ---

    def pad(self, values: Tensor, fill: float) -> Tensor:
        """Pad (..., H, W) at the bottom and right, so that a cell ends each side."""
        height, width = (self.length(self.cells(length)) - length for length in values.shape[-2:])
        return F.pad(values, (0, width, 0, height), value=fill)

    def upsample(self, values: Tensor, size: tuple[int, int] | list[int] | torch.Size) -> Tensor:
        """Bilinear, in the geometry of this grid: (B, C, h, w) of cells to (B, C, H, W) of their padded pixels.

        Also from pixels to those of another scale, and from the grid of one scale to that of another.
        """
        return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=self.offset == 0)

    def labels(self, labels: Tensor, cells: tuple[int, int] | torch.Size) -> Tensor:
        """The label of every cell, read at the pixel that it looks at: (B, H, W) -> (B, h, w).

        cells: (h, w). Where they are the grid of these pixels this reads every stride-th one; the cells of a resized
        image read the nearest pixel of the same place.
        """
        padded = self.pad(labels, IGNORE)
        rows, columns = (
            self._places(length, count, labels.device) for length, count in zip(padded.shape[-2:], cells, strict=True)
        )
        return padded[:, rows[:, None], columns]

    def _places(self, length: int, cells: int, device: torch.device) -> Tensor:
        """The pixels that so many cells look at, when they share a padded side: (cells,) int64."""
        if self.offset == 0:
            return torch.linspace(0, length - 1, cells, device=device, dtype=torch.float64).round().long()
        return ((torch.arange(cells, device=device, dtype=torch.float64) + 0.5) * length / cells).floor().long()

    @property
    def _rest(self) -> int:
        """What a side has beyond a whole number of strides: 1 pixel, or a whole patch."""
        return int(2 * self.offset) + 1


def grid_of(features: object) -> Grid:
    """The grid of a feature module: its `grid`, or one of its `output_stride`, 8 if it has neither."""
    return getattr(features, "grid", None) or Grid(getattr(features, "output_stride", 8))
