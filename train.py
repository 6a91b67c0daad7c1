"""Train a prototype segmentation network: warmup, joint training, prototype push, finetuning of the last layer.

    python train.py                                       all phases of config.yaml
    python train.py --config configs/demo.yaml            generated scenes: minutes on a CPU, no download
    python train.py --phase 1                             one phase, from the result of the one before
    python train.py --resume auto                         go on where a run was stopped
    python train.py --set training.batch_size=4           change single values
    torchrun --nproc_per_node 4 train.py                  four GPUs; see distributed.py

What is written: models/{warmup,joint,push,final}_checkpoint.pth at the phases' ends, last_checkpoint.pth to go on
from, best_checkpoint.pth; in results/ the resolved config.yaml, metrics.csv, TensorBoard events if `tensorboard` is
installed, and prototypes/ with a picture of each prototype after the push.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import shlex
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from tqdm import tqdm

from config import GROUPS, Config, config_to_dict, load_config
from dataset import (
    SegmentationDataset,
    StepSampler,
    TrainingSamples,
    TrainTransform,
    build_dataset,
    check_sample,
    train_batches,
)
from explanation.pictures import draw_prototypes
from model import LinearNet, construct_PPNet
from module import LOSS_NAMES, NotFiniteError, TrainingModule, load_weights
from push import push_prototypes
from runtime import distributed
from runtime.checkpoint import CheckpointError, load_checkpoint, load_last, locked_run, previous, save_checkpoint
from runtime.command import Interrupted, add_config_arguments, all_at_once, run, stop_flag
from runtime.device import choose_device
from runtime.distributed import print_once
from runtime.errors import ConfigError


class Stage(NamedTuple):
    """A piece of the schedule that ends with a file: a training phase, or the push after it."""

    name: str
    phase: int
    is_push: bool
    file: str


def plan(config: Config, skip_push: bool = False, prefix: str = "") -> list[Stage]:
    """The stages of a configuration, in order; the last one's file is the final checkpoint."""
    pushes = sum(phase.push for phase in config.training.phases)
    stages = []
    for i, phase in enumerate(config.training.phases):
        stages.append((phase.name, i, False))
        if phase.push and not skip_push:
            stages.append(("push" if pushes == 1 else f"{phase.name}_push", i, True))
    names = [name for name, _, _ in stages[:-1]] + ["final"]
    return [Stage(*stage, f"{prefix}{name}_checkpoint.pth") for stage, name in zip(stages, names, strict=True)]


class MetricsLog:
    """metrics.csv, a row per logged step, and the same as TensorBoard events where tensorboard is installed."""

    COLUMNS = (
        "phase", "step", *(f"lr_{group}" for group in GROUPS), "total", *LOSS_NAMES, "train_accuracy", "val_miou",
        "images_per_second", "peak_memory_mb",
    )  # fmt: skip

    def __init__(self, path: Path):
        self.path = path
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(path.parent / "tensorboard")
        except ImportError:
            self.events = None

    def rewind(self, phases: list[str], phase: str, step: int) -> None:
        """Drop rows of later phases and of later steps of `phase`: the run goes on from there and writes them anew."""
        rows = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
                rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()]  # no cut-off ones
        earlier = phases[: phases.index(phase)]
        kept = [r for r in rows if r["phase"] in earlier or (r["phase"] == phase and int(r["step"]) <= step)]
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, self.path)

    def write(self, row: dict, total_step: int) -> None:
        """Add a row (keys are COLUMNS, missing ones stay empty); total_step counts over all phases."""
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(
                {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            )
        if self.events is not None:
            for key, value in row.items():
                if key not in ("phase", "step"):
                    self.events.add_scalar(key, value, total_step)
            self.events.flush()


class Progress:
    """Where a phase stands besides the weights: what early stopping and the best checkpoint need."""

    def __init__(self, best_miou: float):
        self.reported = -1  # the last step that was validated and logged
        self.val_miou = float("nan")
        self.best_miou = best_miou  # of the run
        self.phase_best = -1.0
        self.stale = 0  # validations without a better mIoU in this phase
        self.best_weights: dict[str, torch.Tensor] = {}  # what this phase trains, at phase_best

    def load(self, state: dict) -> None:
        """Stand where `state`, a Progress's vars, was taken. Raises CheckpointError if a part is missing."""
        wrong = [name for name, value in vars(self).items() if type(state.get(name)) is not type(value)]
        if wrong:
            raise CheckpointError(f"this checkpoint cannot be resumed exactly: progress without {', '.join(wrong)}")
        vars(self).update(state)


class Run:
    """One call of train.py: the data, the model, the folders, and the stages that lead from one file to the next."""

    def __init__(self, config: Config, command: str = "python train.py"):
        self.config, self.command = config, command
        self.prefix = ""  # of its files: "pruned_" where it goes on from a pruned model
        self.models, self.results = Path(config.paths.model_dir), Path(config.paths.results_dir)
        self.device, self.train_set, self.val_set, _ = all_at_once(
            lambda: choose_device(config.system.device),
            lambda: self._open(config.dataset.train_split),
            lambda: self._open(config.dataset.val_split),
            self._check_disk,
        )
        self.records: list[dict] = []
        self.resume_from: Path | str = "auto"  # what --resume goes on from, if the run is stopped now

    def _open(self, split: str) -> SegmentationDataset:
        dataset = build_dataset(self.config, split)
        check_sample(dataset)
        return dataset

    def path(self, name: str) -> Path:
        """Where one of this run's checkpoints is."""
        return self.models / f"{self.prefix}{name}_checkpoint.pth"

    def start(self, state: dict | None, first: Stage) -> None:
        """Make the model, random or pretrained, or as a checkpoint has it, and the log that goes with it."""
        torch.manual_seed(self.config.training.seed)
        model = construct_PPNet(self.config.model, load_pretrained=state is None)
        if state is not None:
            load_weights(model, state["model"])
            self.records = state.get("prototypes", [])
        self.module = TrainingModule(self.config, model, self.device)
        if state is not None:
            self.module.phase_index, self.module.step = state["phase"], state["step"]
        if state is not None and state.get("processes", distributed.world_size()) != distributed.world_size():
            print_once(
                f"{state['processes']} processes began this run, {distributed.world_size()} go on: the rest will differ"
            )
        if distributed.rank() == 0:
            self._open_log(state, first)

    def _open_log(self, state: dict | None, first: Stage) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        resolved = yaml.safe_dump(config_to_dict(self.config), sort_keys=False)
        (self.results / "config.yaml").write_text(resolved, encoding="utf-8")
        self.log = MetricsLog(self.results / f"{self.prefix}metrics.csv")
        phases = self.config.training.phases
        done = phases[first.phase].steps if first.is_push else -1
        step = state["step"] if state is not None and "optimizer" in state else done
        self.log.rewind([phase.name for phase in phases], phases[first.phase].name, step)

    def _check_disk(self) -> None:
        with torch.device("meta"):  # sizes without weights
            model = construct_PPNet(self.config.model, load_pretrained=False)
        size = sum(value.nbytes for value in model.state_dict().values())
        needed = size * (6 + 3 * 2)  # six files of weights, and a last checkpoint with gradients, moments, predecessor
        there = next(folder for folder in (self.models, *self.models.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise OSError(
                f"{self.models}: the checkpoints of this run need {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free."
                " Make room, or use --set paths.model_dir=FOLDER"
            )

    # --- training ----------------------------------------------------------------------------------------------

    def train_stage(self, stage: Stage, resumed: dict | None) -> None:
        """Run a training phase to its end, from its start or from the state of a last_checkpoint."""
        module, phase = self.module, self.config.training.phases[stage.phase]
        if not module.begin_phase(stage.phase):
            print_once(
                f"phase {stage.phase} ({phase.name}): the {self.config.model.head} head has nothing that it trains"
            )
            return self.finish_stage(stage, self._validate())
        self.progress = Progress(self._best_so_far())
        if resumed is not None:
            module.load_state(resumed, resumed["step"])
            self.progress.load(resumed.get("progress", {}))
        self._announce(stage)
        started = time.monotonic()
        try:
            self._loop(stage)
        except Interrupted:
            self.save_last(stage)
            self.resume_from = self.path("last")
            raise
        except NotFiniteError as error:  # of the step before: found by the next, or where its loss is logged or saved
            raise self._with_images(error, stage) from None
        if self.progress.best_weights:
            self.module.model.load_state_dict(self.progress.best_weights, strict=False)
            self.progress.val_miou = self.progress.phase_best
        self.finish_stage(stage, self.progress.val_miou, time.monotonic() - started)

    def _loop(self, stage: Stage) -> None:
        training, module = self.config.training, self.module
        sampler = StepSampler(len(self.train_set), training.batch_size, training.seed, stage.phase)
        sampler.first, sampler.last = module.step, module.phase.steps
        samples = TrainingSamples(self.train_set, TrainTransform(self.config.dataset), training.seed, stage.phase)
        batches = train_batches(samples, sampler, self.config.system.num_workers)
        bar = distributed.progress_bar(
            total=module.phase.steps, initial=module.step, desc=module.phase.name, unit="step"
        )
        self.clock, self.images = time.monotonic(), 0
        while True:
            self._report(stage, bar)
            if module.step == module.phase.steps or self._is_stale():
                break
            if module.step and module.step % training.checkpoint_every == 0 and self._can_save():
                self.save_last(stage)
            self._stop_if_asked()
            module.training_step(*next(batches))
            self.images += training.batch_size * distributed.world_size()
            bar.update()
        bar.close()

    def _can_save(self) -> bool:
        """Several processes have gradients of their own between updates, and one file has no room for all of them."""
        return distributed.world_size() == 1 or self.module.step % self.config.training.iter_size == 0

    def _stop_if_asked(self) -> None:
        """Raise Interrupted if any process was sent a signal: in all of them, at the same step."""
        if distributed.agree_on_stop() and self._can_save():
            stop_flag.raise_if_set()

    def _report(self, stage: Stage, bar: tqdm) -> None:
        """Validate and log if it is time, once a step."""
        module, progress, training = self.module, self.progress, self.config.training
        step, at_end = module.step, module.step == module.phase.steps
        validates = at_end or (step % training.val_every == 0 and (step > 0 or module.phase.early_stopping > 0))
        if progress.reported >= step or not (validates or (step and step % training.log_every == 0)):
            return
        elapsed = max(1e-9, time.monotonic() - self.clock)
        row = {"phase": module.phase.name, "step": step}
        row |= {f"lr_{group}": rate for group, rate in module.learning_rates().items()}
        if validates:
            row["val_miou"] = progress.val_miou = self._validate()
            self._note_best(stage)
        if step:  # also where a run was stopped while it validated, and has not taken a step of its own yet
            row |= module.take_averages()
        if self.images:
            row["images_per_second"] = self.images / elapsed
        row["peak_memory_mb"] = _peak_memory(self.device)
        progress.reported = step
        if distributed.rank() == 0:
            self.log.write(row, sum(p.steps for p in training.phases[: stage.phase]) + step)
        status = [f"loss {row['total']:.3f}"] if "total" in row else []
        status += [f"val mIoU {progress.val_miou:.3f}"] if progress.val_miou >= 0 else []
        status += [f"{row['images_per_second']:.1f} images/s"] if "images_per_second" in row else []
        status = ", ".join(status)
        bar.set_postfix_str(status)
        if bar.disable:  # not a terminal: a line in the log instead of a bar
            print_once(f"{module.phase.name} {step:,}/{module.phase.steps:,}: {status}")
        self.clock, self.images = time.monotonic(), 0

    def _validate(self) -> float:
        return self.module.validate(self.val_set, self.config.system.num_workers).summary()["miou"]

    def _note_best(self, stage: Stage) -> None:
        progress = self.progress
        progress.stale += 1
        if progress.val_miou > progress.phase_best:
            progress.phase_best, progress.stale = progress.val_miou, 0
            if self.module.phase.early_stopping:
                trained = ((n, p) for n, p in self.module.model.named_parameters() if p.requires_grad)
                progress.best_weights = {name: parameter.detach().clone() for name, parameter in trained}
        if progress.val_miou > progress.best_miou:
            progress.best_miou = progress.val_miou
            self._save(self.path("best"), self._weights(stage, progress.val_miou))

    def _is_stale(self) -> bool:
        patience = self.module.phase.early_stopping
        return 0 < patience <= self.progress.stale

    def _with_images(self, error: NotFiniteError, stage: Stage) -> NotFiniteError:
        if error.step is None:
            return error
        training = self.config.training
        sampler = StepSampler(len(self.train_set), training.batch_size, training.seed, stage.phase)
        names = [self.train_set.image_id(index) for _, index in sampler.batch(error.step)]
        return NotFiniteError(f"{error}. The images of that batch: {', '.join(names)}")

    # --- the push ----------------------------------------------------------------------------------------------

    def push_stage(self, stage: Stage) -> None:
        """Project the prototypes onto training patches, and draw them."""
        started = time.monotonic()
        if isinstance(self.module.model, LinearNet):
            print_once("push: the linear head has no prototypes; nothing to do")
            return self.finish_stage(stage, self._validate())
        print_once(f"push: searching {len(self.train_set):,} images for the nearest patch of every prototype")
        with self.module.autocast():
            report = push_prototypes(self.module.model, self.train_set, self.device, self.config.system.num_workers)
        self.records = report.records
        for prototype in report.not_found:
            name = self.records[prototype]["class_name"]
            print_once(f"push: prototype {prototype}: class '{name}' never occurs in the training data; kept as it is")
        kept, merged = len(self.records), report.merged
        print_once(f"push: {kept} prototypes, {merged} duplicates merged, mean distance {report.moved:.4g}")
        if distributed.rank() == 0:
            draw_prototypes(self.module.model, self.train_set, self.records, self.results / "prototypes")
        self.finish_stage(stage, self._validate(), time.monotonic() - started)

    # --- files -------------------------------------------------------------------------------------------------

    def finish_stage(self, stage: Stage, val_miou: float, seconds: float = 0.0) -> None:
        """Write a stage's checkpoint and say so."""
        self._save(self.models / stage.file, self._weights(stage, val_miou))
        minutes, rest = divmod(round(seconds), 60)
        print_once(f"{stage.name}: val mIoU {val_miou:.4f} after {minutes} min {rest} s -> {self.models / stage.file}")

    def save_last(self, stage: Stage) -> None:
        """Write last_checkpoint.pth: everything that is needed to go on exactly, its predecessor kept."""
        state = self._weights(stage, self.progress.val_miou) | self.module.state()
        state |= {"progress": dict(vars(self.progress)), "processes": distributed.world_size()}
        self._save(self.path("last"), state, keep_previous=True)

    def _save(self, path: Path, state: dict, keep_previous: bool = False) -> None:
        self.module.check_weights()
        if distributed.rank() == 0:
            save_checkpoint(path, state, keep_previous)

    def _weights(self, stage: Stage, val_miou: float) -> dict:
        return {
            "config": config_to_dict(self.config),
            "stage": stage.name,
            "phase": stage.phase,
            "step": self.module.step,
            "model": self.module.model.state_dict(),
            "prototypes": self.records,
            "metrics": {"val_miou": float(val_miou)},
            "class_names": list(self.train_set.mapping.names),
            "palette": [list(color) for color in self.train_set.mapping.palette],
            "pruned": bool(self.prefix),
        }

    def _best_so_far(self) -> float:
        path = self.path("best")
        return load_checkpoint(path)["metrics"]["val_miou"] if path.is_file() else -1.0

    def _announce(self, stage: Stage) -> None:
        count = {group["name"]: sum(p.numel() for p in group["params"]) for group in self.module.optimizer.param_groups}
        trained = ", ".join(f"{name} ({size:,})" for name, size in count.items())
        start = f", from step {self.module.step:,}" if self.module.step else ""
        steps = f"{self.module.phase.steps:,} steps{start}"
        print_once(f"phase {stage.phase} ({stage.name}): {steps} on {self.device}, trains {trained}")


def _peak_memory(device: torch.device) -> float:
    """The most memory used so far, in MB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes; on macOS bytes
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


# --- which stages ----------------------------------------------------------------------------------------------


def newest(config: Config, stages: list[Stage]) -> Path | None:
    """The checkpoint that is furthest in the schedule: a stage's result, or the last_checkpoint beyond it."""
    folder = Path(config.paths.model_dir)
    finished = [i for i, stage in enumerate(stages) if (folder / stage.file).is_file()]
    last = folder / "last_checkpoint.pth"
    if last.is_file() or previous(last).is_file():
        state, last = load_last(last)
        if _index(stages, state, last) > max(finished, default=-1):
            return last
    return folder / stages[finished[-1]].file if finished else None


def _index(stages: list[Stage], state: dict, path: Path) -> int:
    names = [stage.name for stage in stages]
    if state.get("stage") not in names:
        raise CheckpointError(f"{path}: it ends the stage '{state.get('stage')}'; this schedule has {', '.join(names)}")
    return names.index(state["stage"])


def choose_stages(
    config: Config, phase: int | None, resume: str | None, skip_push: bool
) -> tuple[list[Stage], dict | None, Path | None]:
    """The stages to run and the checkpoint to start from, (None, None) for a start from scratch.

    Raises ConfigError, or CheckpointError, naming the file that is missing and the command that makes it.
    """
    stages = plan(config, skip_push)
    if phase is not None and not 0 <= phase < len(config.training.phases):
        raise ConfigError(f"--phase {phase}: there are phases 0 to {len(config.training.phases) - 1}")
    path = newest(config, plan(config)) if resume == "auto" else Path(resume) if resume else None
    first = next(i for i, stage in enumerate(stages) if stage.phase == (phase or 0))
    state = None
    if path is not None:
        state, path = load_last(path)
        _check_same_model(config, state, path)
        full = plan(config)
        at = full[_index(full, state, path)]
        position = next((i for i, stage in enumerate(stages) if stage.name == at.name), None)
        if position is None:  # the push that is skipped from now on
            position = next(i for i, stage in enumerate(stages) if stage.phase == at.phase)
        going_on = position if "optimizer" in state else position + 1
        if phase is None or (going_on < len(stages) and stages[going_on].phase == at.phase == phase):
            first = going_on
        elif "optimizer" in state and first != going_on:
            raise ConfigError(f"{path} stands in phase {at.phase}: give --phase {at.phase}, or none")
    elif first > 0:
        path = Path(config.paths.model_dir) / stages[first - 1].file
        if not path.is_file():
            before = stages[first - 1].phase
            made_by = f"python train.py --phase {before}"
            raise ConfigError(f"--phase {phase} starts from {path}, which is not there. It is made by: {made_by}")
        state = load_checkpoint(path)
        _check_same_model(config, state, path)
    prefix = "pruned_" if state is not None and state.get("pruned") else ""
    chosen = plan(config, skip_push, prefix)[first:]
    return [stage for stage in chosen if phase is None or stage.phase == phase], state, path


def _check_same_model(config: Config, state: dict, path: Path) -> None:
    """Raise CheckpointError naming every key of the model section that differs; where weights came from may."""
    ours, theirs = config_to_dict(config)["model"], state["config"].get("model")
    theirs = theirs if isinstance(theirs, dict) else {}
    differing = [k for k in ours if k not in ("pretrained", "freeze_bn", "msc_scales") and ours[k] != theirs.get(k)]
    if differing:
        what = "; ".join(f"model.{k} is {theirs.get(k)!r} there, {ours[k]!r} here" for k in differing)
        raise CheckpointError(f"{path}: made by another model: {what}")


def outputs_to_replace(config: Config, stages: list[Stage], state: dict | None, overwrite: bool) -> list[Path]:
    """The results that are there and all that was made from them. Raises ConfigError unless they may be replaced."""
    folder = Path(config.paths.model_dir)
    prefix = "pruned_" if stages[0].file.startswith("pruned_") else ""
    everything = plan(config, prefix=prefix)
    later = [folder / s.file for s in everything if (s.phase, s.is_push) >= (stages[0].phase, stages[0].is_push)]
    if state is None or (overwrite and "optimizer" not in state):  # of the run that is replaced
        last = folder / f"{prefix}last_checkpoint.pth"
        later += [last, previous(last), folder / f"{prefix}best_checkpoint.pth"]
    there = [path for path in later if path.is_file()]
    if there and not overwrite:
        raise ConfigError(
            f"{there[0]} is there from an earlier run. To go on with that run: --resume auto; to replace it:"
            " --overwrite; to keep both: --set paths.model_dir=FOLDER --set paths.results_dir=FOLDER"
        )
    return there


def main(argv: list[str] | None = None) -> None:
    """Run the command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_config_arguments(parser)
    parser.add_argument("--phase", type=int, metavar="N", help="run this phase alone (0 warmup, 1 joint, 2 finetune)")
    parser.add_argument("--resume", metavar="CKPT", help="go on from a checkpoint; auto: the newest there is")
    parser.add_argument("--skip-push", action="store_true", help="keep the prototypes as they were trained")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of the phases and of later ones")
    arguments = parser.parse_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    distributed.start(config.system.timeout)
    again = ["--config", arguments.config, *(word for o in arguments.overrides for word in ("--set", o))]
    again += [] if arguments.phase is None else ["--phase", str(arguments.phase)]
    (stages, state, path), job = all_at_once(
        lambda: choose_stages(config, arguments.phase, arguments.resume, arguments.skip_push),
        lambda: Run(config, f"python train.py {shlex.join(again)}"),
    )
    job.prefix = "pruned_" if state and state.get("pruned") else ""
    if not stages:
        print_once(f"{path}: this run is finished; nothing is left to do")
        return
    with locked_run(job.models) if distributed.rank() == 0 else nullcontext():
        # Nothing to go on from: what a run left that was killed before its first save may be replaced.
        overwrite = arguments.overwrite or (arguments.resume == "auto" and state is None)
        replaced = outputs_to_replace(config, stages, state, overwrite) if distributed.rank() == 0 else []
        if path is not None:
            print_once(f"starting from {path}")
        job.start(state, stages[0])
        for old in replaced:
            old.unlink()
        distributed.barrier()
        job.resume_from = path or "auto"
        for i, stage in enumerate(stages):
            try:
                if stage.is_push:
                    job.push_stage(stage)
                else:
                    job.train_stage(stage, state if i == 0 and state is not None and "optimizer" in state else None)
            except Interrupted as signal:
                what_next = f"go on with: {job.command} --resume {shlex.quote(str(job.resume_from))}"
                raise Interrupted(signal.signum, what_next) from None
            job.resume_from = job.models / stage.file


if __name__ == "__main__":
    run(main)
