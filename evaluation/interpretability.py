"""What a prototype model's explanations are worth, as numbers that need no part labels.

A decision is the class predicted at a cell, and its explanation is what each prototype adds to that class's logit:
weight[class, p] * activation[p]. The functions below are pure and take the cells of one image; `Explanations` sums
them over a data set, image by image, on the device.

N cells, C classes, P prototypes, k neighbours or removals. Metrics that need part labels are in parts.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grid import IGNORE
from losses import class_pairs, pair_similarities
from model import PPNet
from push import nearer, neighbours_of_all, no_neighbours
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


def deletion_curve(activations: Tensor, weight: Tensor, classes: Tensor, order: Tensor) -> Tensor:
    """Probability of each cell's class after the first 0, 1, .. k prototypes of `order` were removed.

    activations (N, P), weight (C, P), classes (N,), order (N, k) indices -> (N, k + 1), 0..1. To remove a prototype
    is to take its column out of the last layer. Faithful explanations fall faster than random orders.
    Source: the deletion metric of Petsiuk et al., "RISE" (BMVC 2018), on prototypes instead of pixels.
    """
    logits = activations @ weight.T
    curve = [logits]
    for removed in order.T:
        logits = logits - weight.T[removed] * activations.gather(1, removed[:, None])
        curve.append(logits)
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


class Explanations:
    """All of the above over a data set: `update` with each image, then `summary`."""

    def __init__(self, model: PPNet):
        self.model = model
        count, device = len(model.prototype_class), model.prototype_class.device
        self.class_on_cpu = model.prototype_class.cpu()
        self.depth = int(self.class_on_cpu.bincount().max())  # as far as the curves go: the prototypes of a class
        self.neighbours = no_neighbours(count, NEIGHBOURS, device)
        self.cells, self.explaining, self.unchanged = torch.zeros(3, dtype=torch.int64, device=device)
        self.top = torch.zeros(count, dtype=torch.int64, device=device)
        self.agreement = torch.zeros(self.depth, dtype=torch.float64, device=device)
        self.deleted = torch.zeros(2, self.depth + 1, dtype=torch.float64, device=device)
        pairs = class_pairs(self.class_on_cpu, device)
        self.pairs = pairs.pairs
        self.pair_sums = torch.zeros(pairs.exist.shape, dtype=torch.float64, device=device)
        self.pair_counts = torch.zeros(pairs.exist.shape, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, index: int, distances: Tensor, noisy_distances: Tensor, cells: Tensor) -> None:
        """Add an image: its number, distances (1, P, h, w) of it and of it with noise, labels (1, h, w) of its cells.

        Only labelled cells count. The random order of removal is a function of `index`.
        """
        self.neighbours = nearer(self.neighbours, distances, cells, index)
        similarity, has_pairs, _ = pair_similarities(distances, cells, self.class_on_cpu)
        self.pair_sums += (similarity * has_pairs).double().sum(0)
        self.pair_counts += has_pairs.sum(0)
        counted = cells.flatten() != IGNORE
        table, noisy = (d[0].flatten(1).T[counted] for d in (distances, noisy_distances))  # (N, P)
        generator = torch.Generator().manual_seed(index)
        for part, noisy_part in zip(table.split(CHUNK), noisy.split(CHUNK), strict=True):
            random_order = torch.rand(part.shape, generator=generator).topk(self.depth, dim=1).indices
            self._add_cells(part, noisy_part, random_order.to(part.device))
        self.cells += len(table)

    def _add_cells(self, distances: Tensor, noisy_distances: Tensor, random_order: Tensor) -> None:
        weight, activations = self.model.last_layer.weight, self.model.activations(distances)
        classes = (activations @ weight.T).argmax(1)
        contributed = self._contributions(distances, classes)
        largest, top = contributed.max(1)
        self.top += top[largest > 0].bincount(minlength=len(self.top))
        self.explaining += explaining_count(contributed).sum()
        self.unchanged += (top == self._top_prototypes(noisy_distances)).sum()
        self.agreement += nearest_agreement(distances, self.model.prototype_class, classes, self.depth).sum(0)
        for which, order in enumerate((contributed.topk(self.depth, dim=1).indices, random_order)):
            self.deleted[which] += deletion_curve(activations, weight, classes, order).sum(0)

    def _top_prototypes(self, distances: Tensor) -> Tensor:
        weight, activations = self.model.last_layer.weight, self.model.activations(distances)
        return self._contributions(distances, (activations @ weight.T).argmax(1)).argmax(1)

    def _contributions(self, distances: Tensor, classes: Tensor) -> Tensor:
        """`PPNet.contributions` of a list of cells: (N, P), (N,) -> (N, P)."""
        return self.model.contributions(distances[..., None, None], classes[:, None, None])[..., 0, 0]

    def merge(self) -> None:
        """Add up what the processes of a run have seen; all of them have to call it."""
        self.neighbours = neighbours_of_all(self.neighbours)
        counts = (self.cells, self.explaining, self.unchanged, self.top, self.pair_counts)
        for sums in (*counts, self.agreement, self.deleted, self.pair_sums):
            distributed.all_reduce(sums)

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
        if not self.cells:
            return None
        purity = class_purity(self.neighbours.label, self.model.prototype_class)
        top_curve, random_curve = self.deleted / self.cells
        pair_means = self.pair_sums / self.pair_counts  # NaN where the class never occurs
        return {
            "prototypes": len(self.top),
            "used": float((self.top > 0).double().mean()),
            "unused": (self.top == 0).nonzero().flatten().tolist(),
            "purity": float(purity.mean()),
            "impure": (purity < 0.5).nonzero().flatten().tolist(),
            "similarity": float(self.pair_sums.sum() / self.pair_counts.sum().clamp(min=1)),
            "duplicates": self.pairs[pair_means > ALIKE].tolist(),
            "explaining": float(self.explaining / self.cells),
            "zeros": zero_connections(self.model.last_layer.weight, self.model.prototype_class),
            "agreement": (self.agreement / self.cells).tolist(),
            "stability": float(self.unchanged / self.cells),
            "deletion": {"top": top_curve.tolist(), "random": random_curve.tolist()},
            "faithfulness": float((random_curve - top_curve)[1:].mean()),
        }
