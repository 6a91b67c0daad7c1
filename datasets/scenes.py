"""Generated scenes with exact labels: something to train on that needs no download.

Each scene is a function of (seed, index): a sky with clouds, grass, and in front of them houses (wall, roof, door,
windows), trees (trunk, crown), cars (body, cabin, wheels) and balloons (striped envelope, basket), textured, lit
differently, partly hiding each other. The parts are what prototypes can find.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from datasets.base import ClassMapping, DatasetError, SegmentationDataset

CLASS_NAMES = ("sky", "grass", "house", "tree", "car", "balloon")
PALETTE = ((120, 180, 230), (90, 160, 70), (190, 90, 60), (30, 100, 50), (220, 200, 40), (170, 70, 190))
SKY, GRASS, HOUSE, TREE, CAR, BALLOON = range(len(CLASS_NAMES))


class ShapesDataset(SegmentationDataset):
    """Generated scenes: nothing to download; the splits draw from different random streams."""

    layout = "nothing"
    fetch = "nothing to get"
    has_files = False
    streams = {"train": 0, "val": 1, "test": 2}

    def _setup_class_mappings(self) -> ClassMapping:
        return ClassMapping(CLASS_NAMES, PALETTE, {i: i for i in range(len(CLASS_NAMES))})

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        if self.split not in self.streams:
            raise DatasetError(f"shapes: there is no split '{self.split}', only {', '.join(self.streams)}")
        count = self.config.shapes.train_images if self.split == "train" else self.config.shapes.val_images
        return [(Path(f"scene {self.split} {i:05d}"), None) for i in range(count)]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """A scene drawn anew: RGB image, and label with classes (mode L)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return draw_scene(self.config.shapes.image_size, self.streams[self.split], index)


class _Canvas:
    """An image and its label that are drawn on together, in units of the image's side."""

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng = size, rng
        self.image = Image.new("RGB", (size, size))
        self.label = Image.new("L", (size, size))

    def polygon(self, points, color, class_index: int) -> None:
        pixels = [(x * self.size, y * self.size) for x, y in points]
        ImageDraw.Draw(self.image).polygon(pixels, fill=self._shade(color))
        ImageDraw.Draw(self.label).polygon(pixels, fill=class_index)

    def box(self, x0, y0, x1, y1, color, class_index: int) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color, class_index)

    def ellipse(self, x, y, radius_x, radius_y, color, class_index: int) -> None:
        angles = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        self.polygon([(x + radius_x * math.cos(a), y + radius_y * math.sin(a)) for a in angles], color, class_index)

    def _shade(self, color) -> tuple[int, ...]:
        return tuple(int(np.clip(c + self.rng.normal(0, 6), 0, 255)) for c in color)


def draw_scene(size: int, seed: int, index: int) -> tuple[Image.Image, Image.Image]:
    """Scene `index` of the stream `seed`: an RGB image and its label (mode L, class ids), both size x size."""
    rng = np.random.default_rng((seed, index))
    canvas = _Canvas(size, rng)
    horizon = rng.uniform(0.45, 0.6)
    _background(canvas, horizon)
    for _ in range(rng.integers(0, 3)):
        _balloon(canvas, rng.uniform(0.1, 0.9), rng.uniform(0.14, 0.3), rng.uniform(0.11, 0.17))
    objects = [_house, _tree, _car] + [(_house, _tree, _car)[rng.integers(3)] for _ in range(rng.integers(0, 3))]
    depths = np.sort(rng.uniform(0.0, 1.0, len(objects)))  # far ones first, so that near ones hide them
    for depth, kind in zip(depths, rng.permutation(np.array(objects, dtype=object)), strict=True):
        foot = horizon + 0.06 + depth * (0.95 - horizon - 0.06)
        kind(canvas, rng.uniform(0.1, 0.9), foot, 1.0 + 0.5 * depth)
    return _texture(canvas.image, rng), canvas.label


def _background(canvas: _Canvas, horizon: float) -> None:
    rng = canvas.rng
    canvas.box(0, 0, 1.01, 1.01, (135 + rng.uniform(-25, 25), 185 + rng.uniform(-20, 20), 232), SKY)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0, 1), rng.uniform(0.03, horizon * 0.7)
        for shift in (-0.07, 0.0, 0.07):
            canvas.ellipse(x + shift, y + rng.uniform(-0.01, 0.01), 0.08, 0.035, (238, 241, 245), SKY)
    canvas.box(0, horizon, 1.01, 1.01, (105 + rng.uniform(-20, 20), 165 + rng.uniform(-20, 20), 70), GRASS)
    for _ in range(60):
        x, y = rng.uniform(0, 1), rng.uniform(horizon + 0.03, 1)
        canvas.polygon([(x, y), (x + 0.012, y - 0.035), (x + 0.02, y)], (70, 130 + rng.uniform(-25, 25), 50), GRASS)


def _house(canvas: _Canvas, x: float, foot: float, scale: float) -> None:
    rng = canvas.rng
    width, height = rng.uniform(0.28, 0.38) * scale, rng.uniform(0.2, 0.28) * scale
    left, top = x - width / 2, foot - height
    wall = [(214, 190, 150), (196, 110, 84), (222, 214, 200)][rng.integers(3)]
    canvas.box(left, top, left + width, foot, wall, HOUSE)
    for row in np.arange(top, foot, 0.03):
        canvas.box(left, row, left + width, row + 0.006, [c * 0.86 for c in wall], HOUSE)
    roof = [(122, 52, 44), (92, 78, 74), (70, 80, 104)][rng.integers(3)]
    peak = top - rng.uniform(0.12, 0.18) * scale
    canvas.polygon([(left - 0.03, top), (x, peak), (left + width + 0.03, top)], roof, HOUSE)
    door = left + width * rng.uniform(0.1, 0.7)
    canvas.box(door, foot - 0.12 * scale, door + 0.07 * scale, foot, (88, 56, 34), HOUSE)
    for window in (left + width * 0.12, left + width * 0.66):
        y = top + 0.04 * scale
        canvas.box(window, y, window + 0.07 * scale, y + 0.065 * scale, (244, 240, 225), HOUSE)
        right, bottom = window + 0.07 * scale, y + 0.065 * scale
        canvas.box(window + 0.01, y + 0.01, right - 0.01, bottom - 0.01, (72, 98, 128), HOUSE)


def _tree(canvas: _Canvas, x: float, foot: float, scale: float) -> None:
    rng = canvas.rng
    height = rng.uniform(0.34, 0.46) * scale
    canvas.box(x - 0.025 * scale, foot - height * 0.45, x + 0.025 * scale, foot, (98, 70, 42), TREE)
    green = (38 + rng.uniform(-12, 12), 98 + rng.uniform(-18, 18), 44)
    if rng.random() < 0.5:  # a fir
        for level in range(3):
            y, half = foot - height * (0.25 + 0.22 * level), (0.15 - 0.03 * level) * scale
            canvas.polygon([(x - half, y), (x, y - height * 0.36), (x + half, y)], green, TREE)
        return
    for _ in range(9):
        dx, dy = rng.uniform(-0.09, 0.09) * scale, rng.uniform(-0.09, 0.09) * scale
        shade = [c + rng.uniform(-14, 14) for c in green]
        canvas.ellipse(x + dx, foot - height * 0.72 + dy, 0.085 * scale, 0.085 * scale, shade, TREE)


def _car(canvas: _Canvas, x: float, foot: float, scale: float) -> None:
    rng = canvas.rng
    length, height = rng.uniform(0.3, 0.38) * scale, 0.09 * scale
    left, floor = x - length / 2, foot - 0.03 * scale
    paint = [(206, 44, 40), (238, 196, 40), (40, 70, 170), (232, 232, 236), (50, 52, 58)][rng.integers(5)]
    roof, shoulder = floor - height - 0.085 * scale, floor - height
    cabin = [(left + length * a, b) for a, b in ((0.16, shoulder), (0.3, roof), (0.68, roof), (0.84, shoulder))]
    canvas.polygon(cabin, paint, CAR)
    for start, end, lean in ((0.27, 0.47, 0.06), (0.51, 0.72, -0.06)):
        a, b = left + length * start, left + length * end
        glass = [(a, shoulder), (a + max(lean, 0) * length, roof + 0.015), (b + min(lean, 0) * length, roof + 0.015)]
        canvas.polygon([*glass, (b, shoulder)], (168, 206, 220), CAR)
    canvas.box(left, shoulder, left + length, floor, paint, CAR)
    canvas.box(left + length * 0.95, shoulder + 0.02, left + length, shoulder + 0.045, (250, 240, 170), CAR)
    for wheel in (0.22, 0.78):
        canvas.ellipse(left + length * wheel, floor, 0.052 * scale, 0.052 * scale, (30, 30, 32), CAR)
        canvas.ellipse(left + length * wheel, floor, 0.024 * scale, 0.024 * scale, (186, 188, 192), CAR)


def _balloon(canvas: _Canvas, x: float, y: float, radius: float) -> None:
    rng = canvas.rng
    colors = [(226, 66, 58), (250, 206, 60), (70, 120, 210), (240, 240, 240)]
    first, second = rng.choice(len(colors), 2, replace=False)
    skirt = [(x - radius * 0.75, y + radius * 0.6), (x, y + radius * 1.5), (x + radius * 0.75, y + radius * 0.6)]
    canvas.polygon(skirt, colors[first], BALLOON)
    for width, color in ((1.0, first), (0.68, second), (0.32, first)):
        canvas.ellipse(x, y, radius * width, radius, colors[color], BALLOON)
    canvas.box(x - radius * 0.25, y + radius * 1.35, x + radius * 0.25, y + radius * 1.75, (120, 82, 44), BALLOON)


def _texture(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The drawn image with coarse and fine noise under one light."""
    size = image.size[0]
    coarse = Image.fromarray(rng.normal(0, 12, (9, 9)).astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.4)), dtype=np.float32)
    pixels = (pixels + np.asarray(coarse)[..., None]) * rng.uniform(0.8, 1.15) + rng.normal(0, 7, (size, size, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
