"""Label photographs: masks as palette PNGs, at the photographs' own size.

    python predict.py --checkpoint models/final_checkpoint.pth street.jpg holiday/      masks in results/predictions
    python predict.py --checkpoint FILE holiday/ --out DIR --overlay                   and the photographs under colours
    python predict.py --checkpoint FILE holiday/ --probabilities                       and the probability of each class

A mask is DIR/PATH BELOW THE GIVEN FOLDER/STEM.png; of two photographs of one stem both keep their suffix. It holds the
ids that the data set's own files have, else the class's number, and its palette the class's colours. Photographs are
labelled upright; above 2 million pixels in overlapping windows, as `evaluate.py --sliding 1025` does. A run that was
stopped goes on with the same command. Neither the data set nor a gallery is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.base import IMAGE_TYPES, DatasetError, normalize, read_image, voc_palette
from evaluation.labelling import View, label_image
from evaluation.report import weights_digest
from explanation.pictures import overlay
from inference import Inference, SavedModel, open_model
from runtime import distributed
from runtime.command import add_set_argument, each, run
from runtime.errors import ConfigError
from runtime.files import OutputFolder, replacing

LARGE = 1024 * 2048  # pixels; larger photographs are labelled in windows
WINDOW = 1025  # pixels
ABOUT = "predictions.json"  # what the masks of a folder were made with
WHAT_NEXT = "the masks that are there are whole; the same command goes on"


class Photograph(NamedTuple):
    """A file, and what its mask is called, relative to the output folder, without .png."""

    path: Path
    name: str


def find_photographs(given: list[str]) -> list[Photograph]:
    """The photographs at some paths: files, or folders with all that is below them, by name.

    Raises ConfigError for two photographs that would get one mask, DatasetError for a folder without any.
    """
    found: list[tuple[Path, PurePath]] = []
    for path in map(Path, given):
        if not path.is_dir():
            found.append((path, PurePath(path.name)))
            continue
        inside = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in IMAGE_TYPES and not _is_hidden(f, path)]
        if not inside:
            raise DatasetError(f"{path}: no photograph in this folder (looked for {', '.join(IMAGE_TYPES)})")
        found += [(file, file.relative_to(path)) for file in inside]
    taken = Counter(name for _, below in found for name in _outputs(below.with_suffix("").as_posix()))
    photographs = []
    for path, below in found:
        stem = below.with_suffix("").as_posix()
        is_alone = all(taken[name] == 1 for name in _outputs(stem))
        photographs.append(Photograph(path, stem if is_alone else below.as_posix()))
    by_name: dict[str, Path] = {}
    for photograph in photographs:
        other = by_name.setdefault(photograph.name, photograph.path)
        if other is not photograph.path:
            raise ConfigError(f"{other} and {photograph.path} would get one mask; label them in two calls, each --out")
    return photographs


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _outputs(name: str) -> list[str]:
    """All files that a photograph of this name can get."""
    return [f"{name}.png", f"{name}_overlay.png", f"{name}_probabilities.npz"]


class Labels(NamedTuple):
    """How classes are written: the id of each in a mask, and the colour of each."""

    ids: np.ndarray
    colors: list[tuple[int, int, int]]

    def mask(self, classes: np.ndarray) -> Image.Image:
        """Classes (H, W) as a palette image of their ids."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[self.ids] = self.colors
        picture = Image.fromarray(self.ids[classes])
        picture.putpalette(table.ravel().tolist())
        return picture


def labels_of(saved: SavedModel) -> Labels:
    """The ids and colours that a checkpoint knows; without them the classes' numbers, and the colours of PASCAL VOC."""
    count = saved.config.model.num_classes
    colors = saved.checkpoint.palette or voc_palette(count + 1)[1:]
    return Labels(np.array(saved.checkpoint.file_ids or range(count), dtype=np.uint8), list(colors))


def view_of(inference: Inference, image: Image.Image) -> View:
    """As a whole, or in windows of whole cells where it is large."""
    is_large = image.width * image.height > LARGE
    return View(window=inference.grid.scaled(WINDOW, 1.0) if is_large else None)


def probabilities(inference: Inference, pixels: Tensor) -> np.ndarray:
    """The probability of each class at every pixel of an image (1, 3, H, W), seen as a whole: (C, H, W) float16."""
    return inference.logits(pixels)[0].softmax(0).half().cpu().numpy()


def label_photograph(saved: SavedModel, labels: Labels, photograph: Photograph, out: OutputFolder, options) -> None:
    """Write what is asked for of one photograph, the mask last. Raises DatasetError if it cannot be read."""
    image = read_image(photograph.path, upright=True)
    pixels = normalize(image)[None]
    classes = label_image(saved.inference, pixels, view_of(saved.inference, image))[0][0].byte().cpu().numpy()
    if options.probabilities:
        with replacing(out.add(f"{photograph.name}_probabilities.npz")) as file:
            np.savez_compressed(file, probabilities=probabilities(saved.inference, pixels))
    if options.overlay:
        with replacing(out.add(f"{photograph.name}_overlay.png")) as file:
            overlay(image, classes, labels.colors).save(file, "PNG")
    with replacing(out.add(f"{photograph.name}.png")) as file:
        labels.mask(classes).save(file, "PNG")


def open_output(folder: Path, about: dict) -> OutputFolder:
    """The folder for masks, new or with those of a call that was stopped. Raises ConfigError for those of another."""
    out = OutputFolder(folder).begin()
    path = folder / ABOUT
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if before != about:
            reason = "it holds masks of another model, or made with other options"
            raise ConfigError(f"{folder}: {reason}; nothing was changed, name another folder: --out FOLDER")
    with replacing(out.add(ABOUT), "w", encoding="utf-8") as file:
        json.dump(about, file, indent=1)
    return out


def still_to_do(photographs: list[Photograph], folder: Path) -> Iterator[Photograph]:
    """Those without a mask that is as new as they are."""
    for photograph in photographs:
        mask = folder / f"{photograph.name}.png"
        try:
            is_done = mask.stat().st_mtime_ns >= photograph.path.stat().st_mtime_ns
        except OSError:
            is_done = False
        if not is_done:
            yield photograph


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("photographs", nargs="+", metavar="PHOTO|FOLDER", help="a photograph, or a folder of them")
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the model")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: results/predictions")
    parser.add_argument("--overlay", action="store_true", help="also write the photographs under their labels' colours")
    parser.add_argument("--probabilities", action="store_true", help="also write each class's probability (float16)")
    add_set_argument(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file. Raises DatasetError at the end if a photograph was unreadable."""
    arguments = parse_arguments(argv)
    photographs = find_photographs(arguments.photographs)
    saved = open_model(arguments.checkpoint, arguments.overrides)
    if distributed.world_size() > 1:
        raise ConfigError("predict.py is one process: start it with python, not with torchrun")
    folder = arguments.out or Path(saved.config.paths.results_dir) / "predictions"
    about = {
        "weights": weights_digest(saved.checkpoint.model),
        "settings": sorted(arguments.overrides),
        "overlay": arguments.overlay,
        "probabilities": arguments.probabilities,
    }
    out, labels, skipped = open_output(folder, about), labels_of(saved), 0
    rest = list(still_to_do(photographs, folder))
    with torch.no_grad():
        for photograph in each(rest, "photographs", "image", what_next=WHAT_NEXT):
            try:
                label_photograph(saved, labels, photograph, out, arguments)
            except DatasetError as error:
                skipped += 1
                print(f"skipped: {error}", file=sys.stderr)
    before = len(photographs) - len(rest)
    print(f"{len(rest) - skipped} masks -> {folder}{f' ({before} were there)' if before else ''}")
    if skipped:
        raise DatasetError(f"{skipped} of {len(photographs)} photographs could not be read; they are named above")


if __name__ == "__main__":
    run(main)
