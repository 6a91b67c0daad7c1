"""Runs that are stopped, killed, started twice or somewhere else (rows 1 to 4, 21, 23, 28 and 30 of the fault battery).

What must hold: whatever happens to a run, the command that resumes it ends with the files of a run to which nothing
happened, bit by bit; and nothing that was announced as saved is lost.
"""

import errno
import fcntl
import multiprocessing
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from explanation.prototype_pictures import draw_prototypes
from inference import Inference
from module import TrainingModule
from runtime.checkpoint import load_tensors, previous
from tests.reliability.faults import KILLED, alive, difference, reached, stop_after, without_last
from tests.tiny import CONFIG, ROOT

EVERY = ("training.checkpoint_every=1", "training.val_every=2", "training.log_every=1")
STEPS = 3 + 5 + 4  # of tiny.yaml


def nightly(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


def assert_as_whole(place, name):
    """A run is as one that nothing happened to: all of its files."""
    assert difference(without_last(place.result(name)), without_last(place.whole())) is None


# --- rows 1 and 2: a clean stop at any step, and other workers afterwards ----------------------------------------
# tests/test_train.py resumes from every single step without workers.


WORKERS = [(2, 0), (0, 2), (1, 2), (2, 1)]


@pytest.mark.parametrize(
    ("steps", "before", "after"),
    [(2, 2, 0), (4, 0, 2), (8, 1, 2), (11, 2, 1)]
    + [nightly(k, *pair) for k in range(1, STEPS) for pair in ((0, 0), *WORKERS)],
)
def test_rows_1_and_2_other_workers_after_a_stop(place, monkeypatch, steps, before, after):
    if before:  # once with pictures, compared byte by byte
        monkeypatch.setattr(train, "draw_prototypes", draw_prototypes)
    workers = [("--set", f"system.num_workers={n}") for n in (before, after)]
    assert place.train("run", *workers[0], before=lambda: stop_after(steps)) == 143
    assert place.train("run", *workers[1], "--resume", "auto") == 0
    found, expected = (without_workers(result) for result in (place.result("run"), place.whole()))
    assert difference(found, expected) is None
    assert not before or "results/prototypes/prototypes.json" in found


def without_workers(result):
    """Without the files and keys that tell how many workers there were, or when it was interrupted."""
    return {
        name: {k: v for k, v in content.items() if k != "config"} if isinstance(content, dict) else content
        for name, content in without_last(result).items()
        if name != "results/config.yaml"
    }


# --- row 3: each piece of the state is needed --------------------------------------------------------------------


def reset_to(value, *path):
    return lambda state: descend(state, path[:-1]).update({path[-1]: value})


def zeroed(*path):
    return lambda state: [value.zero_() for value in descend(state, path).values()]


def descend(state, path):
    for name in path:
        state = state[name]
    return state


def forget(key):
    return lambda state: state.pop(key)


def forget_progress(key):
    return lambda state: state["progress"].pop(key)


def last_layer_of_zeros(state):
    state["model"]["last_layer.weight"].zero_()


PROGRESS = tuple(train.Progress.STORED)
CONTROLS = {
    **{f"{key} is gone": forget(key) for key in ("model", "optimizer", "gradients", "sums", "batches", "progress")},
    **{f"{key} is gone": forget(key) for key in ("step", "stage", "phase", "config", "prototypes")},
    **{f"progress.{key} is gone": forget_progress(key) for key in PROGRESS},
    "another weight": last_layer_of_zeros,
    "the optimizer is new": reset_to({}, "optimizer", "state"),
    "gradients are forgotten": reset_to({}, "gradients"),
    "gradients are 0": zeroed("gradients"),
    "sums are 0": lambda state: state["sums"].zero_(),
    "batches are 0": reset_to(0, "batches"),
    "a step earlier": lambda state: state.update(step=state["step"] - 1),
    "a step later": lambda state: state.update(step=state["step"] + 1),
    "no records": reset_to([], "prototypes"),
    "progress.reported": reset_to(-1, "progress", "reported"),
    "progress.val_miou": reset_to(0.123, "progress", "val_miou"),
    "progress.best_miou": reset_to(-1.0, "progress", "best_miou"),
    "progress.phase_best": reset_to(-1.0, "progress", "phase_best"),
    "progress.stale": reset_to(0, "progress", "stale"),
    "progress.best_weights": reset_to({}, "progress", "best_weights"),
    "progress.best_weights are 0": zeroed("progress", "best_weights"),
}
MIOUS = {0: 0.3, 2: 0.6, 4: 0.5, 6: 0.55, 8: 0.4}  # of finetuning: the best is at 2, and at 8 it stops early


def test_row_3_every_piece_of_the_state_is_needed(place, monkeypatch):
    """Without one, or with another value, the resumed run is refused or ends differently: so row 1 has teeth.

    It is resumed from two cuts, since not all pieces can matter at one: right after a validation, and between two,
    with sums that are not yet written; both between two updates.
    """

    def mious(run):
        phase = run.module.phase
        return MIOUS.get(phase.step, 0.1) if phase.index == 2 else 0.1

    monkeypatch.setattr(train.Run, "_validate", mious)
    place.overrides = [
        "training.phases.2.steps=10", "training.iter_size=3", "training.val_every=2", "training.checkpoint_every=5",
    ]  # fmt: skip
    whole = without_previous(place.whole())
    assert whole["models/final_checkpoint.pth"]["step"] == 8
    cuts = []
    for steps in (4, 5):
        assert place.train(f"cut {steps}", before=lambda steps=steps: stop_after(3 + 5 + steps)) == 143
        cuts.append(place.folder / f"cut {steps}")

    def ends_as_whole(cut, change):
        name = "control"
        shutil.rmtree(place.folder / name, ignore_errors=True)
        shutil.copytree(cut, place.folder / name)
        last = place.folder / name / "models" / "last_checkpoint.pth"
        state = load_tensors(last)
        change(state)
        torch.save(state, last)
        previous(last).unlink(missing_ok=True)
        code = place.train(name, "--resume", "auto")
        assert code in (0, 3)
        return code == 0 and difference(without_previous(place.result(name)), whole) is None

    assert all(ends_as_whole(cut, lambda state: None) for cut in cuts)
    toothless = [name for name, change in CONTROLS.items() if all(ends_as_whole(cut, change) for cut in cuts)]
    assert toothless == []


def without_previous(result):
    return {name: content for name, content in result.items() if "prev" not in name}


def test_row_3_negative_controls_are_of_every_key():
    """The list above is complete: a new piece of state needs its control."""
    keys = {name.split(" ")[0] for name in CONTROLS if "is gone" in name}
    assert keys == {
        "model", "optimizer", "gradients", "sums", "batches", "progress", "step", "stage", "phase", "config",
        "prototypes", *(f"progress.{key}" for key in PROGRESS),
    }  # fmt: skip


# --- row 4: kill -9 ----------------------------------------------------------------------------------------------


def announce(place, name):
    """Write down each save that train.py makes, after it was made."""
    real, told = train.save_checkpoint, place.folder / name / "acknowledged"

    def save(path, state, **how):
        real(path, state, **how)
        if "best" not in Path(path).name:
            with open(told, "a") as file:
                file.write(f"{state.stage} {state.step}\n")

    train.save_checkpoint = save


def announced(place, name, stages):
    told = place.folder / name / "acknowledged"
    lines = told.read_text().splitlines() if told.exists() else []
    return max(
        (reached(SimpleNamespace(stage=s, step=int(k)), stages) for s, k in map(str.split, lines)), default=(-1, 0)
    )


@pytest.mark.parametrize("kills", [40, nightly(500)])
def test_row_4_kill_9_at_random_moments(place, seed, kills):
    place.overrides = [*EVERY]
    stages, killed, run = ["warmup", "joint", "push", "finetune"], 0, 0
    whole = place.whole()
    clock = os.times()
    assert place.train("timed") == 0
    duration = os.times().elapsed - clock.elapsed
    while killed < kills:
        run += 1
        name, rng, code = f"run {run}", random.Random(f"{seed} {run}"), KILLED
        while code == KILLED:
            child = place.start(name, "--resume", "auto", before=lambda name=name: announce(place, name))
            code = child.wait(rng.uniform(0.005, duration / 2))
            if code is None:
                child.kill()
                code = child.end()
            killed += code == KILLED
            assert place.newest(name) >= announced(place, name, stages), (run, killed)
        assert code == 0, child.said()
        assert difference(without_last(place.result(name)), without_last(whole)) is None, (run, killed)
        shutil.rmtree(place.folder / name)
    print(f"{killed} kills in {run} runs")


@pytest.mark.parametrize("length", [3, 6, 30])
def test_row_4_a_row_that_was_half_written_is_written_again(place, length):
    """Of metrics.csv, by a run that was killed after step 4 and had written step 5."""
    place.overrides = [*EVERY]
    assert place.train("run", before=lambda: stop_after(3 + 4)) == 143
    table = place.folder / "run" / "results" / "metrics.csv"
    table.write_text(table.read_text() + "joint,5,0.01,0.01,0.01,0.01,1.2345678,1.2,0.5,0.9"[:length])
    assert place.train("run", "--resume", "auto") == 0
    assert_as_whole(place, "run")


# --- row 21: signals ---------------------------------------------------------------------------------------------


def at_call(module, name, n, act):
    """Call `act` at the n-th call of a function, before it."""
    real, calls = getattr(module, name), []

    def called(*arguments, **how):
        calls.append(1)
        if len(calls) == n:
            act()
        return real(*arguments, **how)

    setattr(module, name, called)


def send(signum, times=1):
    for _ in range(times):
        os.kill(os.getpid(), signum)


MOMENTS = {  # where a signal comes: module, function, call number; it is handled when the work at hand is at its end
    "warmup": (TrainingModule, "training_step", 1),
    "between updates": (TrainingModule, "training_step", 2),
    "the last step of joint": (TrainingModule, "training_step", 8),
    "finetuning": (TrainingModule, "training_step", 10),
    "validation": (Inference, "validate", 2),
    "validation at a phase's end": (Inference, "validate", 4),
    "validation after the push": (Inference, "validate", 6),
    "a save of last": (train, "save_checkpoint", 2),
    "a phase's save": (train, "save_checkpoint", 5),
    "the push": (train, "push_prototypes", 1),
    "the pictures": (train, "draw_prototypes", 1),
}


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
QUICK = [(moment, signal.SIGTERM) for moment in MOMENTS] + [("warmup", SIGNALS[1]), ("the push", SIGNALS[2])]
SLOW = [(moment, signum) for moment in MOMENTS for signum in SIGNALS if (moment, signum) not in QUICK]


@pytest.mark.parametrize(("moment", "signum"), [*QUICK, *(nightly(*case) for case in SLOW)])
def test_row_21_a_signal_at_any_moment(place, moment, signum, monkeypatch):
    if moment == "the pictures":
        monkeypatch.setattr(train, "draw_prototypes", draw_prototypes)
    place.overrides = [*EVERY]
    code = place.train("run", before=lambda: at_call(*MOMENTS[moment], lambda: send(signum)))
    last_line = place.said("run").splitlines()[-1]
    assert code == 128 + signum and last_line.startswith(f"error: stopped by {signum.name}: ")
    assert f"go on with: python {ROOT / 'train.py'} --config {place.folder / 'tiny.yaml'} --set " in last_line
    (place.folder / "elsewhere").mkdir()
    assert place.paste(last_line.split("go on with: ")[1], "elsewhere") == 0  # with absolute paths in its configuration
    found, expected = (without_workers(result) for result in (place.result("run"), place.whole()))
    assert difference(found, expected) is None
    assert [path.name for path in (place.folder / "elsewhere").iterdir()] == ["log.txt"]


def test_row_21_a_storm_of_signals_is_one(place):
    assert place.train("run", before=lambda: at_call(TrainingModule, "training_step", 6, lambda: send(15, 50))) == 143
    assert place.train("run", "--resume", "auto") == 0
    assert_as_whole(place, "run")


@pytest.mark.parametrize("moment", ["warmup", "validation", "a save of last", "the push"])
def test_row_21_a_second_ctrl_c_leaves_at_once(place, moment):
    place.overrides = [*EVERY]
    assert place.train("run", before=lambda: at_call(*MOMENTS[moment], lambda: send(signal.SIGINT, 2))) == 130
    assert "stopped by" not in place.said("run")
    assert place.train("run", "--resume", "auto") == 0
    assert_as_whole(place, "run")


@pytest.mark.parametrize("code", [143, KILLED])
def test_row_21_no_worker_is_left_behind(place, code):
    """Also after a kill -9: the workers notice within some seconds, and none keeps the folder locked till then."""
    told = place.folder / "workers"

    def stop():
        told.write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGTERM if code == 143 else signal.SIGKILL)

    two = ("--set", "system.num_workers=2")
    assert place.train("run", *two, before=lambda: at_call(TrainingModule, "training_step", 2, stop)) == code
    assert place.train("run", *two, "--resume", "auto") == 0
    workers = [int(pid) for pid in told.read_text().split()]
    assert len(workers) == 2
    ended = [os.pidfd_open(pid) for pid in workers if alive(pid)]
    for descriptor in ended:
        assert select.select([descriptor], [], [], 10)[0]


# --- row 23: two processes, one folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [10, nightly(100)])
def test_row_23_one_of_several_trains(place, rounds):
    for i in range(rounds):
        started = [place.start(f"race{i}") for _ in range(2 + i % 3)]
        codes = sorted(child.end() for child in started)
        assert codes.count(0) == 1 and set(codes[1:]) <= {5, 2}, codes
        assert "trains there" in place.said(f"race{i}") or 2 in codes
        assert difference(place.result(f"race{i}"), place.whole()) is None


def test_row_23_a_folder_in_use_is_not_touched(place):
    ours, theirs = socket.socketpair()
    ours.settimeout(60)

    def wait():
        theirs.send(b"x")
        theirs.recv(1)

    before = lambda: at_call(TrainingModule, "training_step", 2, wait)  # noqa: E731
    first = place.start("run", "--set", "training.checkpoint_every=1", before=before)
    ours.recv(1)
    files = {path: path.stat().st_mtime_ns for path in (place.folder / "run").rglob("*") if path.suffix != ".txt"}
    for arguments in ([], ["--resume", "auto"], ["--overwrite"], ["--phase", "0"]):
        assert place.train("run", *arguments) == 5
        assert f"process {first.pid} on" in place.said("run").splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in files} == files
    ours.send(b"x")
    assert first.end() == 0


def test_row_23_a_lock_that_cannot_be_made_is_told(place):
    def read_only():
        real = fcntl.flock
        fcntl.flock = lambda *a: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS), "models/.lock"))
        assert real

    assert place.train("run", before=read_only) == 4
    assert "Read-only file system" in place.said("run")


# --- rows 28 and 30: elsewhere, and again ------------------------------------------------------------------------

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["train.py"]
import torch
torch.set_num_threads(1)
import deeplab_features, train
from runtime import command
from tests.tiny import TinyResNet
deeplab_features.BACKBONES["resnet18"] = (TinyResNet, None)
sys.modules["torch.utils.tensorboard"] = None
command.run(lambda argv: train.main(["--config", "tiny.yaml"]))
"""

PLACES = {
    "C locale": ("a b/ü ö", {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONHASHSEED": "2"}),
    "ASCII terminal, no home": ("ü", {"PYTHONIOENCODING": "ascii", "PYTHONHASHSEED": "3", "HOME": ""}),
}


def test_rows_28_and_30_elsewhere_and_again(place, monkeypatch):
    """New processes in other places of other habits write the same bytes: checkpoints, pictures, everything."""
    monkeypatch.setattr(train, "draw_prototypes", draw_prototypes)
    monkeypatch.setattr(sys, "argv", ["train.py"])  # it is in the files
    assert place.train("here") == 0
    expected = bytes_of(place, "here")
    processes = []
    for folder, habits in PLACES.values():
        home = place.folder / folder
        home.mkdir(parents=True)
        (home / "tiny.yaml").write_text(CONFIG)
        env = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", **habits}
        processes.append(
            subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=home, env=env, umask=0o077, stderr=subprocess.PIPE)
        )
    for (folder, _), process in zip(PLACES.values(), processes, strict=True):
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said.decode()
        assert bytes_of(place, folder) == expected


def bytes_of(place, name):
    home = place.folder / name
    return {
        str(path.relative_to(home)): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.name not in (".lock", "log.txt", "tiny.yaml", "metrics.csv")
    }
