"""Pictures, with Pillow alone: label colours, heat overlays, boxes, and contact sheets."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from grid import IGNORE

MARGIN = 6
CAPTION = 16
WIDEST = 16  # times its height: of a wider picture nothing could be seen, and no JPEG holds 65,501 pixels
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
    """An image scaled to a height; a very wide one to less, so that it is at most 16 times as wide as that."""
    scale = min(height / image.height, WIDEST * height / image.width)
    return image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.BICUBIC)


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


def slug(name: str, nameless: str = "class") -> str:
    """A part of a file name made of a name that may hold anything: at most 40 of a-z, 0-9 and -, or `nameless`."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name)[:40].strip("-") or nameless


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
