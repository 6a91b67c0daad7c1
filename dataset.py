"""Data sets: Cityscapes, PASCAL VOC 2012, CamVid, any folder of images, and generated scenes.

    python dataset.py --config configs/camvid.yaml      check a data set: every fault of every file, and class shares

An item is `(image float32 (3, H, W), normalized with ImageNet's mean and standard deviation; label int64 (H, W))`
with labels 0..C-1 and 255 = ignore. Only the data sets know other ids. Files are read as they are published: no
preprocessing step; one that cannot be read without a guess is refused by name. A new data set is one subclass of
`SegmentationDataset` that overrides `_setup_class_mappings()` and `_get_data_paths()`, and one entry in `DATASETS`.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import Config, DatasetConfig, load_config
from datasets.base import ClassMapping, DatasetError, SegmentationDataset, read_image
from datasets.camvid import CamVidDataset
from datasets.cityscapes import CityscapesDataset
from datasets.folder import FolderDataset
from datasets.pascal import PascalVOCDataset
from datasets.scenes import ShapesDataset
from grid import IGNORE, Grid
from runtime.command import add_config_arguments, all_at_once, each, run, stop_flag
from runtime.errors import ConfigError

__all__ = ["DATASETS", "ClassMapping", "DatasetError", "SegmentationDataset", "read_image"]

GRID = Grid()  # of the features that are the default

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
    if dataset.faults:
        raise DatasetError("\n".join(_shortened(dataset.faults)))
    missing = missing_files(dataset)
    if missing:
        raise dataset.missing(f"{len(missing)} files are missing: {', '.join(_shortened(missing))}")
    if config.dataset.cache == "disk":
        dataset.keep_decoded()
    return dataset


def check_classes(dataset: SegmentationDataset, class_names: Sequence[str], path: Path) -> None:
    """Raise ConfigError unless the classes of a checkpoint, the file `path`, are those of the data, in their order.

    A checkpoint without names passes.
    """
    names = dataset.mapping.names
    if not class_names or tuple(class_names) == names:
        return
    where = f"{path}: it was trained"
    data = f"the data in '{dataset.root}'"
    if len(class_names) != len(names):
        counts = f"on {len(class_names)} classes, {data} have {len(names)}"
        raise ConfigError(f"{where} {counts}; --set dataset.root=FOLDER names other data")
    index = next(i for i, (ours, theirs) in enumerate(zip(class_names, names, strict=True)) if ours != theirs)
    what = "the same classes in another order" if set(class_names) == set(names) else "other classes"
    raise ConfigError(
        f"{where} with '{class_names[index]}' as class {index}, in {data} it is '{names[index]}': {what};"
        " put the names (and ids) back as they were, or train anew"
    )


def check_sample(dataset: SegmentationDataset, count: int = 8) -> None:
    """Read some images with their labels, evenly spread. Raises DatasetError with every fault in them."""
    count = min(count, len(dataset))
    all_at_once(*(lambda i=i: dataset.read(i * len(dataset) // count) for i in range(count)))


def look_for_classes(dataset: SegmentationDataset, least: int = 8, most: int = 256, grid: Grid = GRID) -> list[str]:
    """What is odd about the classes of a training split, a line each, judged by as few labels as show all of them.

    least, most: how many labels are looked at. One that cannot be read is passed over: training will name it. grid:
    that of the features.
    """
    counts, looked_at = LabelCounts.none(), 0
    for index in np.random.default_rng(0).permutation(len(dataset))[:most].tolist():
        stop_flag.raise_if_set()
        counts, looked_at = counts.plus(_check_item(dataset, index, grid)[1]), looked_at + 1
        if looked_at >= least and counts.cells[: dataset.num_classes].all():
            break
    part = "" if looked_at == len(dataset) else f" of the {looked_at} labels of {len(dataset):,} that were read"
    return class_warnings(dataset, counts, grid, part)


def missing_files(dataset: SegmentationDataset) -> list[Path]:
    """Image and label files that a data set lists and that are not there."""
    if not dataset.has_files:
        return []
    paths = (path for i in range(len(dataset)) for path in dataset.paths(i))
    return [path for path in paths if path is not None and not path.exists()]


def _shortened(things: list) -> list[str]:
    more = [f"and {len(things) - 5} more"] if len(things) > 5 else []
    return [*map(str, things[:5]), *more]


# --- the check command -----------------------------------------------------------------------------------------


class LabelCounts(NamedTuple):
    """Pixels and cells of each label (256,); labels that hold class 0 and 255 alone, and 255 beside another class."""

    pixels: np.ndarray
    cells: np.ndarray
    binary: int
    mixed: int

    @classmethod
    def none(cls) -> LabelCounts:
        """Of no label."""
        return cls(np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64), 0, 0)

    @classmethod
    def of(cls, label: np.ndarray, grid: Grid) -> LabelCounts:
        """Of one label (H, W) uint8."""
        height, width = label.shape
        seen = grid.labels(torch.from_numpy(label)[None], (grid.cells(height), grid.cells(width)))
        seen = seen[0, : grid.visible(height), : grid.visible(width)]
        pixels, cells = (np.bincount(values.ravel(), minlength=256) for values in (label, seen.numpy()))
        binary = pixels[0] and pixels[IGNORE] and pixels[0] + pixels[IGNORE] == label.size
        return cls(pixels, cells, int(binary), int(pixels[IGNORE] > 0 and pixels[1:IGNORE].any()))

    def plus(self, other: LabelCounts) -> LabelCounts:
        """Of the labels of both."""
        pixels, cells = self.pixels + other.pixels, self.cells + other.cells
        return LabelCounts(pixels, cells, self.binary + other.binary, self.mixed + other.mixed)


class SplitReport(NamedTuple):
    """What the check found in a split: images, faults (a line each), and its labels, counted."""

    images: int
    faults: list[str]
    counts: LabelCounts


def check_split(dataset: SegmentationDataset) -> SplitReport:
    """Read every file of a split, on all cores, and report every fault that training would have met."""
    counts, faults = LabelCounts.none(), list(dataset.faults)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda i: _check_item(dataset, i, GRID), range(len(dataset)))
        for fault, seen in each(results, dataset.split, "image", total=len(dataset)):
            counts = counts.plus(seen)
            faults += [fault] if fault else []
    return SplitReport(len(dataset), faults, counts)


def class_warnings(dataset: SegmentationDataset, counts: LabelCounts, grid: Grid = GRID, part: str = "") -> list[str]:
    """What is no fault, but hardly meant: a line for each oddity of a split. part: of which labels, if not of all."""
    names, kinds = dataset.mapping.names, range(dataset.num_classes)
    absent = [names[c] for c in kinds if not counts.pixels[c]]
    unseen = [names[c] for c in kinds if counts.pixels[c] and not counts.cells[c]]
    where = f" in any{part}" if part else f" in the split '{dataset.split}'"
    warnings = []
    if absent:
        warnings.append(f"no pixel{where} has the class {_quoted(absent)}: nothing can be learned of it")
    if unseen:
        warnings.append(
            f"no cell{where} looks at a pixel of the class {_quoted(unseen)}, which is smaller than the"
            f" {grid.stride} pixels from cell to cell: hardly anything can be learned of it; images and labels of twice"
            " the size would help"
        )
    # Where the files themselves can mean 255 alone, and it is never beside anything but class 0.
    if counts.binary and not counts.mixed and IGNORE not in dataset.mapping.id_to_class.values():
        warnings.append(
            f"{counts.binary} labels{part} hold 0 and 255 alone. Masks of 0 and 255? Here 255 means 'ignore', not"
            f" '{names[1]}': write 1 for 255"
        )
    return warnings


def _quoted(names: list[str]) -> str:
    return ", ".join(_shortened([f"'{name}'" for name in names]))


def balanced_weights(class_pixels: np.ndarray) -> np.ndarray:
    """One over the square root of each class's share of the pixels (C,), 1 for the most frequent class.

    A class that never occurs gets 1, too: no cell is ever weighted with it.
    """
    most = class_pixels.max()
    return np.sqrt(most / np.where(class_pixels, class_pixels, most))


def _check_item(dataset: SegmentationDataset, index: int, grid: Grid) -> tuple[str | None, LabelCounts]:
    try:
        _, label = dataset.read(index)
    except DatasetError as error:
        return str(error), LabelCounts.none()
    counts = LabelCounts.of(np.array(label), grid)
    is_empty = dataset.paths(index)[1] is not None and counts.pixels[IGNORE] == counts.pixels.sum()
    return (f"{dataset.paths(index)[1]}: no pixel of this label has a class" if is_empty else None), counts


def main(argv: list[str] | None = None) -> None:
    """Check the train and val splits of a data set; raises DatasetError (exit code 2) if there is any fault."""
    parser = argparse.ArgumentParser(description="Check a data set: every fault of every file, and class shares.")
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    splits = dict.fromkeys((config.dataset.train_split, config.dataset.val_split))
    datasets = all_at_once(*(lambda split=split: open_dataset(config.dataset, split) for split in splits))
    reports = [check_split(dataset) for dataset in datasets]
    faults = sum(len(report.faults) for report in reports)
    for dataset, report in zip(datasets, reports, strict=True):
        _print_report(dataset, report)
    if datasets[0].num_classes != config.model.num_classes:
        faults += 1
        print(f"model.num_classes is {config.model.num_classes}, the data set has {datasets[0].num_classes} classes")
    if faults:
        raise DatasetError(f"{config.dataset.name}: {faults} faults; the first epoch would have stopped at one of them")
    if config.dataset.cache == "disk":
        for dataset in datasets:
            dataset.keep_decoded()
    weights = balanced_weights(reports[0].counts.pixels[: datasets[0].num_classes])
    print(f"to give rare classes more weight: training.class_weights: [{', '.join(f'{w:.3g}' for w in weights)}]")
    for warning in (warnings := class_warnings(datasets[0], reports[0].counts)):
        print(f"warning: {warning}")
    found = f"no faults, but {len(warnings)} to think about" if warnings else "no faults"
    settings = [word for value in arguments.overrides for word in ("--set", value)]
    command = shlex.join(["python", "train.py", "--config", str(arguments.config), *settings])
    print(f"{config.dataset.name}: {found}. Next: {command}")


def _print_report(dataset: SegmentationDataset, report: SplitReport) -> None:
    """Faults, and the share of each class: of the pixels, and of the cells, which is what training sees at scale 1."""
    print(f"{dataset.config.name} {dataset.split}: {report.images:,} images, {len(report.faults)} faults")
    for fault in report.faults:
        print(f"  fault: {fault}")
    pixels, cells = (100 * values / max(1, values.sum()) for values in (report.counts.pixels, report.counts.cells))
    print("  share of the pixels, and of the cells, each of which looks at one pixel in 8 x 8")
    for c, name in enumerate(dataset.mapping.names):
        never = "" if pixels[c] else "   (never occurs)"
        print(f"  {name:<16}{pixels[c]:6.2f} %{never or f'{cells[c]:8.2f} %'}")
    print(f"  {'(ignored)':<16}{pixels[IGNORE]:6.2f} %{cells[IGNORE]:8.2f} %")


if __name__ == "__main__":
    run(main)
