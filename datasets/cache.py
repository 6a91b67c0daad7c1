"""Decoded images in one memory-mapped file, so that training does not decode the same PNG in every epoch.

Cityscapes' training split takes 25 GB this way; the operating system keeps what is used in memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import distributed
from runtime.command import each
from runtime.errors import ConfigError
from runtime.files import replacing

Item = tuple[Image.Image, Image.Image]


class PixelCache:
    """Images (RGB) and labels (classes, mode L) of a split, built once and checked against the files they are from.

    folder: where the two files `SPLIT-FINGERPRINT.{pixels,sizes.npy}` are kept. files: the images and labels in
    order; their paths, sizes and times make the fingerprint, and made_of: whatever else an item depends on, such as
    the classes of the ids. So what changed is decoded anew, in place of what was kept of this split before.
    read: decodes item i. Raises OSError if the disk is full, and whatever `read` raises.
    """

    def __init__(
        self, folder: Path, split: str, files: list[tuple[Path, Path | None]], made_of: str, read: Callable[[int], Item]
    ):
        if not split or re.search(r"[/\\\0]", split):
            raise ConfigError(f"dataset.cache: no file can have the name of the split '{split}'")
        name = f"{split}-{fingerprint(folder.parent, files, made_of)}"
        self._pixels_path, sizes_path = folder / f"{name}.pixels", folder / f"{name}.sizes.npy"
        if not sizes_path.is_file():  # it is written last
            if distributed.world_size() > 1:
                raise OSError(
                    f"{folder}: the cache is not built yet; one process does it: python dataset.py --config FILE"
                )
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():  # what a cache wrote, of this split, and nothing else
                if re.fullmatch(re.escape(split) + r"-[0-9a-f]{16}\.(pixels|sizes\.npy)", path.name) and path.is_file():
                    path.unlink()
            _build(self._pixels_path, sizes_path, len(files), read)
        self._pixels: np.memmap | None = None
        try:
            self._sizes = np.load(sizes_path)  # (N, 2) width and height
            self._starts = np.concatenate(([0], (4 * self._sizes.prod(1)).cumsum()))
            is_whole = len(self._sizes) == len(files) and self._pixels_path.stat().st_size == self._starts[-1]
        except (OSError, ValueError, EOFError, TypeError):
            is_whole = False
        if not is_whole:
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


def fingerprint(root: Path, files: list[tuple[Path, Path | None]], made_of: str) -> str:
    """16 hexadecimal digits that change with any file's path below root, its size or time, and with made_of."""
    digest = hashlib.sha256(made_of.encode(errors="backslashreplace"))
    for path in (p for pair in files for p in pair):
        if path is not None:
            digest.update(os.fsencode(os.path.relpath(path, root)))
            stat = os.stat(path)
            digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]


def _build(pixels_path: Path, sizes_path: Path, count: int, read: Callable[[int], Item]) -> None:
    sizes = []
    with replacing(pixels_path) as file:
        for index in each(range(count), "cache", "image"):
            for picture in read(index):
                file.write(np.asarray(picture).tobytes())
            sizes.append(picture.size)
    with replacing(sizes_path) as file:
        np.save(file, np.array(sizes, dtype=np.int64))
