"""What a page knows of every pixel of an image, small enough to be mailed: its scores, and what they are made of.

C classes, P prototypes, (h, w) feature grid, (H, W) image, as everywhere.

The encoding (undone by `templates/image.js`). Upsampling is linear: a pixel's score is a weighted mean of its class's
scores in the four cells around it, and a prototype's activation likewise, so cells are all that a page needs, and the
`stride` and `offset` of the grid.

Scores (C, h, w) are kept for every class. The activations of all P prototypes would be 25 MB for 1024x2048 pixels; so
where they do not fit into what the scores leave of MAX_BYTES, the grid is cut into tiles of TILE x TILE squares (a
square lies between four cells; the cells of an edge belong to both tiles), and a tile keeps only some prototypes: each
that adds most to the predicted class at any of its pixels, and then those that add or take most. What the others add
up to is the score minus what is kept, so nothing is lost but their names.

Numbers are rounded to a step: 8e-4 for scores, that over the largest weight for activations, so that contributions,
too, are within 4e-4 of the model's. They are kept as differences from a guess, the median of left neighbour, upper
neighbour, and left + upper - upper left (0 beyond the grid), signs folded in (0, -1, 1, -2 ...), first the lowest
bytes of all numbers, then the second, third and fourth. Labels are a byte each, as differences from the row above.
`scores` are scores, predicted and true labels, `activations` those of the tiles row by row; each zlib in base64.
"""

from __future__ import annotations

import base64
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import PPNet, PPNetOutput, SegmentationNet

SCORE_STEP = 8e-4
MAX_BYTES = 1_600_000  # before base64 makes 4 of 3; the photograph comes on top, and all is to stay below 3 MB
BYTES_PER_VALUE = 1.25  # that an activation takes, and a little more than was measured
TILE = 16


class Tile(NamedTuple):
    """A part of the grid: its cells (slices of rows and columns), and the prototypes that are kept there."""

    rows: slice
    columns: slice
    prototypes: list[int]


@torch.no_grad()
def choose_tiles(model: PPNet, distances: Tensor, values: int) -> tuple[int, list[Tile]]:
    """The tiles of a grid, row by row, and their side in squares; distances (P, h, w).

    One tile with all prototypes where they are at most `values` activations; else about that many in all.
    """
    count, height, width = distances.shape
    keep = values // (height * width)
    if keep >= count:
        return max(height, width), [Tile(slice(0, height), slice(0, width), list(range(count)))]
    tiles = []
    for top in range(0, max(1, height - 1), TILE):
        for left in range(0, max(1, width - 1), TILE):
            rows, columns = slice(top, top + TILE + 1), slice(left, left + TILE + 1)
            kept = strongest_prototypes(model, distances[:, rows, columns], keep)
            tiles.append(Tile(rows, columns, kept))
    return TILE, tiles


def strongest_prototypes(model: PPNet, distances: Tensor, keep: int) -> list[int]:
    """At least `keep` prototypes of those that matter in a tile, distances (P, h, w); see the encoding.

    Among them is, for every pixel, the one that adds most to the class that is predicted there.
    """
    contributions = model.contributions(distances[None])[0]  # (C, P, h, w)
    size = [model.grid.length(cells) for cells in distances.shape[1:]]
    predicted = model.grid.upsample(contributions.sum(1)[None], size)[0].argmax(0)
    strength = torch.zeros(len(distances), device=distances.device)
    kept = []
    for c in predicted.unique():
        strength = torch.maximum(strength, contributions[c].abs().amax((1, 2)))
        least, most = contributions[c].flatten(1).aminmax(dim=1)
        able = (most >= least.max()).nonzero().flatten()  # the others are below one that is never lower
        strongest = able[model.grid.upsample(contributions[c, able][None], size)[0].argmax(0)]
        kept.append(strongest[predicted == c].unique())
    needed = torch.cat(kept).unique()
    strength[needed] = torch.inf
    return sorted(strength.argsort(descending=True, stable=True)[: max(keep, len(needed))].tolist())


@torch.no_grad()
def pack(
    model: SegmentationNet, output: PPNetOutput, prediction: np.ndarray, truth: np.ndarray, limit: int = MAX_BYTES
) -> dict:
    """The data of a page as plain values; see the encoding.

    output: of `forward` for one padded image; prediction, truth: classes (H, W) uint8, 255 where there is none.
    """
    scores = output.logits[0].double().cpu().numpy()
    labels = [np.diff(part, axis=0, prepend=np.uint8(0)).tobytes() for part in (prediction, truth)]
    packed = zlib.compress(b"".join([_folded([_integers(scores, SCORE_STEP)]), *labels]), 9)
    data = {
        "width": prediction.shape[1],
        "height": prediction.shape[0],
        "grid": list(scores.shape[1:]),
        "stride": model.grid.stride,
        "offset": model.grid.offset,
        "scoreStep": SCORE_STEP,
        "scores": base64.b64encode(packed).decode(),
    }
    if output.distances is None or not isinstance(model, PPNet):
        return data | {"tileSide": 1, "tiles": [], "activationSteps": [], "activations": ""}
    distances = output.distances[0]
    values = int(max(0, limit - len(packed)) / BYTES_PER_VALUE)
    side, tiles = choose_tiles(model, distances, values)
    activations = model.activations(distances).double().cpu().numpy()
    steps = SCORE_STEP / model.last_layer.weight.abs().amax(0).clamp(min=1).double().cpu().numpy()
    parts = [
        _integers(activations[tile.prototypes, tile.rows, tile.columns], steps[tile.prototypes, None, None])
        for tile in tiles
    ]
    return data | {
        "tileSide": side,
        "tiles": [tile.prototypes for tile in tiles],
        "activationSteps": steps.tolist(),
        "activations": base64.b64encode(zlib.compress(_folded(parts), 9)).decode(),
    }


def _integers(values: np.ndarray, step) -> np.ndarray:
    return np.rint(values / step).astype(np.int64)


def _folded(parts: list[np.ndarray]) -> bytes:
    """Integers, each part (n, h, w), as the bytes of what they differ from their guesses."""
    folded = []
    for values in parts:
        padded = np.pad(values, ((0, 0), (1, 0), (1, 0)))
        left, above, corner = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
        rest = values - np.clip(left + above - corner, np.minimum(left, above), np.maximum(left, above))
        folded.append(np.where(rest < 0, -2 * rest - 1, 2 * rest).astype(np.uint32).ravel())
    return b"".join((np.concatenate(folded) >> shift).astype(np.uint8).tobytes() for shift in (0, 8, 16, 24))
