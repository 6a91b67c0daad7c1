"""Where a prototype comes from, as pictures: its patch, the patch in its image, and its activation there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datasets.base import SegmentationDataset, normalize
from explanation.pictures import around, draw_box, fit, heat, sheet, slug
from grid import Grid
from inference import Inference
from runtime.command import each
from runtime.files import OutputFolder, Successor

HEIGHT = 160


@torch.no_grad()
def similarity_map(inference: Inference, image: Image.Image, prototype: int) -> tuple[Tensor, np.ndarray]:
    """A prototype's activation on an image: on the grid (h, w), and of every pixel (H, W) as a share of the
    largest activation there is, 0..1 (of the image's own range with the linear activation)."""
    distances = inference.distances(normalize(image)[None])
    activation = inference.ppnet.activations(distances[:, prototype : prototype + 1])
    pixels = inference.upsample(activation, (image.height, image.width))[0, 0].cpu()
    low, high = float(pixels.min()), max(float(pixels.max()), float(pixels.min()) + 1e-6)
    return activation[0, 0].cpu(), ((pixels - low) / (high - low)).numpy()


def patch_box(activation: Tensor, cell: list[int], image_size: tuple[int, int], grid: Grid) -> list[int]:
    """The pixels that a prototype's picture frames: [x0, y0, x1, y1), a box in an image of (width, height).

    It is the region around `cell` in which the activation (h, w) stays within the highest 5 % of the image, the
    rule of the published code, but connected to the cell that the prototype was taken from.
    """
    height, width = activation.shape
    allowed = (activation >= torch.quantile(activation.float(), 0.95)).float()[None, None]
    region = torch.zeros_like(allowed)
    region[0, 0, cell[0], cell[1]] = 1
    for _ in range(height + width):
        grown = F.max_pool2d(region, 3, stride=1, padding=1) * allowed
        grown[0, 0, cell[0], cell[1]] = 1
        if torch.equal(grown, region):
            break
        region = grown
    rows, columns = (region[0, 0].amax(dim).nonzero().flatten() for dim in (1, 0))
    spans = [(int(found[0]), int(found[-1]), length) for found, length in zip((columns, rows), image_size, strict=True)]
    (left, right), (top, bottom) = (grid.box(*span) for span in spans)
    return [left, top, right, bottom]


def draw_prototypes(
    inference: Inference, dataset: SegmentationDataset, records: list[dict], out: OutputFolder
) -> list[dict]:
    """Write `prototypes.json`, a picture of each prototype and a contact sheet of each class.

    records: of `push_prototypes`, on `dataset`. Returns copies that have, too, the `box` [x0, y0, x1, y1) in pixels
    and the `picture` of each, None where it has no patch. What was drawn before stays until all is drawn.
    """
    with out.successor() as new:
        drawn: list[dict] = []
        rows: dict[int, list] = {}
        for record in each(records, "prototype pictures", "picture"):
            box = picture = None
            if record["image"] is not None:
                box, row = _prototype_row(inference, dataset, record)
                picture = f"prototype_{record['prototype']:03d}_{slug(record['class_name'])}.png"
                sheet([row], _title(record)).save(new.add(picture))
                rows.setdefault(record["class"], []).append(row)
            drawn.append({**record, "box": box, "picture": picture})
        _draw_classes(rows, dataset.mapping.names, new)
        new.add("prototypes.json").write_text(json.dumps(drawn, indent=1), encoding="utf-8")
    return drawn


def _draw_classes(rows: dict[int, list], names: tuple[str, ...], new: Successor) -> None:
    for class_index, class_rows in rows.items():
        page = sheet(class_rows, f"{names[class_index]}: {len(class_rows)} prototypes")
        page.save(new.add(f"class_{class_index:02d}_{slug(names[class_index])}.png"))


def _prototype_row(
    inference: Inference, dataset: SegmentationDataset, record: dict
) -> tuple[list[int], list[tuple[Image.Image, str]]]:
    """The box of a prototype's patch, and its captioned pictures."""
    image, _ = dataset.read(record["image_index"])
    activation, share = similarity_map(inference, image, record["prototype"])
    box = patch_box(activation, record["cell"], image.size, inference.grid)
    return box, [
        (fit(image.crop(around(box, image.size)), HEIGHT), f"prototype {record['prototype']}"),
        (fit(draw_box(image, box), HEIGHT), Path(record["image"]).name),
        (fit(draw_box(heat(image, share), box), HEIGHT), f"activation, {activation.max():.1f} at most"),
    ]


def _title(record: dict) -> str:
    stands_for = f", stands for {len(record['merged'])}" if len(record["merged"]) > 1 else ""
    return (
        f"prototype {record['prototype']} of '{record['class_name']}': {record['image']}"
        f" at x={record['pixel'][0]}, y={record['pixel'][1]}{stands_for}"
    )
