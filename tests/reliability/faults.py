"""What the fault tests share: processes made by fork (torch is imported once), and runs compared bit by bit."""

import csv
import dataclasses
import faulthandler
import os
import resource
import select
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import train
from runtime import command
from runtime.checkpoint import Checkpoint, load_checkpoint, load_last
from schedule import RunFolder

PATIENCE = 60  # seconds after which a process hangs
FREE = ("images_per_second", "peak_memory_mb")  # columns of metrics.csv that are the machine's
MACHINE = ("log.txt", ".lock", "acknowledged", "run.json")  # files that say where and by what command
KILLED = -signal.SIGKILL
WHOLE: dict[tuple, dict] = {}  # results of runs that nothing happened to


class Child:
    """A forked process that runs `task` as a script runs its main; what it prints goes to `log`."""

    def __init__(self, task: Callable[[], None], log: Path):
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            self._run(task)
        self._exit = os.pidfd_open(self.pid)

    def _run(self, task):
        code = 70  # a traceback
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, resource.RLIM_INFINITY))  # no fault floods the disk
            faulthandler.disable()  # pytest's would write into the log
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for standard in (1, 2):
                os.dup2(descriptor, standard)
            sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
            warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)  # not pytest's
            command.run(lambda argv: task())
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, seconds: float = PATIENCE) -> int | None:
        """Its exit code, negative for a signal; None if it still runs after so many seconds."""
        if not select.select([self._exit], [], [], seconds)[0]:
            return None
        os.close(self._exit)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def end(self, quiet: bool = True) -> int:
        """Its exit code; a process that hangs, or ends with a traceback, fails the test.

        quiet: nor may anything else have printed one.
        """
        code = self.wait()
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()
        assert code is not None, f"it hangs:\n{self.said()}"
        assert code != 70 and not (quiet and "Traceback" in self.said()), self.said()
        return code

    def kill(self, signum: int = signal.SIGKILL) -> None:
        os.kill(self.pid, signum)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Place:
    """A folder with tiny.yaml in which runs train, each in a folder of its own, with the same relative paths."""

    def __init__(self, folder: Path, *overrides: str):
        self.folder, self.overrides = folder, list(overrides)

    def start(self, name: str, *arguments: str, before: Callable[[], object] = lambda: None) -> Child:
        """Train in the folder `name`; `before` is called first, in the new process: there it plants a fault."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        how = [word for override in self.overrides for word in ("--set", override)]

        def task():
            os.chdir(home)
            before()
            train.main(["--config", "../tiny.yaml", *how, *arguments])

        return Child(task, home / "log.txt")

    def train(self, name: str, *arguments: str, before: Callable[[], object] = lambda: None) -> int:
        """The exit code of a training run in the folder `name`."""
        code = self.start(name, *arguments, before=before).end()
        print(f"{name} {' '.join(arguments)} -> {code}\n{self.said(name)}")
        return code

    def paste(self, command: str, name: str) -> int:
        """The exit code of a printed command of train.py, given in the folder `name`."""

        def task():
            os.chdir(self.folder / name)
            train.main(shlex.split(command)[2:])

        return Child(task, self.folder / name / "log.txt").end()

    def said(self, name: str) -> str:
        return (self.folder / name / "log.txt").read_text()

    def result(self, name: str) -> dict:
        """All that a run left, in comparable form: the checkpoints' contents, the table, the other files' bytes."""
        home, found = self.folder / name, {}
        for path in sorted(home.rglob("*")):
            key = path.relative_to(home).as_posix()
            if path.suffix == ".pth":
                found[key] = contents(load_checkpoint(path))
            elif path.suffix == ".csv":
                with open(path, newline="") as file:
                    found[key] = [{k: v for k, v in row.items() if k not in FREE} for row in csv.DictReader(file)]
            elif path.is_file() and path.name not in MACHINE:
                found[key] = path.read_bytes()
        return found

    def whole(self) -> dict:
        """The result of a run that nothing happened to."""
        key = (*self.overrides, train.draw_prototypes.__name__, train.Run._validate.__name__)
        if key not in WHOLE:
            assert self.train("whole") == 0
            WHOLE[key] = self.result("whole")
        return WHOLE[key]

    def last(self, name: str) -> Checkpoint:
        """The newest readable last_checkpoint of a run."""
        return load_last(self.folder / name / "models" / "last_checkpoint.pth")[0]

    def newest(self, name: str) -> tuple[int, int]:
        """How far the newest checkpoint of a run is: the number of its stage, and its step; (-1, 0) without any."""
        models = self.folder / name / "models"
        folder = RunFolder(train.load_config(self.folder / "tiny.yaml", [f"paths.model_dir={models}"]))
        found = folder.newest()
        return (-1, 0) if found is None else reached(found.checkpoint, [stage.name for stage in folder.schedule])


def contents(checkpoint: Checkpoint) -> dict:
    """What a checkpoint holds, but for the command and the place of its file."""
    found = dataclasses.asdict(checkpoint)
    return {key: value for key, value in found.items() if key not in ("provenance", "origin")}


def reached(state: Checkpoint, stages: list[str]) -> tuple[int, int]:
    """A position in the schedule that can be compared: (number of the stage, step)."""
    return stages.index(state.stage), state.step


def difference(one, two, path: str = "") -> str | None:
    """Where two results differ in a single bit, or None. NaN is equal to NaN."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return f"{path}: {sorted(one.keys() ^ two.keys(), key=str)} is in one alone"
        return next((d for key in one if (d := difference(one[key], two[key], f"{path}/{key}"))), None)
    if isinstance(one, (list, tuple)) and type(one) is type(two) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{path}/{i}"))), None)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    else:
        same = type(one) is type(two) and (one == two or (one != one and two != two))
    return None if same else path


def without_last(result: dict) -> dict:
    """A result without the files that depend on when it was interrupted."""
    return {name: content for name, content in result.items() if "last_checkpoint" not in name}


def stop_after(steps: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal when it has taken so many training steps."""
    real_step, taken = train.TrainingModule.training_step, []

    def step(trainer, *batch):
        real_step(trainer, *batch)
        taken.append(1)
        if len(taken) == steps:
            os.kill(os.getpid(), signum)

    train.TrainingModule.training_step = step


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
