"""What version 1 (commit 9d3e53c) wrote: the files of tests/data/v1/ that tests/test_compatibility.py reads.

    git worktree add OLD 9d3e53c && cp tests/make_v1.py OLD/tests/ && cd OLD && python -m tests.make_v1 FOLDER

It runs that version's code, on a network of 1,900 weights: a training, a pruning, the finetuning of what is left, and
an evaluation of each.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import deeplab_features
import evaluate
import prune
import train

CONFIG = """
dataset:
  name: shapes
  root: .
  crop_size: 65
  shapes: {train_images: 6, val_images: 3, image_size: 71}
model:
  num_classes: 6
  backbone: resnet18
  pretrained: none
  prototype_shape: [12, 8, 1, 1]
  distance_scale: 0.0625
training:
  iter_size: 2
  log_every: 5
  val_every: 5
  checkpoint_every: 45
  phases:
    - {name: warmup, steps: 4, lr: {add_on: 1e-2, prototypes: 1e-2, last_layer: 1e-2}}
    - name: joint
      steps: 80
      schedule: poly
      push: true
      lr: {backbone: 2e-2, add_on: 2e-2, prototypes: 2e-2, last_layer: 2e-2}
    - {name: finetune, steps: 50, early_stopping: 20, lr: {last_layer: 1e-2}}
system: {device: cpu, num_workers: 0}
"""


class Network(nn.Module):
    """What DeepLabFeatures needs of a ResNet, 4 channels wide."""

    def __init__(self, weights=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
            for _ in range(3)
        )
        self.avgpool, self.fc = nn.Identity(), nn.Linear(4, 1)


def measured(name: str) -> dict:
    """What evaluate.py finds for a checkpoint in models/."""
    evaluate.main(["--checkpoint", f"models/{name}_checkpoint.pth"])
    report = json.loads(Path(f"results/evaluation/{name}_checkpoint.json").read_text())
    return {key: report[key] for key in ("miou", "pixel_accuracy", "confusion", "explanations")}


def copy_midway(save):
    """`save_checkpoint` that keeps two last_checkpoints at step 45, half-way to an update: of joint, and pruned."""

    def save_and_copy(path, state, keep_previous=False):
        save(path, state, keep_previous)
        if "optimizer" in state and (state["stage"] == "joint" or state["pruned"]):
            shutil.copy(path, f"models/midway_{path.name}")

    return save_and_copy


def main(target: Path) -> None:
    """Train, prune, finetune and evaluate in the working folder; copy to `target` what the test reads."""
    torch.set_num_threads(1)
    deeplab_features.BACKBONES["resnet18"] = (Network, None)
    train.save_checkpoint = copy_midway(train.save_checkpoint)
    Path("config.yaml").write_text(CONFIG)
    train.main(["--config", "config.yaml"])
    prune.main(["--checkpoint", "models/push_checkpoint.pth", "--k", "4", "--threshold", "3"])
    train.main(["--config", "config.yaml", "--resume", "models/pruned_checkpoint.pth"])
    names = ("push", "final", "pruned", "pruned_final")
    about = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    numbers = about | {name: measured(name) for name in names}
    target.mkdir(parents=True, exist_ok=True)
    (target / "numbers.json").write_text(json.dumps(numbers) + "\n")
    shutil.copy("results/config.yaml", target)
    for name in names:
        shutil.copy(f"models/{name}_checkpoint.pth", target)
    for name in ("last", "pruned_last"):
        shutil.copy(f"models/midway_{name}_checkpoint.pth", target / f"{name}_checkpoint.pth")


if __name__ == "__main__":
    where = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(where)
