"""What a prototype model's explanations are worth, as numbers that need no part labels.

A decision is the class predicted at a cell, and its explanation is what each prototype adds to that class's logit:
weight[class, p] * activation[p]. The functions below are pure and take the cells of one image; `Explanations` sums
them over a data set, image by image, on the device.

N cells, C classes, P prototypes, k neighbours or removals. Metrics that need part labels are in parts.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grid import IGNORE
from losses import class_pairs, pair_similarities
from model import PPNet
from push import Neighbours
from runtime import distributed

NOISE = 0.2  # standard deviation of the noise on the normalized image (Huang et al., ICCV 2023, and ScaleProtoSeg)
NEIGHBOURS = 6  # patches whose classes make a prototype's purity, as in the pruning of ProtoSeg
ALIKE = 0.99  # pairs of prototypes more similar than this are called duplicates
CHUNK = 8192  # cells at a time: bounds the memory of the tables (cells, P), whatever the size of the images


def explaining_count(contributed: Tensor, share: float = 0.95) -> Tensor:
    """Sparsity of a decision: how few prototypes make up `share` of it, (N, P) -> (N,), 0..P.

    The smallest number of prototypes whose absolute contributions sum to at least `share` of all absolute
    contributions to the logit; 0 if nothing contributes. Own definition, in the spirit of the local explanation size
    of PIP-Net (Nauta et al., CVPR 2023), which counts every prototype above a threshold.
    """
    sizes = contributed.abs().sort(dim=1, descending=True).values
    total = sizes.sum(1)
    short = sizes.cumsum(1) < share * total[:, None]
    return (short.sum(1) + 1) * (total > 0)


def nearest_agreement(distances: Tensor, prototype_class: Tensor, classes: Tensor, k: int) -> Tensor:
    """Share of the 1, 2, .. k nearest prototypes that are of the predicted class: (N, P), (P,), (N,) -> (N, k), 0..1.

    Source: the curve over K of the published evaluation (ProtoSeg, eval_valid.py).
    """
    nearest = distances.topk(k, dim=1, largest=False).indices
    agree = (prototype_class[nearest] == classes[:, None]).float()
    return agree.cumsum(1) / torch.arange(1, k + 1, device=agree.device)


def deletion_curve(logits: Tensor, removed: Iterable[Tensor], classes: Tensor) -> Tensor:
    """Probability of each cell's class after the first 0, 1, .. k of its prototypes were removed.

    logits (N, C); removed: for each of the k prototypes what it adds to them, (N, C); classes (N,) -> (N, k + 1), 0..1.
    To remove a prototype is to take away what it adds. Faithful explanations fall faster than random orders.
    Source: the deletion metric of Petsiuk et al., "RISE" (BMVC 2018), on prototypes instead of pixels.
    """
    curve = [logits]
    for added in removed:
        curve.append(curve[-1] - added)
    index = classes[:, None]
    return torch.cat([step.softmax(1).gather(1, index) for step in curve], dim=1)


def class_purity(neighbour_labels: Tensor, prototype_class: Tensor) -> Tensor:
    """Share of each prototype's nearest patches that have its class: (P, k) labels, (P,) -> (P,), 0..1.

    Patches that do not exist (label 255) do not count; without any the purity is 0. Source: the pruning rule of
    ProtoSeg (Sacha et al. 2023, section 3.4) and ProtoPNet (Chen et al. 2019), as a number.
    """
    own = (neighbour_labels == prototype_class[:, None]).sum(1)
    return own / (neighbour_labels != IGNORE).sum(1).clamp(min=1)


def zero_connections(weight: Tensor, prototype_class: Tensor) -> float:
    """Share of exact zeros among the connections (C, P) of prototypes to classes that are not their own, 0..1."""
    is_other = torch.arange(len(weight), device=weight.device)[:, None] != prototype_class
    return float((weight == 0)[is_other].float().mean())


@dataclass
class Sums:
    """What adds up over cells, images and processes: all of it is summed whole."""

    cells: Tensor  # how many there were
    explaining: Tensor  # prototypes that explain them, see `explaining_count`
    unchanged: Tensor  # cells whose largest contributor stays the same under noise
    top: Tensor  # (P,) cells at which a prototype contributes most
    agreement: Tensor  # (depth,) see `nearest_agreement`
    deleted: Tensor  # (2, depth + 1) see `deletion_curve`: the largest contributors first, and in a random order
    similarity: Tensor  # of each pair of a class, as in `losses.class_pairs`, over images
    pairs_seen: Tensor  # in so many images

    @classmethod
    def zero(cls, prototypes: int, depth: int, pairs: torch.Size, device: torch.device) -> Sums:
        """Nothing seen yet. depth: as far as the curves go."""
        counts = {"cells": (), "explaining": (), "unchanged": (), "top": (prototypes,), "pairs_seen": pairs}
        shares = {"agreement": (depth,), "deleted": (2, depth + 1), "similarity": pairs}
        zeros = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name, shape in counts.items()}
        zeros |= {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shares.items()}
        return cls(**zeros)

    def merge(self) -> None:
        """Add up what the processes of a run have seen; all of them have to call it."""
        for values in vars(self).values():
            distributed.all_reduce(values)


class Explanations:
    """All of the above over a data set: `update` with each image, then `summary`."""

    def __init__(self, model: PPNet):
        self.model = model
        count, device = len(model.prototype_class), model.prototype_class.device
        self.class_on_cpu = model.prototype_class.cpu()
        self.depth = int(self.class_on_cpu.bincount().max())  # as far as the curves go: the prototypes of a class
        self.neighbours = Neighbours.none(count, NEIGHBOURS, 0, device)
        pairs = class_pairs(self.class_on_cpu, device)
        self.pairs = pairs.pairs
        self.sums = Sums.zero(count, self.depth, pairs.exist.shape, device)

    @torch.no_grad()
    def update(self, index: int, distances: Tensor, noisy_distances: Tensor, cells: Tensor) -> None:
        """Add an image: its number, distances (1, P, h, w) of it and of it with noise, labels (1, h, w) of its cells.

        Only labelled cells count. The random order of removal is a function of `index`.
        """
        self.neighbours = self.neighbours.updated(index, distances, cells)
        similarity, has_pairs, _ = pair_similarities(distances, cells, self.class_on_cpu)
        self.sums.similarity += (similarity * has_pairs).double().sum(0)
        self.sums.pairs_seen += has_pairs.sum(0)
        counted = cells.flatten() != IGNORE
        table, noisy = (d[0].flatten(1).T[counted] for d in (distances, noisy_distances))  # (N, P)
        generator = torch.Generator().manual_seed(index)
        for part, noisy_part in zip(table.split(CHUNK), noisy.split(CHUNK), strict=True):
            random_order = torch.rand(part.shape, generator=generator).topk(self.depth, dim=1).indices
            self._add_cells(part, noisy_part, random_order.to(part.device))
        self.sums.cells += len(table)

    def _add_cells(self, distances: Tensor, noisy_distances: Tensor, random_order: Tensor) -> None:
        table, sums = _as_image(distances), self.sums
        logits = self._logits(table)
        classes = logits.argmax(1)
        contributed = self._contributions(table, classes)
        largest, top = contributed.max(1)
        sums.top += top[largest > 0].bincount(minlength=len(sums.top))
        sums.explaining += explaining_count(contributed).sum()
        sums.unchanged += (top == self._top_prototypes(noisy_distances)).sum()
        sums.agreement += nearest_agreement(distances, self.model.prototype_class, classes, self.depth).sum(0)
        for which, order in enumerate((contributed.topk(self.depth, dim=1).indices, random_order)):
            removed = (self.model.contributions_of(table, p[None, :, None])[0, :, :, 0].T for p in order.T)
            sums.deleted[which] += deletion_curve(logits, removed, classes).sum(0)

    def _top_prototypes(self, distances: Tensor) -> Tensor:
        table = _as_image(distances)
        return self._contributions(table, self._logits(table).argmax(1)).argmax(1)

    def _logits(self, table: Tensor) -> Tensor:
        """Logits of a list of cells: distances (1, P, N, 1) -> (N, C)."""
        return self.model.class_logits(self.model.evidence(self.model.activations(table)))[0, :, :, 0].T

    def _contributions(self, table: Tensor, classes: Tensor) -> Tensor:
        """`PPNet.contributions_to` of a list of cells: distances (1, P, N, 1), (N,) -> (N, P)."""
        return self.model.contributions_to(table, classes[None, :, None])[0, :, :, 0].T

    def merge(self) -> None:
        """Add up what the processes of a run have seen; all of them have to call it."""
        self.neighbours = self.neighbours.of_all_processes()
        self.sums.merge()

    def summary(self) -> dict | None:
        """The metrics as plain numbers and lists; None without a labelled cell.

        prototypes     how many there are
        used           share of them that is the largest contributor to the decision at one cell at least
        unused         indices of the others
        purity         mean class purity
        impure         indices of the prototypes with a purity below 0.5
        similarity     distinctness: mean of exp(-Jeffreys' divergence) over all images, classes and pairs, 0..1,
                       1 = all prototypes of a class look at the same cells (equations 2-5 of ProtoSeg)
        duplicates     pairs of indices whose own mean is above 0.99
        explaining     mean number of prototypes that make up 95 % of a decision
        zeros          share of exact zeros among the last layer's connections to other classes
        agreement      share of the 1, 2, .. nearest prototypes that are of the predicted class
        stability      share of cells whose largest contributor stays the same prototype under noise of 0.2 standard
                       deviations (after Huang et al., ICCV 2023, who compare object parts)
        deletion       mean probability of the predicted class after 0, 1, .. removals, `top` and `random`
        faithfulness   mean gap between the two curves: above 0, the named prototypes matter more than random ones
        """
        sums, model = self.sums, self.model
        if not sums.cells:
            return None
        purity = class_purity(self.neighbours.label, model.prototype_class)
        top_curve, random_curve = sums.deleted / sums.cells
        pair_means = sums.similarity / sums.pairs_seen  # NaN where the class never occurs
        return {
            "prototypes": len(sums.top),
            "used": float((sums.top > 0).double().mean()),
            "unused": (sums.top == 0).nonzero().flatten().tolist(),
            "purity": float(purity.mean()),
            "impure": (purity < 0.5).nonzero().flatten().tolist(),
            "similarity": float(sums.similarity.sum() / sums.pairs_seen.sum().clamp(min=1)),
            "duplicates": self.pairs[pair_means > ALIKE].tolist(),
            "explaining": float(sums.explaining / sums.cells),
            "zeros": zero_connections(model.last_layer.weight, model.prototype_class),
            "agreement": (sums.agreement / sums.cells).tolist(),
            "stability": float(sums.unchanged / sums.cells),
            "deletion": {"top": top_curve.tolist(), "random": random_curve.tolist()},
            "faithfulness": float((random_curve - top_curve)[1:].mean()),
        }


def _as_image(cells: Tensor) -> Tensor:
    """A list of cells (N, P) as an image of one column, (1, P, N, 1): what the model takes."""
    return cells.T[None, :, :, None]
