"""The whole pipeline on generated scenes, in under a minute on a CPU, in a temporary folder.

    python example_usage.py

A small model takes a few steps of every phase, its prototypes are pushed, it is saved, loaded again, and one pixel
is explained. Each part prints a line; the exit code is not 0 if any part fails. The numbers are those of a model
that has hardly been trained: `python train.py --config configs/demo.yaml` trains one.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from config import Config, DatasetConfig, LearningRates, ModelConfig, PhaseConfig, TrainingConfig, config_to_dict
from dataset import build_dataset
from datasets.batches import StepSampler, TrainingSamples, TrainTransform, train_batches
from explanation.prototype_pictures import draw_prototypes
from inference import open_model
from model import PPNet, construct_PPNet
from module import TrainingModule
from push import push_prototypes
from runtime.checkpoint import Checkpoint, save_checkpoint
from runtime.command import run
from runtime.files import OutputFolder

STEPS = 6
ALL = LearningRates(backbone=1e-3, add_on=1e-3, prototypes=1e-3, last_layer=1e-3)
HEAD = LearningRates(add_on=1e-3, prototypes=1e-3, last_layer=1e-3)
CONFIG = Config(
    dataset=DatasetConfig(name="shapes", root=".", crop_size=97),
    model=ModelConfig(num_classes=6, backbone="resnet18", pretrained="none", prototype_shape=(12, 16, 1, 1)),
    training=TrainingConfig(
        batch_size=2,
        iter_size=2,
        phases=(
            PhaseConfig(name="warmup", steps=STEPS, lr=HEAD),
            PhaseConfig(name="joint", steps=STEPS, lr=ALL, schedule="poly", push=True),
            PhaseConfig(name="finetune", steps=STEPS, lr=LearningRates(last_layer=1e-3)),
        ),
    ),
)
SHAPES = dataclasses.replace(CONFIG.dataset.shapes, train_images=8, val_images=4)
CONFIG = dataclasses.replace(CONFIG, dataset=dataclasses.replace(CONFIG.dataset, shapes=SHAPES))


def dummy_model() -> str:
    """Any module that maps images to (B, D, h, w) can be the features of a PPNet."""
    features = nn.Conv2d(3, 16, kernel_size=8, stride=8)
    model = PPNet(features, (10, 16, 1, 1), num_classes=5)
    logits = model.predict(torch.rand(2, 3, 60, 100))
    _expect(logits.shape == (2, 5, 60, 100), "logits have the size of the image")
    return f"{len(model.prototype_class)} prototypes of {model.num_classes} classes, logits {tuple(logits.shape)}"


def train_phase(module: TrainingModule, dataset, phase: int) -> str:
    """A few steps of one phase; what it does not train stays as it is."""
    _expect(module.begin_phase(phase) is not None, "the phase trains something")
    before = {name: p.detach().clone() for name, p in module.model.named_parameters()}
    sampler = StepSampler(len(dataset), 2, seed=0, phase=phase, last=STEPS)
    samples = TrainingSamples(dataset, TrainTransform(CONFIG.dataset), seed=0, phase=phase)
    for images, labels in train_batches(samples, sampler, num_workers=0):
        module.training_step(images, labels)
    for name, parameter in module.model.named_parameters():
        _expect(parameter.requires_grad != torch.equal(parameter, before[name]), f"{name} moves only if it is trained")
    averages = module.take_averages()
    return f"{STEPS} steps of {', '.join(module.learning_rates())}; loss {averages['total']:.3f}"


def explain_pixel(model: PPNet, dataset, x: int = 40, y: int = 90) -> str:
    """The class of a pixel as the sum of what the prototypes contribute."""
    image = model.grid.pad(dataset[0][0][None], 0.0)
    with torch.no_grad():
        logits = model.predict(image)[0, :, y, x]
        winner = int(logits.argmax())
        shares = model.contributions(model(image).distances)[:, winner]
        shares = model.grid.upsample(shares, image.shape[2:])[0, :, y, x]
    _expect(torch.allclose(shares.sum(), logits[winner], atol=1e-3), "contributions add up to the logit")
    best = int(shares.argmax())
    names = dataset.mapping.names
    return (
        f"pixel x={x}, y={y} is '{names[winner]}' with score {logits[winner]:.3f}; prototype {best}"
        f" ('{names[model.prototype_class[best]]}') gives {shares[best]:.3f} of it"
    )


def parts(folder: Path) -> Iterator[tuple[str, str]]:
    """Run the parts one after the other; yields the name of each and what it found."""
    yield "dummy model", dummy_model()
    torch.manual_seed(0)
    train_set, val_set = build_dataset(CONFIG, "train"), build_dataset(CONFIG, "val")
    yield "data", f"{len(train_set)} + {len(val_set)} scenes of {', '.join(train_set.mapping.names)}"
    module = TrainingModule(CONFIG, construct_PPNet(CONFIG.model), torch.device("cpu"))
    yield "warmup", train_phase(module, train_set, 0)
    yield "joint", train_phase(module, train_set, 1)
    report = push_prototypes(module.inference, train_set)
    yield "push", f"{len(report.records)} prototypes are patches now, {report.merged} duplicates merged"
    draw_prototypes(module.inference, train_set, report.records, OutputFolder(folder / "prototypes"))
    yield "pictures", f"{len(list((folder / 'prototypes').glob('*.png')))} pictures drawn"
    yield "finetune", train_phase(module, train_set, 2)
    miou = module.inference.validate(val_set).summary()["miou"]
    yield "validation", f"mIoU {miou:.3f} on scenes that were not trained on"
    yield "save and load", save_and_load(module, folder / "model.pth")
    yield "explanation", explain_pixel(module.inference.ppnet.eval(), train_set)


def save_and_load(module: TrainingModule, path: Path) -> str:
    """A checkpoint gives back the same predictions."""
    model = module.model.eval()
    save_checkpoint(path, Checkpoint(config_to_dict(CONFIG), "finetune", 2, STEPS, dict(model.state_dict())))
    loaded = open_model(path, ["system.device=cpu"]).model
    image = torch.rand(1, 3, 65, 65).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        _expect(torch.equal(loaded.predict(image), model.predict(image)), "loaded equals saved")
    return f"{path.stat().st_size / 1e6:.1f} MB, the same predictions"


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"failed: {what}")


def main(argv: list[str] | None = None) -> None:
    """Run all parts in a temporary folder."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for name, found in parts(Path(folder)):
            print(f"{name:<14} ok  {found}")
    print(f"all parts work, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main)
