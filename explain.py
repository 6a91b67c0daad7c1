"""Show what a model learned, and why each pixel got its class: pages to look at, from the disk, without a network.

    python explain.py --checkpoint models/final_checkpoint.pth              8 images of the val split
    python explain.py --checkpoint models/final_checkpoint.pth --split train --count 20
    python explain.py --checkpoint models/final_checkpoint.pth street.jpg holiday/   own photographs
    python explain.py --checkpoint models/final_checkpoint.pth --png        and each explanation as one picture

What is written: results/explanations/index.html, the gallery of all prototypes, and a page for each image on which
every pixel can be asked for its scores and the prototypes they are made of. The folder can be zipped and mailed. A
new report of the same checkpoint takes the place of the one before when it is whole; a folder that holds anything
else is refused. Where it is written is never read from a checkpoint: --out, or --set paths.results_dir=FOLDER.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image

from dataset import build_dataset, check_classes
from datasets.base import (
    IMAGE_TYPES,
    ClassMapping,
    DatasetError,
    SegmentationDataset,
    read_image,
    voc_palette,
)
from explanation.gallery import NEIGHBOURS, Card, Subject, describe_prototypes
from explanation.image_page import TWIN, Entry, Item, write_image
from explanation.pages import render, write_page
from inference import open_model
from model import PPNet
from runtime import distributed
from runtime.checkpoint import Checkpoint
from runtime.command import add_set_argument, each, run
from runtime.errors import ConfigError
from runtime.files import OutputFolder, Successor

ABOUT = "report.json"  # what a report was made from
DECIDES = (
    "At how many places of the {split} split the prototype decides: of all prototypes it adds most to the score of the"
    " class that is predicted there. Looked at is one pixel in {stride} x {stride}, a cell."
)


# --- what is explained -----------------------------------------------------------------------------------------


def find_photographs(names: list[str]) -> list[Path]:
    """The photographs at some names: files, or folders of them. Raises DatasetError for a folder without any."""
    found: list[Path] = []
    for path in map(Path, names):
        inside = [path]
        if path.is_dir():
            inside = [f for f in sorted(path.iterdir()) if f.suffix.lower() in IMAGE_TYPES and f.name[0] != "."]
        if not inside:
            raise DatasetError(f"{path}: no photograph in this folder (looked for {', '.join(IMAGE_TYPES)})")
        found += inside
    return found


def find_wrong(photographs: list[Path]) -> list[str]:
    """A line for each that is not a file. Nothing is opened: a pipe may never answer."""
    wrong = [path for path in photographs if not path.is_file()]
    return [f"{p}: {'it is not a file' if os.path.lexists(p) else 'there is no such photograph'}" for p in wrong]


def find_items(photographs: list[Path], dataset: SegmentationDataset | None, count: int) -> list[Item]:
    """The photographs that are files, then `count` images, evenly spread, of a data set."""
    items = [
        Item(number, path.name, partial(_read_photograph, path))
        for number, path in enumerate(photographs, start=1)
        if path.is_file()
    ]
    if dataset is not None:
        count = min(count, len(dataset))
        for number, i in enumerate((i * len(dataset) // count for i in range(count)), start=len(photographs) + 1):
            items.append(Item(number, dataset.image_id(i), partial(dataset.read, i)))
    return items


def _read_photograph(path: Path) -> tuple[Image.Image, None]:
    return read_image(path, upright=True), None


def open_subject(arguments: argparse.Namespace) -> tuple[Subject, Checkpoint]:
    """The model and data of the command line, and all that the checkpoint holds.

    Without images to explain a missing data set is an error; own photographs can be explained without it.
    """
    inference, config, checkpoint = open_model(arguments.checkpoint, arguments.overrides)
    if distributed.world_size() > 1:
        raise ConfigError("explain.py is one process: start it with python, not with torchrun")
    splits: list[SegmentationDataset | None] = []
    for split in (config.dataset.train_split, config.dataset.val_split):
        try:
            splits.append(dataset := build_dataset(config, split))
            check_classes(dataset, checkpoint.class_names, Path(arguments.checkpoint))
        except DatasetError as error:
            if not arguments.images or arguments.split:
                raise
            print(f"without pictures of the {split} split: {error}", file=sys.stderr)
            splits.append(None)
    mapping = next((s.mapping for s in splits if s is not None), None)
    if mapping is None:
        names = checkpoint.class_names or tuple(f"class {c}" for c in range(config.model.num_classes))
        mapping = ClassMapping(names, checkpoint.palette or voc_palette(len(names) + 1)[1:], {})
    return Subject(inference.explainable(), config, mapping, *splits), checkpoint


# --- the report ------------------------------------------------------------------------------------------------


def about_report(arguments: argparse.Namespace, subject: Subject, checkpoint: Checkpoint, folder: Path) -> dict:
    """What a report is made from: checkpoint (as it is found from the report), its content, the data, the settings."""
    path, data = Path(arguments.checkpoint), subject.config.dataset
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {
        "checkpoint": Path(os.path.relpath(path, folder)).as_posix(),
        "sha256": digest.hexdigest(),
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "data": {"name": data.name, "root": data.root, "train": data.train_split, "val": data.val_split},
        "settings": arguments.overrides,
    }


def check_same_checkpoint(folder: Path, about: dict) -> None:
    """Raise ConfigError if the report in a folder is one of another checkpoint."""
    before = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["checkpoint"]
    if before not in (None, about["checkpoint"]):
        raise ConfigError(f"{folder}: it holds the report of {folder / before}; name another folder: --out FOLDER")


def write_index(
    subject: Subject, checkpoint: Checkpoint, about: dict, images: list[Entry], cards: list[Card], out: Successor
) -> None:
    """Write index.html, and what the report was made from."""
    names, data = subject.mapping.names, subject.config.dataset
    classes = [{"index": c, "name": names[c], "prototypes": [card for card in cards if card.class_index == c]}
               for c in range(len(names))]  # fmt: skip
    miou = checkpoint.metrics.get("val_miou", float("nan"))
    facts = [data.name, f"{len(cards)} prototypes of {len(names)} classes" if cards else f"{len(names)} classes"]
    facts += [f"val mIoU {miou:.3f}"] if miou == miou else []
    is_twin = not isinstance(subject.model, PPNet)
    notes = ([TWIN] if is_twin else []) + subject.scales_note
    if subject.train_set is None and not is_twin:
        notes.append("The training data were not there: prototypes have no pictures, only the places they come from.")
    page = render(
        "index.html", subject.mapping.palette, images=images, notes=notes, facts=facts, about=about,
        title="What the model predicts" if is_twin else "What the model learned",
        checkpoint=about["checkpoint"].rpartition("/")[2], k=NEIGHBOURS,
        classes=[c for c in classes if c["prototypes"]],
        decided_means=DECIDES.format(split=data.val_split, stride=subject.inference.grid.stride),
    )  # fmt: skip
    out.add(ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    write_page(out.add("index.html"), page)


def write_report(
    subject: Subject, checkpoint: Checkpoint, about: dict, items: list[Item], png: bool, out: Successor
) -> tuple[int, int]:
    """Write gallery, pages and index; returns how many prototypes and images are in it. Names what it has to skip."""
    cards = []
    if isinstance(subject.model, PPNet):
        cards = describe_prototypes(subject, list(checkpoint.prototypes), out)
    else:
        print(TWIN)
    faces, entries = [card.face for card in cards], []
    for item in each(items, "images", "image"):
        try:
            entries.append(write_image(subject, item, out, faces, png))
        except DatasetError as error:
            print(f"skipped: {error}", file=sys.stderr)
    write_index(subject, checkpoint, about, entries, cards, out)
    return len(cards), len(entries)


# --- the command -----------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="a photograph, or a folder of them")
    parser.add_argument(
        "--checkpoint", default="models/final_checkpoint.pth", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--split", help="explain images of this split (default: the val split, without IMAGE)")
    parser.add_argument(
        "--count", type=int, default=8, metavar="N", help="how many of the split (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="default: results/explanations")
    parser.add_argument("--png", action="store_true", help="also write each explanation as one picture, for papers")
    add_set_argument(parser)
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise ConfigError(f"--count {arguments.count}: want at least 1")
    return arguments


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file. Raises DatasetError at the end if a photograph was unreadable."""
    arguments = parse(argv)
    photographs = find_photographs(arguments.images)
    wrong = find_wrong(photographs)
    if wrong and len(wrong) == len(photographs) and not arguments.split:
        raise DatasetError("\n".join(wrong))
    for line in wrong:
        print(f"skipped: {line}", file=sys.stderr)
    subject, checkpoint = open_subject(arguments)
    split = arguments.split or (None if arguments.images else subject.config.dataset.val_split)
    items = find_items(photographs, build_dataset(subject.config, split) if split else None, arguments.count)
    folder = Path(arguments.out or Path(subject.config.paths.results_dir) / "explanations")
    about = about_report(arguments, subject, checkpoint, folder)
    with OutputFolder(folder).successor() as out:
        if arguments.out is None:
            check_same_checkpoint(folder, about)
        prototypes, images = write_report(subject, checkpoint, about, items, arguments.png, out)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{prototypes} prototypes and {images} images, {size / 1e6:.1f} MB -> {folder / 'index.html'}")
    asked = len(items) + len(wrong)
    if images < asked:
        raise DatasetError(f"{asked - images} of {asked} images could not be read; they are named above")


if __name__ == "__main__":
    run(main)
