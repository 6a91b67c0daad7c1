"""Which stages run, from which file, into which folder: the schedule of a configuration and the folder of a run.

A *stage* is a piece of the schedule that ends with a file: a training phase, or the push after it. A *run folder* is
the model folder of one run: a file for each stage that is finished, `last_checkpoint.pth` to go on from and
`best_checkpoint.pth`. A pruned model starts a run folder of its own, inside that of the run that it comes from.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from config import Config, config_arguments, config_of, config_to_dict
from runtime import distributed
from runtime.checkpoint import Checkpoint, CheckpointError, load_checkpoint, load_last, locked_run, previous
from runtime.command import go_on_command
from runtime.errors import ConfigError
from runtime.files import replacing
from runtime.typed_yaml import dump_yaml

TWO_FOLDERS = "--set paths.model_dir=FOLDER --set paths.results_dir=FOLDER"  # a run has one of each


class Stage(NamedTuple):
    """A piece of the schedule that ends with a file: a training phase, or the push after it."""

    name: str
    phase: int
    is_push: bool
    file: str

    @property
    def place(self) -> tuple[int, bool]:
        """Where it stands in the schedule; places can be compared."""
        return self.phase, self.is_push


def plan(config: Config, skip_push: bool = False) -> list[Stage]:
    """The stages of a configuration, in order; the last one's file is the final checkpoint."""
    pushes = sum(phase.push for phase in config.training.phases)
    stages = []
    for i, phase in enumerate(config.training.phases):
        stages.append((phase.name, i, False))
        if phase.push and not skip_push:
            stages.append(("push" if pushes == 1 else f"{phase.name}_push", i, True))
    names = [name for name, _, _ in stages[:-1]] + ["final"]
    return [Stage(*stage, f"{name}_checkpoint.pth") for stage, name in zip(stages, names, strict=True)]


def stage_of(config: Config, checkpoint: Checkpoint, path: Path) -> Stage:
    """The stage that a checkpoint stands in or ends, in the schedule of `config`. Raises CheckpointError."""
    schedule = plan(config)
    for stage in schedule:
        if stage.name == checkpoint.stage:
            return stage
    names = ", ".join(stage.name for stage in schedule)
    raise CheckpointError(f"{path}: it ends the stage '{checkpoint.stage}'; this schedule has {names}")


# --- the folder of a run ---------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A checkpoint, the file that it was read from, and the stage that it stands in or ends."""

    checkpoint: Checkpoint
    path: Path
    stage: Stage


class RunFolder:
    """The model folder of one run.

    While `--overwrite` replaces a run, the files of that run stay until their successors are whole; `OUTDATED` names
    them, so that nothing goes on from one of them.
    """

    OUTDATED = ".outdated.json"

    def __init__(self, config: Config):
        self.config, self.path = config, Path(config.paths.model_dir)
        self.schedule = plan(config)
        self.last, self.best = self.path / "last_checkpoint.pth", self.path / "best_checkpoint.pth"

    def file(self, stage: Stage) -> Path:
        """Where the result of a stage is."""
        return self.path / stage.file

    def names(self) -> set[str]:
        """What the files of this run are called."""
        return {stage.file for stage in self.schedule} | {p.name for p in (self.last, previous(self.last), self.best)}

    def is_inside(self, path: Path) -> bool:
        """Whether a file lies in this folder."""
        return path.parent.resolve() == self.path.resolve()

    def outdated(self) -> set[str]:
        """Names of the files that are there from a run that is being replaced."""
        try:
            listed = json.loads((self.path / self.OUTDATED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return set()
        return {name for name in listed if name in self.names()} if isinstance(listed, list) else set()

    def set_outdated(self, names: set[str]) -> None:
        """Remember which files are of a run that is being replaced."""
        path = self.path / self.OUTDATED
        if names:
            with replacing(path, "w", encoding="utf-8") as file:
                json.dump(sorted(names), file)
        elif self.outdated():  # anything else of this name is not ours
            path.unlink(missing_ok=True)

    def has(self, path: Path) -> bool:
        """Whether a file is there and of this run."""
        return path.is_file() and path.name not in self.outdated()

    def files(self) -> list[Path]:
        """All files of this run that are there."""
        return [self.path / name for name in sorted(self.names()) if self.has(self.path / name)]

    def replaced(self, path: Path) -> None:
        """A file was written: it is of this run now. Of a run that was replaced, the last checkpoint goes with it."""
        if outdated := self.outdated():
            names = {path.name, previous(path).name}
            if previous(path).name in outdated:
                previous(path).unlink(missing_ok=True)
            self.set_outdated(outdated - names)

    def forget_outdated(self) -> None:
        """Remove what is left of a run that was replaced: it was made from what is not there any more."""
        for name in self.outdated():
            (self.path / name).unlink(missing_ok=True)
        self.set_outdated(set())

    def newest(self) -> Found | None:
        """What is furthest in the schedule: a stage's result, or the last checkpoint beyond it."""
        finished = [stage for stage in self.schedule if self.has(self.file(stage))]
        if self.has(self.last) or self.has(previous(self.last)):
            last = self.load(self.last)
            if not finished or last.stage.place > finished[-1].place:
                return last
        return self.load(self.file(finished[-1])) if finished else None

    def load(self, path: Path) -> Found:
        """A checkpoint that fits the model and the schedule. Raises CheckpointError."""
        checkpoint, path = load_last(path)
        check_same_model(self.config, checkpoint, path)
        return Found(checkpoint, path, stage_of(self.config, checkpoint, path))


def check_own_folder(folder: RunFolder, found: Found, command: Command) -> None:
    """Refuse to go on from another run's file in a folder that holds a run: each model has a folder of its own.

    A pruned model is another run, also where an earlier version wrote it beside the run that it comes from.
    """
    is_inside = folder.is_inside(found.path)
    is_ours = found.path.name in folder.names() or not found.path.name.startswith("pruned_")
    if (is_inside and is_ours) or not folder.files():
        return
    models, results = folders_of_pruned(folder.path, Path(folder.config.paths.results_dir))
    if not is_inside:
        models, results = found.path.parent, results.with_name(found.path.absolute().parent.name)
    raise ConfigError(
        f"{folder.path} holds another run than that of {found.path}. To go on with the latter, in folders of its own: "
        + command.text(found.path, model_dir=str(models), results_dir=str(results))
    )


def left_by_an_earlier_version(folder: RunFolder, command: Command) -> str | None:
    """How to go on with a pruned model that was kept beside its run, as --resume auto once seemed to."""
    there = [folder.path / f"{name}_checkpoint.pth" for name in ("pruned_final", "pruned_last", "pruned")]
    newest = next((path for path in there if path.is_file()), None)
    if newest is None or newest == there[0]:
        return None
    models, results = folders_of_pruned(folder.path, Path(folder.config.paths.results_dir))
    how = command.text(newest, model_dir=str(models), results_dir=str(results))
    return f"{newest} is of a pruned model, which is a run of its own; to go on with that: {how}"


def folders_of_pruned(models: Path, results: Path) -> tuple[Path, Path]:
    """The folders in which the next model that is pruned from a run begins: `pruned`, or `pruned_2`, ... in each."""
    return _free(models), _free(results)


def _free(folder: Path) -> Path:
    names = ("pruned", *(f"pruned_{number}" for number in range(2, 10_000)))
    return next(folder / name for name in names if not os.path.lexists(folder / name))


# --- the folders, held and checked -----------------------------------------------------------------------------


def outputs_to_replace(folder: RunFolder, stages: list[Stage], found: Found | None, overwrite: bool) -> list[Path]:
    """The results that are there and all that was made from them. Raises ConfigError unless they may be replaced.

    Never the file that the run starts from, nor one that is no checkpoint of this project.
    """
    later = [folder.file(stage) for stage in folder.schedule if stage.place >= stages[0].place]
    if found is None or (overwrite and not found.checkpoint.is_midway):  # of the run that is replaced
        later += [folder.last, previous(folder.last), folder.best]
    there = [path for path in later if path.is_file() and (overwrite or found is None or folder.has(path))]
    if there and not overwrite:
        raise ConfigError(
            f"{there[0]} is there from an earlier run. To go on with that run: --resume auto; to replace it:"
            f" --overwrite; to keep both: {TWO_FOLDERS}"
        )
    for path in there:
        if found is not None and path.samefile(found.path):
            raise ConfigError(f"{path}: --overwrite would replace the file that it starts from; instead: {TWO_FOLDERS}")
    # Of the last file and its predecessor one may be damaged, as long as the run goes on from the other.
    pair = {folder.last, previous(folder.last)}
    kept = pair if found is not None and found.path in pair else set()
    written = {*later, folder.last, previous(folder.last), folder.best, *map(folder.path.joinpath, folder.outdated())}
    for path in sorted(written - kept):
        if path.is_file():
            load_checkpoint(path)
    return there


@contextmanager
def locked_folders(folders: Iterable[Path], check: Callable[[], object]) -> Iterator[None]:
    """Hold the folders of a run: no second process can. Raises RunInUseError, and whatever `check` does.

    It is called while those are held that a run had before, and nothing is made in the others: who is refused leaves
    no trace; and again when all are held.
    """
    known = [folder for folder in folders if (folder / ".lock").exists()]
    with locked_run(*known):
        check()
        with locked_run(*(folder for folder in folders if folder not in known)):
            check()
            yield


class ResultsFolder:
    """The results folder of one run: run.json says of which and what made it; config.yaml and metrics.csv."""

    def __init__(self, path: Path, models: Path):
        self.path, self.models = path, models
        self.run, self.config, self.metrics = path / "run.json", path / "config.yaml", path / "metrics.csv"

    def check(self) -> None:
        """Refuse results of another run, and files under the names of ours that somebody else wrote (ConfigError)."""
        remedy = f"nothing was changed; use other folders: {TWO_FOLDERS}"
        there = [path for path in (self.run, self.config, self.metrics) if os.path.lexists(path)]
        owner = self._owner()
        if owner is None and there and not self._is_of_an_earlier_version():
            raise ConfigError(f"{there[0]}: this project did not write this file; {remedy}")
        if owner and owner != self.models.resolve() and any(owner.glob("*_checkpoint.pth")):
            raise ConfigError(f"{self.path}: these are the results of the run in {owner}; {remedy}")

    def _owner(self) -> Path | None:
        """The model folder that run.json names, relative to itself, so that both may be moved."""
        try:
            about = json.loads(self.run.read_text(encoding="utf-8"))
            is_ours = {"train_images", "version"} <= set(about)
            return (self.path.resolve() / about["models"]).resolve() if is_ours else None
        except (OSError, ValueError, TypeError, LookupError):
            return None

    def _is_of_an_earlier_version(self) -> bool:
        """Whether there is a table of ours: before there was a run.json, nothing else said so."""
        try:
            with open(self.metrics, encoding="utf-8", errors="replace") as file:
                return file.readline(100).startswith("phase,step,lr_")
        except OSError:
            return False

    def claim(self, config: Config, about: dict[str, str]) -> None:
        """Write which run this is and what made it, and the resolved configuration."""
        models = os.path.relpath(self.models.resolve(), self.path.resolve())
        with replacing(self.run, "w", encoding="utf-8") as file:
            json.dump({"models": models, **about}, file, indent=1)
        with replacing(self.config, "w", encoding="utf-8") as file:
            file.write(dump_yaml(config_to_dict(config)))


# --- what differs from the run before --------------------------------------------------------------------------


def check_same_model(config: Config, checkpoint: Checkpoint, path: Path) -> None:
    """Raise CheckpointError naming every key of the model section that differs; where weights came from may."""
    ours, theirs = (config_to_dict(c)["model"] for c in (config, config_of(checkpoint)))
    free = ("pretrained", "freeze_bn", "msc_scales", "msc_fusion")
    differing = [k for k in ours if k not in free and ours[k] != theirs[k]]
    if differing:
        what = "; ".join(f"model.{k} is {theirs[k]!r} there, {ours[k]!r} here" for k in differing)
        raise CheckpointError(f"{path}: made by another model: {what}")


def differences(config: Config, checkpoint: Checkpoint, about: dict[str, str]) -> list[str]:
    """What is not as in the run that a checkpoint is of: settings, the number of images and of processes."""
    ours, theirs = (dict(_settings(config_to_dict(c))) for c in (config, config_of(checkpoint)))
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    keys = [key for key in keys if not _is_same_place(key, ours, theirs)]
    told = [f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}" for key in keys]
    before = dict(checkpoint.provenance)
    if checkpoint.midway is not None:
        before["processes"] = str(checkpoint.midway.processes)
    for key, what in (("train_images", "training images"), ("processes", "processes")):
        if before.get(key, about[key]) != about[key]:
            told.append(f"{about[key]} {what}, were {before[key]}")
    return told


def push_differs(command: Command, found: Found) -> list[str]:
    """Whether prototypes were pushed that this command would not have pushed, or the other way round: --skip-push."""
    stages = plan(command.config, command.skip_push)
    is_due = any(stage.is_push and stage.place <= found.stage.place for stage in stages)
    if command.config.model.head == "linear" or is_due == bool(found.checkpoint.prototypes):
        return []
    return ["the push was skipped" if is_due else "the prototypes were pushed"]


def _settings(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Nested plain data as (dotted key, scalar), without what changes no number."""
    if path in ("paths", "system", "dataset.cache", "training.log_every", "training.checkpoint_every"):
        return
    if not isinstance(value, (dict, list)):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _settings(inner, f"{path}.{key}" if path else str(key))


def _is_same_place(key: str, ours: dict, theirs: dict) -> bool:
    """Whether two paths may be one, of which one is relative to a folder that nobody knows any more."""
    if key not in ("dataset.root", "model.pretrained") or None in (ours.get(key), theirs.get(key)):
        return False
    short, long = sorted((Path(ours[key]).parts, Path(theirs[key]).parts), key=len)
    return not Path(*short).is_absolute() and long[len(long) - len(short) :] == short


# --- the command that goes on ----------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command line of train.py to be printed: complete, and the same in whatever folder it is pasted into."""

    config_file: str
    config: Config
    overrides: tuple[str, ...] = ()
    skip_push: bool = False
    phase: int | None = None

    def text(self, resume: Path | str, phase: int | None = None, **folders: str) -> str:
        """The command that goes on from a file or from auto; phase, folders (model_dir, results_dir): other ones."""
        config = dataclasses.replace(self.config, paths=dataclasses.replace(self.config.paths, **folders))
        words = config_arguments(config, self.config_file, list(self.overrides))
        phase = self.phase if phase is None else phase
        words += [] if phase is None else ["--phase", str(phase)]
        words += ["--skip-push"] * self.skip_push
        words += ["--resume", "auto" if resume == "auto" else os.path.abspath(resume)]
        return go_on_command("train.py", words, distributed.world_size())


# --- where to start, what follows, what is asked for -----------------------------------------------------------


def starting_point(folder: RunFolder, command: Command, resume: str | None) -> Found | None:
    """Where to start: from the file that --resume names, from the newest of the run, from the result of the stage
    before the phase that is asked for, or from scratch.

    Raises ConfigError naming the file that is missing and the command that makes it, or CheckpointError.
    """
    phase = command.phase
    if resume not in (None, "auto"):
        return folder.load(Path(resume))
    before = [s for s in plan(folder.config, command.skip_push) if phase is not None and s.phase < phase][-1:]
    found = folder.newest() if resume else None
    if found and (not before or found.stage.place > before[0].place or _ends(found, before[0])):
        return found
    if not before:
        return None
    path = folder.file(before[0])
    if not folder.has(path):
        made_by = command.text("auto", before[0].phase)
        raise ConfigError(f"--phase {phase} starts from {path}, which is not there. It is made by: {made_by}")
    return folder.load(path)


def _ends(found: Found, stage: Stage) -> bool:
    return found.stage.place == stage.place and not found.checkpoint.is_midway


def following(schedule: list[Stage], found: Found | None) -> list[Stage]:
    """What follows: the stage that a checkpoint stands in and all later ones, or those after the one that it ends."""
    if found is None:
        return schedule
    if found.checkpoint.is_midway:
        return [stage for stage in schedule if stage.place >= found.stage.place]
    return [stage for stage in schedule if stage.place > found.stage.place]


def asked_for(schedule: list[Stage], rest: list[Stage], phase: int | None, again: bool) -> list[Stage]:
    """Which of the stages that follow are asked for: all, or those of a phase; all of that phase where it is to be
    trained again."""
    if phase is None:
        return rest
    return [s for s in rest if s.phase == phase] or [s for s in schedule if again and s.phase == phase]


def choose_stages(folder: RunFolder, command: Command, resume: str | None) -> tuple[list[Stage], Found | None]:
    """The stages to run and what to start from, None for a start from scratch; nothing is written.

    Raises ConfigError, or CheckpointError, with the command that helps.
    """
    phases, phase = len(folder.config.training.phases), command.phase
    if phase is not None and not 0 <= phase < phases:
        raise ConfigError(f"--phase {phase}: there are phases 0 to {phases - 1}")
    schedule = plan(folder.config, command.skip_push)
    found = starting_point(folder, command, resume)
    rest = following(schedule, found)
    is_named = resume not in (None, "auto")
    if found and is_named:
        check_own_folder(folder, found, command)
        if found.checkpoint.is_midway and phase is not None and rest[0].phase != phase:
            raise ConfigError(f"{found.path} stands in phase {rest[0].phase}: give --phase {rest[0].phase}, or none")
    return asked_for(schedule, rest, phase, again=is_named), found
