"""Predictions as the test servers of Cityscapes and PASCAL VOC take them, packed, and read back to be sure.

    cityscapes   DIR/<city>_<sequence>_<frame>.png with the official label ids, packed as DIR/cityscapes_<split>.zip
    pascal       DIR/results/VOC2012/Segmentation/comp6_test_cls/<image>.png, class indices with the VOC palette,
                 packed as DIR/voc2012_<split>.tar.gz

A data set's `submission` says which of the two it takes. Every PNG has one 8-bit channel and the size of its image.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.base import SegmentationDataset
from runtime.errors import ConfigError, UserError


class SubmissionError(UserError):
    """What was written is not what the server takes."""

    exit_code = 4


class Submission:
    """A submission that grows image by image: `write` each, then `finish` packs and checks it.

    folder: where it goes; it must be new or empty, so that nothing of an older submission gets in. Raises ConfigError
    for a folder with files in it, and for a data set without a server.
    """

    def __init__(self, dataset: SegmentationDataset, folder: Path):
        if dataset.submission is None:
            raise ConfigError(f"--export: only cityscapes and pascal have a test server, not {dataset.config.name}")
        self.dataset, self.folder, self.format = dataset, Path(folder), dataset.submission
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"--export: {self.folder} is not empty; name a new folder")
        self.images = self.folder / self.format.folder
        self.folder.mkdir(parents=True, exist_ok=True)  # stays empty until the first image: other processes look, too
        self.id_of_class = np.array(dataset.mapping.file_ids, dtype=np.uint8)
        self.written: dict[str, tuple[tuple[int, int], int]] = {}  # name in the archive: size, checksum of the ids

    def write(self, index: int, classes: np.ndarray) -> None:
        """Add the predicted classes (H, W) of an image."""
        ids = self.id_of_class[classes]
        picture = Image.fromarray(ids)
        if self.format.has_palette:
            picture.putpalette([channel for color in self.dataset.mapping.palette for channel in color])
        self.images.mkdir(parents=True, exist_ok=True)
        path = self.images / f"{self.dataset.stem(index)}.png"
        picture.save(path)
        self.written[path.relative_to(self.folder).as_posix()] = (picture.size, zlib.crc32(ids.tobytes()))

    def finish(self) -> Path:
        """Pack what was written and read the archive back. Raises SubmissionError; returns the archive's path."""
        archive = self.folder / self.format.archive.format(split=self.dataset.split)
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
                for name in sorted(self.written):
                    file.write(self.folder / name, name)
        else:
            with tarfile.open(archive, "w:gz") as file:
                for name in sorted(self.written):
                    file.add(self.folder / name, name)
        self.check(archive)
        return archive

    def check(self, archive: Path) -> None:
        """Raise SubmissionError unless the archive holds every image once, with its mode, size and ids."""
        found = set()
        for name, data in _members(archive):
            if name in found or name not in self.written:
                raise SubmissionError(f"{archive}: {name} is there twice, or should not be there")
            found.add(name)
            with Image.open(io.BytesIO(data)) as picture:
                ids = np.array(picture)
                mode, size = picture.mode, picture.size
            wanted, checksum = self.written[name]
            if mode != ("P" if self.format.has_palette else "L") or size != wanted:
                raise SubmissionError(f"{archive}: {name} has mode {mode} and size {size}; want {wanted}")
            if zlib.crc32(ids.tobytes()) != checksum or not np.isin(ids, self.id_of_class).all():
                raise SubmissionError(f"{archive}: {name} does not hold the ids that were predicted")
        missing = sorted(self.written.keys() - found)
        if missing or len(found) != len(self.dataset):
            raise SubmissionError(f"{archive}: {len(found)} images, want {len(self.dataset)}; missing: {missing[:3]}")


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each file in a .zip or .tar.gz."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            yield from ((name, file.read(name)) for name in file.namelist())
    else:
        with tarfile.open(archive) as file:
            files = ((m.name, file.extractfile(m)) for m in file if m.isfile())
            yield from ((name, content.read()) for name, content in files)  # type: ignore[union-attr]  # files have one
