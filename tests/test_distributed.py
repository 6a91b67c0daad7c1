"""Two processes are one run: the same weights, the same push, and an end for all when one is lost."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import load_checkpoint, load_last

ROOT = Path(__file__).parent.parent
CONFIG = """
dataset: {name: shapes, root: ., crop_size: 33, shapes: {train_images: 9, val_images: 3, image_size: 65}}
model: {num_classes: 6, backbone: resnet18, pretrained: none, freeze_bn: true, prototype_shape: [12, 8, 1, 1],
        distance_scale: 0.0625}
training:
  batch_size: 2
  iter_size: 2
  log_every: 1
  val_every: 10
  phases:
    - {name: warmup, steps: 20, lr: {add_on: 1e-5, prototypes: 1e-5, last_layer: 1e-5}}
    - {name: joint, steps: 20, schedule: poly, push: true, lr: {backbone: 1e-6, add_on: 1e-5, prototypes: 1e-5}}
    - {name: finetune, steps: 20, early_stopping: 5, lr: {last_layer: 1e-5}}
system: {num_workers: 0, timeout: 15, device: cpu}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def start(folder: Path, code: str, processes: int = 1) -> list[subprocess.Popen]:
    """`processes` Python processes that run `code`, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if processes > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=folder,
            env=env | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]


def train(*arguments: str) -> str:
    return f"import train, command, sys; sys.argv = ['train.py', *{list(arguments)!r}]; command.run(train.main)"


def finish(processes: list[subprocess.Popen]) -> list[int]:
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert not any("Traceback" in output for output in outputs), outputs
    return codes


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


def test_two_processes_train_and_push_as_one(folder):
    one = start(folder, train("--set", "training.batch_size=4"))
    assert finish(one) == [0]
    (folder / "models").rename(folder / "one")
    assert finish(start(folder, train(), 2)) == [0, 0]
    for name in ("warmup", "joint", "push", "final"):
        single, double = (load_checkpoint(folder / f / f"{name}_checkpoint.pth") for f in ("one", "models"))
        for key, value in single["model"].items():
            torch.testing.assert_close(double["model"][key], value, rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")
        places = [[(r["image"], r["cell"], r["merged"]) for r in state["prototypes"]] for state in (single, double)]
        assert places[0] == places[1]


def test_gradients_are_averaged_and_searches_merged(folder):
    code = """
import torch, distributed
from config import IGNORE
from push import Nearest, Neighbours, _nearest_of_all, _neighbours_of_all
distributed.start(15)
r = distributed.rank()
p = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))]
p[0].grad = torch.full((2, 3), 1.0 + r)
distributed.average_gradients(p)
assert p[0].grad.eq(1.5).all() and p[1].grad.eq(0).all()
image = torch.tensor([[r, -1, r]]).T[:, 0]
own = Nearest(torch.tensor([2.0 - r, torch.inf, 1.0]), image, image[:, None].expand(3, 2), image[:, None].float())
best = _nearest_of_all(own)
assert best.image[0] == 1 and best.distance[1].isinf() and best.image[2] == 0, best
cells, labels = torch.zeros(1, 2, 2).long(), torch.tensor([[r, r]])
near = Neighbours(torch.tensor([[1.0, 3.0 - r]]), torch.tensor([[r, 2 + r]]), cells, labels)
found = _neighbours_of_all(near)
assert found.distance.tolist() == [[1.0, 1.0]] and found.image.tolist() == [[0, 1]], found
"""
    assert finish(start(folder, code, 2)) == [0, 0]


def test_a_killed_process_ends_the_other(folder):
    first, second = start(folder, train("--set", "training.phases.0.steps=100000"), 2)
    wait_for(first, "warmup 5/")
    second.kill()
    assert finish([first]) == [4]
    second.communicate()


def test_a_stopped_process_ends_the_other_in_time(folder):
    first, second = start(folder, train("--set", "training.phases.0.steps=100000", "--set", "system.timeout=3"), 2)
    wait_for(first, "warmup 5/")
    second.send_signal(signal.SIGSTOP)
    assert finish([first]) == [4]
    second.kill()
    second.communicate()


def test_a_full_disk_in_the_writer_ends_all(folder):
    code = "import train; train.save_checkpoint = lambda *a: (_ for _ in ()).throw(OSError('disk full'));" + train()
    assert finish(start(folder, code, 2)) == [4, 4]


def test_a_signal_to_one_stops_both_and_they_resume_exactly(folder):
    first, second = start(folder, train(), 2)
    wait_for(first, "joint 3/")
    second.send_signal(signal.SIGTERM)
    assert finish([first, second]) == [143, 143]
    state, _ = load_last(folder / "models" / "last_checkpoint.pth")
    assert state["stage"] == "joint" and state["step"] % 2 == 0
    assert finish(start(folder, train("--resume", "auto"), 2)) == [0, 0]
    (folder / "models").rename(folder / "resumed")
    assert finish(start(folder, train(), 2)) == [0, 0]
    resumed, whole = (load_checkpoint(folder / f / "final_checkpoint.pth")["model"] for f in ("resumed", "models"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
