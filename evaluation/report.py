"""What an evaluation found, as JSON, as a table on the console, and as a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from dataset import SegmentationDataset
from explanation.pictures import fit, overlay
from metrics import ConfusionMatrix, bootstrap_difference
from runtime.errors import ConfigError


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


def report_of(result: Evaluation, about: dict) -> dict:
    """Everything that was measured as plain data, after what it is `about` (checkpoint, stage, pruned, tta, window).

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
    """(name, value, meaning) of each metric of the explanations, for the console and the page."""
    if measured is None:
        return []
    share = {key: percent(value) for key, value in measured.items() if isinstance(value, float)}
    listed = {key: _listed(measured[key]) for key in ("unused", "impure")}
    pairs = _listed([f"{p} and {q}" for p, q in measured["duplicates"]])
    first, last = percent(measured["agreement"][0]), percent(measured["agreement"][-1])
    depth = len(measured["agreement"])
    lines = [
        (
            "used",
            share["used"],
            f"% of {measured['prototypes']} prototypes; never the first reason: {listed['unused']}",
        ),
        ("purity", share["purity"], f"% of the nearest patches have the class; less than half: {listed['impure']}"),
        (
            "similarity",
            f"{measured['similarity']:.3f}",
            f"between prototypes of a class (1: the same); duplicates: {pairs}",
        ),
        ("sparsity", f"{measured['explaining']:.1f}", "prototypes make up 95 % of a decision"),
        ("zeros", share["zeros"], "% of the connections to other classes"),
        ("agreement", first, f"% of nearest prototypes have the predicted class; of the {depth} nearest {last} %"),
        ("stability", share["stability"], "% of cells keep their first reason under noise"),
        (
            "faithfulness",
            f"{measured['faithfulness']:+.3f}",
            "probability lost with the first reasons, beyond random ones",
        ),
    ]
    if "consistency" in measured:
        lines.append(("consistency", share["consistency"], "% of prototypes hit the same part of their object"))
        lines.append(("part stability", share["part_stability"], "% of prototypes and images: same parts under noise"))
    return lines


def _listed(items: list, most: int = 12) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more if items else "none"


def absent_classes(report: dict) -> list[str]:
    """Names of the classes that are in no label and no prediction."""
    return [c["name"] for c in report["classes"] if c["iou"] is None]


def percent(value: float | None, sign: str = "") -> str:
    """A share as a percentage with one digit, or "-" where there is none."""
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- the page --------------------------------------------------------------------------------------------------


def write_page(path: Path, results: Sequence[Evaluation], reports: Sequence[dict], difference: dict | None) -> None:
    """The page of one or two evaluations; it contains its pictures and style, runs no script and loads nothing."""
    templates = Path(__file__).parent.parent / "explanation" / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = percent
    style = "".join((templates / name).read_text(encoding="utf-8") for name in ("style.css", "evaluation.css"))
    page = environment.get_template("evaluation.html").render(
        generator="prototype segmentation: evaluate.py",
        policy="default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script="",
        reports=reports,
        difference=difference,
        pictures=[worst_pictures(result) for result in results],
        explanation_lines=explanation_lines,
        absent_classes=absent_classes,
    )
    path.write_text(page, encoding="utf-8", errors="replace")  # names may hold bytes that no encoding has


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
