"""Measuring a model on a data set, in one pass: its labels, and what its explanations are worth."""

from __future__ import annotations

from collections import ChainMap

import numpy as np
import torch
from torch import Tensor

from datasets.base import SegmentationDataset
from datasets.batches import own_images
from evaluation.interpretability import NOISE, Explanations
from evaluation.labelling import View, label_image
from evaluation.parts import PartMetrics, read_parts
from evaluation.report import Evaluation
from evaluation.submission import Submission
from inference import Inference
from metrics import ConfusionMatrix
from model import PPNet
from runtime import distributed

WORST = 6  # images that are shown


@torch.no_grad()
def evaluate(
    inference: Inference,
    dataset: SegmentationDataset,
    view: View,
    export: Submission | None = None,
    num_workers: int = 0,
) -> Evaluation:
    """Label every image at native size, in one pass; memory is that of one image. export: also write the labels.

    Under torchrun each process takes its share of the images, and all of them return the whole result.
    """
    device = inference.device
    explained = Explained(inference, dataset) if isinstance(inference.model, PPNet) and view.is_plain else None
    matrix = ConfusionMatrix(dataset.num_classes, device)
    tallies: dict[int, Tensor] = {}
    worst: list[tuple[float, int, np.ndarray]] = []
    for index, image, label in own_images(dataset, num_workers, dataset.split, stop_together=True):
        image = image.to(device, non_blocking=True, memory_format=torch.channels_last)
        classes, distances = label_image(inference, image, view)
        label = label.to(device, non_blocking=True)
        ours = ConfusionMatrix(dataset.num_classes, device)
        ours.update(classes, label)
        matrix.counts += ours.counts
        tallies[index] = ours.tallies().cpu()
        drawn = classes[0].byte().cpu().numpy()
        if export is not None:
            export.write(index, drawn)
        if ours.counts.any():
            worst = _worst([*worst, (ours.summary()["miou"], index, drawn)])
            if explained is not None and distances is not None:
                explained.update(index, image, label, distances)
    explanations = explained.summary() if explained is not None else None
    distributed.all_reduce(matrix.counts)
    tallies = _of_all_processes(tallies)
    worst = _worst([item for part in distributed.all_gather_objects(worst) for item in part])
    if export is not None:
        export.written = _of_all_processes(export.written)
    return Evaluation(dataset, matrix, torch.stack([tallies[i] for i in range(len(dataset))]), worst, explanations)


def _of_all_processes(by_image: dict) -> dict:
    return dict(ChainMap(*distributed.all_gather_objects(by_image)))


def _worst(images: list[tuple[float, int, np.ndarray]]) -> list[tuple[float, int, np.ndarray]]:
    return sorted(images, key=lambda item: item[:2])[:WORST]


class Explained:
    """The explanations of a prototype model on a data set, measured: with part labels too, where there are any."""

    def __init__(self, inference: Inference, dataset: SegmentationDataset):
        self.inference, self.dataset = inference, dataset
        self.explanations = Explanations(inference.ppnet)
        self.parts = PartMetrics(inference.ppnet.prototype_class, inference.grid)

    def update(self, index: int, image: Tensor, label: Tensor, distances: Tensor) -> None:
        """Add an image (1, 3, H, W) with its label (1, H, W) and distances; the noise is a function of its index."""
        model = self.inference.ppnet
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(index)).to(image.device)
        noisy = self.inference.distances(image + NOISE * noise)
        self.explanations.update(index, distances, noisy, self.inference.grid.labels(label, distances.shape[2:]))
        if (part_label := self.dataset.part_label(index)) is not None:
            parts = read_parts(part_label, (label.shape[2], label.shape[1]))
            clean, changed = (model.activations(values[0]) for values in (distances, noisy))
            self.parts.update(clean, changed, label[0], parts)

    def summary(self) -> dict | None:
        """See `Explanations.summary` and `PartMetrics.summary`; without part labels there are none of the latter.

        Of several processes, all have to call it.
        """
        self.explanations.merge()
        self.parts.merge()
        explanations = self.explanations.summary()
        return explanations and explanations | (self.parts.summary() or {})
