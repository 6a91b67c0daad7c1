"""Prune a prototype model: drop the prototypes whose nearest training patches are mostly of another class.

    python prune.py --checkpoint models/push_checkpoint.pth
    python prune.py --checkpoint models/push_checkpoint.pth --k 6 --threshold 3      the same, as published
    python train.py --resume models/pruned_checkpoint.pth                             trains on with what is left

Of the k training patches nearest to a prototype (at most one an image, of any class) at least `threshold` must have
its class, or it goes, with its column of the last layer. A class never loses its last prototype: its best one stays.
Written: models/pruned_checkpoint.pth, the checkpoint it came from with fewer prototypes and their records renumbered.
Source: Sacha et al., "ProtoSeg" (WACV 2023), section 3.4, after Chen et al., "This Looks Like That" (NeurIPS 2019).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor

from config import Config
from dataset import build_dataset
from model import PPNet
from module import TrainingModule, load_model
from push import Neighbours, find_neighbours
from runtime.checkpoint import save_checkpoint
from runtime.command import add_set_argument, run
from runtime.device import choose_device
from runtime.errors import ConfigError


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


def renumber(records: list[dict], kept: list[int]) -> list[dict]:
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
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="the model, usually pushed")
    parser.add_argument("--k", type=int, default=6, help="patches to look at (default: %(default)s)")
    parser.add_argument("--threshold", type=int, default=3, help="of its class, to stay (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier pruned checkpoint")
    add_set_argument(parser)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.threshold <= arguments.k or arguments.k < 1:
        raise ConfigError(f"--k {arguments.k} --threshold {arguments.threshold}: want 0 <= threshold <= k and k >= 1")
    return arguments


def output_path(config: Config, overwrite: bool) -> Path:
    """Where the pruned checkpoint goes. Raises ConfigError if something is there that may not be replaced."""
    path = Path(config.paths.model_dir) / "pruned_checkpoint.pth"
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; to replace it: --overwrite")
    return path


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file."""
    arguments = parse_arguments(argv)
    model, config, state = load_model(arguments.checkpoint, overrides=arguments.overrides)
    if not isinstance(model, PPNet):
        raise ConfigError(f"{arguments.checkpoint}: the linear head has no prototypes; there is nothing to prune")
    path = output_path(config, arguments.overwrite)
    module = TrainingModule(config, model, choose_device(config.system.device))
    train_set = build_dataset(config, config.dataset.train_split)
    val_set = build_dataset(config, config.dataset.val_split)
    if len(train_set) < arguments.k:
        raise ConfigError(f"--k {arguments.k}: there are only {len(train_set)} training images, one patch each")
    workers, count = config.system.num_workers, len(model.prototype_class)

    before = module.validate(val_set, workers).summary()["miou"]
    with module.autocast():
        found = find_neighbours(model, train_set, module.device, arguments.k, workers)
    kept, spared = choose_prototypes(found, model.prototype_class, arguments.threshold)
    for line in describe(found, model.prototype_class, kept, spared, train_set.mapping.names):
        print(line)
    model.keep_prototypes(kept)
    after = module.validate(val_set, workers).summary()["miou"]
    copied = {key: state[key] for key in ("config", "stage", "phase", "step", "class_names") if key in state}
    save_checkpoint(
        path,
        copied
        | {
            "model": model.state_dict(),
            "prototypes": renumber(state.get("prototypes", []), kept.tolist()),
            "metrics": {"val_miou": after},
            "pruned": True,
        },
    )
    print(f"{len(kept)} of {count} prototypes are left; val mIoU {before:.4f} before, {after:.4f} after -> {path}")
    was_last = state["phase"] + 1 == len(config.training.phases)
    again = f"--phase {state['phase']} " if was_last else ""
    print(f"to train it further, with the --config and --set of its training: python train.py {again}--resume {path}")


if __name__ == "__main__":
    run(main)
