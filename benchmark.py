"""Where the time goes: each command measures alternatives side by side in one run and prints their ratios.

    python benchmark.py diversity      the diversity loss against a loop over classes and pairs
    python benchmark.py push           the patch search in a 1024x2048 image against a loop over its pixels
    python benchmark.py step           prototype model, its twin, and the backbone alone
    python benchmark.py phases         a step of each phase of the configuration
    python benchmark.py batches        an update from iter_size small batches against one from a large batch
    python benchmark.py profile        the operations that the joint step spends its time in
    python benchmark.py evaluate       labelling a 1024x2048 image: prototype model, its twin, the backbone alone
    python benchmark.py loader         a training sample against decoding its files, and samples/s by worker count
    python benchmark.py schedule       hours that the configuration's phases take at the measured rates

Times are medians of interleaved repetitions after a warm-up, on CUDA between device events; peak memory is printed on
CUDA alone. `--json FILE` writes the same numbers. Nothing is read from a data set: images are random, files are made
in a temporary folder.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from config import Config, TrainingConfig, load_config
from datasets.batches import StepSampler, TrainingSamples, TrainTransform, train_batches
from datasets.cityscapes import CityscapesDataset
from grid import IGNORE, Grid
from inference import Inference
from losses import diversity_loss
from model import SegmentationNet, construct_PPNet
from module import TrainingModule
from push import nearest_patches
from runtime.command import add_config_arguments, run
from runtime.device import choose_device
from runtime.errors import ConfigError

Row = dict[str, Any]  # text and numbers by the name of their column
WHOLE_IMAGE = (1024, 2048)  # of Cityscapes
NEVER = 10**6  # steps: more than are ever measured


def measure(work: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Median seconds of each piece of work; one repetition runs all of them, so that drift meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repeats + 1):
        for name, function in work.items():
            seconds = _seconds(function, device)
            if repetition:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(torch.cuda.current_stream(device))
    function()
    end.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def compare(work: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> list[Row]:
    """A row per piece of work: milliseconds, and how many times as long as the first one takes."""
    seconds = measure(work, device, repeats)
    base = next(iter(seconds.values()))
    return [{"what": name, "ms": 1000 * s, "times the first": s / base} for name, s in seconds.items()]


# --- diversity -------------------------------------------------------------------------------------------------


def naive_diversity(distances: Tensor, labels: Tensor, prototype_class: Tensor) -> Tensor:
    """The diversity loss as its definition reads: loops over images, classes and pairs."""
    terms = []
    for image, cells in zip(distances.flatten(2), labels.flatten(1), strict=True):
        for class_index in cells.unique():
            mask = cells == class_index
            if class_index == IGNORE or mask.sum() < 2:
                continue
            log_v = [image[p][mask].log_softmax(0) for p in (prototype_class == class_index).nonzero().flatten()]
            for i, first in enumerate(log_v):
                for second in log_v[i + 1 :]:
                    forward = (first.exp() * (first - second)).sum()
                    backward = (second.exp() * (second - first)).sum()
                    terms.append(torch.exp(-(forward + backward) / 2))
    return torch.stack(terms).mean() if terms else distances.sum() * 0


def bench_diversity(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """Forward and backward at 2 x 65 x 65 cells, 19 classes of 10 prototypes, every class in both images."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(2, 190, 65, 65, generator=generator).to(device).requires_grad_()
    blocks = torch.stack([torch.randperm(25, generator=generator) % 19 for _ in range(2)]).view(2, 5, 5)
    labels = blocks.repeat_interleave(13, 1).repeat_interleave(13, 2)
    labels, prototype_class = labels.to(device), torch.arange(190) // 10
    own_device = prototype_class.to(device)
    return compare(
        {
            "diversity_loss": lambda: diversity_loss(distances, labels, prototype_class).value.backward(),
            "loop over pairs": lambda: naive_diversity(distances, labels, own_device).backward(),
        },
        device,
        repeats,
    )


# --- push ------------------------------------------------------------------------------------------------------


def naive_push(distances: np.ndarray, labels: np.ndarray, prototype_class: np.ndarray) -> np.ndarray:
    """The nearest own-class cell of each prototype in one image, by a loop over all label pixels, as published."""
    height, width = (pixels / cells for pixels, cells in zip(labels.shape, distances.shape[1:], strict=True))
    members = {c: np.flatnonzero(prototype_class == c) for c in np.unique(prototype_class)}
    best = np.full(len(prototype_class), np.inf)
    for y in range(labels.shape[0]):
        for x in range(labels.shape[1]):
            own = members.get(labels[y, x])
            if own is not None:
                best[own] = np.minimum(best[own], distances[own, int(y / height), int(x / width)])
    return best


def bench_push(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """The search in a 1024x2048 image of 19 classes with 190 prototypes, given the distances; 'ms' is its cost."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(1, 190, 129, 257, generator=generator)
    blocks = torch.randint(0, 19, (1, 16, 32), generator=generator)
    pixels = blocks.repeat_interleave(64, 1).repeat_interleave(64, 2)
    cells = Grid().labels(pixels, distances.shape[2:]).to(device)
    prototype_class = torch.arange(190) // 10
    here, classes = distances.to(device), prototype_class.to(device)
    arrays = distances[0].numpy(), pixels[0].numpy(), prototype_class.numpy()
    rows = compare({"nearest_patches": lambda: nearest_patches(here, cells, classes)}, device, max(repeats, 10))
    started = time.perf_counter()
    naive_push(*arrays)
    seconds = time.perf_counter() - started
    ratio = 1000 * seconds / rows[0]["ms"]
    return [*rows, {"what": "loop over pixels (once)", "ms": 1000 * seconds, "times the first": ratio}]


# --- steps -----------------------------------------------------------------------------------------------------


def _batch(config: Config, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.training.batch_size, 3, size, size, generator=generator)
    blocks = torch.randint(0, config.model.num_classes, (len(images), 9, 9), generator=generator)
    labels = torch.nn.functional.interpolate(blocks[:, None].float(), size=(size, size), mode="nearest")[:, 0].long()
    return images, labels


def _random(config: Config, **model) -> Config:
    """The configuration with random weights but batch norm as it would be, so that nothing is downloaded."""
    frozen = config.model.bn_is_frozen
    changed = dataclasses.replace(config.model, pretrained="none", freeze_bn=frozen, **model)
    return dataclasses.replace(config, model=changed)


def _tame(model: SegmentationNet) -> SegmentationNet:
    """Make a randomly initialized network with frozen statistics finite: each residual branch starts at zero."""
    for block in model.features.get_submodule("backbone").modules():
        for name in ("bn3", "bn2"):
            if hasattr(block, name):
                torch.nn.init.zeros_(getattr(block, name).weight)
                break
    return model


def _module(config: Config, device: torch.device, phase: int, iter_size: int = NEVER) -> TrainingModule:
    """At the start of a phase that does not end, with an update every iter_size steps."""
    torch.manual_seed(0)
    endless = tuple(dataclasses.replace(p, steps=NEVER) for p in config.training.phases)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, phases=endless, iter_size=iter_size)
    )
    module = TrainingModule(config, _tame(construct_PPNet(config.model, load_pretrained=False)), device)
    module.begin_phase(phase)
    return module


def _joint(config: Config) -> int:
    """The phase that trains most."""
    phases = config.training.phases
    return max(range(len(phases)), key=lambda i: len(phases[i].lr.trained))


def _peak_memory(make: Callable[[], Callable[[], object]], device: torch.device) -> Row:
    """The memory at the height of some work, with the model that `make` makes for it; on CUDA alone."""
    if device.type != "cuda":
        return {}
    before = torch.cuda.memory_allocated(device)
    work = make()
    work()  # once without counting, for what libraries keep
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return {"peak MB": (torch.cuda.max_memory_allocated(device) - before) / 1e6}


def _rate(work: Callable[[], object], ms: float, device: torch.device, repeats: int, bfloat16: bool) -> Row:
    """Operations a second of `work`, which takes `ms`, and their share of what a large matrix product reaches."""
    with FlopCounterMode(display=False) as counter:
        work()
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # the same numbers as the convolutions
    fastest = 2 * size**3 / measure({"": lambda: matrix @ matrix}, device, repeats)[""]
    torch.backends.cuda.matmul.allow_tf32 = allowed
    reached = 1000 * counter.get_total_flops() / ms
    return {"TFLOP/s": reached / 1e12, "share of matmul": reached / fastest}


def bench_step(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """A step of the phase that trains most, prototype model against twin and backbone alone (forward and backward).

    The memory is that of a step with an update, optimizer included; the share is of a large matrix product's rate.
    """
    phase = _joint(config)
    images, labels = _batch(config, config.dataset.crop_size)
    heads = {"twin (linear head)": "linear", "prototype model": "prototype"}

    def update(head: str) -> Callable[[], object]:
        module = _module(_random(config, head=head), device, phase, iter_size=1)
        return lambda: module.training_step(images, labels)

    peaks = {name: _peak_memory(partial(update, head), device) for name, head in heads.items()}
    twin, prototype = (_module(_random(config, head=head), device, phase) for head in heads.values())
    backbone = twin.model.features.get_submodule("backbone")
    on_device = images.to(device, memory_format=torch.channels_last)

    def backbone_alone():
        with twin.inference.autocast():
            features = backbone(on_device)
        features.float().mean().backward()
        backbone.zero_grad(set_to_none=True)

    rows = compare(
        {
            "twin (linear head)": lambda: twin.training_step(images, labels),
            "prototype model": lambda: prototype.training_step(images, labels),
            "backbone alone": backbone_alone,
        },
        device,
        repeats,
    )
    rows = [{**row, "images/s": 1000 * len(images) / row["ms"], **peaks.get(row["what"], {})} for row in rows]
    step = rows[1]  # of the prototype model
    is_bfloat16 = prototype.inference.is_bfloat16
    step |= _rate(lambda: prototype.training_step(images, labels), step["ms"], device, repeats, is_bfloat16)
    return rows


def bench_phases(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """A training step of each phase; the first row is the phase that trains most."""
    phases = config.training.phases
    order = sorted(range(len(phases)), key=lambda i: -len(phases[i].lr.trained))
    images, labels = _batch(config, config.dataset.crop_size)
    first = _module(_random(config), device, order[0])
    modules = {phases[i].name: _same_weights(first, config, device, i) for i in order}
    rows = compare({name: partial(m.training_step, images, labels) for name, m in modules.items()}, device, repeats)
    return [{**row, "images/s": 1000 * len(images) / row["ms"]} for row in rows]


def _same_weights(first: TrainingModule, config: Config, device: torch.device, phase: int) -> TrainingModule:
    module = TrainingModule(first.config, copy.deepcopy(first.model), device)
    module.begin_phase(phase)
    return module


def bench_batches(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """An update of the phase that trains most, from small batches or from one of all their images."""
    training, phase = config.training, _joint(config)
    if training.iter_size == 1:
        raise ConfigError("training.iter_size: 1 is one large batch already; set it to what it is compared with")
    large = dataclasses.replace(training, batch_size=training.batch_size * training.iter_size, iter_size=1)

    def updates(setting: TrainingConfig) -> Callable[[], object]:
        changed = dataclasses.replace(config, training=setting)
        module = _module(_random(changed), device, phase, setting.iter_size)
        batch = _batch(changed, config.dataset.crop_size)

        def update() -> None:
            for _ in range(setting.iter_size):
                module.training_step(*batch)

        return update

    settings = {f"batch_size {s.batch_size}, iter_size {s.iter_size}": s for s in (training, large)}
    peaks = {name: _peak_memory(partial(updates, setting), device) for name, setting in settings.items()}
    rows = compare({name: updates(setting) for name, setting in settings.items()}, device, repeats)
    return [{**row, "images/s": 1000 * large.batch_size / row["ms"], **peaks[row["what"]]} for row in rows]


def bench_profile(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """Where the joint step spends its time: operations by their own time on the device, the first 20."""
    images, labels = _batch(config, config.dataset.crop_size)
    module = _module(_random(config), device, _joint(config))
    module.training_step(images, labels)
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        for _ in range(repeats):
            module.training_step(images, labels)
    times = {
        event.key: (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count)
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CPU and not event.is_user_annotation  # not the same kernels once more
    }
    total = sum(time for time, _ in times.values())
    first = sorted(times.items(), key=lambda item: -item[1][0])[:20]
    return [
        {"what": name, "ms": time / 1000 / repeats, "share": time / total, "calls": count / repeats}
        for name, (time, count) in first
    ]


@torch.no_grad()
def bench_evaluate(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """Labels of a whole image of Cityscapes' size, 1024x2048, from logits of every pixel."""
    image = torch.randn(1, 3, *WHOLE_IMAGE, generator=torch.Generator().manual_seed(0))
    image = image.to(device, memory_format=torch.channels_last)

    def backbone_alone(inference: Inference) -> Tensor:
        with inference.autocast():
            return inference.model.features.get_submodule("backbone")(image)

    def on_image(head: str, work: Callable[[Inference], Tensor]) -> Callable[[], Tensor]:
        inference = _module(_random(config, head=head), device, _joint(config)).inference
        inference.model.eval()
        return lambda: work(inference)

    makers = {
        "twin (linear head)": lambda: on_image("linear", lambda inference: inference.label(image)),
        "prototype model": lambda: on_image("prototype", lambda inference: inference.label(image)),
        "backbone alone": lambda: on_image("linear", backbone_alone),
    }
    peaks = {name: _peak_memory(make, device) for name, make in makers.items()}
    rows = compare({name: make() for name, make in makers.items()}, device, repeats)
    return [{**row, "images/s": 1000 / row["ms"], **peaks[row["what"]]} for row in rows]


def bench_schedule(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """Hours of each phase: its steps times the measured time of one; validation, push and loading come on top."""
    seconds = {row["what"]: row["ms"] / 1000 for row in bench_phases(config, device, repeats)}
    rows = [
        {"what": p.name, "ms": 1000 * seconds[p.name], "steps": p.steps, "hours": p.steps * seconds[p.name] / 3600}
        for p in config.training.phases
    ]
    return [*rows, {"what": "all phases, extrapolated", "hours": sum(row["hours"] for row in rows)}]


# --- data ------------------------------------------------------------------------------------------------------


def bench_loader(config: Config, device: torch.device, repeats: int) -> list[Row]:
    """A training sample of a 1024x2048 PNG pair against decoding its two files, and samples a second by workers."""
    with tempfile.TemporaryDirectory() as folder:
        data = dataclasses.replace(config.dataset, name="cityscapes", root=folder)
        _write_pair(Path(folder))
        samples = TrainingSamples(CityscapesDataset(data, "train"), TrainTransform(config.dataset), 0, 0)
        files = [path for path in samples.dataset.paths(0) if path is not None]
        cached = TrainingSamples(CityscapesDataset(data, "train"), TrainTransform(config.dataset), 0, 0)
        cached.dataset.keep_decoded()
        epochs = iter(range(10_000))
        rows = compare(
            {
                "decode both files": lambda: [Image.open(path).load() for path in files],
                "training sample": lambda: samples[next(epochs), 0],
                "training sample from the cache": lambda: cached[next(epochs), 0],
            },
            torch.device("cpu"),
            max(repeats, 20),
        )
        counts = [n for n in (1, 2, 4, 8, 16) if n <= max(1, os.cpu_count() or 1)]
        for kind, source in (("PNG", samples), ("the cache", cached)):
            for workers in (0, *counts):
                rate = _samples_per_second(source, workers, 10 * max(repeats, 4, 3 * workers))
                rows.append({"what": f"from {kind}, {workers} workers", "samples/s": rate})
        return rows


def _samples_per_second(samples: TrainingSamples, workers: int, count: int) -> float:
    warmup = 1 + 2 * workers  # until every worker has started, and its first batches are taken
    sampler = StepSampler(len(samples.dataset), 1, 0, 0, last=warmup + count)
    batches = train_batches(samples, sampler, workers)
    for _ in range(warmup):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = time.perf_counter() - started
    batches.close()
    return count / seconds


def _write_pair(root: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)).resize((2048, 1024))
    noisy = np.asarray(coarse, dtype=np.int16) + rng.integers(-6, 7, (1024, 2048, 3))
    blocks = rng.integers(7, 34, (16, 32), dtype=np.uint8).repeat(64, 0).repeat(64, 1)
    for folder, suffix, pixels in (
        ("leftImg8bit", "leftImg8bit", noisy.clip(0, 255).astype(np.uint8)),
        ("gtFine", "gtFine_labelIds", blocks),
    ):
        path = root / folder / "train" / "a" / f"a_000000_000000_{suffix}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels).save(path)


# --- the command -----------------------------------------------------------------------------------------------

COMMANDS = {
    "diversity": bench_diversity,
    "push": bench_push,
    "step": bench_step,
    "phases": bench_phases,
    "batches": bench_batches,
    "profile": bench_profile,
    "evaluate": bench_evaluate,
    "loader": bench_loader,
    "schedule": bench_schedule,
}


def machine(device: torch.device) -> str:
    """Hardware and versions, in a line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    return f"{device} ({name}{threads}), {versions}"


def print_table(rows: list[Row]) -> None:
    """Rows as an aligned table; all keys of all rows are columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        first, *others = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        print("  ".join([first.strip().ljust(widths[0]), *others]))


def _cell(value: float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def main(argv: list[str] | None = None) -> None:
    """Run one command and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("command", choices=COMMANDS)
    add_config_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, help="repetitions after the warm-up (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    device = choose_device(config.system.device)
    rows = COMMANDS[arguments.command](config, device, arguments.repeats)
    summary = (COMMANDS[arguments.command].__doc__ or "").split("\n")[0]
    print(f"{arguments.command}: {summary}\n{machine(device)}")
    print_table(rows)
    if arguments.json:
        result = {"command": arguments.command, "machine": machine(device), "rows": rows}
        Path(arguments.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run(main)
