"""Show what a model learned, and why each pixel got its class: pages to look at, from the disk, without a network.

    python explain.py --checkpoint models/final_checkpoint.pth              8 images of the val split
    python explain.py --checkpoint models/final_checkpoint.pth --split train --count 20
    python explain.py --checkpoint models/final_checkpoint.pth street.jpg holiday/   own photographs
    python explain.py --checkpoint models/final_checkpoint.pth --png        and each explanation as one picture

What is written: results/explanations/index.html, the gallery of all prototypes, and a page for each image on which
every pixel can be asked for its scores and the prototypes they are made of. The folder can be zipped and mailed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import override_config
from dataset import (
    IMAGE_TYPES,
    ClassMapping,
    DatasetError,
    SegmentationDataset,
    build_dataset,
    normalize,
    read_image,
    voc_palette,
)
from explanation.gallery import NEIGHBOURS, Subject, deciding_prototypes, describe_prototypes
from explanation.pages import is_ours, write_page
from explanation.pictures import explained_figure, fit, overlay, slug
from explanation.pixel_data import pack
from grid import IGNORE
from model import PPNet, PPNetOutput, pad_to_grid, upsample
from module import load_model
from runtime.command import add_set_argument, run, stop_flag
from runtime.device import choose_device
from runtime.errors import ConfigError

MAX_PHOTOGRAPH = 1024 * 2048  # pixels; larger ones are made smaller, so that a page stays below 3 MB
WRITTEN = ("index.html", "[0-9]*-*.html", "[0-9]*-*.png", "photographs/[0-9]*-*.jpg", "patches/[0-9]*-*.jpg")
DECIDES = (
    "At how many places of the {split} split the prototype decides: of all prototypes it adds most to the score of the"
    " class that is predicted there. Looked at is one pixel in {stride} x {stride}, a cell."
)
TWIN = (
    "This checkpoint is the black-box twin (model.head: linear). It has no prototypes to show: its scores are what it"
    " predicts, and nothing tells what they are made of."
)


class Item(NamedTuple):
    """An image to be explained: its name, and what reads it as (RGB image, label of mode L)."""

    name: str
    read: Callable[[], tuple[Image.Image, Image.Image]]


# --- an image --------------------------------------------------------------------------------------------------


@torch.no_grad()
def explain_image(subject: Subject, image: Image.Image) -> tuple[PPNetOutput, np.ndarray]:
    """The model's output for the padded image, and the predicted class of every pixel (H, W) uint8."""
    model = subject.model
    padded = pad_to_grid(normalize(image)[None].to(subject.device), 0.0, model.output_stride)
    output = model(padded)
    classes = upsample(output.logits, padded.shape[-2:])[0, :, : image.height, : image.width].argmax(0)
    return output, classes.to(torch.uint8).cpu().numpy()


def write_image(subject: Subject, item: Item, number: int, out: Path, faces: list[dict], png: bool) -> dict:
    """Write the page of an image, and its PNG if that is asked for; return its entry of the index.

    faces: of every prototype its class `index`, `source` in words and `picture`, "" if there is none.
    """
    image, label = item.read()
    notes = list(subject.scales_note) if faces else [TWIN]
    if label is None and image.width * image.height > MAX_PHOTOGRAPH:
        notes.append(f"The photograph has {image.width} × {image.height} pixels; it was made smaller to be predicted.")
        image = _at_most(image, MAX_PHOTOGRAPH)
    truth = np.full((image.height, image.width), IGNORE, np.uint8) if label is None else np.asarray(label)
    output, prediction = explain_image(subject, image)
    name = f"{number:03d}-{slug(Path(item.name).stem, 'image')}"
    known = truth != IGNORE
    entry = {
        "name": item.name,
        "page": f"{name}.html",
        "preview": f"photographs/{name}-small.jpg",
        "accuracy": float((prediction == truth)[known].mean()) if known.any() else None,
        "figure": f"{name}.png" if png else None,
    }
    painted = overlay(image, prediction, subject.mapping.palette)
    fit(painted, 180).save(out / entry["preview"], quality=85)
    photograph = f"photographs/{name}.jpg"
    image.save(out / photograph, quality=88)
    legend = _legend(subject, prediction)
    if png:
        rows = _figure_rows(subject, output, legend, image.size, faces, out) if faces else legend
        explained_figure(image, painted, rows).save(out / entry["figure"])
    values = {key: entry[key] for key in ("name", "accuracy", "figure")}
    values |= {"width": image.width, "height": image.height, "ratio": image.width / image.height}
    values |= {"photograph": photograph, "legend": legend, "notes": notes, "stride": subject.model.output_stride}
    data = _page_data(subject, output, prediction, truth, faces)
    write_page(out / entry["page"], "image.html", subject.mapping.palette, data=data, **values)
    return entry


def _page_data(subject: Subject, output: PPNetOutput, prediction: np.ndarray, truth: np.ndarray, faces) -> dict:
    weights = subject.model.last_layer.weight.tolist() if faces else []
    return pack(subject.model, output, prediction, truth) | {
        "classes": subject.mapping.names,
        "palette": subject.mapping.palette,
        "prototypes": faces,
        "weights": [[float(f"{weight:.8g}") for weight in row] for row in weights],
    }


def _legend(subject: Subject, prediction: np.ndarray) -> list[dict]:
    """The predicted classes, the largest first, with their shares of the pixels."""
    shares = np.bincount(prediction.ravel(), minlength=len(subject.mapping.names)) / prediction.size
    order = [c for c in np.argsort(-shares, kind="stable").tolist() if shares[c] > 0]
    names, palette = subject.mapping.names, subject.mapping.palette
    return [{"index": c, "name": names[c], "color": palette[c], "share": float(shares[c])} for c in order]


def _figure_rows(subject: Subject, output: PPNetOutput, legend: list[dict], size, faces, out: Path) -> list[dict]:
    """The legend with, for each class, the prototypes that decide most of its cells, at most 3; see the figure."""
    model, stride = subject.model, subject.model.output_stride
    winners, classes = deciding_prototypes(model, output, size)
    similarity = model.activations(output.distances[0, :, : len(winners), : winners.shape[1]])
    rows = []
    for entry in legend:
        of_class = classes == entry["index"]
        counts = torch.bincount(winners[of_class], minlength=len(faces))
        strongest = [p for p in counts.argsort(descending=True, stable=True)[:3].tolist() if counts[p]]
        prototypes = []
        for p in strongest:
            best = int(similarity[p].masked_fill((winners != p) | ~of_class, -torch.inf).argmax())
            prototypes.append({
                "prototype": p,
                "picture": Image.open(out / faces[p]["picture"]) if faces[p]["picture"] else None,
                "share": int(counts[p]) / int(of_class.sum()),
                "at": (best % winners.shape[1] * stride, best // winners.shape[1] * stride),
            })  # fmt: skip
        rows.append(entry | {"prototypes": prototypes})
    return rows


def _at_most(image: Image.Image, pixels: int) -> Image.Image:
    shrink = math.sqrt(pixels / (image.width * image.height))
    return image.resize([max(1, int(length * shrink)) for length in image.size], Image.Resampling.LANCZOS)


# --- the report ------------------------------------------------------------------------------------------------


def find_items(paths: list[str], dataset: SegmentationDataset | None, count: int) -> list[Item]:
    """Photographs at `paths` (files, or folders of them), then `count` images, evenly spread, of a data set.

    Raises DatasetError for a folder without photographs.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_TYPES) if path.is_dir() else [path]
        if not inside:
            raise DatasetError(f"{path}: no photograph in this folder (looked for {', '.join(IMAGE_TYPES)})")
        files += inside
    items = [Item(file.name, lambda file=file: (read_image(file, upright=True), None)) for file in files]
    if dataset is not None:
        count = min(count, len(dataset))
        chosen = [i * len(dataset) // count for i in range(count)]
        items += [Item(dataset.image_id(i), lambda i=i: dataset.read(i)) for i in chosen]
    return items


def prepare(out: Path) -> None:
    """Make the folder, without what an earlier call wrote there. Raises ConfigError if another's page is there."""
    if (out / "index.html").exists() and not is_ours(out / "index.html"):
        raise ConfigError(f"{out}: there is an index.html that was not made here; name another folder with --out")
    for pattern in WRITTEN:
        for path in out.glob(pattern):
            path.unlink()
    for folder in (out, out / "photographs", out / "patches"):
        folder.mkdir(parents=True, exist_ok=True)


def open_subject(arguments: argparse.Namespace) -> tuple[Subject, dict]:
    """The model and data of the command line, and all that the checkpoint holds.

    Without images to explain a missing data set is an error; own photographs can be explained without it.
    """
    model, config, state = load_model(arguments.checkpoint)
    changed = override_config(config, arguments.overrides)
    if changed.model != config.model:
        raise ConfigError("--set model.*: the model is the checkpoint's; only dataset, system and paths can be set")
    device = choose_device(changed.system.device)
    splits = []
    for split in (changed.dataset.train_split, changed.dataset.val_split):
        try:
            splits.append(build_dataset(changed, split))
        except DatasetError as error:
            if not arguments.images or arguments.split:
                raise
            print(f"without pictures of the {split} split: {error}", file=sys.stderr)
            splits.append(None)
    mapping = next((s.mapping for s in splits if s is not None), None)
    if mapping is None:
        names = state.get("class_names") or [f"class {c}" for c in range(changed.model.num_classes)]
        palette = state.get("palette") or voc_palette(len(names) + 1)[1:]
        mapping = ClassMapping(tuple(names), tuple(tuple(color) for color in palette), {})
    return Subject(model.to(device), changed, mapping, device, *splits), state


def write_index(
    subject: Subject, state: dict, images: list[dict], prototypes: list[dict], out: Path, name: str
) -> None:
    """Write index.html, and so end a report."""
    names, data = subject.mapping.names, subject.config.dataset
    classes = [
        {"index": c, "name": names[c], "prototypes": [p for p in prototypes if p["class"] == c]}
        for c in range(len(names))
    ]
    miou = state.get("metrics", {}).get("val_miou")
    facts = [
        data.name,
        f"{len(prototypes)} prototypes of {len(names)} classes" if prototypes else f"{len(names)} classes",
    ]
    facts += [f"val mIoU {miou:.3f}"] if isinstance(miou, float) and miou == miou else []
    is_twin = not isinstance(subject.model, PPNet)
    notes = ([TWIN] if is_twin else []) + subject.scales_note
    if subject.train_set is None and not is_twin:
        notes.append("The training data were not there: prototypes have no pictures, only the places they come from.")
    write_page(
        out / "index.html", "index.html", subject.mapping.palette, images=images, notes=notes, facts=facts,
        title="What the model predicts" if is_twin else "What the model learned", checkpoint=name, k=NEIGHBOURS,
        classes=[c for c in classes if c["prototypes"]],
        decided_means=DECIDES.format(split=data.val_split, stride=subject.model.output_stride),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file. Raises DatasetError at the end if a photograph was unreadable."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
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
    subject, state = open_subject(arguments)
    split = arguments.split or (None if arguments.images else subject.config.dataset.val_split)
    dataset = build_dataset(subject.config, split) if split else None
    items = find_items(arguments.images, dataset, arguments.count)
    out = Path(arguments.out or Path(subject.config.paths.results_dir) / "explanations")
    prepare(out)
    prototypes = []
    if isinstance(subject.model, PPNet):
        prototypes = describe_prototypes(subject, state.get("prototypes", []), out)
    else:
        print(TWIN)
    faces = [
        {
            "index": p["class"],
            "source": "{image}, x {x}, y {y}".format(**p["source"]) if p["source"] else "",
            "picture": p["patch"],
        }
        for p in prototypes
    ]
    entries, unreadable = [], 0
    for number, item in enumerate(tqdm(items, desc="images", unit="image", leave=False, disable=None), start=1):
        stop_flag.raise_if_set()
        try:
            entries.append(write_image(subject, item, number, out, faces, arguments.png))
        except DatasetError as error:
            unreadable += 1
            print(f"skipped: {error}", file=sys.stderr)
    write_index(subject, state, entries, prototypes, out, Path(arguments.checkpoint).name)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{len(prototypes)} prototypes and {len(entries)} images, {size / 1e6:.1f} MB -> {out / 'index.html'}")
    if unreadable:
        raise DatasetError(f"{unreadable} of {len(items)} images could not be read; they are named above")


if __name__ == "__main__":
    run(main)
