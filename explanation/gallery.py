"""The gallery: a card for every prototype, in three passes: all is measured, then drawn, then put into words.

C classes, P prototypes, (h, w) feature grid, (H, W) image, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import Config
from datasets.base import ClassMapping, SegmentationDataset
from datasets.batches import eval_batches
from explanation.pictures import around, draw_box, fit, heat, slug
from explanation.prototype_pictures import patch_box, similarity_map
from grid import Grid
from inference import Inference
from model import PPNet, PPNetOutput
from push import Neighbours, find_neighbours
from runtime.command import each
from runtime.files import Successor

NEIGHBOURS = 6
SIDE = 48  # pixels of a neighbour's picture, where there is none of the prototype itself
NOT_PROJECTED = "not projected yet: the nearest patch"
NEVER = "not projected: class never in training"
OTHER_SIZE = "no picture: the image here has another size than when it was pushed"


class Subject(NamedTuple):
    """What is explained: how the model labels, its configuration and classes; the training set and val set, or None."""

    inference: Inference
    config: Config
    mapping: ClassMapping
    train_set: SegmentationDataset | None
    val_set: SegmentationDataset | None

    @property
    def model(self):
        """The network."""
        return self.inference.model

    @property
    def scales_note(self) -> list[str]:
        """What a page says of a model with several input scales, a sentence or nothing."""
        scales = self.config.model.msc_scales
        if not scales or self.inference.scales:
            return []
        listed = ", ".join(f"{scale:g}" for scale in scales)
        return [f"The model predicts at several scales (1, {listed}); explained is its prediction at scale 1 alone."]


class Place(NamedTuple):
    """A cell of a training image: the image's id, [row, column], and the pixel that it looks at.

    image_index: of the image in the training set that is here, None if it is not there. size: (width, height) that the
    image had at the push, None if nobody knows. class_index: what the cell is labelled as.
    """

    image: str
    cell: list[int]
    x: int
    y: int
    class_index: int
    image_index: int | None
    size: tuple[int, int] | None = None


class Measured(NamedTuple):
    """What is known of a prototype before anything is drawn.

    record: of the push, or None. source: the patch that it is, else the one nearest to it, else None. nearest: the
    training patches that are most similar, the first the most. decided: at how many cells it decides, and `share` of
    all cells; None where nobody counted. copy_of: the first prototype with the very same vector, None if that is
    itself. least: the class whose weight is the lowest.
    """

    prototype: int
    class_index: int
    record: dict | None
    source: Place | None
    nearest: list[Place]
    decided: int | None
    share: float
    copy_of: int | None
    own_weight: float
    least: int
    least_weight: float


class Drawn(NamedTuple):
    """The pictures of a prototype as names below the report: empty where there is none, and then perhaps `problem`."""

    patch: str = ""
    place: str = ""
    heat: str = ""
    side: int = SIDE  # pixels of the image that the patch shows
    problem: str = ""
    nearest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Neighbour:
    """A nearest patch as the card shows it."""

    picture: str
    at: Place
    class_name: str
    is_own: bool


@dataclass(frozen=True)
class Card:
    """What the gallery tells of a prototype, as `index.html` shows it.

    negative: class and weight of the most negative connection, None if none is. decided: cells, None if nobody
    counted; decided_share: of all cells, as text.
    """

    index: int
    class_index: int
    marks: list[str]
    source: Place | None
    own_weight: float
    negative: tuple[int, str, float] | None
    decided: int | None
    decided_share: str
    patch: str
    place: str
    heat: str
    neighbours: list[Neighbour]

    @property
    def pure(self) -> int:
        """How many of the nearest patches have the prototype's class."""
        return sum(neighbour.is_own for neighbour in self.neighbours)

    @property
    def face(self) -> dict:
        """What the page of an image shows of the prototype."""
        source = f"{self.source.image}, x {self.source.x}, y {self.source.y}" if self.source else ""
        return {"index": self.class_index, "source": source, "picture": self.patch}


def describe_prototypes(subject: Subject, records: list[dict], out: Successor) -> list[Card]:
    """The cards of all prototypes, their pictures written.

    records: of the push, one per prototype, or none at all: then the nearest training patch stands for a prototype.
    """
    measured = measure(subject, records)
    drawn = [draw(subject, one, out) for one in each(measured, "gallery", "prototype")]
    return [word(subject, *both) for both in zip(measured, drawn, strict=True)]


# --- measured --------------------------------------------------------------------------------------------------


@torch.no_grad()
def deciding_prototypes(model: PPNet, output: PPNetOutput, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """At each cell the prototype that adds most to the predicted class, and that class: two of (rows, columns).

    size: (width, height) of the image; cells that look at the padding are left out.
    """
    columns, rows = (model.grid.visible(length) for length in size)
    logits = output.logits[:, :, :rows, :columns]
    distances = output.distances[:, :, :rows, :columns]  # type: ignore[index]  # a PPNet's are there
    classes = logits.argmax(1)
    return model.contributions_to(distances, classes).argmax(1)[0], classes[0]


@torch.no_grad()
def count_decided(inference: Inference, dataset: SegmentationDataset, num_workers: int = 0) -> Tensor:
    """The number of a data set's cells that each prototype decides (see `deciding_prototypes`), (P,) on the CPU."""
    model = inference.ppnet
    counts = torch.zeros(len(model.prototype_class), dtype=torch.int64, device=inference.device)
    for image, _ in each(eval_batches(dataset, num_workers), "deciding", "image", len(dataset)):
        output = inference.output(image)
        winners, _ = deciding_prototypes(model, output, (image.shape[3], image.shape[2]))
        counts += torch.bincount(winners.flatten(), minlength=len(counts))
    return counts.cpu()


@torch.no_grad()
def measure(subject: Subject, records: list[dict]) -> list[Measured]:
    """What is known of every prototype, by one pass over the val set and one over the training set."""
    model, inference, workers = subject.model, subject.inference, subject.config.system.num_workers
    train, val = subject.train_set, subject.val_set
    classes = model.prototype_class.tolist()
    decided = count_decided(inference, val, workers).tolist() if val else None
    nearest: list[list[Place]] = [[] for _ in classes]
    if train:
        near = find_neighbours(inference, train, NEIGHBOURS, num_workers=workers)
        nearest = _places(train, inference.grid, near)
    index_of = {train.image_id(i): i for i in range(len(train))} if train else {}
    copy_of = _copies(model.prototype_vectors.flatten(1))
    weights = model.last_layer.weight.cpu()
    least = weights.argmin(0).tolist()
    found = []
    for p, own in enumerate(classes):
        record = records[p] if len(records) == len(classes) else None
        found.append(Measured(
            p, own, record, _source(record, nearest[p], index_of), nearest[p],
            decided[p] if decided else None, decided[p] / max(1, sum(decided)) if decided else 0.0, copy_of[p],
            float(weights[own, p]), least[p], float(weights[least[p], p]),
        ))  # fmt: skip
    return found


def _places(train: SegmentationDataset, grid: Grid, near: Neighbours) -> list[list[Place]]:
    """The nearest patches of every prototype; fewer where the training set has fewer images."""
    return [
        [
            Place(train.image_id(index), [row, column], grid.pixel(column), grid.pixel(row), label, index)
            for index, (row, column), label in zip(*columns, strict=True)
            if index >= 0
        ]
        for columns in zip(near.image.tolist(), near.cell.tolist(), near.label.tolist(), strict=True)
    ]


def _source(record: dict | None, nearest: list[Place], index_of: dict[str, int]) -> Place | None:
    """Where a prototype comes from: the patch it was projected onto, else the training patch nearest to it."""
    if record is None or record["image"] is None:
        return nearest[0] if nearest else None
    (x, y), size = record["pixel"], record.get("image_size")
    index = index_of.get(record["image"])
    return Place(record["image"], record["cell"], x, y, record["class"], index, tuple(size) if size else None)


def _copies(vectors: Tensor) -> list[int | None]:
    """For each prototype the first one with the very same vector, None if that is itself."""
    first: dict[tuple, int] = {}
    found = [first.setdefault(tuple(vector), p) for p, vector in enumerate(vectors.tolist())]
    return [original if original != p else None for p, original in enumerate(found)]


# --- drawn -----------------------------------------------------------------------------------------------------


def draw(subject: Subject, one: Measured, out: Successor) -> Drawn:
    """Write the pictures of a prototype: its patch, its place, its activation there, and its neighbours, as large."""
    name = f"patches/{one.prototype:03d}-{slug(subject.mapping.names[one.class_index])}"
    drawn = _draw_source(subject, one, out, name)
    pictures = []
    for i, place in enumerate(one.nearest):
        image, _ = subject.train_set.read(place.image_index)  # type: ignore[union-attr, arg-type]  # it is from there
        patch = image.crop(around([place.x, place.y, place.x, place.y], image.size, drawn.side))
        pictures.append(_save(patch, 80, out, f"{name}-near-{i + 1}.jpg"))
    return drawn._replace(nearest=tuple(pictures))


def _draw_source(subject: Subject, one: Measured, out: Successor, name: str) -> Drawn:
    """The pictures of a prototype's source; none without its image, or if that is not what was pushed."""
    if subject.train_set is None or one.source is None or one.source.image_index is None:
        return Drawn()
    image, _ = subject.train_set.read(one.source.image_index)
    activation, share = similarity_map(subject.inference, image, one.prototype)
    (row, column), (height, width) = one.source.cell, activation.shape
    if one.source.size not in (None, image.size) or row >= height or column >= width:
        return Drawn(problem=OTHER_SIZE)
    box = patch_box(activation, one.source.cell, image.size, subject.inference.grid)
    window = around(box, image.size)
    low, high = np.quantile(share, (0.5, 0.99))  # one cell alone is equal to the prototype: the scale is not its
    share = (share - low) / max(high - low, 1e-6)
    return Drawn(
        patch=_save(image.crop(window), 112, out, f"{name}-patch.jpg"),
        place=_save(draw_box(image, box), 220, out, f"{name}-place.jpg"),
        heat=_save(draw_box(heat(image, share), box), 220, out, f"{name}-heat.jpg"),
        side=window[2] - window[0],
    )


def _save(image: Image.Image, height: int, out: Successor, name: str) -> str:
    fit(image, height).save(out.add(name), quality=85)
    return name


# --- put into words --------------------------------------------------------------------------------------------


def word(subject: Subject, one: Measured, drawn: Drawn) -> Card:
    """The card of a prototype."""
    names = subject.mapping.names
    neighbours = [
        Neighbour(picture, at, names[at.class_index], is_own=at.class_index == one.class_index)
        for picture, at in zip(drawn.nearest, one.nearest, strict=True)
    ]
    return Card(
        index=one.prototype,
        class_index=one.class_index,
        marks=_marks(one, drawn),
        source=one.source,
        own_weight=one.own_weight,
        negative=(one.least, names[one.least], one.least_weight) if one.least_weight < 0 else None,
        decided=one.decided,
        decided_share=f"{100 * one.share:.2f} %",
        patch=drawn.patch,
        place=drawn.place,
        heat=drawn.heat,
        neighbours=neighbours,
    )


def _marks(one: Measured, drawn: Drawn) -> list[str]:
    """What is remarkable about a prototype."""
    record = one.record
    marks = [drawn.problem] if drawn.problem else []
    if record is None or record["image"] is None:
        marks.append(NOT_PROJECTED if record is None else NEVER)
    if record is not None and len(record["merged"]) > 1:
        marks.append(f"stands for {len(record['merged'])} that became this patch")
    if one.copy_of is not None:
        marks.append(f"duplicate of {one.copy_of}")
    if one.decided == 0:
        marks.append("never decides")
    return marks
