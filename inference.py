"""Labelling: one object through which validation, evaluation, pruning, push, pages and prediction ask a model.

It holds the device, the precision and the input scales, so that no two of them can see another model. B images,
C classes, P prototypes, D prototype depth, (h, w) feature grid, (H, W) image.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from config import Config, config_of, config_to_dict, override_config
from datasets.base import SegmentationDataset
from datasets.batches import own_images
from grid import Grid
from metrics import ConfusionMatrix
from model import (
    PPNet,
    PPNetOutput,
    SegmentationNet,
    at_least_float32,
    construct_PPNet,
    features_at_scales,
    highest,
    outputs_at_scales,
)
from runtime import distributed
from runtime.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from runtime.device import choose_device
from runtime.errors import ConfigError

MOST_VALUES = 2**27  # logits of pixels at a time: half a gigabyte


class Inference:
    """A model as it labels images: on a device, in a precision, at its own and other input scales.

    precision: float32, bfloat16 or auto (bfloat16 on CUDA alone). scales, fusion: see `outputs_at_scales`. The model
    may go on training; every method here puts it into evaluation mode first, and differentiates nothing.
    """

    def __init__(
        self,
        model: SegmentationNet,
        device: torch.device,
        precision: str = "auto",
        scales: tuple[float, ...] = (),
        fusion: str = "logits",
    ):
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.device, self.precision, self.scales, self.fusion = device, precision, scales, fusion

    @property
    def grid(self) -> Grid:
        """Which pixels the model's cells look at."""
        return self.model.grid

    @property
    def ppnet(self) -> PPNet:
        """The model, of which prototypes are asked. Raises TypeError for the twin, which has none."""
        if not isinstance(self.model, PPNet):
            raise TypeError(f"{type(self.model).__name__} has no prototypes, and so no distances to them")
        return self.model

    @property
    def is_bfloat16(self) -> bool:
        """Whether the features are computed in bfloat16; all that follows them never is."""
        return self.precision == "bfloat16" or (self.precision == "auto" and self.device.type == "cuda")

    def autocast(self) -> torch.autocast:
        """bfloat16 where the precision asks for it, else nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.is_bfloat16)

    def explainable(self) -> Inference:
        """The same model at the scale at which its scores are sums over prototypes: without logits of other scales."""
        if self.fusion == "features":
            return self
        return Inference(self.model, self.device, self.precision)

    # --- on images (B, 3, H, W) of any size, normalized, on any device ---

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the prototypes are compared with, on the grid of the padded images: (B, D, h, w) float32.

        Raises TypeError for the twin.
        """
        scales = self.scales if self.fusion == "features" else ()
        with self.autocast():
            features = highest(self.grid, features_at_scales(self.model, self._padded(images), scales))
            return at_least_float32(self.ppnet.add_on_layers(features))

    @torch.no_grad()
    def distances(self, images: Tensor) -> Tensor:
        """Squared distances to the prototypes on the grid of the padded images: (B, P, h, w) float32.

        Raises TypeError for the twin.
        """
        return self.ppnet.distances(self.features(images))

    @torch.no_grad()
    def output(self, images: Tensor) -> PPNetOutput:
        """Logits and distances on the grid of the padded images, over all scales.

        Where the maximum of the logits decides, the distances are those at the images' own scale.
        """
        with self.autocast():
            outputs = outputs_at_scales(self.model, self._padded(images), self.scales, self.fusion)
        last = outputs[-1]
        return PPNetOutput(last.logits, outputs[0].distances if last.distances is None else last.distances)

    def upsample(self, values: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        """Values on the grid of padded images (B, C, h, w) at every pixel of the images themselves: (B, C, H, W)."""
        padded = [self.grid.length(self.grid.cells(length)) for length in size]
        return self.grid.upsample(values, padded)[..., : size[0], : size[1]]

    def logits(self, images: Tensor) -> Tensor:
        """Logits of every pixel: (B, C, H, W) float32."""
        return self.upsample(self.output(images).logits, images.shape[-2:])

    def label(self, images: Tensor) -> Tensor:
        """The class of every pixel: (B, H, W) int64."""
        return self.classes(self.output(images).logits, images.shape[-2:])

    def classes(self, logits: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
        """The class of every pixel of images, of logits on their grid: (B, C, h, w) -> (B, H, W) int64.

        Many classes at many pixels are looked at some at a time; of equal ones the first wins, as in one go.
        """
        step = max(1, MOST_VALUES // (len(logits) * size[0] * size[1]))
        best = self.upsample(logits[:, :step], size)
        found = best.argmax(1)
        if step >= logits.shape[1]:
            return found
        best = best.amax(1)
        for first in range(step, logits.shape[1], step):
            values = self.upsample(logits[:, first : first + step], size)
            highest_now, here = values.amax(1), values.argmax(1) + first
            found = torch.where(highest_now > best, here, found)
            best = torch.maximum(best, highest_now)
        return found

    def validate(self, dataset: SegmentationDataset, num_workers: int = 0) -> ConfusionMatrix:
        """The confusion matrix of whole images at native size; under torchrun the processes share them."""
        matrix = ConfusionMatrix(dataset.num_classes, self.device)
        for _, image, label in own_images(dataset, num_workers, "validation"):
            matrix.update(self.label(image), label.to(self.device, non_blocking=True))
        distributed.all_reduce(matrix.counts)
        return matrix

    def _padded(self, images: Tensor) -> Tensor:
        self.model.eval()
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return self.grid.pad(images, 0.0)


# --- the model of a checkpoint ---------------------------------------------------------------------------------


class SavedModel(NamedTuple):
    """A checkpoint ready to label: its model, its configuration with what the user changed, the file's content."""

    inference: Inference
    config: Config
    checkpoint: Checkpoint

    @property
    def model(self) -> SegmentationNet:
        """The network, in evaluation mode."""
        return self.inference.model


def open_model(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> SavedModel:
    """The model of a checkpoint on the configured device, in evaluation mode.

    overrides: `section.key=value` changes of its configuration. Under torchrun this joins the other processes.
    Raises CheckpointError; ConfigError for overrides.
    """
    checkpoint = load_checkpoint(path)
    config = config_of(checkpoint)
    changed = override_config(config, overrides)
    ours = config.model
    if dataclasses.replace(changed.model, msc_scales=ours.msc_scales, msc_fusion=ours.msc_fusion) != ours:
        raise ConfigError("--set model.*: the model is the checkpoint's; only msc_scales and msc_fusion can be set")
    try:
        model = construct_PPNet(changed.model, load_pretrained=False)
        load_weights(model, checkpoint.model)
    except ConfigError as error:  # of a backbone that this version does not know
        raise CheckpointError(f"{path}: its configuration cannot be used: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    # Before the device is chosen: each of several processes takes its own.
    distributed.start(changed.system.timeout, config_to_dict(changed))
    inference = inference_of(changed, model.eval(), choose_device(changed.system.device))
    return SavedModel(inference, changed, checkpoint)


def inference_of(config: Config, model: SegmentationNet, device: torch.device) -> Inference:
    """How a configuration has a model label images."""
    return Inference(model, device, config.system.precision, config.model.msc_scales, config.model.msc_fusion)


def load_weights(model: SegmentationNet, state: dict[str, Tensor]) -> None:
    """Load a model's state dict; a PPNet first takes over the number of prototypes that a push or pruning left.

    Raises CheckpointError, naming what does not fit (names, shapes, types, what is not finite, classes that are not
    there); then the model is untouched.
    """
    wanted = model.state_dict()
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("these weights do not fit the model: not a state dict (names to tensors)")
    kept = _prototypes_in(state)
    if isinstance(model, PPNet) and 0 < kept < len(model.prototype_class):
        for name, dim in (("prototype_vectors", 0), ("prototype_class", 0), ("last_layer.weight", 1)):
            wanted[name] = wanted[name].narrow(dim, 0, kept)
    problems = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - wanted.keys()]
    problems += [_misfit(name, state[name], wanted[name]) for name in wanted.keys() & state.keys()]
    problems = sorted(problem for problem in problems if problem)
    if not problems and isinstance(model, PPNet):
        problems = _class_problems(state["prototype_class"], model.num_classes)
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"these weights do not fit the model: {'; '.join(problems[:3])}{more}")
    if isinstance(model, PPNet) and kept < len(model.prototype_class):
        model.keep_prototypes(torch.arange(kept))
    model.load_state_dict(state)


def _prototypes_in(state: dict[str, Tensor]) -> int:
    """How many prototypes a state dict has; 0 if it does not say so."""
    classes = state.get("prototype_class")
    return len(classes) if classes is not None and classes.dim() == 1 else 0


def _misfit(name: str, value: Tensor, wanted: Tensor) -> str:
    """What keeps a tensor from being loaded in place of another, "" if nothing."""
    if value.shape != wanted.shape:
        return f"{name} has shape {list(value.shape)}, want {list(wanted.shape)}"
    if value.dtype != wanted.dtype or not torch.isfinite(value).all():
        return f"{name} is not finite {str(wanted.dtype).removeprefix('torch.')}"
    return ""


def _class_problems(prototype_class: Tensor, num_classes: int) -> list[str]:
    if 0 <= int(prototype_class.min()) and int(prototype_class.max()) < num_classes:
        return []
    return [f"prototype_class is not within 0..{num_classes - 1}"]
