"""Images and labels as batches: the random crops of training, the order of the steps, whole images to evaluate."""

from __future__ import annotations

import signal
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from config import DatasetConfig
from datasets.base import DatasetError, SegmentationDataset, normalize
from grid import IGNORE
from runtime import distributed
from runtime.command import machine_trouble, stop_flag

WORKER_TIMEOUT = 120  # seconds that a worker may take for a batch before it is taken for dead


class TrainTransform:
    """Random scale, crop and flip of image and label together.

    A window of crop_size / scale source pixels is cut out and resized; where it leaves the image, the crop is image
    mean (0 after normalization) and 255. Only the pixels of the window are ever resized.
    """

    def __init__(self, config: DatasetConfig):
        self.crop_size, self.scale_range, self.flip = config.crop_size, config.scale_range, config.flip

    def __call__(self, image: Image.Image, label: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(RGB, mode L) of one size -> float32 (3, crop, crop), int64 (crop, crop)."""
        scale = rng.uniform(*self.scale_range)
        source, target = zip(*(self._interval(length, scale, rng) for length in image.size), strict=True)
        box = (source[0][0], source[1][0], source[0][1], source[1][1])
        (left, right), (top, bottom) = target
        size = (right - left, bottom - top)
        pixels = torch.zeros(3, self.crop_size, self.crop_size)
        classes = torch.full((self.crop_size, self.crop_size), IGNORE, dtype=torch.int64)
        if min(size) > 0:
            pixels[:, top:bottom, left:right] = normalize(image.resize(size, Image.Resampling.BILINEAR, box))
            nearest = np.array(label.resize(size, Image.Resampling.NEAREST, box), dtype=np.int64)
            classes[top:bottom, left:right] = torch.from_numpy(nearest)
        if self.flip and rng.random() < 0.5:
            return pixels.flip(2), classes.flip(1)
        return pixels, classes

    def _interval(self, length: int, scale: float, rng: np.random.Generator) -> tuple[tuple, tuple[int, int]]:
        """Along one side: the part of the image that is used, and the part of the crop that it fills."""
        window = self.crop_size / scale
        start = round(rng.uniform(min(0.0, length - window), max(0.0, length - window)))
        first, last = max(0, start), min(length, start + window)
        return (first, last), (round((first - start) * scale), round((last - start) * scale))


class TrainingSamples(Dataset):
    """A data set seen through `TrainTransform`, its items keyed by (epoch, index).

    Every random number of an item is a function of (seed, phase, epoch, index), so that the data depend neither on
    the number of workers nor on where a run was resumed.
    """

    def __init__(self, dataset: SegmentationDataset, transform: TrainTransform, seed: int, phase: int):
        self.dataset, self.transform, self.seed, self.phase = dataset, transform, seed, phase

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        rng = np.random.default_rng((1, self.seed, self.phase, epoch, index))
        return self.transform(*self.dataset.read(index), rng)


class StepSampler:
    """The (epoch, index) keys of each step's batch: one endless stream of shuffled epochs, cut into batches.

    A batch sampler for steps first..last-1. Batch `step` is a function of (seed, phase, step) alone. Several processes
    cut the same stream into batches of batch_size x processes, and each takes its part.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, phase: int, first: int = 0, last: int = 0):
        self.num_images, self.batch_size, self.seed, self.phase = num_images, batch_size, seed, phase
        self.first, self.last = first, last
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The keys of one step's batch."""
        start = (step * distributed.world_size() + distributed.rank()) * self.batch_size
        positions = range(start, start + self.batch_size)
        return [(p // self.num_images, int(self._order(p // self.num_images)[p % self.num_images])) for p in positions]

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng = np.random.default_rng((0, self.seed, self.phase, epoch))
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = rng.permutation(self.num_images)
        return self._orders[epoch]

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self.batch(step) for step in range(self.first, self.last))


def train_batches(samples: TrainingSamples, sampler: StepSampler, num_workers: int) -> Generator[list[Tensor]]:
    """The batches of the sampler's steps: images (B, 3, crop, crop), labels (B, crop, crop)."""
    return _batches(samples, num_workers, batch_sampler=sampler)


def eval_batches(dataset: Dataset, num_workers: int) -> Iterator[list[Tensor]]:
    """Whole images one by one, in order: image (1, 3, H, W), label (1, H, W)."""
    return _batches(dataset, num_workers, batch_size=1)


def own_images(
    dataset: SegmentationDataset, num_workers: int, what: str, stop_together: bool = False
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Index, image (1, 3, H, W) and label (1, H, W) of every image that is this process's to handle, with a bar.

    One process handles all; under torchrun each takes every size-th. A signal stops it between two images, alone:
    several processes have to agree first. With stop_together they do so at every image; else after the loop.
    """
    size = distributed.world_size()
    indices = range(distributed.rank(), len(dataset), size)
    batches = eval_batches(Subset(dataset, indices), num_workers)
    with distributed.progress_bar(total=len(indices), desc=what, unit="image") as bar:
        for index, (image, label) in zip(indices, batches, strict=True):
            if stop_together and index < len(dataset) // size * size:  # as many times in every process
                distributed.agree_on_stop()
                stop_flag.raise_if_set()
            elif size == 1:
                stop_flag.raise_if_set()
            yield index, image, label
            bar.update()


def _batches(dataset: Dataset, num_workers: int, **how) -> Generator[list[Tensor]]:
    """A DataLoader's batches, with its failures as one line. Raises DatasetError, or OSError if a worker is lost."""
    loader = DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        timeout=WORKER_TIMEOUT if num_workers else 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own, so that making a loader does not move the global one
        **how,
    )
    batches: Any = None  # torch's types do not have what ends its workers
    try:
        batches = iter(loader)
        yield from batches
    except DatasetError as error:
        raise DatasetError(_without_traceback(str(error))) from None
    except RuntimeError as error:
        raise machine_trouble(error) or error from None
    finally:  # now: left to the garbage collector, torch ends its workers by SIGTERM, and waits; but they ignore it
        if num_workers and batches is not None:
            batches._shutdown_workers()
            for worker in batches._workers:  # one that hangs would never end by itself
                worker.kill()


def _without_traceback(message: str) -> str:
    """The message of an error; from a worker it comes with that process's traceback, and ends with NAME: MESSAGE."""
    return message.strip().splitlines()[-1].partition(": ")[2] if message.startswith("Caught ") else message


def _ignore_signals(_worker_id: int) -> None:
    """Leave signals to the main process: it finishes its step and saves, and needs its workers for that."""
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)
