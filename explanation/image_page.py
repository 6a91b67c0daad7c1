"""The page of an image: its prediction, and of every pixel the scores and the prototypes they are made of.

C classes, P prototypes, (h, w) feature grid, (H, W) image, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from datasets.base import DatasetError, normalize
from explanation.figure import explained_figure
from explanation.gallery import Subject, deciding_prototypes
from explanation.pages import render, write_page
from explanation.pictures import fit, overlay, slug
from explanation.pixel_data import pack
from grid import IGNORE
from model import PPNetOutput
from runtime.files import Successor

MAX_PHOTOGRAPH = 1024 * 2048  # pixels; larger ones are made smaller, so that a page stays below 3 MB
MAX_SIDE = 32_767  # pixels; no browser draws over a longer picture
TWIN = (
    "This checkpoint is the black-box twin (model.head: linear). It has no prototypes to show: its scores are what it"
    " predicts, and nothing tells what they are made of."
)


class Item(NamedTuple):
    """An image to be explained: its number in the report, its name, and what reads it: RGB image, label L or None."""

    number: int
    name: str
    read: Callable[[], tuple[Image.Image, Image.Image | None]]


class Explained(NamedTuple):
    """An image with what the model says of it: its output, and the predicted and true class of every pixel (H, W)."""

    image: Image.Image
    output: PPNetOutput
    prediction: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Entry:
    """An image in the index: its name, the files of page, preview and figure; accuracy None where nothing is known."""

    name: str
    page: str
    preview: str
    figure: str | None
    accuracy: float | None


def write_image(subject: Subject, item: Item, out: Successor, faces: list[dict], png: bool) -> Entry:
    """Write the page of an image, and its PNG if that is asked for.

    faces: of every prototype its class `index`, `source` in words and `picture`, "" if there is none; empty for the
    twin. Raises DatasetError for an image that cannot be read or shown.
    """
    image, label, notes = read(item)
    notes += subject.scales_note if faces else [TWIN]
    explained = explain_image(subject, image, label)
    legend = legend_of(subject, explained.prediction)
    name = f"{item.number:03d}-{slug(Path(item.name).stem, 'image')}"
    known = explained.truth != IGNORE
    entry = Entry(
        name=item.name,
        page=f"{name}.html",
        preview=f"photographs/{name}-small.jpg",
        figure=f"{name}.png" if png else None,
        accuracy=float((explained.prediction == explained.truth)[known].mean()) if known.any() else None,
    )
    photograph = save_pictures(subject, explained, entry, legend, faces, out)
    width, height = image.size
    page = render(
        "image.html", subject.mapping.palette, data=page_data(subject, explained, faces), ratio=width / height,
        entry=entry, photograph=photograph, width=width, height=height, legend=legend, notes=notes,
        stride=subject.inference.grid.stride,
    )  # fmt: skip
    write_page(out.add(entry.page), page)
    return entry


def read(item: Item) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """An image, made smaller if it is a large photograph, its label, and what the page has to say of that."""
    image, label = item.read()
    width, height = image.size
    shrink = min(1.0, math.sqrt(MAX_PHOTOGRAPH / (width * height)), MAX_SIDE / max(image.size))
    if label is None and shrink < 1:
        image = image.resize([max(1, int(length * shrink)) for length in image.size], Image.Resampling.LANCZOS)
        return image, label, [f"The photograph has {width} × {height} pixels; it was made smaller to be predicted."]
    if max(image.size) > MAX_SIDE:
        raise DatasetError(f"{item.name}: {width}x{height} pixels; a page shows at most {MAX_SIDE:,} in a row")
    return image, label, []


@torch.no_grad()
def explain_image(subject: Subject, image: Image.Image, label: Image.Image | None) -> Explained:
    """What the model says of an image, and what is true, 255 where nobody knows."""
    output = subject.inference.output(normalize(image)[None])
    classes = subject.inference.upsample(output.logits, (image.height, image.width))[0].argmax(0)
    prediction = classes.to(torch.uint8).cpu().numpy()
    truth = np.full_like(prediction, IGNORE) if label is None else np.array(label)
    return Explained(image, output, prediction, truth)


def legend_of(subject: Subject, prediction: np.ndarray) -> list[dict]:
    """The predicted classes, the largest first, with their shares of the pixels."""
    shares = np.bincount(prediction.ravel(), minlength=len(subject.mapping.names)) / prediction.size
    order = [c for c in np.argsort(-shares, kind="stable").tolist() if shares[c] > 0]
    names, palette = subject.mapping.names, subject.mapping.palette
    return [{"index": c, "name": names[c], "color": palette[c], "share": float(shares[c])} for c in order]


def save_pictures(
    subject: Subject, explained: Explained, entry: Entry, legend: list[dict], faces: list[dict], out: Successor
) -> str:
    """Write preview, figure and photograph; returns the name of the last."""
    painted = overlay(explained.image, explained.prediction, subject.mapping.palette)
    fit(painted, 180).save(out.add(entry.preview), quality=85)
    if entry.figure:
        rows = figure_rows(subject, explained, legend, faces, out.path) if faces else legend
        explained_figure(explained.image, painted, rows).save(out.add(entry.figure))
    photograph = entry.preview.replace("-small.jpg", ".jpg")
    explained.image.save(out.add(photograph), quality=88)
    return photograph


def figure_rows(
    subject: Subject, explained: Explained, legend: list[dict], faces: list[dict], folder: Path
) -> list[dict]:
    """The legend with, for each class, the prototypes that decide most of its cells, at most 3; see the figure."""
    model, output = subject.model, explained.output
    winners, classes = deciding_prototypes(model, output, explained.image.size)
    distances = output.distances[0, :, : len(winners), : winners.shape[1]]  # type: ignore[index]  # of a PPNet
    similarity = model.activations(distances)
    rows = []
    for entry in legend:
        of_class = classes == entry["index"]
        counts = torch.bincount(winners[of_class], minlength=len(faces))
        prototypes = []
        for p in counts.argsort(descending=True, stable=True)[:3].tolist():
            if counts[p]:
                best = int(similarity[p].masked_fill((winners != p) | ~of_class, -torch.inf).argmax())
                row, column = divmod(best, winners.shape[1])
                prototypes.append({
                    "prototype": p,
                    "picture": _opened(folder / faces[p]["picture"]) if faces[p]["picture"] else None,
                    "share": int(counts[p]) / int(of_class.sum()),
                    "at": (model.grid.pixel(column), model.grid.pixel(row)),
                })  # fmt: skip
        rows.append(entry | {"prototypes": prototypes})
    return rows


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def page_data(subject: Subject, explained: Explained, faces: list[dict]) -> dict:
    """What the page's script is given."""
    weights = subject.model.last_layer.weight.tolist() if faces else []
    return pack(subject.model, explained.output, explained.prediction, explained.truth) | {
        "classes": subject.mapping.names,
        "palette": subject.mapping.palette,
        "prototypes": faces,
        "weights": [[float(f"{weight:.8g}") for weight in row] for row in weights],
    }
