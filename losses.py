"""The losses: pure functions of tensors, each a mean of what it counted, each 0 where it has nothing to say.

B images, C classes, P prototypes, (h, w) feature cells. Labels are 0..C-1, 255 = ignore.
Source: Sacha et al., "ProtoSeg: Interpretable Semantic Segmentation with Prototypical Parts" (WACV 2023), section 3.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grid import IGNORE

SHARPNESS = 3.0  # of `purity_loss`: the power of the ratio of similarities


class Mean(NamedTuple):
    """A loss as the sum of its terms and how many there are (or their weights), two 0-dim tensors.

    They are kept apart so that several processes can find the mean over all their terms.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody asks for

    @property
    def value(self) -> Tensor:
        """The mean; 0 with zero gradient if nothing was counted."""
        return self.total / self.count.clamp(min=1e-12)


def cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Mean:
    """Mean cross-entropy over the labelled cells; 0 with zero gradient if there are none.

    logits (B, C, h, w) float, labels (B, h, w) int64 in 0..C-1 or 255; class_weights (C,): the mean is weighted with
    that of each cell's class.
    """
    # Sum and count instead of the built-in mean: that one is NaN for a batch without labels, and its CUDA kernel
    # has no deterministic form.
    per_cell = F.cross_entropy(logits, labels, class_weights, ignore_index=IGNORE, reduction="none")
    weight = is_labelled = labels != IGNORE
    if class_weights is not None:
        weight = class_weights[torch.where(is_labelled, labels, 0)] * is_labelled
    return Mean(per_cell.sum(), weight.sum())


def l1_loss(last_layer_weight: Tensor, prototype_class: Tensor) -> Mean:
    """Sum of |w| over the connections of every prototype to classes that are not its own; one term, so no mean.

    last_layer_weight (C, P) float, prototype_class (P,) int64.
    """
    total = (last_layer_weight.abs() * other_connections(prototype_class, last_layer_weight)).sum()
    return Mean(total, torch.ones_like(total))


def diversity_loss(distances: Tensor, labels: Tensor, prototype_class: Tensor) -> Mean:
    """How alike the prototypes of a class look at the cells of that class: 1 identical, 0 fully diverse.

    For each image and each class with at least 2 cells, v_p is the softmax over the class's cells of the squared
    distance to prototype p. The loss is the mean of exp(-D_J(v_p, v_q)) over all pairs of prototypes of the class,
    all classes and all images, with Jeffreys' divergence D_J = KL(v_p||v_q) / 2 + KL(v_q||v_p) / 2 (equations 2-5
    of the paper). No pair: 0. distances (B, P, h, w) float, labels (B, h, w), prototype_class (P,).

    A cell has one class, so only the K prototypes of that class matter to it: everything below is (B, K, cells),
    not (B, P, cells), and the gradient at another class's cells is exactly zero. `prototype_class` may stay on the
    CPU; then a GPU is waited for only the first time, when the tables that derive from it are made.
    """
    similarity, has_pairs, _ = pair_similarities(distances, labels, prototype_class)
    return Mean((similarity * has_pairs).sum(), has_pairs.sum())


def pair_similarities(distances: Tensor, labels: Tensor, prototype_class: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The exp(-D_J) of `diversity_loss`, one for each image, class and pair of the class's prototypes.

    Returns similarity (B, C, pairs) in 0..1; has_pairs (B, C, pairs), whether it counts (the class has both prototypes
    and at least 2 cells); and pairs (C, pairs, 2), which prototypes they are. C is the largest class of
    `prototype_class` plus 1.
    """
    members, first, second, pairs, exist = class_pairs(prototype_class, distances.device)
    labels = labels.flatten(1)  # (B, N) cells
    of_class = labels[..., None] == torch.arange(len(members), device=labels.device)  # (B, N, C)
    counted = of_class.any(2)  # not ignored, and of a class that has prototypes
    index = torch.where(counted, labels, 0)
    own = distances.flatten(2).gather(1, members.T[:, index].transpose(0, 1))  # (B, K, N) distance to own prototypes
    own = own.masked_fill(~counted[:, None], 0)  # below every distance: changes no maximum, passes no gradient
    of_class = of_class.to(own.dtype)

    log_v = own - _log_sum_exp(own, of_class, index)
    v = log_v.exp()
    # KL(p||q) + KL(q||p) = sum (p - q)(log p - log q): exact for near-identical distributions.
    jeffreys = 0.5 * (v[:, first] - v[:, second]) * (log_v[:, first] - log_v[:, second])  # (B, pairs, N)
    jeffreys = (jeffreys @ of_class).transpose(1, 2)  # (B, C, pairs): summed over the cells of each class

    has_pairs = (of_class.sum(1) >= 2)[..., None] & exist
    return (-jeffreys).exp(), has_pairs, pairs


def purity_loss(activations: Tensor, labels: Tensor, prototype_class: Tensor) -> Mean:
    """How near cells of other classes come to the prototypes, compared with cells of their own class.

    For each prototype with cells of its own and of other classes in the batch, log(1 + exp(3 (b - a))), where a and b
    are its highest activations at the ones and at the others; the loss is their mean, log 2 where both are alike. As
    an activation is the logarithm of a similarity, this is log(1 + (other / own)^3). No such prototype: 0.
    activations (B, P, h, w) float, labels (B, h, w), prototype_class (P,).

    Own definition, not of the paper: a smooth form of "the nearest patch is of the prototype's class", the rule by
    which `prune.py` judges it, in the spirit of the separation cost of ProtoPNet (Chen et al., NeurIPS 2019).
    """
    is_own = labels.flatten() == prototype_class.to(labels.device)[:, None]  # (P, N)
    is_other = ~is_own & (labels.flatten() != IGNORE)
    counts = is_own.any(1) & is_other.any(1)
    activations = activations.transpose(0, 1).flatten(1)  # (P, N)
    own, other = (activations.masked_fill(~where, -torch.inf).amax(1) for where in (is_own, is_other))
    gap = torch.where(counts, other - own, 0)  # infinities where it does not count, which pass no gradient
    return Mean((F.softplus(SHARPNESS * gap) * counts).sum(), counts.sum())


class ClassPairs(NamedTuple):
    """Which prototypes belong together: tables that derive from `prototype_class` alone.

    members (C, K) the prototypes of each class, K those of the largest; first, second (pairs,) columns of `members`;
    pairs (C, pairs, 2) which prototypes these are; exist (C, pairs) whether the class has both of them.
    """

    members: Tensor
    first: Tensor
    second: Tensor
    pairs: Tensor
    exist: Tensor


def class_pairs(prototype_class: Tensor, device: torch.device) -> ClassPairs:
    """The tables of (P,) classes, on a device; made once."""
    return _class_pairs(tuple(prototype_class.tolist()), device)


@lru_cache(maxsize=8)
def _class_pairs(classes: tuple[int, ...], device: torch.device) -> ClassPairs:
    counts = torch.bincount(torch.tensor(classes))
    order = torch.argsort(torch.tensor(classes), stable=True)
    slots = torch.arange(int(counts.max()))
    is_member = slots < counts[:, None]
    start = counts.cumsum(0) - counts
    members = order[(start[:, None] + slots).clamp(max=len(order) - 1)]
    first, second = torch.triu_indices(len(slots), len(slots), 1)
    pairs = torch.stack((members[:, first], members[:, second]), dim=2)
    tables = members, first, second, pairs, is_member[:, first] & is_member[:, second]
    return ClassPairs(*(table.to(device) for table in tables))


def other_connections(prototype_class: Tensor, weight: Tensor) -> Tensor:
    """Which connections of a last layer's weight (C, P) are between a prototype and another's class: (C, P) bool."""
    return _other_connections(tuple(prototype_class.tolist()), len(weight), weight.device)


@lru_cache(maxsize=8)
def _other_connections(classes: tuple[int, ...], num_classes: int, device: torch.device) -> Tensor:
    return (torch.arange(num_classes)[:, None] != torch.tensor(classes)).to(device)


def _log_sum_exp(values: Tensor, of_class: Tensor, index: Tensor) -> Tensor:
    """For each cell, log sum exp of `values` over all cells of its class in its image; (B, K, N) -> (B, K, N)."""
    gather_index = index[:, None].expand_as(values)
    shape = (*values.shape[:2], of_class.shape[2])
    highest = values.detach().new_full(shape, -torch.inf)
    highest = highest.scatter_reduce(2, gather_index, values.detach(), "amax").gather(2, gather_index)
    sums = (values - highest).exp() @ of_class  # (B, K, C)
    # Only classes without a single counted cell have a sum below 1; their logarithm is never used.
    return highest + sums.clamp(min=1e-30).log().gather(2, gather_index)
