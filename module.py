"""`TrainingModule`: a model and the phase that trains it: what is trained, one training step, the state of a resume.

A parameter group without a learning rate is frozen: it gets no gradient, no optimizer state, and its batch norms
keep their statistics. Optimizer and freezing come from the same line of the configuration, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import GROUPS, Config, LossWeights, PhaseConfig
from grid import IGNORE
from inference import inference_of
from losses import Mean, cross_entropy, diversity_loss, l1_loss, other_connections, purity_loss
from model import PPNet, SegmentationNet, outputs_at_scales
from runtime import distributed
from runtime.checkpoint import CheckpointError
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.checkpoint import Midway

LOSS_NAMES = tuple(field.name for field in dataclasses.fields(LossWeights))


class LossInputs(NamedTuple):
    """What a loss may look at, at one input scale.

    logits (B, C, h, w); distances (B, P, h, w), None without prototypes; labels (B, h, w) of the cells; class_weights
    (C,) or None; prototype_class (P,), on the CPU, where making tables of it waits for no GPU.
    """

    model: SegmentationNet
    logits: Tensor
    distances: Tensor | None
    labels: Tensor
    class_weights: Tensor | None
    prototype_class: Tensor | None


# How each loss of `LossWeights` is called. One that looks at logits is called at every input scale; at distances, at
# every scale that has some, if its weight is not 0; at weights alone, once a step, if there are prototypes. Any: the
# `LossInputs` then have what their types leave open.
LOSSES: dict[str, tuple[str, Callable[[Any], Mean]]] = {
    "cross_entropy": ("logits", lambda i: cross_entropy(i.logits, i.labels, i.class_weights)),
    "l1": ("weights", lambda i: l1_loss(i.model.last_layer.weight, i.prototype_class)),
    "diversity": ("distances", lambda i: diversity_loss(i.distances, i.labels, i.prototype_class)),
    "purity": ("distances", lambda i: purity_loss(i.model.activations(i.distances), i.labels, i.model.prototype_class)),
}


class NotFiniteError(UserError):
    """The loss is NaN or infinite; nothing was saved since. step: which one it was, where that is known."""

    exit_code = 6
    step: int | None = None


def group_of_each(model: SegmentationNet) -> dict[str, str]:
    """The parameter group of each parameter, by name, in the model's order.

    Raises UserError, naming it, for a parameter that is in no group, in two, or in one that no phase can train.
    """
    claims: dict[int, set[str]] = {}
    for group, members in model.parameter_groups().items():
        for _, parameter in members:
            claims.setdefault(id(parameter), set()).add(group)
    groups = {name: claims.get(id(parameter), set()) for name, parameter in model.named_parameters()}
    for name, claimed in groups.items():
        if len(claimed) != 1 or not claimed <= set(GROUPS):
            raise UserError(
                f"the parameter {name} is in {' and '.join(sorted(claimed)) or 'no group'}: parameter_groups() of the"
                f" model or its features has to put it into one of {', '.join(GROUPS)}"
            )
    return {name: claimed.pop() for name, claimed in groups.items()}


NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)  # what `model.freeze_bn` freezes in a backbone


def freeze_and_group(model: SegmentationNet, phase: PhaseConfig, weight_decay: float, bn_is_frozen: bool) -> list[dict]:
    """Set `requires_grad` of every parameter for a phase; return the optimizer's parameter groups.

    Weight decay is for backbone and add_on alone. Frozen norms of the backbone train in no phase.
    """
    norms = (m for m in model.modules() if bn_is_frozen and isinstance(m, NORMS))
    frozen_norms = {id(p) for m in norms for p in m.parameters()}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in phase.lr.trained}
    group_of = group_of_each(model)
    for name, parameter in model.named_parameters():
        group = group_of[name]
        trains = group in members and not (group == "backbone" and id(parameter) in frozen_norms)
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


class Pending(NamedTuple):
    """The raw losses of a step on their way to the CPU, there after the event (None: they are)."""

    step: int
    losses: Tensor
    is_there: torch.cuda.Event | None


@dataclass
class Phase:
    """What a phase starts anew: its optimizer, where it stands, and what was measured since it was last asked for.

    index, config: which phase. prototype_class: see `LossInputs`. step: steps taken. sums: of each raw loss, of right
    and of labelled cells, over `batches` batches of this process. pending: the losses of the last step.
    """

    index: int
    config: PhaseConfig
    optimizer: torch.optim.Adam
    prototype_class: Tensor | None
    sums: Tensor
    batches: int = 0
    step: int = 0
    pending: Pending | None = None

    def check_finite(self) -> None:
        """Raise NotFiniteError, naming every term, if the last loss is NaN or infinite (its step is `error.step`)."""
        if self.pending is None:
            return
        if self.pending.is_there is not None:
            self.pending.is_there.synchronize()  # long done: it is of the step before
        terms = dict(zip(LOSS_NAMES, self.pending.losses.tolist(), strict=True))
        if not all(abs(value) < float("inf") for value in terms.values()):
            error = NotFiniteError(
                f"the loss of phase '{self.config.name}', step {self.pending.step + 1}, is not finite: "
                + ", ".join(f"{name} = {value:g}" for name, value in terms.items())
                + ". No file was changed since the step before; see 'It diverges' in docs/troubleshooting.md"
            )
            error.step = self.pending.step
            raise error


class TrainingModule:
    """A model with the phase that trains it.

    `begin_phase` sets what is trained, `training_step` takes one batch, `take_averages` reads what was measured
    since it was last called, `state` and `load_state` carry all of it through a file. inference: how the same model
    labels images, for validation.
    """

    def __init__(self, config: Config, model: SegmentationNet, device: torch.device):
        self.config, self.device = config, device
        self.inference = inference_of(config, model, device)
        self.model = self.inference.model
        weights = config.training.class_weights
        self._class_weights = torch.tensor(weights, device=device) if weights else None
        self.current_phase: Phase | None = None  # the one that was begun last, if it has something to train

    @property
    def phase(self) -> Phase:
        """The current phase. Raises RuntimeError if there is none."""
        if self.current_phase is None:
            raise RuntimeError("no phase is being trained: begin_phase first")
        return self.current_phase

    @property
    def is_sparse(self) -> bool:
        """Whether this phase sets connections to other classes to exactly zero."""
        return self.phase.config.sparse and isinstance(self.model, PPNet)

    def begin_phase(self, index: int) -> Phase | None:
        """Freeze, thaw and make a new optimizer for a phase; None if the model has nothing that the phase trains.

        Raises UserError for a parameter that is in no group.
        """
        training = self.config.training
        config = training.phases[index]
        groups = freeze_and_group(self.model, config, training.weight_decay, self.config.model.bn_is_frozen)
        self.model.train()
        self.current_phase = None
        if groups:
            optimizer = torch.optim.Adam(groups, fused=self.device.type == "cuda")
            prototype_class = self.model.prototype_class.cpu() if isinstance(self.model, PPNet) else None
            sums = torch.zeros(len(LOSS_NAMES) + 2, dtype=torch.float64, device=self.device)
            self.current_phase = Phase(index, config, optimizer, prototype_class, sums)
            if self.config.system.compile:  # in place: names in checkpoints stay as they are
                self.model.features.get_submodule("backbone").compile()
        return self.current_phase

    def learning_rates(self) -> dict[str, float]:
        """The learning rate of each trained group at this step."""
        phase = self.phase
        factor = lr_factor(phase.config, min(phase.step, phase.config.steps - 1), self.config.training.poly_power)
        return {group["name"]: group["base_lr"] * factor for group in phase.optimizer.param_groups}

    def training_step(self, images: Tensor, labels: Tensor) -> None:
        """One batch: images (B, 3, H, W), labels (B, H, W). Every iter_size steps, and at the last, an update.

        Nothing here waits for what the GPU does in this step. Raises NotFiniteError if the loss of the batch before
        was not finite.
        """
        training, phase = self.config.training, self.phase
        # Whatever random numbers a layer draws are then a function of the step, and need no state in checkpoints.
        torch.manual_seed(((training.seed * 1_000_003 + phase.index) * 1_000_000_007 + phase.step) % 2**63)
        if not self.model.training:  # after a validation
            self.model.train()
        inputs = self._inputs(images, labels)
        terms = self.loss_terms(inputs)
        weights = training.loss_weights
        # A sparse phase takes the L1 term out of the gradient: `soft_threshold` applies it after each update.
        total = weighted_sum(terms, dataclasses.replace(weights, l1=0.0) if self.is_sparse else weights)
        phase.check_finite()
        losses = torch.stack([terms[name].detach() for name in LOSS_NAMES])
        phase.pending = Pending(phase.step, *_on_its_way(losses))
        (total / training.iter_size).backward()
        self._measure(inputs[-1], losses)
        if (phase.step + 1) % training.iter_size == 0 or phase.step + 1 == phase.config.steps:
            self._update()
        phase.step += 1

    def _inputs(self, images: Tensor, labels: Tensor) -> list[LossInputs]:
        """What the losses look at: the model's outputs at each input scale, and last what is made of all of them."""
        grid, prototype_class = self.model.grid, self.phase.prototype_class
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(self.device, non_blocking=True)
        with self.inference.autocast():
            scales, fusion = self.inference.scales, self.inference.fusion
            outputs = outputs_at_scales(self.model, grid.pad(images, 0.0), scales, fusion)
        cells = [grid.labels(labels, output.logits.shape[2:]) for output in outputs]
        return [
            LossInputs(self.model, *output, of_cells, self._class_weights, prototype_class)
            for output, of_cells in zip(outputs, cells, strict=True)
        ]

    def loss_terms(self, inputs: list[LossInputs]) -> dict[str, Tensor]:
        """The raw losses, each a scalar, averaged over the scales; the twin has cross-entropy alone.

        Averaged over the processes, each is the mean over the terms of all of them.
        """
        weights = self.config.training.loss_weights
        with_prototypes = [i for i in inputs if i.distances is not None]
        seen = {"logits": inputs, "distances": with_prototypes, "weights": with_prototypes[:1]}
        means = {}
        for name in LOSS_NAMES:
            what, loss = LOSSES[name]
            is_needed = what != "distances" or getattr(weights, name)
            means[name] = [loss(i) for i in seen[what]] if is_needed else []
        return averaged(means, self.device)

    def _measure(self, seen: LossInputs, losses: Tensor) -> None:
        counts = torch.stack(((seen.logits.argmax(1) == seen.labels).sum(), (seen.labels != IGNORE).sum()))
        self.phase.sums += torch.cat((losses, counts)).double()
        self.phase.batches += 1

    def _update(self) -> None:
        phase = self.phase
        groups = phase.optimizer.param_groups
        for group, rate in zip(groups, self.learning_rates().values(), strict=True):
            group["lr"] = rate
        distributed.average_gradients([p for group in groups for p in group["params"]])
        phase.optimizer.step()
        if self.is_sparse:
            strength = self.config.training.loss_weights.l1
            weight, classes = self.inference.ppnet.last_layer.weight, phase.prototype_class
            soft_threshold(weight, classes, phase.optimizer, strength)  # type: ignore[arg-type]  # a PPNet has classes
        phase.optimizer.zero_grad(set_to_none=True)

    def check_weights(self) -> None:
        """Raise NotFiniteError if the last loss, or any weight or statistic of the model, is not finite."""
        if self.current_phase is not None:
            self.current_phase.check_finite()
        self._refuse_broken(self.model.state_dict())

    def _refuse_broken(self, tensors: dict[str, Tensor]) -> None:
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if broken:
            when = (
                f"after step {self.current_phase.step} of phase '{self.current_phase.config.name}' "
                if self.current_phase
                else ""
            )
            see = "see 'It diverges' in docs/troubleshooting.md"
            raise NotFiniteError(f"{when}{broken[0]} is not finite; it is not saved, {see}")

    def take_averages(self) -> dict[str, float]:
        """Since the last call: the mean of each raw loss, their weighted total, and the share of right cells."""
        phase = self.phase
        phase.check_finite()
        *losses, right, cells = distributed.all_reduce(phase.sums).tolist()
        batches = max(1, phase.batches * distributed.world_size())
        averages = {name: value / batches for name, value in zip(LOSS_NAMES, losses, strict=True)}
        averages["total"] = weighted_sum(averages, self.config.training.loss_weights)
        averages["train_accuracy"] = right / max(1.0, cells)
        phase.sums.zero_()
        phase.batches = 0
        return averages

    # --- through a file ---

    def trained_state(self) -> dict[str, Tensor]:
        """A copy of what the phase changes: trained parameters, and buffers, as the statistics of batch norms."""
        frozen = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return {name: value.clone() for name, value in self.model.state_dict().items() if name not in frozen}

    def state(self) -> dict:
        """Everything that the next step depends on besides the weights, as plain data: the fields of a `Midway`.

        Raises NotFiniteError rather than save NaN. Of several processes, all have to call it, after an update.
        """
        self.check_weights()
        phase = self.phase
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        self._refuse_broken({f"the gradient of {name}": gradient for name, gradient in gradients.items()})
        moments = ((f"{k} of {n}", v) for n, p in trained.items() for k, v in phase.optimizer.state.get(p, {}).items())
        self._refuse_broken(dict(moments))
        return {
            "optimizer": phase.optimizer.state_dict(),
            "gradients": gradients,
            "sums": distributed.all_reduce(phase.sums.clone()) / distributed.world_size(),
            "batches": phase.batches,
        }

    def load_state(self, midway: Midway, step: int) -> None:
        """Go on where `midway` was taken, after `load_weights` and `begin_phase`.

        Rates, decay and betas stay those of the configuration. Raises CheckpointError if anything does not fit.
        """
        phase = self.phase
        name, steps = phase.config.name, phase.config.steps
        if not 0 <= step <= steps:
            raise CheckpointError(f"this checkpoint is of step {step}; '{name}' has {steps} steps")
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        try:
            load_moments(phase.optimizer, midway.optimizer, step)
            for parameter, gradient in midway.gradients.items():
                trained[parameter].grad = gradient.to(self.device)
            if midway.sums.shape != phase.sums.shape:
                raise ValueError(f"it sums {len(midway.sums) - 2} losses, not {len(LOSS_NAMES)}")
            phase.sums.copy_(midway.sums)
            phase.batches, phase.step = midway.batches, step
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"this checkpoint does not fit the phase '{name}': {error}") from None


def load_moments(optimizer: torch.optim.Adam, state: dict, step: int) -> None:
    """Take the moments out of an optimizer's state dict that was made at `step`, and nothing else.

    Raises ValueError, LookupError, TypeError or AttributeError if they are not those of this optimizer's parameters.
    """
    own = optimizer.state_dict()["param_groups"]
    if [(g["name"], g["params"]) for g in own] != [(g["name"], g["params"]) for g in state["param_groups"]]:
        raise ValueError("the optimizer's parameter groups are others")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for index, moments in state["state"].items():
        if index not in parameters or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError("the optimizer's moments are not Adam's, or of other parameters")
        updates, mean, square = moments["step"], moments["exp_avg"], moments["exp_avg_sq"]
        if not mean.shape == square.shape == parameters[index].shape:
            raise ValueError("the optimizer's moments have other shapes")
        if not (torch.isfinite(mean).all() and torch.isfinite(square).all() and (square >= 0).all()):
            raise ValueError("the optimizer's moments are not finite, or negative")
        if not 1 <= float(updates) <= step or float(updates) % 1:
            raise ValueError(f"the optimizer counts {float(updates):g} updates in {step} steps")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})


def weighted_sum(terms: dict, weights: LossWeights):
    """The total loss of raw terms, tensors or numbers."""
    return sum(getattr(weights, name) * terms[name] for name in LOSS_NAMES)


def averaged(means: dict[str, list[Mean]], device: torch.device) -> dict[str, Tensor]:
    """Each loss as the average of its means at several scales, 0 where it has none.

    Each mean is divided by the average count of the processes, not by its own, so that their average is the mean over
    the terms of all of them, as is that of the gradients. One message, whatever the number of losses.
    """
    flat = [mean for of_scales in means.values() for mean in of_scales]
    if distributed.world_size() > 1:
        counts = distributed.all_reduce(torch.stack([mean.count.double() for mean in flat]))
        counts = counts / distributed.world_size()
        flat = [Mean(mean.total, count.to(mean.total.dtype)) for mean, count in zip(flat, counts, strict=True)]
    values = iter([mean.value for mean in flat])
    zero = torch.zeros((), device=device)
    return {name: sum((next(values) / len(of) for _ in of), start=zero) for name, of in means.items()}


def _on_its_way(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy of values for the CPU, and the event after which it is there (None: it is)."""
    if not values.is_cuda:
        return values.cpu(), None
    copy = values.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
