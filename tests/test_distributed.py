"""Two processes are one run: the same weights, the same push, and an end for all when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from config import config_to_dict, load_config
from model import construct_PPNet
from runtime import distributed
from runtime.checkpoint import Checkpoint, load_checkpoint, load_last, save_checkpoint
from runtime.errors import ConfigError
from tests.test_evaluate import write_cityscapes

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
  class_weights: [1, 2, 3, 1, 2, 3]
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


def run(script: str, arguments: tuple[str, ...]) -> str:
    argv = [f"{script}.py", *arguments]
    return f"import {script}, sys; from runtime import command; sys.argv = {argv!r}; command.run({script}.main)"


def train(*arguments: str) -> str:
    return run("train", arguments)


def finish(processes: list[subprocess.Popen], timeout: float = 180) -> list[int]:
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
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
        for key, value in single.model.items():
            torch.testing.assert_close(double.model[key], value, rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")
        places = [[(r["image"], r["cell"], r["merged"]) for r in state.prototypes] for state in (single, double)]
        assert places[0] == places[1]


def test_gradients_are_averaged_and_searches_merged(folder):
    code = """
import torch
from runtime import distributed
from grid import IGNORE
from push import Neighbours
distributed.start(15)
r = distributed.rank()
p = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))]
p[0].grad = torch.full((2, 3), 1.0 + r)
distributed.average_gradients(p)
assert p[0].grad.eq(1.5).all() and p[1].grad.eq(0).all()
image = torch.tensor([[r, -1, r]]).T[:, 0]
place = image[:, None, None]
distance, column = torch.tensor([[2.0 - r, torch.inf, 1.0]]).T, image[:, None]
own = Neighbours(distance, column, place.expand(3, 1, 2), column, place.float())
best = Neighbours(*(values[:, 0] for values in own.of_all_processes()))
assert best.image[0] == 1 and best.vector[0] == 1 and best.distance[1].isinf() and best.image[2] == 0, best
cells, labels = torch.zeros(1, 2, 2).long(), torch.tensor([[r, r]])
near = Neighbours(torch.tensor([[1.0, 3.0 - r]]), torch.tensor([[r, 2 + r]]), cells, labels, torch.zeros(1, 2, 0))
found = near.of_all_processes()
assert found.distance.tolist() == [[1.0, 1.0]] and found.image.tolist() == [[0, 1]], found
"""
    assert finish(start(folder, code, 2)) == [0, 0]


def evaluate(*arguments: str) -> str:
    return run("evaluate", arguments)


def evaluated(folder: Path, name: str, processes: int, *arguments: str) -> dict:
    # The same command for all, since a report says how it was made; then out of the way of the next one.
    paths = ["--checkpoint", "models/warmup_checkpoint.pth", "--set", "paths.results_dir=found"]
    assert finish(start(folder, evaluate(*paths, *arguments), processes)) == [0] * processes
    (folder / "found").rename(folder / name)
    return json.loads((folder / name / "evaluation" / "warmup_checkpoint.json").read_text())


@pytest.mark.parametrize("images", [3, 1])  # a process has fewer images than the other, or none
def test_two_processes_evaluate_as_one(folder, images):
    short = ["training.phases.0.steps=2", "training.phases.1.steps=2", "training.phases.2.steps=2"]
    assert finish(start(folder, train(*(a for value in short for a in ("--set", value))))) == [0]
    count = ["--set", f"dataset.shapes.val_images={images}"]
    one, two = (evaluated(folder, name, n, *count) for n, name in ((1, "one"), (2, "two")))
    assert one["explanations"]["prototypes"] == 12
    numbers, others = ([{k: v for k, v in flat(r).items() if isinstance(v, float) == of} for r in (one, two)]
                       for of in (True, False))  # fmt: skip
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-12) and others[0] == others[1]
    pages = [(folder / name / "evaluation" / "warmup_checkpoint.html").read_text() for name in ("one", "two")]
    assert pages[0] == pages[1]


def flat(value) -> dict:
    """Nested plain data as one level, path to value."""
    if not isinstance(value, dict | list):
        return {"": value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {f"{key}/{path}": v for key, inner in items for path, v in flat(inner).items()}


def test_two_processes_export_as_one(folder):
    write_cityscapes(folder / "own", "test")
    model = [
        "training.class_weights=[]",
        "dataset.name=cityscapes",
        "dataset.root=own",
        "model.num_classes=19",
        "model.prototype_shape=[38,8,1,1]",
    ]
    config = load_config(folder / "config.yaml", model)
    torch.manual_seed(0)
    weights = construct_PPNet(config.model).state_dict()
    save_checkpoint(folder / "a.pth", Checkpoint(config_to_dict(config), "joint", 1, 1, dict(weights)))
    for processes in (1, 2):
        code = evaluate("--checkpoint", "a.pth", "--split", "test", "--export", f"out{processes}")
        assert finish(start(folder, code, processes)) == [0] * processes
    archives = [zipfile.ZipFile(folder / f"out{processes}/cityscapes_test.zip") for processes in (1, 2)]
    contents = [{name: archive.read(name) for name in archive.namelist()} for archive in archives]
    assert len(contents[0]) == 3 and contents[0] == contents[1]


def test_two_processes_measure_parts_as_one(folder):
    code = """
import numpy as np, torch
from runtime import distributed
from pathlib import Path
from evaluation.parts import PartMetrics
from grid import Grid
distributed.start(15)
r = distributed.rank()

def see(metrics, image):
    values = torch.zeros(2, 5, 5)
    values[:, 1 + image % 2, 2] = 1
    parts = np.zeros((33, 33), dtype=int)
    parts[6:11, 14:19] = 1
    parts[14:19, 14:19] = 2
    noisy = values.flip(1) if image == 2 else values
    metrics.update(values, noisy, torch.zeros(33, 33).long(), parts)

own, whole = (PartMetrics(torch.tensor([0, 0]), Grid()) for _ in range(2))
for image in range(5):
    see(whole, image)
    if image % 2 == r:
        see(own, image)
own.merge()
assert whole.summary()["part_stability"] == 0.8 and whole.sums["hits"].sum() == 10, (whole.summary(), whole.sums)
assert own.summary() == whole.summary()
assert torch.equal(own.sums["hits"], whole.sums["hits"]) and torch.equal(own.sums["images"], whole.sums["images"])
assert distributed.all_gather_objects({r: "x" * r}) == [{0: ""}, {1: "x"}]
"""
    assert finish(start(folder, code, 2)) == [0, 0]


def test_a_signal_to_one_stops_the_evaluation_of_both(folder):
    short = ["training.phases.0.steps=2", "training.phases.1.steps=2", "training.phases.2.steps=2"]
    assert finish(start(folder, train(*(a for value in short for a in ("--set", value))))) == [0]
    code = "import signal, os; from evaluation import measuring; real = measuring.label_image;"
    code += "second = os.environ['RANK'] == '1';"
    code += "measuring.label_image = lambda *a: (second and os.kill(os.getpid(), signal.SIGTERM), real(*a))[1];"
    code += evaluate("--checkpoint", "models/warmup_checkpoint.pth", "--set", "dataset.shapes.val_images=6")
    assert finish(start(folder, code, 2)) == [143, 143]


ASKED = """
import os, sys
from runtime import command, distributed
def main(argv):
    seed = 1 + int(sys.argv[1]) * int(os.environ["RANK"])
    distributed.start(15, {"training": {"seed": seed, "phases": [3] * seed}, "--phase": None})
    print("started")
command.run(main)
"""


def test_processes_that_were_asked_for_the_same_start(folder):
    assert finish(start(folder, ASKED.replace("sys.argv[1]", "'0'"), 2)) == [0, 0]


def test_processes_that_were_asked_for_different_things_are_refused(folder):
    processes = start(folder, ASKED.replace("sys.argv[1]", "'1'"), 3)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2]
    reason = "training.seed is 1 in process 0 and 2 in process 1; training.phases.1 is not given in process 0"
    message = f"error: the processes of this run were asked for different things: {reason} and 3 in process 1"
    assert all(line.startswith(message) and line.count("\n") == 1 for line in said), said


def test_processes_with_different_settings_do_not_train(folder):
    code = f"import os, sys; extra = ['--set', 'training.seed=' + os.environ['RANK']];{train()}"
    code = code.replace("sys.argv = ['train.py']", "sys.argv = ['train.py', *extra]")
    processes = start(folder, code, 2)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("training.seed is 0 in process 0 and 1 in process 1" in line for line in said)
    assert not (folder / "models").exists() and not (folder / "results").exists()


def test_processes_with_different_options_do_not_evaluate(folder):
    assert finish(start(folder, train("--phase", "0", "--set", "training.phases.0.steps=1"))) == [0]
    code = f"import os, sys; extra = ['--tta'][:int(os.environ['RANK'])];{evaluate('models/warmup_checkpoint.pth')}"
    processes = start(folder, code.replace("_checkpoint.pth']", "_checkpoint.pth', *extra]"), 2)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert all("tta is 'False' in process 0 and 'True' in process 1" in line for line in said)


OTHERS = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
ENVIRONMENT = {
    "one": ({"WORLD_SIZE": "1"}, ""),
    "one, and nonsense": ({"WORLD_SIZE": "1", "RANK": "7", "LOCAL_RANK": "x", "MASTER_PORT": "tcp://1.2.3.4:5"}, ""),
    "a rank alone": ({"RANK": "1", "LOCAL_RANK": "3"}, ""),
    "a cluster's own": ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMI_RANK": "1"}, ""),
    "two alone": ({"WORLD_SIZE": "2"}, "RANK in the environment: want a number of 0 to 1, got none"),
    "no port": ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT in the environment: want a number of 1 to 65535"),
    "no address": ({"WORLD_SIZE": "2"} | OTHERS | {"MASTER_ADDR": ""}, "MASTER_ADDR in the environment: want the name"),
    "a rank too high": ({"WORLD_SIZE": "2"} | OTHERS | {"RANK": "2"}, "RANK in the environment: want a number of 0"),
    "a bad local rank": ({"WORLD_SIZE": "2"} | OTHERS | {"LOCAL_RANK": "x"}, "LOCAL_RANK in the environment: want"),
    "text": ({"WORLD_SIZE": "two"} | OTHERS, "WORLD_SIZE in the environment: want a number of 1 to 1000000, got 'two'"),
    "nothing": ({"WORLD_SIZE": ""} | OTHERS, "got ''"),
    "zero": ({"WORLD_SIZE": "0"} | OTHERS, "got '0'"),
    "a fraction": ({"WORLD_SIZE": "1.0"} | OTHERS, "got '1.0'"),
    "other digits": ({"WORLD_SIZE": "٢"} | OTHERS, "got '٢'"),
    "very many": ({"WORLD_SIZE": "9" * 5000} | OTHERS, "got '9999"),
}


@pytest.mark.parametrize("case", ENVIRONMENT)
def test_the_environment_is_of_one_process_or_refused(monkeypatch, case):
    variables, message = ENVIRONMENT[case]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if not message:
        distributed.start(5)
        assert (distributed.world_size(), distributed.rank(), distributed.local_rank()) == (1, 0, 0)
        return
    with pytest.raises(ConfigError) as caught:
        distributed.start(5)
    assert message in str(caught.value) and "torchrun" in str(caught.value) and "\n" not in str(caught.value)


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
    code = (
        "import train; train.save_checkpoint = lambda *a, **how: (_ for _ in ()).throw(OSError('disk full'));" + train()
    )
    assert finish(start(folder, code, 2)) == [4, 4]


def test_a_signal_to_one_stops_both_and_they_resume_exactly(folder):
    first, second = start(folder, train(), 2)
    wait_for(first, "joint 3/")
    second.send_signal(signal.SIGTERM)
    assert finish([first, second]) == [143, 143]
    state, _ = load_last(folder / "models" / "last_checkpoint.pth")
    assert state.stage == "joint" and state.step % 2 == 0
    assert finish(start(folder, train("--resume", "auto"), 2)) == [0, 0]
    (folder / "models").rename(folder / "resumed")
    assert finish(start(folder, train(), 2)) == [0, 0]
    resumed, whole = (load_checkpoint(folder / f / "final_checkpoint.pth").model for f in ("resumed", "models"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
