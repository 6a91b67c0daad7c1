"""What an evaluation found, as JSON, as a table on the console, and as a page that needs nothing but itself.

A report says what it is of (`SUBJECT`): the weights, the settings and the data. Only a report of the same takes its
place; one of anything else gets another name.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from config import config_to_dict
from datasets.base import SegmentationDataset
from explanation import pages
from explanation.pictures import fit, overlay
from inference import SavedModel
from metrics import ConfusionMatrix, bootstrap_difference
from runtime.errors import ConfigError
from runtime.files import replacing
from runtime.provenance import provenance


def percent(value: float | None, sign: str = "") -> str:
    """A share as a percentage with one digit, or "-" where there is none."""
    return "-" if value is None else f"{100 * value:{sign}.1f}"


# Key in `Explanations.summary` or `PartMetrics.summary`, name, how its value is shown, what it means.
METRICS: tuple[tuple[str, str, Callable[[Any], str], str], ...] = (
    ("used", "used", percent, "% of {prototypes} prototypes; never the first reason: {unused}"),
    ("purity", "purity", percent, "% of the nearest patches have the class; less than half: {impure}"),
    ("similarity", "similarity", "{:.3f}".format,
     "between prototypes of a class (1: the same); duplicates: {duplicates}"),
    ("explaining", "sparsity", "{:.1f}".format, "prototypes make up 95 % of a decision"),
    ("zeros", "zeros", percent, "% of the connections to other classes"),
    ("agreement", "agreement", lambda shares: percent(shares[0]),
     "% of nearest prototypes have the predicted class; of the {depth} nearest {last} %"),
    ("stability", "stability", percent, "% of cells keep their first reason under noise"),
    ("faithfulness", "faithfulness", "{:+.3f}".format, "probability lost with the first reasons, beyond random ones"),
    ("consistency", "consistency", percent, "% of prototypes hit the same part of their object"),
    ("part_stability", "part stability", percent, "% of prototypes and images: same parts under noise"),
)  # fmt: skip


# What two reports have to share for one to replace the other.
SUBJECT = ("weights", "settings", "tta", "window", "dataset", "split", "images")


class Evaluation(NamedTuple):
    """What one pass over a data set measured.

    tallies (N, 3, C) of each image; worst: (mIoU, index, classes (H, W) uint8) of the images labelled worst, worst
    first; explanations: metrics of a prototype model, or None.
    """

    dataset: SegmentationDataset
    matrix: ConfusionMatrix
    tallies: Tensor
    worst: list[tuple[float, int, np.ndarray]]
    explanations: dict | None


def about_model(path: Path, saved: SavedModel) -> dict:
    """What a report says of its model: which weights they were (a digest of names and values), with which settings."""
    inference, config, checkpoint = saved
    sections = config_to_dict(config)
    settings = {
        "model": sections["model"],
        "dataset": sections["dataset"] | {"root": os.path.abspath(config.dataset.root)},
        "precision": "bfloat16" if inference.is_bfloat16 else "float32",
        "device": inference.device.type,
    }
    return {
        "checkpoint": str(path),
        "weights": weights_digest(checkpoint.model),
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "settings": settings,
        "made_with": provenance(),
    }


def weights_digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of the names and the values of a state dict, whatever file they are in: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def report_of(result: Evaluation, about: dict) -> dict:
    """Everything that was measured as plain data, after what it is `about` (see `about_model`; tta, window).

    Classes that are in no label and no prediction have None instead of an IoU.
    """
    dataset, counts = result.dataset, result.matrix.counts.cpu()
    iou, accuracy = result.matrix.iou().tolist(), result.matrix.accuracy().tolist()
    return {
        **about,
        "dataset": dataset.config.name,
        "split": dataset.split,
        "images": len(dataset),
        **result.matrix.summary(),
        "classes": [
            {"name": name, "iou": _number(iou[i]), "accuracy": _number(accuracy[i]), "pixels": int(counts[i].sum())}
            for i, name in enumerate(dataset.mapping.names)
        ],
        "confusion": counts.tolist(),
        "worst": [{"image": dataset.image_id(index), "miou": miou} for miou, index, _ in result.worst],
        "explanations": result.explanations,
    }


def origin(report: dict) -> list[str]:
    """Where a report's numbers come from, in a few words each, for the page."""
    settings, made = report["settings"], report["made_with"]
    model = settings["model"]
    scales = ", ".join(f"{scale:g}" for scale in (1, *model["msc_scales"]))
    words = {
        f"weights {report['weights'][:12]}": True,
        f"step {report['step']:,} of {report['stage']}": report["stage"],
        f"data {settings['dataset']['root']}": True,
        f"{settings['precision']} on {settings['device']}": True,
        f"maximum of the {model['msc_fusion']} at scales {scales}": model["msc_scales"],
        "scales and flips averaged": report["tta"],
        f"windows of {report['window']} pixels averaged": report["window"],
        f"version {made['version']}": True,
        f"commit {made['commit'][:12]}": made["commit"],
    }
    return [word for word, holds in words.items() if holds]


def compare(first: Evaluation, second: Evaluation) -> dict:
    """How much better the second is: mIoU, its 95 % interval over images, and the IoU of each class.

    Raises ConfigError unless both were measured on the same images and classes.
    """
    same = [(d.mapping.names, [d.image_id(i) for i in range(len(d))]) for d in (first.dataset, second.dataset)]
    if same[0] != same[1]:
        raise ConfigError("these two checkpoints cannot be compared: their images or classes differ")
    low, high = bootstrap_difference(first.tallies, second.tallies)
    by_class = (second.matrix.iou() - first.matrix.iou()).tolist()
    miou = second.matrix.summary()["miou"] - first.matrix.summary()["miou"]
    return {"miou": miou, "low": low, "high": high, "classes": [_number(value) for value in by_class]}


def print_report(reports: Sequence[dict], difference: dict | None) -> None:
    """The table of classes and the means, one column of percentages for each checkpoint."""
    names = [c["name"] for c in reports[0]["classes"]]
    width = max(map(len, [*names, "mean accuracy", "pixel accuracy"]))
    tags = ["1: ", "2: "] if difference else [""]
    for tag, report in zip(tags, reports, strict=True):
        print(f"{tag}{report['checkpoint']} on {report['images']} images of {report['dataset']} {report['split']}")
    heads = [f"IoU {n}" for n in range(1, len(reports) + 1)] if difference else ["IoU"]
    print(" " * width + "".join(f"{head:>9}" for head in heads) + ("   2 - 1" if difference else ""))
    for i, name in enumerate(names):
        row = "".join(f"{percent(report['classes'][i]['iou']):>9}" for report in reports)
        print(f"{name:<{width}}{row}" + (f"{percent(difference['classes'][i], '+'):>8}" if difference else ""))
    for key, name in (("miou", "mIoU"), ("mean_accuracy", "mean accuracy"), ("pixel_accuracy", "pixel accuracy")):
        print(f"{name:<{width}}" + "".join(f"{percent(report[key]):>9}" for report in reports))
    for tag, report in zip(tags, reports, strict=True):
        if absent := absent_classes(report):
            print(f"{tag}'-' = in no label and no prediction, left out of the mean: {', '.join(absent)}")
    if difference:
        print(
            f"mIoU 2 - 1: {percent(difference['miou'], '+')} points, 95 % interval over images"
            f" {percent(difference['low'], '+')} to {percent(difference['high'], '+')}"
        )
    for tag, report in zip(tags, reports, strict=True):
        for name, text, meaning in explanation_lines(report["explanations"]):
            print(f"{tag}{name:<15}{text:>8}   {meaning}")


def explanation_lines(measured: dict | None) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of each of the `METRICS` that was measured, for the console and the page."""
    if measured is None:
        return []
    lists = {
        "unused": _listed(measured["unused"]),
        "impure": _listed(measured["impure"]),
        "duplicates": _listed([f"{p} and {q}" for p, q in measured["duplicates"]]),
        "depth": len(measured["agreement"]),
        "last": percent(measured["agreement"][-1]),
    }
    return [
        (name, show(measured[key]), meaning.format(**measured | lists))
        for key, name, show, meaning in METRICS
        if key in measured
    ]


def absent_classes(report: dict) -> list[str]:
    """Names of the classes that are in no label and no prediction."""
    return [c["name"] for c in report["classes"] if c["iou"] is None]


def _listed(items: list, most: int = 12) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more if items else "none"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- files -----------------------------------------------------------------------------------------------------


def write_report(
    folder: Path, name: str, results: Sequence[Evaluation], reports: Sequence[dict], difference: dict | None
) -> Path:
    """Write NAME.json and NAME.html, the page of it; the path of the former.

    Where that name is a report of something else, or not ours, it stays, and NAME_2, NAME_3 .. is tried.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = next(path for path in _names(folder, name) if _may_write(path, reports))
    if free.stem != name:
        print(f"{folder / name}.json is of another checkpoint, other settings or other data, and stays")
    content = {"checkpoints": reports, "difference": difference} if difference else reports[0]
    page = page_of(results, reports, difference)  # before anything is written: a picture may be missing
    with replacing(free, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
    pages.write_page(free.with_suffix(".html"), page)
    return free


def _names(folder: Path, name: str) -> Iterator[Path]:
    yield folder / f"{name}.json"
    yield from (folder / f"{name}_{number}.json" for number in itertools.count(2))


def _may_write(path: Path, reports: Sequence[dict]) -> bool:
    """Whether nothing is in the way of a report, or an earlier one of the same."""
    if not os.path.lexists(path):
        return not os.path.lexists(path.with_suffix(".html"))
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, RecursionError):
        return False
    there = found.get("checkpoints", [found]) if isinstance(found, dict) else []
    if not (isinstance(there, list) and all(isinstance(report, dict) for report in there)):
        return False
    return [_subject(report) for report in there] == [_subject(report) for report in reports]


def _subject(report: dict) -> dict:
    return {key: report.get(key) for key in SUBJECT}


# --- the page --------------------------------------------------------------------------------------------------


def page_of(results: Sequence[Evaluation], reports: Sequence[dict], difference: dict | None) -> str:
    """The page of one or two evaluations; it contains its pictures and style, runs no script and loads nothing."""
    return pages.render(
        "evaluation.html",
        styles=("style.css", "evaluation.css"),
        inline=True,
        filters={"percent": percent},
        reports=reports,
        difference=difference,
        pictures=[worst_pictures(result) for result in results],
        explanation_lines=explanation_lines,
        absent_classes=absent_classes,
        origin=origin,
    )


def worst_pictures(result: Evaluation) -> list[dict]:
    """The images that were labelled worst: name, mIoU, and image, truth and prediction as data: addresses."""
    dataset, found = result.dataset, []
    for miou, index, classes in result.worst:
        image, label = dataset.read(index)
        truth = np.array(label)
        layers = [image] + [overlay(image, labels, dataset.mapping.palette) for labels in (truth, classes)]
        found.append({"image": dataset.image_id(index), "miou": miou, "data": [_data_address(p) for p in layers]})
    return found


def _data_address(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    fit(picture, min(240, picture.height)).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
