"""Prune a prototype model: drop the prototypes whose nearest training patches are mostly of another class.

    python prune.py --checkpoint models/push_checkpoint.pth
    python prune.py --checkpoint models/push_checkpoint.pth --k 6 --threshold 3      the same, as published

Of the k training patches nearest to a prototype (at most one an image, of any class) at least `threshold` must have
its class, or it goes, with its column of the last layer. A class never loses its last prototype: its best one stays.
Written: models/pruned/push_checkpoint.pth, the run folder of a model of its own (then pruned_2/, ...), that begins
with fewer prototypes and their records renumbered; in results/pruned/ its config.yaml and the pictures of what is
left. The command that trains it further is printed.
Source: Sacha et al., "ProtoSeg" (WACV 2023), section 3.4, after Chen et al., "This Looks Like That" (NeurIPS 2019).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from config import Config, config_to_dict
from dataset import build_dataset, check_classes
from datasets.base import SegmentationDataset
from explanation.prototype_pictures import draw_prototypes
from inference import open_model
from model import PPNet
from push import Neighbours, find_neighbours
from runtime.checkpoint import Checkpoint, save_checkpoint
from runtime.command import add_set_argument, run
from runtime.errors import ConfigError
from runtime.files import OutputFolder
from runtime.provenance import provenance
from schedule import Command, ResultsFolder, Stage, folders_of_pruned, plan, stage_of


def choose_prototypes(found: Neighbours, prototype_class: Tensor, threshold: int) -> tuple[Tensor, list[int]]:
    """Which prototypes stay: (K,) indices in order; and those of them that stay only as the best of their class.

    found: (P, k) neighbours, prototype_class (P,). The best has most neighbours of its class; of equals, the one that
    is nearest to its nearest patch.
    """
    own = (found.label == prototype_class[:, None]).sum(1)
    keep = own >= threshold
    spared = []
    for class_index in prototype_class.unique().tolist():
        members = (prototype_class == class_index).nonzero().flatten()
        if not keep[members].any():
            best = min(members.tolist(), key=lambda p: (-int(own[p]), float(found.distance[p, 0])))
            keep[best] = True
            spared.append(best)
    return keep.nonzero().flatten(), spared


def renumber(records: tuple[dict, ...], kept: list[int]) -> list[dict]:
    """The provenance records (one a prototype, or none before a push) of the prototypes that stay, numbered anew."""
    return [{**records[old], "prototype": new} for new, old in enumerate(kept)] if records else []


def describe(found: Neighbours, prototype_class: Tensor, kept: Tensor, spared: list[int], names: tuple) -> list[str]:
    """A line for each prototype that goes, and for each that stays as the last of its class."""
    own = (found.label == prototype_class[:, None]).sum(1).tolist()
    gone = sorted(set(range(len(own))) - set(kept.tolist()))
    k = found.label.shape[1]

    def line(p: int, what: str) -> str:
        name = names[int(prototype_class[p])]
        return f"prototype {p} of '{name}' {what}: {own[p]} of its {k} nearest patches have that class"

    return [line(p, "goes") for p in gone] + [line(p, "stays, as the best of its class") for p in spared]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises ConfigError for a rule that makes no sense."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the model, usually pushed")
    parser.add_argument("--k", type=int, default=6, help="patches to look at (default: %(default)s)")
    parser.add_argument("--threshold", type=int, default=3, help="of its class, to stay (default: %(default)s)")
    add_set_argument(parser)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.threshold <= arguments.k or arguments.k < 1:
        raise ConfigError(f"--k {arguments.k} --threshold {arguments.threshold}: want 0 <= threshold <= k and k >= 1")
    return arguments


def place_of(config: Config, checkpoint: Checkpoint, path: Path) -> Stage:
    """The stage whose result the pruned model is: the one that its checkpoint ends; before the last, if it is the last.

    So there is a phase that trains it further.
    """
    schedule, stage = plan(config), stage_of(config, checkpoint, path)
    return stage if stage != schedule[-1] or len(schedule) == 1 else schedule[-2]


def pictured(config: Config, checkpoint: Checkpoint, path: Path) -> SegmentationDataset | None:
    """The data that the prototypes were taken from, None before a push. Raises ConfigError if they are other ones."""
    records = [record for record in checkpoint.prototypes if record["image"] is not None]
    if not records:
        return None
    dataset = build_dataset(config, records[0]["split"])
    for record in records:
        index = record["image_index"]
        if index >= len(dataset) or dataset.image_id(index) != record["image"]:
            raise ConfigError(
                f"{path}: its prototypes come from other data: image {index} of the split '{dataset.split}' was"
                f" {record['image']}. Where are they? --set dataset.root=FOLDER"
            )
    return dataset


def own_run(config: Config, path: Path) -> Config:
    """The configuration of the pruned model's run: its folders, which are beside `path` and in the results' folder."""
    models, results = (
        os.path.abspath(folder) for folder in folders_of_pruned(path.parent, Path(config.paths.results_dir))
    )
    root = os.path.abspath(config.dataset.root)
    return dataclasses.replace(
        config,
        dataset=dataclasses.replace(config.dataset, root=root),
        paths=dataclasses.replace(config.paths, model_dir=models, results_dir=results),
    )


def begin_run(config: Config, stage: Stage, pruned: Checkpoint, draw: Callable[[OutputFolder], list[dict]]) -> Path:
    """Write what the run of the pruned model begins with, its checkpoint last; the checkpoint's path."""
    models, results = Path(config.paths.model_dir), Path(config.paths.results_dir)
    models.mkdir()  # fails if another pruning was faster
    try:
        results.mkdir(parents=True)
        records = draw(OutputFolder(results / "prototypes"))
        ResultsFolder(results, models).claim(config, pruned.provenance)
        save_checkpoint(models / stage.file, pruned.with_(prototypes=tuple(records)))
    except BaseException:
        with suppress(OSError):
            models.rmdir()
        raise
    return models / stage.file


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file."""
    arguments = parse_arguments(argv)
    path = arguments.checkpoint
    inference, config, checkpoint = open_model(path, arguments.overrides)
    model = inference.model
    if not isinstance(model, PPNet):
        raise ConfigError(f"{path}: the linear head has no prototypes; there is nothing to prune")
    stage = place_of(config, checkpoint, path)
    train_set, val_set = (build_dataset(config, s) for s in (config.dataset.train_split, config.dataset.val_split))
    check_classes(train_set, checkpoint.class_names, path)
    source = pictured(config, checkpoint, path)
    if len(train_set) < arguments.k:
        raise ConfigError(f"--k {arguments.k}: there are only {len(train_set)} training images, one patch each")
    workers, count = config.system.num_workers, len(model.prototype_class)

    before = inference.validate(val_set, workers).summary()["miou"]
    found = find_neighbours(inference, train_set, arguments.k, num_workers=workers)
    kept, spared = choose_prototypes(found, model.prototype_class, arguments.threshold)
    for line in describe(found, model.prototype_class, kept, spared, train_set.mapping.names):
        print(line)
    model.keep_prototypes(kept)
    after = inference.validate(val_set, workers).summary()["miou"]
    records = renumber(checkpoint.prototypes, kept.tolist())
    steps = checkpoint.step if stage.name == checkpoint.stage else config.training.phases[stage.phase].steps
    pruned = checkpoint.with_(
        config=config_to_dict(config),
        **{"stage": stage.name, "phase": stage.phase, "step": steps, "midway": None},
        model=model.state_dict(),
        metrics={"val_miou": after},
        provenance={"train_images": str(len(train_set)), **provenance()},
    )
    own, draw = own_run(config, path), lambda to: draw_prototypes(inference, source, records, to) if source else records
    written = begin_run(own, stage, pruned, draw)
    print(f"{len(kept)} of {count} prototypes are left; val mIoU {before:.4f} before, {after:.4f} after -> {written}")
    if stage != plan(config)[-1]:
        command = Command(str(Path(own.paths.results_dir) / "config.yaml"), own)
        print(f"to train it further: {command.text('auto')}")


if __name__ == "__main__":
    run(main)
