"""What every data set is: images with labels, read as they are published, with classes instead of the files' ids."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from config import DatasetConfig
from datasets.cache import PixelCache
from grid import IGNORE
from runtime.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
MAX_PIXELS = 50_000_000  # a 79 kB file can unpack to 81 million pixels; nobody trains on such images
UNKNOWN = 254  # stands for an id that the data set does not have
READING = 2  # another number for other rules of reading: what was decoded before is then decoded anew


class DatasetError(UserError):
    """Data that is missing, damaged or mislabelled: the message names the file."""


class ClassMapping(NamedTuple):
    """names of the classes; their colours (C, 3) 0..255; and for each id in the files, the class or 255."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    id_to_class: dict[int, int]

    @property
    def file_ids(self) -> tuple[int, ...]:
        """The id that stands for each class in the files, (C,); none at all if there is a class without one."""
        ids = {c: i for i, c in self.id_to_class.items() if c != IGNORE and 0 <= i <= 255}
        return tuple(ids[c] for c in range(len(self.names))) if len(ids) == len(self.names) else ()


class ServerFormat(NamedTuple):
    """What a test server takes: PNGs of label ids, with the palette of the classes or without, in one archive.

    folder: where they lie in the archive. archive: its name (.zip or .tar.gz), with {split} in it.
    """

    folder: str
    archive: str
    has_palette: bool


class SegmentationDataset(Dataset):
    """Images with labels. Index i gives the whole image at its own size, the same at every read.

    config: the `dataset` section. split: which part. Raises DatasetError if the data set is not there.
    """

    layout = "images and labels"
    fetch = "put your own files there"
    labels_carry_palette = False  # whether the label files' own palettes have to be `mapping.palette`
    has_files = True  # whether `paths` are files, which can be missing
    submission: ClassVar[ServerFormat | None] = None  # what its test server takes, if it has one

    def __init__(self, config: DatasetConfig, split: str):
        self.config, self.split, self.root = config, split, Path(config.root)
        self.faults: list[str] = []  # of the folders and lists themselves, a line each
        self.mapping = self._setup_class_mappings()
        self._class_of_id = self._table_of_classes()
        pairs = self._get_data_paths()
        if not pairs:
            raise self.missing("; ".join([f"no images of the split '{split}'", *self.faults]))
        # Arrays of bytes, not lists of paths: Python objects would be copied into every worker as they are counted.
        self._images = np.array([os.fsencode(image) for image, _ in pairs])
        self._labels = np.array([os.fsencode(label or "") for _, label in pairs])
        names, counts = np.unique(self._images, return_counts=True)
        for i in np.flatnonzero(counts > 1):
            self.faults.append(f"{os.fsdecode(names[i])}: listed {counts[i]} times; once is enough")
        self._cache: PixelCache | None = None

    def _setup_class_mappings(self) -> ClassMapping:
        """The classes of this data set."""
        raise NotImplementedError

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        """(image, label) files of `self.split` below `self.root`, sorted; no label file: nothing is labelled."""
        raise NotImplementedError

    def part_label(self, index: int) -> Path | None:
        """The file with the parts of an image's objects (evaluation/parts.py), if there is one."""
        return None

    def stem(self, index: int) -> str:
        """What the files that belong to an image are called, without their endings."""
        return self.paths(index)[0].stem

    @property
    def num_classes(self) -> int:
        """C: how many classes the labels can have."""
        return len(self.mapping.names)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.read(index)
        return normalize(image), torch.from_numpy(np.array(label, dtype=np.int64))

    def image_id(self, index: int) -> str:
        """What an image is called in records and messages: its path below the root."""
        path = Path(os.fsdecode(self._images[index]))
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def paths(self, index: int) -> tuple[Path, Path | None]:
        """The image file and the label file of an item."""
        label = os.fsdecode(self._labels[index])
        return Path(os.fsdecode(self._images[index])), Path(label) if label else None

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """An item at its own size: RGB image, and label with classes (mode L). Raises DatasetError naming the file."""
        return self._decode(index) if self._cache is None else self._cache[index]

    def keep_decoded(self) -> None:
        """From now on read from a file of decoded pixels in ROOT/.cache, which is built if it is not there."""
        if not self.has_files:
            return
        files = [self.paths(i) for i in range(len(self))]
        made_of = f"{READING} {self.mapping} {self.labels_carry_palette}"
        self._cache = PixelCache(self.root / ".cache", self.split, files, made_of, self._decode)

    def missing(self, what: str) -> DatasetError:
        """The error that says what is not there, what has to be, and how to get it."""
        return DatasetError(
            f"{self.config.name}: {what} in '{self.root}'. It must contain {self.layout}. To get it: {self.fetch}."
            " Elsewhere? --set dataset.root=FOLDER. To try without data: python train.py --config configs/demo.yaml"
        )

    def _table_of_classes(self) -> np.ndarray:
        names, palette, id_to_class = self.mapping
        wrong = {i: c for i, c in id_to_class.items() if not (-1 <= i <= 255 and (0 <= c < len(names) or c == IGNORE))}
        if wrong or len(palette) != len(names):
            raise DatasetError(
                f"{self.config.name}: {len(names)} names, {len(palette)} colours, and ids with classes {wrong}:"
                f" want a colour for each name, ids of -1 to 255, and classes of 0 to {len(names) - 1} or {IGNORE}"
            )
        table = np.full(256, UNKNOWN, dtype=np.uint8)
        for file_id, class_index in {**id_to_class, IGNORE: IGNORE}.items():
            table[file_id % 256] = class_index  # -1 is stored as 255 in 8 bits
        return table

    def _decode(self, index: int) -> tuple[Image.Image, Image.Image]:
        image_path, label_path = self.paths(index)
        image = _open(image_path, "image")
        if label_path is None:
            image = _rgb(ImageOps.exif_transpose(image), image_path)
            return image, Image.new("L", image.size, IGNORE)
        label = _open(label_path, "label")
        _check_label(label, label_path)
        image = _rgb(_as_labelled(image, label.size, image_path), image_path)
        if label.size != image.size:
            raise DatasetError(
                f"{label_path}: the label is {label.width}x{label.height}, its image {image.width}x{image.height}"
            )
        return image, Image.fromarray(self._to_classes(label, label_path))

    def _to_classes(self, label: Image.Image, path: Path) -> np.ndarray:
        ids = np.asarray(label)
        classes = self._class_of_id[ids]
        if (classes == UNKNOWN).any():
            unknown = np.unique(ids[classes == UNKNOWN]).tolist()
            known = sorted(self.mapping.id_to_class)
            raise DatasetError(
                f"{path}: label ids {', '.join(map(str, unknown[:10]))}{' ...' if len(unknown) > 10 else ''} are not"
                f" ids of {self.config.name} ({known[0]}..{known[-1]}, {IGNORE} = ignore); was the file converted?"
            )
        if label.mode == "P":
            self._check_palette(label, np.unique(ids), path)
        return classes

    def _check_palette(self, label: Image.Image, ids: np.ndarray, path: Path) -> None:
        """Refuse a label whose indices seem to have been renumbered: what they mean is then in its palette alone."""
        colors = np.array(label.getpalette("RGB"), dtype=int).reshape(-1, 3)
        ids = ids[self._class_of_id[ids] != IGNORE] if self.labels_carry_palette else ids
        for file_id in ids if self.labels_carry_palette else ():
            if file_id >= len(colors) or tuple(colors[file_id]) != self.mapping.palette[file_id]:
                raise DatasetError(f"{path}: the palette was changed, so the ids may mean other classes")
        if ids.max(initial=0) >= len(colors):
            raise DatasetError(f"{path}: the label has indices beyond its palette; save the ids as 8-bit grey")
        greys = colors[ids]
        is_grey = bool((greys == greys[:, :1]).all())
        named = (greys[:, 0] > 0) & (greys[:, 0] < self.num_classes)  # too dark for a colour that somebody chose
        if is_grey and named.any() and (greys[:, 0] != ids).any():
            raise DatasetError(
                f"{path}: the greys of its palette are other ids than its indices, as a program that makes PNGs smaller"
                " leaves them; save the ids as 8-bit grey"
            )


# --- reading ---------------------------------------------------------------------------------------------------


def read_image(path: Path, upright: bool = False) -> Image.Image:
    """An image file as RGB. upright: turn it as its EXIF data say, and lay what is transparent on white.

    That is how a photograph is shown elsewhere. Raises DatasetError naming the file.
    """
    image = _open(path, "image")
    return _rgb(ImageOps.exif_transpose(image) if upright else image, path, on_white=upright)


def check_regular(path: Path, what: str) -> None:
    """Raise DatasetError unless a path is a file: to open a pipe or a device may wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DatasetError(f"{path}: this {what} is missing") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot read this {what} ({error})") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise DatasetError(f"{path}: cannot read this {what} (it is {kind}, not a file)")


def _open(path: Path, what: str) -> Image.Image:
    """A picture with 8 bits a channel or less, decoded."""
    check_regular(path, what)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DatasetError(
                    f"{path}: {image.width}x{image.height} pixels in this {what}; at most {MAX_PIXELS:,} are read"
                )
            if image.format != "MPO" and (count := getattr(image, "n_frames", 1)) > 1:  # MPO: a JPEG and its preview
                raise DatasetError(f"{path}: {count} pictures in this {what}; save each as a file of its own")
            raw = _how_stored(image)
            image.load()
            image.getexif()  # is read on demand, and may be damaged
    except FileNotFoundError:
        raise DatasetError(f"{path}: this {what} is missing") from None
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # a damaged file raises whatever its decoder happens to meet
        if type(error) is RuntimeError:  # torch's, of a lost worker: it comes wherever the script just is
            raise
        raise DatasetError(f"{path}: cannot read this {what} ({str(error) or type(error).__name__})") from None
    image.info["stored"] = raw
    return image


def _how_stored(image: Image.Image) -> str:
    """How a pixel is stored, which `mode` does not tell. Of a TIFF whose channels lie apart PIL forgets their depth."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(ExifTags.Base.PlanarConfiguration) == 2 and max(tags.get(ExifTags.Base.BitsPerSample, (8,))) > 8:
        return "planes;16"
    tiles = getattr(image, "tile", [])
    return str(tiles[0][3]) if tiles else ""


def _rgb(image: Image.Image, path: Path, on_white: bool = False) -> Image.Image:
    """Any picture as RGB, if that takes no guess: deep pixels are refused, and transparent ones that lie on nothing."""
    if image.mode[0] in "IF" or re.search(r"\b(?!BGR)[A-Za-z]+;(16|32)", image.info["stored"]):
        raise DatasetError(
            f"{path}: more than 8 bits a channel (mode {image.mode}), and nothing says which values are black and"
            " white; save 8-bit images, all scaled alike, for example (pixels / LARGEST * 255).astype('uint8')"
        )
    alpha = _alpha(image)
    if alpha is None or alpha.getextrema()[0] == 255:
        return image if image.mode == "RGB" else image.convert("RGB")
    if on_white:
        return Image.composite(image.convert("RGB"), Image.new("RGB", image.size, "white"), alpha)
    raise DatasetError(
        f"{path}: {100 * np.mean(np.asarray(alpha) < 255):.3g} % of its pixels are transparent, and nothing says what"
        " is behind them; save it without transparency (magick FILE -background white -flatten FILE)"
    )


def _alpha(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    return (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")


def _as_labelled(image: Image.Image, size: tuple[int, int], path: Path) -> Image.Image:
    """The image as it lay when its label, of a size, was drawn: as stored, or upright as its EXIF data say.

    Only the size can tell: after a quarter turn of a picture that is not square.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9):
        return image
    fitting = [one for one in (image, ImageOps.exif_transpose(image)) if one.size == size]
    if len(fitting) == 1:
        return fitting[0]
    raise DatasetError(
        f"{path}: its EXIF data say that it was turned or mirrored, and not whether its label was, too. If the label"
        " is of the upright picture: mogrify -auto-orient FILE; if it is of the stored one: exiftool -Orientation= FILE"
    )


def _check_label(label: Image.Image, path: Path) -> None:
    if label.format in ("JPEG", "MPO", "JPEG2000") or "jpeg" in str(label.info.get("compression")):  # that of a TIFF
        raise DatasetError(f"{path}: JPEG changes the ids of a label; save labels as PNG from where they were made")
    if label.mode not in ("L", "P"):
        raise DatasetError(
            f"{path}: the label has mode {label.mode}; want one channel of 8-bit class ids (mode L or P)."
            " Colour-coded labels must be turned into ids first"
        )
    if label.info["stored"] in ("L;2", "L;4"):  # decoded to greys 0..255, and nobody knows which of both are the ids
        raise DatasetError(f"{path}: the label has {label.info['stored'][2:]} bits a pixel; save the ids as 8-bit grey")
    largest = re.fullmatch(r"\('L', (\d+)\)", label.info["stored"])  # of a PGM: PIL spreads its greys over 0..255
    if largest and largest[1] != "255":
        raise DatasetError(f"{path}: its greys go up to {largest[1]}, not 255; save the ids as 8-bit grey PNG")
    if label.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        raise DatasetError(
            f"{path}: its EXIF data say that the label was turned or mirrored, and not whether its image was, too;"
            " if it lies as its image does: exiftool -Orientation= FILE"
        )


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC: the bits of the class index, spread over the high bits of red, green and blue."""

    def part(i: int, channel: int) -> int:
        return sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))

    return tuple((part(i, 0), part(i, 1), part(i, 2)) for i in range(count))


def normalize(image: Image.Image) -> Tensor:
    """RGB image -> float32 (3, H, W) with ImageNet's mean 0 and standard deviation 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)
