"""Train a prototype segmentation network: warmup, joint training, prototype push, finetuning of the last layer.

    python train.py                                       all phases of config.yaml
    python train.py --config configs/demo.yaml            generated scenes: minutes on a CPU, no download
    python train.py --phase 1                             one phase, from the result of the one before
    python train.py --resume auto                         go on where a run was stopped
    python train.py --set training.batch_size=4           change single values
    torchrun --nproc_per_node 4 train.py                  four GPUs; see runtime/distributed.py

What is written: models/{warmup,joint,push,final}_checkpoint.pth at the phases' ends, last_checkpoint.pth to go on
from, best_checkpoint.pth; in results/ the resolved config.yaml, metrics.csv, TensorBoard events if `tensorboard` is
installed, run.json (which run this is, and what made it) and prototypes/ with a picture of each after the push.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from config import GROUPS, Config, config_to_dict, load_config
from dataset import build_dataset, check_classes, check_sample, look_for_classes
from datasets.base import SegmentationDataset
from datasets.batches import StepSampler, TrainingSamples, TrainTransform, own_images, train_batches
from explanation.prototype_pictures import draw_prototypes
from grid import IGNORE
from inference import load_weights
from model import LinearNet, construct_PPNet
from module import LOSS_NAMES, NotFiniteError, TrainingModule
from push import push_prototypes
from runtime import distributed
from runtime.checkpoint import (
    Checkpoint,
    CheckpointError,
    Midway,
    load_checkpoint,
    save_checkpoint,
)
from runtime.command import GO_ON, Interrupted, add_config_arguments, all_at_once, machine_trouble, run, stop_flag
from runtime.device import choose_device
from runtime.distributed import print_once
from runtime.errors import UserError
from runtime.files import OutputFolder
from runtime.metrics_log import MetricsLog
from runtime.provenance import provenance
from schedule import (
    TWO_FOLDERS,
    Command,
    Found,
    ResultsFolder,
    RunFolder,
    Stage,
    choose_stages,
    differences,
    left_by_an_earlier_version,
    locked_folders,
    outputs_to_replace,
    push_differs,
)

COLUMNS = (
    "phase", "step", *(f"lr_{group}" for group in GROUPS), "total", *LOSS_NAMES, "train_accuracy", "val_miou",
    "images_per_second", "peak_memory_mb",
)  # fmt: skip


class Data(NamedTuple):
    """What a run looks at."""

    train: SegmentationDataset
    val: SegmentationDataset


class Progress:
    """Where a phase stands besides the weights: what was reported, what early stopping and the best checkpoint need.

    Only `STORED` goes through a file; the speed is measured anew.
    """

    STORED = {  # what it is called in last_checkpoint.pth, and its type
        "reported": int,  # the last step that was validated or logged
        "val_miou": float,
        "best_miou": float,  # of the run
        "phase_best": float,
        "stale": int,  # validations without a better mIoU in this phase
        "best_weights": dict,  # what this phase changes, at phase_best
    }

    def __init__(self, best_miou: float, patience: int = 0):
        self.reported, self.val_miou, self.best_miou = -1, float("nan"), best_miou
        self.phase_best, self.stale, self.patience = -1.0, 0, patience
        self.best_weights: dict[str, torch.Tensor] = {}
        self.clock, self.images = time.monotonic(), 0

    def state(self) -> dict:
        """What a resume needs."""
        return {name: getattr(self, name) for name in self.STORED}

    def load(self, state: dict) -> None:
        """Stand where `state` was taken. Raises CheckpointError if a part is missing."""
        wrong = [name for name, kind in self.STORED.items() if type(state.get(name)) is not kind]
        if wrong:
            raise CheckpointError(f"this checkpoint cannot be resumed exactly: progress without {', '.join(wrong)}")
        for name in self.STORED:
            setattr(self, name, state[name])
        if not self.patience:  # early stopping was switched off meanwhile
            self.best_weights = {}
        elif not self.best_weights:  # it was switched on: the best from here on, which there are weights of
            self.phase_best, self.stale = -1.0, 0

    def note_best(self, val_miou: float, module: TrainingModule) -> None:
        """Take a validation into account: whether it is the phase's best, the run's best, or one more without."""
        self.val_miou, self.best_miou = val_miou, max(self.best_miou, val_miou)
        self.stale += 1
        if val_miou > self.phase_best:
            self.phase_best, self.stale = val_miou, 0
            if self.patience:
                self.best_weights = module.trained_state()

    def note_report(self, step: int) -> None:
        """Step `step` is reported: the speed is measured from here."""
        self.reported, self.clock, self.images = step, time.monotonic(), 0

    @property
    def speed(self) -> float:
        """Images a second since the last report."""
        return self.images / max(1e-9, time.monotonic() - self.clock)

    @property
    def is_stale(self) -> bool:
        """Whether the phase is to be stopped early."""
        return 0 < self.patience <= self.stale


class Run:
    """One call of train.py: the data, the model, the folders, and the stages that lead from one file to the next."""

    def __init__(
        self,
        command: Command,
        folder: RunFolder,
        results: ResultsFolder,
        data: Data,
        device: torch.device,
        found: Found | None,
    ):
        self.config, self.command, self.folder, self.results, self.data = command.config, command, folder, results, data
        torch.manual_seed(self.config.training.seed)
        model = construct_PPNet(self.config.model, load_pretrained=found is None)
        if found is not None:
            load_weights(model, found.checkpoint.model)
        self.module = TrainingModule(self.config, model, device)
        self.found, self.records = found, list(found.checkpoint.prototypes) if found else []
        self.step = found.checkpoint.step if found else 0  # of the phase that was trained last
        self.resume_from: Path | str = found.path if found else "auto"  # if the run is stopped now
        self.log = MetricsLog(results.metrics, COLUMNS) if distributed.rank() == 0 else None
        self.pictures = OutputFolder(results.path / "prototypes", f"name another one with {TWO_FOLDERS}")
        self.about = about_run(data.train)

    @property
    def midway(self) -> Checkpoint | None:
        """What the run goes on from in the middle of a phase."""
        return self.found.checkpoint if self.found and self.found.checkpoint.is_midway else None

    def take_over(self, stages: list[Stage], replaced: list[Path]) -> None:
        """Say what the run starts from, make the folders its own, and drop the rows that it will write anew."""
        if self.found is not None:
            print_once(f"starting from {self.found.path}")
            tell_differences(self.command, self.found, self.about)
        for warning in look_for_classes(self.data.train, grid=self.module.inference.grid):
            print_once(f"warning: {warning}")
        if any(stage.is_push for stage in stages) and not isinstance(self.module.model, LinearNet):
            self.pictures.begin()
        self.folder.set_outdated(self.folder.outdated() | {path.name for path in replaced})
        self.results.claim(self.config, self.about)
        phases, first = self.config.training.phases, stages[0]
        reported = phases[first.phase].steps if first.is_push else -1
        if self.found and self.found.checkpoint.midway:
            reported = self.found.checkpoint.midway.progress.get("reported", -1)
        names = [phase.name for phase in phases]
        if self.found and not self.folder.is_inside(self.found.path):
            names = names[first.phase :]  # rows of earlier phases, if there are any, are those of another run
        if self.log is not None:
            self.log.rewind(names, phases[first.phase].name, reported)

    def go(self, stages: list[Stage]) -> None:
        """Run the stages. An error says how to go on."""
        for stage in stages:
            try:
                if stage.is_push:
                    self.push(stage)
                else:
                    self.train(stage, self.midway if stage is stages[0] else None)
            except Interrupted as signal:
                raise Interrupted(signal.signum, self._what_next()) from None
            except NotFiniteError:
                raise
            except (UserError, OSError, MemoryError, RuntimeError) as error:
                raise self._with_remedy(error) from None
            self.resume_from = self.folder.file(stage)

    def _what_next(self) -> str:
        is_here = self.resume_from == "auto" or Path(self.resume_from).parent == self.folder.path
        return f"go on with: {self.command.text('auto' if is_here else self.resume_from)}"

    def _with_remedy(self, error: UserError | OSError | MemoryError | RuntimeError) -> Exception:
        trouble = None if isinstance(error, UserError) else machine_trouble(error)
        if trouble is None and not isinstance(error, (UserError, OSError)):
            return error
        kind = type(error) if isinstance(error, UserError) else OSError
        reason = told(trouble or error).removesuffix(GO_ON).rstrip(". ")
        return kind(f"{reason}. When that is mended, {self._what_next()}")

    # --- a training phase ----------------------------------------------------------------------------------------

    def train(self, stage: Stage, midway: Checkpoint | None) -> None:
        """Train a phase to its end, from its start or from the state of a last_checkpoint."""
        phase = self.module.begin_phase(stage.phase)
        self.step = 0
        if phase is None:
            head = self.config.model.head
            print_once(f"phase {stage.phase} ({stage.name}): the {head} head has nothing that it trains")
            return self.finish(stage, self._validate())
        progress = Progress(self._best_so_far(), phase.config.early_stopping)
        if midway is not None and midway.midway is not None:
            try:
                self.module.load_state(midway.midway, midway.step)
                progress.load(midway.midway.progress)
            except CheckpointError as error:
                raise CheckpointError(f"{midway.origin}: {error}; give it the settings of the run before") from None
        self._announce(stage)
        started = time.monotonic()
        try:
            self._loop(stage, progress)
        except NotFiniteError as error:  # of the step before: found by the next, or where its loss is logged or saved
            raise self._with_images(error, stage) from None
        self.step = phase.step
        if progress.best_weights:
            self.module.model.load_state_dict(progress.best_weights, strict=False)
            progress.val_miou = progress.phase_best
        self.finish(stage, progress.val_miou, time.monotonic() - started)

    def _loop(self, stage: Stage, progress: Progress) -> None:
        training, phase = self.config.training, self.module.phase
        steps = phase.config.steps
        sampler = StepSampler(len(self.data.train), training.batch_size, training.seed, stage.phase, phase.step, steps)
        samples = TrainingSamples(self.data.train, TrainTransform(self.config.dataset), training.seed, stage.phase)
        batches = train_batches(samples, sampler, self.config.system.num_workers)
        progress.note_report(progress.reported)
        with distributed.progress_bar(total=steps, initial=phase.step, desc=stage.name, unit="step") as bar:
            while True:
                with self._saved(stage, progress):
                    self._report(stage, progress, bar)
                    if phase.step == steps or progress.is_stale:
                        return
                    if phase.step and phase.step % training.checkpoint_every == 0 and self._can_save():
                        self.save_last(stage, progress)
                    self._stop_if_asked()
                    batch = next(batches)
                self.module.training_step(*batch)
                progress.images += training.batch_size * distributed.world_size()
                bar.update()

    @contextmanager
    def _saved(self, stage: Stage, progress: Progress) -> Iterator[None]:
        """Save the state where something stops the run between two steps: a signal, a full disk, a vanished file."""
        try:
            yield
        except NotFiniteError:
            raise
        except Interrupted:
            self.save_last(stage, progress)
            raise
        except (UserError, OSError, MemoryError, RuntimeError):
            if distributed.world_size() == 1:  # the other processes do not know of it
                with suppress(UserError, OSError, MemoryError, RuntimeError):
                    self.save_last(stage, progress)
            raise

    def _can_save(self) -> bool:
        """Several processes have gradients of their own between updates, and one file has no room for all of them."""
        return distributed.world_size() == 1 or self.module.phase.step % self.config.training.iter_size == 0

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if any process was sent a signal: in all of them, at the same step."""
        if distributed.agree_on_stop() and self._can_save():
            stop_flag.raise_if_set()

    # --- the log -------------------------------------------------------------------------------------------------

    def _report(self, stage: Stage, progress: Progress, bar: tqdm) -> None:
        """Validate and log if it is time, once a step; what is noted is noted when all of it is written."""
        phase = self.module.phase
        validates, logs = self._is_due()
        if progress.reported >= phase.step or not (validates or logs):
            return
        val_miou = self._validate() if validates else None
        measured = phase.sums.clone(), phase.batches
        try:
            row = self._row(progress, val_miou)
            if self.log is not None:
                self.log.write(row, sum(p.steps for p in self.config.training.phases[: stage.phase]) + phase.step)
            if val_miou is not None and val_miou > progress.best_miou:
                self._save(self.folder.best, self._checkpoint(stage, phase.step, val_miou))
        except OSError:
            phase.sums, phase.batches = measured
            raise
        if val_miou is not None:
            progress.note_best(val_miou, self.module)
        self._show(row, progress, bar)
        progress.note_report(phase.step)

    def _is_due(self) -> tuple[bool, bool]:
        """Whether this step is validated, and whether it is logged."""
        phase, training = self.module.phase, self.config.training
        step = phase.step
        is_first = step == 0 and phase.config.early_stopping == 0
        validates = step == phase.config.steps or (step % training.val_every == 0 and not is_first)
        return validates, step > 0 and step % training.log_every == 0

    def _row(self, progress: Progress, val_miou: float | None) -> dict:
        """A row of metrics.csv: what was measured since the last one."""
        phase = self.module.phase
        row = {"phase": phase.config.name, "step": phase.step}
        row |= {f"lr_{group}": rate for group, rate in self.module.learning_rates().items()}
        if val_miou is not None:
            row["val_miou"] = val_miou
        if phase.step:  # also where a run was stopped while it validated, and has not taken a step of its own yet
            row |= self.module.take_averages()
        if progress.images:
            row["images_per_second"] = progress.speed
        return row | {"peak_memory_mb": _peak_memory(self.module.device)}

    def _show(self, row: dict, progress: Progress, bar: tqdm) -> None:
        """What a row says, beside the bar; as a line where the log is no terminal."""
        status = [f"loss {row['total']:.3f}"] if "total" in row else []
        status += [f"val mIoU {progress.val_miou:.3f}"] if progress.val_miou >= 0 else []
        status += [f"{row['images_per_second']:.1f} images/s"] if "images_per_second" in row else []
        bar.set_postfix_str(", ".join(status))
        if bar.disable or not sys.stdout.isatty():
            print_once(f"{row['phase']} {row['step']:,}/{self.module.phase.config.steps:,}: {', '.join(status)}")

    def _announce(self, stage: Stage) -> None:
        phase = self.module.phase
        count = {group["name"]: sum(p.numel() for p in group["params"]) for group in phase.optimizer.param_groups}
        trained = ", ".join(f"{name} ({size:,})" for name, size in count.items())
        start = f", from step {phase.step:,}" if phase.step else ""
        steps = f"{phase.config.steps:,} steps{start}"
        print_once(f"phase {stage.phase} ({stage.name}): {steps} on {self.module.device}, trains {trained}")

    def _validate(self) -> float:
        return self.module.inference.validate(self.data.val, self.config.system.num_workers).summary()["miou"]

    def _with_images(self, error: NotFiniteError, stage: Stage) -> NotFiniteError:
        if error.step is None:
            return error
        training = self.config.training
        sampler = StepSampler(len(self.data.train), training.batch_size, training.seed, stage.phase)
        names = [self.data.train.image_id(index) for _, index in sampler.batch(error.step)]
        return NotFiniteError(f"{error}. The images of that batch: {', '.join(names)}")

    # --- the push ------------------------------------------------------------------------------------------------

    def push(self, stage: Stage) -> None:
        """Project the prototypes onto training patches, and draw them."""
        started = time.monotonic()
        if isinstance(self.module.model, LinearNet):
            print_once("push: the linear head has no prototypes; nothing to do")
            return self.finish(stage, self._validate())
        print_once(f"push: searching {len(self.data.train):,} images for the nearest patch of every prototype")
        report = push_prototypes(self.module.inference, self.data.train, self.config.system.num_workers)
        self.records = report.records
        if report.not_found:
            self._tell_not_found(report.not_found)
        kept, merged = len(self.records), report.merged
        print_once(f"push: {kept} prototypes, {merged} duplicates merged, mean distance {report.moved:.4g}")
        if distributed.rank() == 0:
            self.records = draw_prototypes(self.module.inference, self.data.train, self.records, self.pictures)
        self.finish(stage, self._validate(), time.monotonic() - started)

    def _tell_not_found(self, prototypes: list[int]) -> None:
        """Say why prototypes have no patch: their class has no pixels, or none that a cell looks at."""
        train, stride = self.data.train, self.module.inference.grid.stride
        pixels = torch.zeros(train.num_classes, dtype=torch.int64)
        for _, _, label in own_images(train, self.config.system.num_workers, "labels"):
            pixels += torch.bincount(label.flatten(), minlength=IGNORE + 1)[: len(pixels)]
        distributed.all_reduce(pixels)
        for prototype in prototypes:
            record = self.records[prototype]
            reason = f"class '{record['class_name']}' never occurs in the training data"
            if pixels[record["class"]]:
                small = f"too small for a grid of stride {stride}"
                reason = f"class '{record['class_name']}' has pixels, but no cell looks at one: {small}"
            print_once(f"push: prototype {prototype}: {reason}; kept as it is")

    # --- files ---------------------------------------------------------------------------------------------------

    def finish(self, stage: Stage, val_miou: float, seconds: float = 0.0) -> None:
        """Write a stage's checkpoint and say so."""
        self._save(self.folder.file(stage), self._checkpoint(stage, self.step, val_miou))
        minutes, rest = divmod(round(seconds), 60)
        file = self.folder.file(stage)
        print_once(f"{stage.name}: val mIoU {val_miou:.4f} after {minutes} min {rest} s -> {file}")

    def save_last(self, stage: Stage, progress: Progress) -> None:
        """Write last_checkpoint.pth: everything that is needed to go on exactly, its predecessor kept."""
        midway = Midway(**self.module.state(), progress=progress.state(), processes=distributed.world_size())
        # What was validated last may be some steps old: it is no number of this file's.
        self._save(self.folder.last, self._checkpoint(stage, self.module.phase.step, None).with_(midway=midway))
        self.resume_from = self.folder.last

    def _save(self, path: Path, checkpoint: Checkpoint) -> None:
        self.module.check_weights()
        if distributed.rank() == 0:
            save_checkpoint(path, checkpoint, keep_previous=checkpoint.is_midway and self.folder.has(path))
            self.folder.replaced(path)

    def _checkpoint(self, stage: Stage, step: int, val_miou: float | None) -> Checkpoint:
        """The model as it is now; val_miou: its own, None where it was not validated."""
        mapping = self.data.train.mapping
        return Checkpoint(
            config=config_to_dict(self.config),
            stage=stage.name,
            phase=stage.phase,
            step=step,
            model=self.module.model.state_dict(),
            prototypes=tuple(self.records),
            metrics={} if val_miou is None else {"val_miou": float(val_miou)},
            class_names=tuple(mapping.names),
            palette=tuple(tuple(color) for color in mapping.palette),  # type: ignore[misc]  # three parts each
            file_ids=mapping.file_ids,
            provenance=self.about,
        )

    def _best_so_far(self) -> float:
        best = self.folder.best
        return load_checkpoint(best).val_miou if self.folder.has(best) else -1.0


def about_run(train_set: SegmentationDataset) -> dict[str, str]:
    """What run.json and the checkpoints say besides the settings."""
    return {"train_images": str(len(train_set)), "processes": str(distributed.world_size()), **provenance()}


def tell_differences(command: Command, found: Found, about: dict[str, str]) -> None:
    """Say in a line what was asked for now and not in the run that goes on, and the other way round."""
    if differing := differences(command.config, found.checkpoint, about) + push_differs(command, found):
        print_once(f"not as in the run before: {'; '.join(differing)}")


def told(error: Exception) -> str:
    """An error as a line: of the system's own the file and the reason, without numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _peak_memory(device: torch.device) -> float:
    """The most memory used so far, in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; on macOS bytes
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# --- the command ---------------------------------------------------------------------------------------------------


def open_data(config: Config, split: str) -> SegmentationDataset:
    """A split of the data, after a look at some of its items."""
    dataset = build_dataset(config, split)
    check_sample(dataset)
    return dataset


def check_disk(config: Config, folder: Path) -> None:
    """Raise OSError if the checkpoints of a run will not fit."""
    with torch.device("meta"):  # sizes without weights
        model = construct_PPNet(config.model, load_pretrained=False)
    size = sum(value.nbytes for value in model.state_dict().values())
    needed = size * (6 + 3 * 2)  # six files of weights, and a last checkpoint with gradients, moments, predecessor
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"{folder}: the checkpoints of this run need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free."
            " Make room, or use --set paths.model_dir=FOLDER --set paths.results_dir=FOLDER"
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--phase", type=int, metavar="N", help="run this phase alone (0 warmup, 1 joint, 2 finetune)")
    parser.add_argument("--resume", metavar="CKPT", help="go on from a checkpoint; auto: the newest there is")
    parser.add_argument("--skip-push", action="store_true", help="keep the prototypes as they were trained")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of the phases and of later ones")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file."""
    arguments = parse_arguments(argv)
    config = load_config(arguments.config, arguments.overrides)
    asked = {name: value for name, value in vars(arguments).items() if name not in ("config", "overrides")}
    distributed.start(config.system.timeout, config_to_dict(config) | asked)
    command = Command(arguments.config, config, tuple(arguments.overrides), arguments.skip_push, arguments.phase)
    folder = RunFolder(config)
    (stages, found), device, train_set, val_set, _ = all_at_once(
        lambda: choose_stages(folder, command, arguments.resume),
        lambda: choose_device(config.system.device),
        lambda: open_data(config, config.dataset.train_split),
        lambda: open_data(config, config.dataset.val_split),
        lambda: check_disk(config, folder.path),
    )
    if arguments.resume == "auto" and (told_of := left_by_an_earlier_version(folder, command)):
        print_once(told_of)
    if found is not None:
        check_classes(train_set, found.checkpoint.class_names, found.path)
    if not stages:
        tell_differences(command, found, about_run(train_set))
        what = "this run" if arguments.phase is None else f"phase {arguments.phase}"
        return print_once(f"{found.path}: {what} is finished; nothing is left to do")
    # Nothing to go on from: what a run left that was killed before its first save may be replaced.
    overwrite = arguments.overwrite or (arguments.resume == "auto" and found is None)
    results = ResultsFolder(Path(config.paths.results_dir), folder.path)

    def check() -> None:
        results.check()
        outputs_to_replace(folder, stages, found, overwrite)

    with locked_folders((results.path, folder.path), check) if distributed.rank() == 0 else nullcontext():
        job = Run(command, folder, results, Data(train_set, val_set), device, found)
        if distributed.rank() == 0:
            job.take_over(stages, outputs_to_replace(folder, stages, found, overwrite))
        distributed.barrier()
        job.go(stages)
        if distributed.rank() == 0:
            folder.forget_outdated()


if __name__ == "__main__":
    run(main)
