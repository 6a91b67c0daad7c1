"""Evaluate checkpoints: how well they label whole images at native size, and what their explanations are worth.

    python evaluate.py --checkpoint models/final_checkpoint.pth
    python evaluate.py models/final_checkpoint.pth twin/models/final_checkpoint.pth     two models, side by side
    python evaluate.py --checkpoint FILE --tta                        averaged over scales and flips
    python evaluate.py --checkpoint FILE --sliding 513                averaged over overlapping windows of 513 pixels
    python evaluate.py --checkpoint FILE --split test --export DIR    files for the Cityscapes or VOC server
    torchrun --nproc_per_node 4 evaluate.py --checkpoint FILE         shared among four GPUs; the same numbers
    python evaluate.py --checkpoint FILE --set dataset.root=FOLDER    what the checkpoint's configuration says, changed

Written to results/evaluation/: NAME.json with every number, and NAME.html, a page that needs nothing else.
The metrics of the explanations belong to the plain whole image, and are left out with --tta and --sliding.
"""

from __future__ import annotations

import argparse
import json
from collections import ChainMap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset import SegmentationDataset, build_dataset, own_images
from evaluation.interpretability import NOISE, Explanations
from evaluation.parts import PartMetrics, find_part_labels, read_parts
from evaluation.report import Evaluation, compare, print_report, report_of, write_page
from evaluation.submission import Export
from metrics import ConfusionMatrix
from model import PPNet, cell_labels, multi_scale_outputs, pad_to_grid, upsample
from module import TrainingModule, load_model
from runtime import distributed
from runtime.command import add_set_argument, run, stop_flag
from runtime.device import choose_device
from runtime.errors import ConfigError

TTA_SCALES = (0.75, 1.0, 1.25)
WORST = 6  # images that are shown


class View(NamedTuple):
    """How an image is looked at: averaged over scales and flips, in windows of so many pixels, or neither."""

    tta: bool = False
    window: int | None = None

    @property
    def is_plain(self) -> bool:
        return not self.tta and self.window is None


# --- labelling an image ----------------------------------------------------------------------------------------


def sliding_logits(classify: Callable[[Tensor], Tensor], images: Tensor, window: int, stride: int) -> Tensor:
    """Logits (1, C, h, w) on the grid of images (1, 3, sk+1, sl+1): the weighted mean over overlapping windows.

    classify: images to logits on their grid. window: sk+1 pixels; windows overlap by at least half, begin on grid
    cells, so that their cells coincide, and the last one of a row or column ends with the image. A cell's weight falls
    linearly towards the window's border, where it sees less of what is around it.
    """
    sizes = [min(window, length) for length in images.shape[-2:]]
    hats = [_hat((size - 1) // stride + 1, images.device) for size in sizes]
    weight = hats[0][:, None] * hats[1]
    tops, lefts = (_starts(n, size, stride) for n, size in zip(images.shape[-2:], sizes, strict=True))
    total = count = 0
    for top in tops:
        for left in lefts:
            if distributed.world_size() == 1:
                stop_flag.raise_if_set()
            logits = classify(images[..., top : top + sizes[0], left : left + sizes[1]])
            around = [left, images.shape[3] - left - sizes[1], top, images.shape[2] - top - sizes[0]]
            around = [pixels // stride for pixels in around]
            total = total + F.pad(logits * weight, around)
            count = count + F.pad(weight, around)
    return total / count


def _hat(cells: int, device: torch.device) -> Tensor:
    index = torch.arange(cells, device=device)
    return torch.minimum(index + 1, cells - index).float()


def _starts(length: int, size: int, stride: int) -> list[int]:
    step = max(stride, (size - 1) // 2 // stride * stride)
    return sorted({*range(0, length - size, step), length - size})


def tta_logits(classify: Callable[[Tensor], Tensor], images: Tensor, stride: int) -> Tensor:
    """Mean probabilities (1, C, H, W) over scales and horizontal flips of images (1, 3, H, W), H and W sk+1."""
    total = 0
    for scale in TTA_SCALES:
        scaled = upsample(images, [max(1, round((n - 1) * scale / stride)) * stride + 1 for n in images.shape[-2:]])
        for flipped in (False, True):
            logits = classify(scaled.flip(3)).flip(3) if flipped else classify(scaled)
            total = total + upsample(logits.float().softmax(1), images.shape[-2:])
    return total / (2 * len(TTA_SCALES))


def label_image(module: TrainingModule, image: Tensor, view: View) -> tuple[Tensor, Tensor | None]:
    """Classes (1, H, W) of an image (1, 3, H, W), and its distances (1, P, h, w) if it was seen as a whole."""
    model, scales = module.model, module.config.model.msc_scales
    padded = pad_to_grid(image, 0.0, model.output_stride)
    stride, distances = model.output_stride, None

    def classify(images: Tensor) -> Tensor:
        return multi_scale_outputs(model, images, scales)[-1].logits

    def classify_windows(images: Tensor) -> Tensor:
        return sliding_logits(classify, images, view.window, stride)

    with module.autocast():
        if view.tta:
            scores = tta_logits(classify_windows if view.window else classify, padded, stride)
        elif view.window:
            scores = classify_windows(padded)
        else:
            outputs = multi_scale_outputs(model, padded, scales)
            scores, distances = outputs[-1].logits, outputs[0].distances
    height, width = image.shape[-2:]
    return upsample(scores, padded.shape[-2:])[..., :height, :width].argmax(1), distances


# --- measuring -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(module: TrainingModule, dataset: SegmentationDataset, view: View, export: Export | None) -> Evaluation:
    """Label every image at native size, in one pass; memory is that of one image. export: also write the labels.

    Under torchrun each process takes its share of the images, and all of them return the whole result.
    """
    module.model.eval()
    explained = Explained(module, dataset) if isinstance(module.model, PPNet) and view.is_plain else None
    matrix, tallies, worst = ConfusionMatrix(dataset.num_classes, module.device), {}, []
    for index, image, label in own_images(dataset, module.config.system.num_workers, dataset.split):
        if (
            index < len(dataset) // distributed.world_size() * distributed.world_size()
        ):  # as many times in every process
            distributed.agree_on_stop()
            stop_flag.raise_if_set()
        image = image.to(module.device, non_blocking=True, memory_format=torch.channels_last)
        classes, distances = label_image(module, image, view)
        label = label.to(module.device, non_blocking=True)
        ours = ConfusionMatrix(dataset.num_classes, module.device)
        ours.update(classes, label)
        matrix.counts += ours.counts
        tallies[index] = ours.tallies().cpu()
        drawn = classes[0].byte().cpu().numpy()
        if export is not None:
            export.write(index, drawn)
        if ours.counts.any():
            worst = _worst([*worst, (ours.summary()["miou"], index, drawn)])
            if explained is not None:
                explained.update(index, image, label, distances)
    explanations = explained.summary() if explained is not None else None
    distributed.all_reduce(matrix.counts)
    tallies = ChainMap(*distributed.all_gather_objects(tallies))
    worst = _worst([item for part in distributed.all_gather_objects(worst) for item in part])
    if export is not None:
        export.written = ChainMap(*distributed.all_gather_objects(export.written))
    return Evaluation(dataset, matrix, torch.stack([tallies[i] for i in range(len(dataset))]), worst, explanations)


def _worst(images: list[tuple]) -> list[tuple]:
    return sorted(images, key=lambda item: item[:2])[:WORST]


class Explained:
    """The explanations of a prototype model on a data set, measured: with part labels too, where there are any."""

    def __init__(self, module: TrainingModule, dataset: SegmentationDataset):
        self.module, self.dataset = module, dataset
        self.explanations = Explanations(module.model)
        self.part_files = find_part_labels(dataset)
        self.parts = PartMetrics(module.model.prototype_class)

    def update(self, index: int, image: Tensor, label: Tensor, distances: Tensor) -> None:
        """Add an image (1, 3, H, W) with its label (1, H, W) and distances; the noise is a function of its index."""
        model = self.module.model
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(index)).to(image.device)
        with self.module.autocast():
            noisy = model(pad_to_grid(image + NOISE * noise, 0.0, model.output_stride)).distances
        cells = cell_labels(label, distances.shape[2:], model.output_stride)
        self.explanations.update(index, distances, noisy, cells)
        if index in self.part_files:
            parts = read_parts(self.part_files[index], (label.shape[2], label.shape[1]))
            activations = (model.activations(d[0]) for d in (distances, noisy))
            self.parts.update(*activations, label[0], parts, model.output_stride)

    def summary(self) -> dict | None:
        """See `Explanations.summary` and `PartMetrics.summary`; without part labels there are none of the latter.

        Of several processes, all have to call it.
        """
        self.explanations.merge()
        self.parts.merge()
        explanations = self.explanations.summary()
        return explanations and explanations | (self.parts.summary() or {})


# --- the command -----------------------------------------------------------------------------------------------


def evaluate_checkpoint(path: Path, arguments: argparse.Namespace) -> tuple[Evaluation, dict, Path]:
    """What was measured as the command line says, its report, and the folder that the configuration has for results."""
    model, config, state = load_model(path, overrides=arguments.overrides)
    distributed.start(config.system.timeout)
    module = TrainingModule(config, model, choose_device(config.system.device))
    dataset = build_dataset(config, arguments.split or config.dataset.val_split)
    export = Export(dataset, arguments.export) if arguments.export else None
    view = View(arguments.tta, arguments.sliding)
    if export is not None:
        distributed.barrier()  # nobody writes before everybody has seen that the folder is empty
    result = evaluate(module, dataset, view, export)
    if export is not None and distributed.rank() == 0:
        print(f"packed and checked {len(dataset)} images: {export.finish()}")
    about = {"checkpoint": str(path), "stage": state.get("stage", ""), "pruned": bool(state.get("pruned"))}
    report = report_of(result, about | view._asdict())
    return result, report, Path(config.paths.results_dir) / "evaluation"


def file_name(paths: list[Path], arguments: argparse.Namespace) -> str:
    """What the files of an evaluation are called: the checkpoint, and what is not the default."""
    parts = ["_vs_".join(path.stem for path in paths), arguments.split, "tta" if arguments.tta else None]
    parts += [f"sliding{arguments.sliding}" if arguments.sliding else None]
    return "_".join(part for part in parts if part)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[Path]]:
    """The command line and the one or two checkpoints that it names. Raises ConfigError."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="one, or two to compare")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="the same as naming one")
    parser.add_argument("--split", metavar="NAME", help="part of the data set (default: its validation split)")
    parser.add_argument("--tta", action="store_true", help="average over scales and flips")
    parser.add_argument("--sliding", type=int, metavar="WINDOW", help="average over windows of so many pixels (8k + 1)")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write what the Cityscapes or VOC server takes")
    add_set_argument(parser)
    arguments = parser.parse_args(argv)
    paths = ([arguments.checkpoint] if arguments.checkpoint else []) + arguments.checkpoints
    if len(paths) not in (1, 2) or (arguments.export and len(paths) == 2):
        raise ConfigError("name one checkpoint, or two to compare them (without --export)")
    if arguments.sliding is not None and (arguments.sliding < 33 or arguments.sliding % 8 != 1):
        raise ConfigError(f"--sliding {arguments.sliding}: want a multiple of 8 plus 1, at least 33, for example 513")
    return arguments, paths


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file."""
    arguments, paths = parse_arguments(argv)
    results, reports, folders = zip(*(evaluate_checkpoint(path, arguments) for path in paths), strict=True)
    if distributed.rank() > 0:
        return
    if not any(result.matrix.counts.any() for result in results):
        print(f"nothing is labelled in the split '{results[0].dataset.split}', so nothing was measured")
        return
    difference = compare(*results) if len(results) == 2 else None
    print_report(reports, difference)
    folder, name = folders[0], file_name(paths, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"checkpoints": reports, "difference": difference} if difference else reports[0]
    (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    write_page(folder / f"{name}.html", results, reports, difference)
    print(f"written: {folder / name}.json and {folder / name}.html")


if __name__ == "__main__":
    run(main)
