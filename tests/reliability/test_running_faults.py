"""Faults while a run runs: numbers that are not finite, lost workers, lost processes, leaks (rows 20, 22, 24 and 26
of the fault battery). tests/test_distributed.py has the rest of row 24: a process killed, stopped, signalled, without
disk.

What must hold: one line with the remedy and the promised exit code, checkpoints that are whole, no wait without end.
"""

import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

import module
import train
from datasets import batches
from module import TrainingModule
from runtime import checkpoint
from runtime.checkpoint import load_checkpoint
from tests.reliability.faults import difference
from tests.reliability.test_resume_faults import at_call, send, without_workers
from tests.test_distributed import CONFIG, finish, start
from tests.test_distributed import train as training

# --- row 20: numbers that are not finite -------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def spoil(name, n, change):
    """Change what the n-th call of a function of module.py, or of a method, returns."""
    owner = module if hasattr(module, name) else TrainingModule
    real, calls = getattr(owner, name), []

    def spoiled(*arguments, **how):
        calls.append(1)
        result = real(*arguments, **how)
        return change(result) if len(calls) == n else result

    setattr(owner, name, spoiled)


def spoil_input(n, value):
    real, calls = TrainingModule.training_step, []

    def step(trainer, images, labels):
        calls.append(1)
        if len(calls) == n:
            images = images.clone()
            images[0, 0, 0, :9] = value
        real(trainer, images, labels)

    TrainingModule.training_step = step


def spoil_state(n, change):
    """Change the module before its n-th step."""
    real, calls = TrainingModule.training_step, []

    def step(trainer, *batch):
        calls.append(1)
        if len(calls) == n:
            with torch.no_grad():
                change(trainer)
        real(trainer, *batch)

    TrainingModule.training_step = step


def spoil_update(n, value):
    """Let the gradient of the n-th step, not its loss, be `value`."""
    spoil_state(n, lambda trainer: trainer.model.prototype_vectors.register_hook(lambda gradient: gradient * value))


def moments(value):
    return lambda t: [state["exp_avg"].fill_(value) for state in t.phase.optimizer.state.values()]


def parameter(name, value):
    return lambda t: dict(t.model.named_parameters())[name].select(0, 0).fill_(value)


def buffer(name, value):
    return lambda t: t.model.get_buffer(name)[0].fill_(value)


def learning_rate(value):
    return lambda t: [group.update(base_lr=value) for group in t.phase.optimizer.param_groups]


# Steps 1-3 are warmup, 4-8 joint, 9-12 finetuning; updates are after 2, 3 | 5, 7, 8 | 10, 12.
NUMERICAL = {
    "NaN in an image": lambda: spoil_input(5, NAN),
    "infinity in an image": lambda: spoil_input(5, INF),
    "cross entropy is NaN": lambda: spoil("cross_entropy", 5, lambda loss: loss._replace(total=loss.total * NAN)),
    "diversity is infinite": lambda: spoil("diversity_loss", 5, lambda loss: loss._replace(total=loss.total + INF)),
    "l1 is NaN": lambda: spoil("l1_loss", 5, lambda loss: loss._replace(total=loss.total * NAN)),
    "the last loss of a phase": lambda: spoil("cross_entropy", 8, lambda loss: loss._replace(total=loss.total * NAN)),
    "a gradient is NaN": lambda: spoil_update(4, NAN),
    "the last gradient of a phase is NaN": lambda: spoil_update(8, NAN),
    "the last gradient of a phase is infinite": lambda: spoil_update(8, INF),
    "a weight of the network is NaN": lambda: spoil_state(5, parameter("features.backbone.conv1.weight", NAN)),
    "a prototype is infinite": lambda: spoil_state(5, parameter("prototype_vectors", INF)),
    "a frozen weight is NaN": lambda: spoil_state(2, parameter("features.backbone.conv1.weight", NAN)),
    "a statistic is infinite": lambda: spoil_state(5, buffer("features.backbone.bn1.running_var", INF)),
    "the optimizer's moments are NaN": lambda: spoil_state(7, moments(NAN)),
    "the learning rate is absurd": lambda: spoil_state(4, learning_rate(1e30)),
}


@pytest.mark.parametrize("case", NUMERICAL)
def test_row_20_numbers_that_are_not_finite(place, case):
    place.overrides = ["training.checkpoint_every=1", "training.log_every=3"]
    code = place.train("run", before=NUMERICAL[case])
    last = place.said("run").splitlines()[-1]
    assert code == 6 and last.startswith("error: ") and "not finite" in last and "It diverges" in last, last
    if "the loss of" in last:
        assert all(f"{name} = " in last for name in module.LOSS_NAMES) and "The images of that batch: scene" in last
    saved = sorted((place.folder / "run" / "models").glob("*.pth"))
    assert saved
    for path in saved:
        assert all(value.isfinite().all() for value in load_checkpoint(path).model.values()), path
    if case == "the learning rate is absurd":  # its weights are finite, and beyond help
        return
    assert place.train("run", "--resume", "auto") == 0
    assert all(value.isfinite().all() for value in place.result("run")["models/final_checkpoint.pth"]["model"].values())


# --- row 22: workers ---------------------------------------------------------------------------------------------


def in_worker(act, after=2):
    """Let a worker do something when it has loaded so many images."""
    main, real, count = os.getpid(), batches.TrainingSamples.__getitem__, []

    def getitem(samples, key):
        count.append(1)
        if os.getpid() != main and len(count) > after:
            act()
        return real(samples, key)

    batches.TrainingSamples.__getitem__ = getitem


def kill_a_worker():
    """While the main process computes, not while it waits for the worker."""
    worker = multiprocessing.active_children()[0].pid
    os.kill(worker, signal.SIGKILL)
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)


def no_files():
    """From now on this process can open no more files."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def full_shared_memory():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def raise_memory_error():
    raise MemoryError


def too_large():
    torch.empty(1 << 60)


WORKERS = {
    "killed while it loads": lambda: in_worker(lambda: send(signal.SIGKILL)),
    "segmentation fault": lambda: in_worker(lambda: send(signal.SIGSEGV)),
    "killed while the main process computes": lambda: at_call(TrainingModule, "loss_terms", 2, kill_a_worker),
    "killed while a checkpoint is saved": lambda: at_call(checkpoint, "load_tensors", 2, kill_a_worker),
    "shared memory is full": lambda: in_worker(full_shared_memory),
    "no more files": lambda: (in_worker(no_files, after=0), setattr(batches, "WORKER_TIMEOUT", 2)),
    "no more files in the main process": lambda: at_call(train, "train_batches", 1, no_files),
    "no memory": lambda: in_worker(raise_memory_error),
    "no memory in the main process": lambda: at_call(TrainingModule, "loss_terms", 3, too_large),
}


@pytest.mark.parametrize("case", WORKERS)
def test_row_22_lost_workers(place, case):
    place.overrides = ["system.num_workers=2", "training.checkpoint_every=1"]
    # Without files Python's own threads in the worker say so before the run does.
    assert place.start("run", before=WORKERS[case]).end(quiet="no more files" not in case) == 4
    said = place.said("run").replace("\0", "")  # torch's word on a segmentation fault ends with one
    last = next(line.strip() for line in reversed(said.splitlines()) if line.strip().startswith("error: "))
    remedies = ("system.num_workers=0", "ulimit -n", "--shm-size")
    assert all(words in last for words in remedies) or "training.batch_size=1" in last, last
    assert not list((place.folder / "run" / "models").glob(".*tmp*"))
    assert place.start("run", "--resume", "auto").end(quiet=False) == 0
    place.overrides = ["training.checkpoint_every=1"]
    assert difference(without_workers(place.result("run")), without_workers(place.whole())) is None


def test_row_22_a_hanging_worker_does_not_keep_a_script_from_ending(tmp_path):
    """At the end of a script Python waits for its workers; in the fork of the other tests it does not get there."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    code = f"""
import threading
from datasets import batches
batches.WORKER_TIMEOUT = 2
batches.TrainingSamples.__getitem__ = lambda *_: threading.Event().wait()
{training("--set", "system.num_workers=1")}
"""
    assert finish(start(tmp_path, code)) == [4]


# --- row 24: several processes -----------------------------------------------------------------------------------

FAULT = """
import os, train
from module import TrainingModule
real = TrainingModule.training_step
def step(trainer, images, labels):
    if os.environ["RANK"] == "1" and trainer.phase.step == 4:
        {act}
    real(trainer, images, labels)
TrainingModule.training_step = step
"""


@pytest.mark.parametrize(
    ("act", "codes"),
    [
        pytest.param("images = images * float('nan')", [{4, 6}, 6], id="NaN"),
        pytest.param("raise SystemExit(0)", [4, 0], id="leaves early"),
        pytest.param("raise MemoryError", [4, 4], id="no memory", marks=pytest.mark.nightly),
    ],
)
def test_row_24_a_fault_in_one_process_ends_all(tmp_path, act, codes):
    (tmp_path / "config.yaml").write_text(CONFIG)
    code = FAULT.format(act=act) + training("--set", "training.checkpoint_every=2")
    found = finish(start(tmp_path, code, 2))
    assert all(f == c or (isinstance(c, set) and f in c) for f, c in zip(found, codes, strict=True)), found
    state = load_checkpoint(tmp_path / "models" / "last_checkpoint.pth")
    assert state.step in (2, 4) and all(value.isfinite().all() for value in state.model.values())


# --- row 26: leaks -----------------------------------------------------------------------------------------------


WATCHED = """
import os, sys, threading
import deeplab_features, train
from tests.tiny import TinyResNet

def memory_mb():
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1000

def validate(run):
    value = real(run)
    with open("told", "a") as file:
        print(memory_mb(), len(os.listdir("/proc/self/fd")), threading.active_count(), file=file)
    return value

sys.modules["torch.utils.tensorboard"] = None
deeplab_features.BACKBONES["resnet18"] = (TinyResNet, None)
real, train.Run._validate = train.Run._validate, validate
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epochs", [40, pytest.param(2000, marks=pytest.mark.nightly)])
def test_row_26_nothing_grows(workdir, epochs, workers):
    """Memory of its own, open files and threads at each validation, one every two epochs of 8 images.

    In a new process, and all of its anonymous pages: those that it shares with a parent or with its workers become its
    own whenever one of the two first touches them, which looks like growth where only pages of its own are counted.
    """
    rates = "{backbone: 1e-3, add_on: 1e-3, prototypes: 1e-3}"
    how = [
        "dataset.shapes.train_images=8", "training.val_every=8", f"system.num_workers={workers}",
        "training.checkpoint_every=50",
        f"training.phases=[{{name: only, steps: {epochs * 4}, lr: {rates}}}]",
    ]  # fmt: skip
    code = WATCHED + training("--config", "tiny.yaml", *(word for value in how for word in ("--set", value)))
    assert finish(start(workdir, code), timeout=180 + epochs) == [0]
    rows = [[float(word) for word in line.split()] for line in Path("told").read_text().splitlines()]
    assert len(rows) == epochs // 2
    half = len(rows) // 2

    def middle(part):  # right after a validation the threads of its workers may not have ended yet on a busy machine
        return [sorted(column)[len(part) // 2] for column in zip(*part, strict=True)]

    early, late = middle(rows[half // 2 : half]), middle(rows[half:])
    print(f"{early[0]:.1f} MB, later {late[0]:.1f} MB; open files and threads {early[1:]}, later {late[1:]}")
    assert late[0] - early[0] < 1.0
    assert late[1:] == early[1:]
    most = [max(column) for column in zip(*rows[:-1], strict=True)]
    assert all(last <= before for last, before in zip(rows[-1][1:], most[1:], strict=True))
