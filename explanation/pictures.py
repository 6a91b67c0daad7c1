"""Pictures, with Pillow alone: label colours, heat overlays, prototype pictures and contact sheets."""

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from dataset import SegmentationDataset, normalize
from grid import IGNORE
from model import PPNet, SegmentationNet, pad_to_grid, upsample
from push import patch_box
from runtime.command import stop_flag

MARGIN = 6
CAPTION = 16
BOX_COLORS = ((0, 0, 0), (255, 255, 0))


def colorize(labels: np.ndarray, palette) -> Image.Image:
    """Classes (H, W) as their colours; 255 is black."""
    colors = np.zeros((256, 3), dtype=np.uint8)
    colors[: len(palette)] = palette
    return Image.fromarray(colors[labels.astype(np.uint8)])


def overlay(image: Image.Image, labels: np.ndarray, palette, opacity: float = 0.6) -> Image.Image:
    """An image under the colours of its labels; pixels of 255 stay as they are."""
    mask = Image.fromarray(np.where(labels == IGNORE, 0, round(255 * opacity)).astype(np.uint8))
    return Image.composite(colorize(labels, palette), image, mask)


def heat(image: Image.Image, values: np.ndarray) -> Image.Image:
    """An image under a heat map: values (H, W) in 0..1 from transparent over red to yellow."""
    values = values.clip(0, 1)
    colors = np.stack((np.ones_like(values), (values * 1.6 - 0.6).clip(0, 1), np.zeros_like(values)), axis=-1)
    mask = Image.fromarray((values**0.5 * 200).astype(np.uint8))
    return Image.composite(Image.fromarray((colors * 255).astype(np.uint8)), image, mask)


def draw_box(image: Image.Image, box: list[int]) -> Image.Image:
    """A copy of an image with [x0, y0, x1, y1) framed in black and yellow, visible on any background."""
    framed = image.copy()
    width = max(1, round(max(image.size) / 300))
    for step, color in enumerate(BOX_COLORS):
        grow = width * (1 - step)
        corners = (box[0] - grow - 1, box[1] - grow - 1, box[2] + grow, box[3] + grow)
        ImageDraw.Draw(framed).rectangle(corners, outline=color, width=width)
    return framed


def fit(image: Image.Image, height: int) -> Image.Image:
    """An image scaled to a height."""
    return image.resize((max(1, round(image.width * height / image.height)), height), Image.Resampling.BICUBIC)


def sheet(rows: list[list[tuple[Image.Image, str]]], title: str) -> Image.Image:
    """Rows of captioned pictures below a title."""
    font = ImageFont.load_default(12)
    widths = [sum(picture.width + MARGIN for picture, _ in row) for row in rows]
    heights = [max(picture.height for picture, _ in row) + CAPTION + MARGIN for row in rows]
    size = (max([*widths, 8 * len(title)]) + MARGIN, sum(heights) + CAPTION + 2 * MARGIN)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, MARGIN // 2), title, fill="black", font=font)
    y = CAPTION + MARGIN
    for row, height in zip(rows, heights, strict=True):
        x = MARGIN
        for picture, caption in row:
            page.paste(picture, (x, y))
            pen.text((x, y + picture.height + 1), caption, fill="black", font=font)
            x += picture.width + MARGIN
        y += height
    return page


def explained_figure(image: Image.Image, painted: Image.Image, rows: list[dict]) -> Image.Image:
    """A photograph above its prediction, and beside them a legend with the prototypes that made each class.

    rows: of each class its `name`, `color`, `share` of the pixels 0..1 and, if any, `prototypes`, each with its number
    `prototype`, `picture` or None, `share` of the class's cells that it decides, and `at`, the pixel (x, y) of the
    image where it is the most similar: that is marked with the same number.
    """
    scale = 640 / image.width
    left = [fit(picture, round(scale * image.height)) for picture in (image, painted)]
    tall, line, wide = left[0].height, 132, 312
    in_column = max(4, (2 * tall + MARGIN) // line)
    columns = -(-len(rows) // in_column)
    height = max(2 * tall + MARGIN, min(len(rows), in_column) * line)
    page = Image.new("RGB", (640 + columns * (wide + MARGIN), height), "white")
    for i, picture in enumerate(left):
        for row in rows:
            for prototype in row.get("prototypes", ()):
                _mark(picture, str(prototype["prototype"]), [scale * c for c in prototype["at"]])
        page.paste(picture, (0, i * (tall + MARGIN)))
    for i, row in enumerate(rows):
        corner = (640 + 2 * MARGIN + i // in_column * (wide + MARGIN), i % in_column * line)
        _figure_row(page, row, corner)
    return page


def _figure_row(page: Image.Image, row: dict, corner: tuple[int, int]) -> None:
    (x, y), pen, font = corner, ImageDraw.Draw(page), ImageFont.load_default(13)
    pen.rectangle((x, y + 4, x + 11, y + 15), fill=tuple(row["color"]), outline="black")
    name = " ".join(row["name"].split())
    name = name if len(name) <= 32 else name[:31] + "..."
    pen.text((x + 18, y + 1), f"{name}  {100 * row['share']:.1f} %", fill="black", font=font)
    for i, prototype in enumerate(row.get("prototypes", ())):
        left = x + i * 104
        if prototype["picture"] is not None:
            page.paste(prototype["picture"].resize((92, 92)), (left, y + 20))
        caption = f"{prototype['prototype']}: {100 * prototype['share']:.0f} %"
        pen.text((left, y + 113), caption, fill="black", font=font)


def _mark(picture: Image.Image, text: str, at: list[float]) -> None:
    """A number in a white disc, on the picture in full."""
    pen, font, radius = ImageDraw.Draw(picture), ImageFont.load_default(11), 10
    x, y = (min(max(radius, c), length - radius - 1) for c, length in zip(at, picture.size, strict=True))
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill="white", outline="black")
    pen.text((x, y), text, fill="black", font=font, anchor="mm")


def slug(name: str, nameless: str = "class") -> str:
    """A part of a file name made of a name that may hold anything: at most 40 of a-z, 0-9 and -, or `nameless`."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name)[:40].strip("-") or nameless


@torch.no_grad()
def similarity_map(model: PPNet, image: Image.Image, prototype: int) -> tuple[Tensor, np.ndarray]:
    """A prototype's activation on an image: on the grid (h, w), and of every pixel (H, W) as a share of the
    largest activation there is, 0..1 (of the image's own range with the linear activation)."""
    device = model.prototype_vectors.device
    padded = pad_to_grid(normalize(image)[None].to(device), 0.0, model.output_stride)
    activation = model.activations(model(padded).distances[:, prototype : prototype + 1])
    pixels = upsample(activation, padded.shape[2:])[0, 0, : image.height, : image.width].cpu()
    low, high = float(pixels.min()), max(float(pixels.max()), float(pixels.min()) + 1e-6)
    return activation[0, 0].cpu(), ((pixels - low) / (high - low)).numpy()


def draw_prototypes(model: SegmentationNet, dataset: SegmentationDataset, records: list[dict], folder: Path) -> None:
    """Write `prototypes.json`, a picture of each prototype and a contact sheet of each class into a new `folder`.

    records: of `push_prototypes`, on `dataset`; each gets its `box` [x0, y0, x1, y1) in pixels and its `picture`.
    """
    model.eval()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows: dict[int, list] = {}
    for record in tqdm(records, desc="prototype pictures", unit="picture", leave=False, disable=None):
        stop_flag.raise_if_set()
        if record["image"] is None:
            record.update(box=None, picture=None)
            continue
        row = _prototype_row(model, dataset, record)
        record["picture"] = f"prototype_{record['prototype']:03d}_{slug(record['class_name'])}.png"
        sheet([row], _title(record)).save(folder / record["picture"])
        rows.setdefault(record["class"], []).append(row)
    for class_index, class_rows in rows.items():
        name = dataset.mapping.names[class_index]
        page = sheet(class_rows, f"{name}: {len(class_rows)} prototypes")
        page.save(folder / f"class_{class_index:02d}_{slug(name)}.png")
    (folder / "prototypes.json").write_text(json.dumps(records, indent=1), encoding="utf-8")


def _prototype_row(model: PPNet, dataset: SegmentationDataset, record: dict) -> list[tuple[Image.Image, str]]:
    image, _ = dataset.read(record["image_index"])
    activation, share = similarity_map(model, image, record["prototype"])
    record["box"] = patch_box(activation, record["cell"], image.size, model.output_stride)
    height = 160
    return [
        (fit(image.crop(around(record["box"], image.size)), height), f"prototype {record['prototype']}"),
        (fit(draw_box(image, record["box"]), height), Path(record["image"]).name),
        (fit(draw_box(heat(image, share), record["box"]), height), f"activation, {activation.max():.1f} at most"),
    ]


def around(box: list[int], size: tuple[int, int], side: int = 0) -> tuple[int, int, int, int]:
    """A square around a box, inside an image of (width, height).

    side: its width; by default a little more than the box's, and at least 32 pixels.
    """
    side = min(side or max(32, round(1.25 * max(box[2] - box[0], box[3] - box[1]))), *size)
    x, y = (
        min(max(0, (low + high - side) // 2), length - side)
        for low, high, length in zip(box[:2], box[2:], size, strict=True)
    )
    return x, y, x + side, y + side


def _title(record: dict) -> str:
    stands_for = f", stands for {len(record['merged'])}" if len(record["merged"]) > 1 else ""
    return (
        f"prototype {record['prototype']} of '{record['class_name']}': {record['image']}"
        f" at x={record['pixel'][0]}, y={record['pixel'][1]}{stands_for}"
    )
