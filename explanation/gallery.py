"""The gallery: what a page tells of every prototype, with the pictures that it shows.

C classes, P prototypes, (h, w) feature grid, (H, W) image, as everywhere.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import Config
from dataset import ClassMapping, SegmentationDataset, eval_batches
from explanation.pictures import around, draw_box, fit, heat, similarity_map, slug
from model import PPNet, PPNetOutput, SegmentationNet, pad_to_grid
from push import find_neighbours, patch_box
from runtime.command import stop_flag

NEIGHBOURS = 6


class Subject(NamedTuple):
    """What is explained: the model, its configuration and classes; and the training set and val set, or None."""

    model: SegmentationNet
    config: Config
    mapping: ClassMapping
    device: torch.device
    train_set: SegmentationDataset | None
    val_set: SegmentationDataset | None

    @property
    def scales_note(self) -> list[str]:
        """What a page says of a model with several input scales, a sentence or nothing."""
        scales = self.config.model.msc_scales
        if not scales:
            return []
        listed = ", ".join(f"{scale:g}" for scale in scales)
        return [f"The model predicts at several scales (1, {listed}); explained is its prediction at scale 1 alone."]


@torch.no_grad()
def deciding_prototypes(model: PPNet, output: PPNetOutput, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """At each cell the prototype that adds most to the predicted class, and that class: two of (rows, columns).

    size: (width, height) of the image; cells that look at the padding are left out.
    """
    columns, rows = (math.ceil(length / model.output_stride) for length in size)
    logits, distances = output.logits[:, :, :rows, :columns], output.distances[:, :, :rows, :columns]
    classes = logits.argmax(1)
    return model.contributions(distances, classes).argmax(1)[0], classes[0]


@torch.no_grad()
def count_decided(model: PPNet, dataset: SegmentationDataset, device: torch.device, num_workers: int = 0) -> Tensor:
    """The number of a data set's cells that each prototype decides (see `deciding_prototypes`), (P,) on the CPU."""
    counts = torch.zeros(len(model.prototype_class), dtype=torch.int64, device=device)
    batches = eval_batches(dataset, num_workers)
    for image, _ in tqdm(batches, desc="deciding", total=len(dataset), unit="image", leave=False, disable=None):
        stop_flag.raise_if_set()
        output = model(pad_to_grid(image.to(device), 0.0, model.output_stride))
        winners, _ = deciding_prototypes(model, output, (image.shape[3], image.shape[2]))
        counts += torch.bincount(winners.flatten(), minlength=len(counts))
    return counts.cpu()


def describe_prototypes(subject: Subject, records: list[dict], out: Path) -> list[dict]:
    """What the gallery tells of every prototype, its pictures written: see the template `index.html`.

    records: of the push, one per prototype, or none at all: then the nearest training patch stands for a prototype.
    """
    model, device, workers = subject.model, subject.device, subject.config.system.num_workers
    count = len(model.prototype_class)
    records = records if len(records) == count else [None] * count
    train, val = subject.train_set, subject.val_set
    decided = count_decided(model, val, device, workers) if val else None
    near = find_neighbours(model, train, device, NEIGHBOURS, workers) if train else None
    index_of = {train.image_id(i): i for i in range(len(train))} if train else {}
    twins = _copies(model.prototype_vectors.detach().flatten(1).cpu())
    described = []
    for p in tqdm(range(count), desc="gallery", unit="prototype", leave=False, disable=None):
        stop_flag.raise_if_set()
        record = records[p]
        one = {"index": p, "decided": None, "neighbours": []} | _weights_of(subject, p)
        one |= _source(record, [x[p] for x in near] if near else None, train, model.output_stride)
        if record is not None and len(record["merged"]) > 1:
            one["marks"].append(f"stands for {len(record['merged'])} that became this patch")
        if twins[p] is not None:
            one["marks"].append(f"duplicate of {twins[p]}")
        if decided is not None:
            share = float(decided[p]) / max(1, int(decided.sum()))
            one |= {"decided": int(decided[p]), "decided_share": f"{100 * share:.2f} %"}
            one["marks"] += ["never decides"] * (decided[p] == 0)
        one |= _draw_source(subject, one, index_of, out)
        if near:
            one |= _draw_neighbours(subject, one, [x[p].tolist() for x in near], out)
        described.append(one)
    return described


def _copies(vectors: Tensor) -> list[int | None]:
    """For each prototype the first one with the very same vector, None if that is itself."""
    first: dict[tuple, int] = {}
    found = [first.setdefault(tuple(vector), p) for p, vector in enumerate(vectors.tolist())]
    return [original if original != p else None for p, original in enumerate(found)]


@torch.no_grad()
def _weights_of(subject: Subject, p: int) -> dict:
    column, own = subject.model.last_layer.weight[:, p], int(subject.model.prototype_class[p])
    least = int(column.argmin())
    name = subject.mapping.names[least]
    negative = {"weight": float(column[least]), "index": least, "name": name} if column[least] < 0 else None
    return {"class": own, "own_weight": float(column[own]), "negative": negative}


def _source(record: dict | None, near: list[Tensor] | None, train, stride: int) -> dict:
    """Where a prototype comes from: the patch it was projected onto, else the training patch nearest to it."""
    if record is not None and record["image"] is not None:
        x, y = record["pixel"]
        return {"source": {"image": record["image"], "x": x, "y": y}, "cell": record["cell"], "marks": []}
    marks = ["not projected yet: the nearest patch" if record is None else "not projected: class never in training"]
    if near is None or near[1][0] < 0:
        return {"source": None, "cell": None, "marks": marks}
    row, column = near[2][0].tolist()
    source = {"image": train.image_id(int(near[1][0])), "x": column * stride, "y": row * stride}
    return {"source": source, "cell": [row, column], "marks": marks}


def _draw_source(subject: Subject, one: dict, index_of: dict[str, int], out: Path) -> dict:
    """Write a prototype's patch, the patch in its image, and its activation there; nothing without the image."""
    if one["source"] is None or one["source"]["image"] not in index_of:
        return {"patch": "", "place": None, "heat": None, "side": 48}
    image, _ = subject.train_set.read(index_of[one["source"]["image"]])
    activation, share = similarity_map(subject.model, image, one["index"])
    box = patch_box(activation, one["cell"], image.size, subject.model.output_stride)
    window = around(box, image.size)
    low, high = np.quantile(share, (0.5, 0.99))  # one cell alone is equal to the prototype: the scale is not its
    share = (share - low) / max(high - low, 1e-6)
    return {
        "patch": _save(image.crop(window), 112, out, _name(subject, one, "patch")),
        "place": _save(draw_box(image, box), 220, out, _name(subject, one, "place")),
        "heat": _save(draw_box(heat(image, share), box), 220, out, _name(subject, one, "heat")),
        "side": window[2] - window[0],
    }


def _draw_neighbours(subject: Subject, one: dict, near: list[list], out: Path) -> dict:
    """Write the nearest patches of one prototype, as large as its own; near: distances, images, cells, labels."""
    train, stride = subject.train_set, subject.model.output_stride
    neighbours = []
    for i, (_, index, (row, column), label) in enumerate(zip(*near, strict=True)):
        if index < 0:
            continue
        image, _ = train.read(index)
        x, y = column * stride, row * stride
        patch = image.crop(around([x, y, x, y], image.size, one["side"]))
        neighbours.append({
            "picture": _save(patch, 80, out, _name(subject, one, f"near-{i + 1}")),
            "class_index": label, "class_name": subject.mapping.names[label], "is_own": label == one["class"],
            "image": train.image_id(index), "x": x, "y": y,
        })  # fmt: skip
    return {"neighbours": neighbours, "pure": sum(n["is_own"] for n in neighbours)}


def _name(subject: Subject, one: dict, what: str) -> str:
    return f"patches/{one['index']:03d}-{slug(subject.mapping.names[one['class']])}-{what}.jpg"


def _save(image: Image.Image, height: int, out: Path, name: str) -> str:
    fit(image, height).save(out / name, quality=85)
    return name
