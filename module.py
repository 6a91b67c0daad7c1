"""`TrainingModule`: what a phase trains, one training step, validation, and the state that a resume needs.

A parameter group without a learning rate is frozen: it gets no gradient, no optimizer state, and its batch norms
keep their statistics. Optimizer and freezing come from the same line of the configuration, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import Config, LossWeights, PhaseConfig, config_from_dict, override_config
from dataset import SegmentationDataset, own_images
from grid import IGNORE
from losses import (
    counted_pairs,
    counted_prototypes,
    cross_entropy,
    diversity_loss,
    l1_loss,
    labelled_weight,
    other_connections,
    purity_loss,
)
from metrics import ConfusionMatrix
from model import PPNet, PPNetOutput, SegmentationNet, cell_labels, construct_PPNet, multi_scale_outputs
from runtime import distributed
from runtime.checkpoint import CheckpointError, load_checkpoint
from runtime.errors import ConfigError, UserError

LOSS_NAMES = tuple(field.name for field in dataclasses.fields(LossWeights))


class NotFiniteError(UserError):
    """The loss is NaN or infinite; nothing was saved since. step: which one it was, where that is known."""

    exit_code = 6
    step: int | None = None


def group_of(name: str) -> str:
    """The parameter group of a parameter's name: backbone, add_on, prototypes or last_layer."""
    if name == "prototype_vectors":
        return "prototypes"
    if name.startswith("last_layer."):
        return "last_layer"
    return "add_on" if name.startswith(("features.aspp.", "add_on_layers.")) else "backbone"


def freeze_and_group(model: nn.Module, phase: PhaseConfig, weight_decay: float, bn_is_frozen: bool) -> list[dict]:
    """Set `requires_grad` of every parameter for a phase; return the optimizer's parameter groups.

    Weight decay is for backbone and add_on alone. Frozen batch norms of the backbone train in no phase.
    """
    frozen_bn = {id(p) for m in model.modules() if bn_is_frozen and isinstance(m, _BatchNorm) for p in m.parameters()}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in phase.lr.trained}
    for name, parameter in model.named_parameters():
        group = group_of(name)
        trains = group in members and not (group == "backbone" and id(parameter) in frozen_bn)
        parameter.requires_grad_(trains)
        if trains:
            members[group].append(parameter)
    return [
        {
            "params": parameters,
            "name": group,
            "lr": phase.lr.trained[group],
            "base_lr": phase.lr.trained[group],
            "weight_decay": weight_decay if group in ("backbone", "add_on") else 0.0,
        }
        for group, parameters in members.items()
        if parameters
    ]


def lr_factor(phase: PhaseConfig, step: int, power: float) -> float:
    """What the learning rates are multiplied with at a step, 0-based: 1, or (1 - step / steps)^power for poly."""
    return (1 - step / phase.steps) ** power if phase.schedule == "poly" else 1.0


@torch.no_grad()
def soft_threshold(weight: nn.Parameter, prototype_class: Tensor, adam: torch.optim.Adam, strength: float) -> None:
    """The proximal step of strength * |w| on the connections (C, P) to other classes, after an update by Adam.

    After a plain gradient step every such w moves by lr * strength towards 0 and stops there. Adam divides the
    gradient by r = sqrt(v) + eps, each weight by its own; the proximal step in that metric (Yun, Lozano & Yang,
    "Adaptive proximal gradient methods for structured neural networks", NeurIPS 2021) moves it by lr * strength / r.
    Then w stays 0 exactly where the mean gradient is smaller than `strength`, as for the plain step; with lr * strength
    alone, 1e-9 as published, it would take half a billion updates from -0.5 to 0.
    """
    state = adam.state[weight]
    group = next(g for g in adam.param_groups if any(p is weight for p in g["params"]))
    r = (state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])).sqrt() + group["eps"]
    shrunk = weight.sign() * (weight.abs() - group["lr"] * strength / r).clamp(min=0)
    weight.copy_(torch.where(other_connections(prototype_class, weight), shrunk, weight))


class TrainingModule:
    """A model with the phase that trains it.

    `begin_phase` sets what is trained, `training_step` takes one batch, `take_averages` reads what was measured
    since it was last called, `state` and `load_state` carry all of it through a file.
    """

    def __init__(self, config: Config, model: SegmentationNet, device: torch.device):
        self.config, self.device = config, device
        self.model = model.to(device, memory_format=torch.channels_last)
        weights = config.training.class_weights
        self._class_weights = torch.tensor(weights, device=device) if weights else None
        self.use_bfloat16 = config.system.precision == "bfloat16" or (
            config.system.precision == "auto" and device.type == "cuda"
        )
        self.optimizer: torch.optim.Adam | None = None
        self.phase_index, self.step = 0, 0
        self._pending: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    @property
    def phase(self) -> PhaseConfig:
        """The phase that is trained."""
        return self.config.training.phases[self.phase_index]

    @property
    def is_sparse(self) -> bool:
        """Whether this phase sets connections to other classes to exactly zero."""
        return self.phase.sparse and isinstance(self.model, PPNet)

    def autocast(self) -> torch.autocast:
        """bfloat16 where the configuration asks for it, else nothing."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.use_bfloat16)

    def begin_phase(self, phase_index: int) -> bool:
        """Freeze, thaw and make a new optimizer for a phase; False if the model has nothing that the phase trains."""
        self.phase_index, self.step = phase_index, 0
        training = self.config.training
        groups = freeze_and_group(self.model, self.phase, training.weight_decay, self.config.model.bn_is_frozen)
        self.optimizer = torch.optim.Adam(groups, fused=self.device.type == "cuda") if groups else None
        self._sums = torch.zeros(len(LOSS_NAMES) + 2, dtype=torch.float64, device=self.device)
        self._batches = 0
        self._pending = None
        # On the CPU, where looking up the tables that derive from it does not wait for the GPU.
        self._prototype_class = self.model.prototype_class.cpu() if isinstance(self.model, PPNet) else None
        self.model.train()
        if self.config.system.compile and groups:  # in place: names in checkpoints stay as they are
            self.model.features.backbone.compile()
        return bool(groups)

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each trained group at this step."""
        factor = lr_factor(self.phase, min(self.step, self.phase.steps - 1), self.config.training.poly_power)
        return {group["name"]: group["base_lr"] * factor for group in self.optimizer.param_groups}

    def training_step(self, images: Tensor, labels: Tensor) -> None:
        """One batch: images (B, 3, H, W), labels (B, H, W). Every iter_size steps, and at the last, an update.

        Nothing here waits for what the GPU does in this step. Raises NotFiniteError if the loss of the batch before
        was not finite.
        """
        training = self.config.training
        # Whatever random numbers a layer draws are then a function of the step, and need no state in checkpoints.
        torch.manual_seed(((training.seed * 1_000_003 + self.phase_index) * 1_000_000_007 + self.step) % 2**63)
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True)
        with self.autocast():
            outputs = multi_scale_outputs(self.model, images, self.config.model.msc_scales)
        terms = self.loss_terms(outputs if self.config.model.msc_scales else outputs[:1], labels)
        weights = training.loss_weights
        # A sparse phase takes the L1 term out of the gradient: `soft_threshold` applies it after each update.
        total = weighted_sum(terms, dataclasses.replace(weights, l1=0.0) if self.is_sparse else weights)
        self.check_finite()
        losses = torch.stack([terms[name].detach() for name in LOSS_NAMES])
        self._pending = self.step, *_on_its_way(losses)
        (total / training.iter_size).backward()
        self._measure(outputs[-1].logits.detach(), labels, losses)
        if (self.step + 1) % training.iter_size == 0 or self.step + 1 == self.phase.steps:
            for group, rate in zip(self.optimizer.param_groups, self.learning_rates().values(), strict=True):
                group["lr"] = rate
            distributed.average_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
            self.optimizer.step()
            if self.is_sparse:
                soft_threshold(self.model.last_layer.weight, self._prototype_class, self.optimizer, weights.l1)
            self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def loss_terms(self, outputs: list[PPNetOutput], labels: Tensor) -> dict[str, Tensor]:
        """The raw losses, each a scalar, averaged over the scales; the twin has cross-entropy alone."""
        weight = self.config.training.loss_weights
        terms = {name: torch.zeros((), device=self.device) for name in LOSS_NAMES}
        for output in outputs:
            cells = cell_labels(labels, output.logits.shape[2:], self.model.output_stride)
            loss = cross_entropy(output.logits, cells, self._class_weights)
            loss = loss * _share(labelled_weight, cells, self._class_weights)
            terms["cross_entropy"] = terms["cross_entropy"] + loss / len(outputs)
            if output.distances is None:
                continue
            scales = sum(o.distances is not None for o in outputs)
            if weight.diversity:
                loss = diversity_loss(output.distances, cells, self._prototype_class)
                loss = loss * _share(counted_pairs, cells, self._prototype_class)
                terms["diversity"] = terms["diversity"] + loss / scales
            if weight.purity:
                activations = self.model.activations(output.distances)
                loss = purity_loss(activations, cells, self.model.prototype_class)
                loss = loss * _share(counted_prototypes, cells, self.model.prototype_class)
                terms["purity"] = terms["purity"] + loss / scales
        if isinstance(self.model, PPNet):
            terms["l1"] = l1_loss(self.model.last_layer.weight, self._prototype_class)
        return terms

    def _measure(self, logits: Tensor, labels: Tensor, losses: Tensor) -> None:
        cells = cell_labels(labels, logits.shape[2:], self.model.output_stride)
        counts = torch.stack(((logits.argmax(1) == cells).sum(), (cells != IGNORE).sum()))
        self._sums += torch.cat((losses, counts)).double()
        self._batches += 1

    def check_finite(self) -> None:
        """Raise NotFiniteError, naming every term, if the last loss was NaN or infinite (its step is `error.step`)."""
        if self._pending is None:
            return
        step, values, is_there = self._pending
        self._pending = None
        if is_there is not None:
            is_there.synchronize()  # long done: it is of the step before
        terms = dict(zip(LOSS_NAMES, values.tolist(), strict=True))
        if not all(abs(value) < float("inf") for value in terms.values()):
            error = NotFiniteError(
                f"the loss of phase '{self.phase.name}', step {step + 1}, is not finite: "
                + ", ".join(f"{name} = {value:g}" for name, value in terms.items())
                + ". No file was changed since the step before; see 'It diverges' in the README"
            )
            error.step = step
            raise error

    def check_weights(self) -> None:
        """Raise NotFiniteError if the last loss, or any weight or statistic of the model, is not finite."""
        self.check_finite()
        self._refuse_broken(self.model.state_dict())

    def _refuse_broken(self, tensors: dict[str, Tensor]) -> None:
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if broken:
            raise NotFiniteError(
                f"after step {self.step} of phase '{self.phase.name}' {broken[0]} is not finite; it is not saved."
                " See 'It diverges' in the README"
            )

    def take_averages(self) -> dict[str, float]:
        """Since the last call: the mean of each raw loss, their weighted total, and the share of right cells."""
        self.check_finite()
        *losses, right, cells = distributed.all_reduce(self._sums).tolist()
        batches = max(1, self._batches * distributed.world_size())
        averages = {name: value / batches for name, value in zip(LOSS_NAMES, losses, strict=True)}
        averages["total"] = weighted_sum(averages, self.config.training.loss_weights)
        averages["train_accuracy"] = right / max(1.0, cells)
        self._sums.zero_()
        self._batches = 0
        return averages

    @torch.no_grad()
    def validate(self, dataset: SegmentationDataset, num_workers: int = 0) -> ConfusionMatrix:
        """The confusion matrix of whole images at native size, in evaluation mode."""
        self.model.eval()
        matrix = ConfusionMatrix(dataset.num_classes, self.device)
        scales = self.config.model.msc_scales
        for _, image, label in own_images(dataset, num_workers, "validation"):
            image = image.to(self.device, non_blocking=True, memory_format=torch.channels_last)
            with self.autocast():
                logits = self.model.predict_multi_scale(image, scales) if scales else self.model.predict(image)
            matrix.update(logits.argmax(1), label.to(self.device, non_blocking=True))
        distributed.all_reduce(matrix.counts)
        self.model.train()
        return matrix

    def state(self) -> dict:
        """Everything that the next step depends on, as plain data. Raises NotFiniteError rather than save NaN.

        Of several processes, all have to call it, after an update.
        """
        self.check_weights()
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        self._refuse_broken({f"the gradient of {name}": gradient for name, gradient in gradients.items()})
        moments = ((f"{k} of {n}", v) for n, p in trained.items() for k, v in self.optimizer.state.get(p, {}).items())
        self._refuse_broken(dict(moments))
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "gradients": gradients,
            "sums": distributed.all_reduce(self._sums.clone()) / distributed.world_size(),
            "batches": self._batches,
        }

    def load_state(self, state: dict, step: int) -> None:
        """Go on where `state` was taken, after `load_weights` and `begin_phase`.

        Raises CheckpointError if anything is missing or does not fit.
        """
        missing = {"optimizer", "gradients", "sums", "batches"} - state.keys()
        if missing:
            raise CheckpointError(f"this checkpoint cannot be resumed exactly: {', '.join(sorted(missing))} missing")
        if not 0 <= step <= self.phase.steps:
            name, steps = self.phase.name, self.phase.steps
            raise CheckpointError(f"this checkpoint is of step {step}; '{name}' has {steps} steps")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            for parameter, moments in self.optimizer.state.items():
                if any(value.shape not in ((), parameter.shape) for value in moments.values()):
                    raise ValueError("the optimizer's moments have other shapes")
            parameters = dict(self.model.named_parameters())
            for name, gradient in state["gradients"].items():
                parameters[name].grad = gradient.to(self.device)
            self._sums.copy_(state["sums"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"this checkpoint does not fit the phase '{self.phase.name}': {error}") from None
        self._batches, self.step = state["batches"], step


def weighted_sum(terms: dict, weights: LossWeights):
    """The total loss of raw terms, tensors or numbers."""
    return sum(getattr(weights, name) * terms[name] for name in LOSS_NAMES)


def _on_its_way(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of values for the CPU, and the event after which it is there (None: it is)."""
    if not values.is_cuda:
        return values.cpu(), None
    copy = values.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event


def _share(count: Callable[..., Tensor], *arguments) -> Tensor | float:
    """What a process's mean over `count(*arguments)` terms is multiplied with, so that averaging over the processes
    gives the mean over all their terms: 1 in a single process."""
    if distributed.world_size() == 1:
        return 1.0
    own = count(*arguments)
    return own * distributed.world_size() / distributed.all_reduce(own.clone()).clamp(min=1e-12)


def load_weights(model: SegmentationNet, state: dict[str, Tensor]) -> None:
    """Load a model's state dict; a PPNet first takes over the number of prototypes that a push or pruning left.

    Raises CheckpointError, naming what does not fit; then the model is untouched.
    """
    wanted = model.state_dict()
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("these weights do not fit the model: not a state dict (names to tensors)")
    kept = len(state.get("prototype_class", ())) if isinstance(model, PPNet) else 0
    sizes = {"prototype_vectors": 0, "prototype_class": 0, "last_layer.weight": 1}
    problems = [f"{name} is missing" for name in wanted.keys() - state.keys()]
    problems += [f"{name} is unknown" for name in state.keys() - wanted.keys()]
    for name in wanted.keys() & state.keys():
        shape = list(wanted[name].shape)
        if name in sizes and 0 < kept <= shape[sizes[name]]:
            shape[sizes[name]] = kept
        if list(state[name].shape) != shape:
            problems.append(f"{name} has shape {list(state[name].shape)}, want {shape}")
        elif state[name].dtype != wanted[name].dtype or not torch.isfinite(state[name]).all():
            problems.append(f"{name} is not finite {str(wanted[name].dtype).removeprefix('torch.')}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"these weights do not fit the model: {'; '.join(sorted(problems)[:3])}{more}")
    if 0 < kept < len(model.prototype_class):
        model.keep_prototypes(torch.arange(kept))
    model.load_state_dict(state)


def load_model(
    path: str | Path, device: torch.device | str = "cpu", overrides: list[str] | tuple[str, ...] = ()
) -> tuple[SegmentationNet, Config, dict]:
    """The model of a checkpoint in evaluation mode, its configuration, and all that the file holds.

    overrides: `section.key=value` changes of that configuration. Raises CheckpointError; ConfigError for overrides.
    """
    state = load_checkpoint(path)
    try:
        config = config_from_dict(state["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path}: its configuration cannot be used: {error}") from None
    changed = override_config(config, overrides)
    if dataclasses.replace(changed.model, msc_scales=config.model.msc_scales) != config.model:
        raise ConfigError("--set model.*: the model is the checkpoint's; of this section only msc_scales can be set")
    config = changed
    model = construct_PPNet(config.model, load_pretrained=False)
    try:
        load_weights(model, state["model"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return model.to(device, memory_format=torch.channels_last).eval(), config, state
