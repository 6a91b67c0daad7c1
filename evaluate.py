"""Evaluate checkpoints: how well they label whole images at native size, and what their explanations are worth.

    python evaluate.py --checkpoint models/final_checkpoint.pth
    python evaluate.py models/final_checkpoint.pth twin/models/final_checkpoint.pth     two models, side by side
    python evaluate.py --checkpoint FILE --tta                        averaged over scales and flips
    python evaluate.py --checkpoint FILE --sliding 513                averaged over overlapping windows of 513 pixels
    python evaluate.py --checkpoint FILE --split test --export DIR    files for the Cityscapes or VOC server
    torchrun --nproc_per_node 4 evaluate.py --checkpoint FILE         shared among four GPUs; the same numbers
    python evaluate.py --checkpoint FILE --set dataset.root=FOLDER    what the checkpoint's configuration says, changed

Written to results/evaluation/ (--set paths.results_dir=FOLDER): NAME.json with every number and what it is of, and
NAME.html, a page that needs nothing else. They replace those of the same weights, settings and data alone.
The metrics of the explanations belong to the plain whole image, and are left out with --tta and --sliding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dataset import build_dataset, check_classes
from evaluation.labelling import View
from evaluation.measuring import evaluate
from evaluation.report import Evaluation, about_model, compare, print_report, report_of, write_report
from evaluation.submission import Submission
from inference import open_model
from runtime import distributed
from runtime.command import add_set_argument, run
from runtime.errors import ConfigError


def evaluate_checkpoint(path: Path, arguments: argparse.Namespace) -> tuple[Evaluation, dict, Path]:
    """What was measured as the command line says, its report, and the folder for results."""
    saved = open_model(path, arguments.overrides)
    distributed.check_same({name: str(value) for name, value in vars(arguments).items() if name != "overrides"})
    config, grid = saved.config, saved.inference.grid
    if arguments.sliding is not None and not grid.fits(arguments.sliding):
        near = grid.scaled(arguments.sliding, 1.0)
        raise ConfigError(f"--sliding {arguments.sliding}: want whole cells of this model, for example {near}")
    dataset = build_dataset(config, arguments.split or config.dataset.val_split)
    check_classes(dataset, saved.checkpoint.class_names, path)
    export = Submission(dataset, arguments.export) if arguments.export else None
    view = View(arguments.tta, arguments.sliding)
    if export is not None:
        distributed.barrier()  # nobody writes before everybody has seen that the folder is empty
    result = evaluate(saved.inference, dataset, view, export, config.system.num_workers)
    if export is not None and distributed.rank() == 0:
        print(f"packed and checked {len(dataset)} images: {export.finish()}")
    report = report_of(result, about_model(path, saved) | view._asdict())
    return result, report, Path(config.paths.results_dir) / "evaluation"


def file_name(paths: list[Path], arguments: argparse.Namespace) -> str:
    """What the files of an evaluation are called: the checkpoint, and what is not the default."""
    parts = ["_vs_".join(path.stem for path in paths), arguments.split, "tta" if arguments.tta else None]
    parts += [f"sliding{arguments.sliding}" if arguments.sliding else None]
    return "_".join(part for part in parts if part)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[Path]]:
    """The command line and the one or two checkpoints that it names. Raises ConfigError."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
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
    if arguments.sliding is not None and arguments.sliding < 33:
        raise ConfigError(f"--sliding {arguments.sliding}: want at least 33, for example 513")
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
    written = write_report(folders[0], file_name(paths, arguments), results, reports, difference)
    print(f"written: {written} and {written.with_suffix('.html')}")


if __name__ == "__main__":
    run(main)
