"""Decoded images in one memory-mapped file, so that training does not decode the same PNG in every epoch.

Cityscapes' training split takes 25 GB this way; the operating system keeps what is used in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime import distributed
from runtime.command import stop_flag

Item = tuple[Image.Image, Image.Image]


class PixelCache:
    """Images (RGB) and labels (classes, mode L) of a split, built once and checked against the files they are from.

    folder: where the two files `SPLIT-FINGERPRINT.{pixels,sizes.npy}` are kept. files: the images and labels in
    order; their names, sizes and times make the fingerprint, so that a changed source is decoded anew.
    read: decodes item i. Raises OSError if the disk is full, and whatever `read` raises.
    """

    def __init__(self, folder: Path, split: str, files: list[tuple[Path, Path | None]], read: Callable[[int], Item]):
        name = f"{split}-{fingerprint(files)}"
        self._pixels_path, sizes_path = folder / f"{name}.pixels", folder / f"{name}.sizes.npy"
        if not sizes_path.is_file():  # it is written last
            if distributed.world_size() > 1:
                raise OSError(
                    f"{folder}: the cache is not built yet; one process does it: python dataset.py --config FILE"
                )
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{split}-*"):
                stale.unlink()
            _build(self._pixels_path, sizes_path, len(files), read)
        self._sizes = np.load(sizes_path)  # (N, 2) width and height
        self._starts = np.concatenate(([0], (4 * self._sizes.prod(1)).cumsum()))
        self._pixels: np.memmap | None = None
        if self._pixels_path.stat().st_size != self._starts[-1]:
            sizes_path.unlink()
            raise OSError(
                f"{self._pixels_path}: this cache was damaged and has been removed; start again to rebuild it"
            )

    def __getitem__(self, index: int) -> Item:
        if self._pixels is None:  # opened by each process for itself
            self._pixels = np.memmap(self._pixels_path, dtype=np.uint8, mode="r")
        width, height = self._sizes[index].tolist()
        pixels = self._pixels[self._starts[index] : self._starts[index + 1]]
        split = 3 * width * height
        image = Image.frombuffer("RGB", (width, height), pixels[:split], "raw", "RGB", 0, 1)
        return image, Image.frombuffer("L", (width, height), pixels[split:], "raw", "L", 0, 1)


def fingerprint(files: list[tuple[Path, Path | None]]) -> str:
    """16 hexadecimal digits that change with any file's name, size or time."""
    digest = hashlib.sha256()
    for path in (p for pair in files for p in pair if p is not None):
        stat = os.stat(path)
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _build(pixels_path: Path, sizes_path: Path, count: int, read: Callable[[int], Item]) -> None:
    temporary = pixels_path.with_name(f".{pixels_path.name}.tmp.{os.getpid()}")
    sizes = []
    try:
        with open(temporary, "wb") as file:
            for index in tqdm(range(count), desc="cache", unit="image", leave=False, disable=None):
                stop_flag.raise_if_set()
                for picture in read(index):
                    file.write(np.asarray(picture).tobytes())
                sizes.append(picture.size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, pixels_path)
        with open(temporary, "wb") as file:
            np.save(file, np.array(sizes, dtype=np.int64))
        os.replace(temporary, sizes_path)
    finally:
        temporary.unlink(missing_ok=True)
