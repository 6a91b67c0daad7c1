"""What version 1 wrote loads, resumes and evaluates to the same numbers: tests/data/v1/, made by tests/make_v1.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import deeplab_features
import evaluate
import train
from config import load_config
from tests.make_v1 import CONFIG, Network
from tests.tiny import ROOT

V1 = ROOT / "tests" / "data" / "v1"
NUMBERS = json.loads((V1 / "numbers.json").read_text())
SAME = torch.__version__ == NUMBERS["torch"] and torch.backends.cpu.get_cpu_capability() == NUMBERS["cpu"]


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch):
    """An empty folder to work in, and version 1's network under the name resnet18."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(deeplab_features.BACKBONES, "resnet18", (Network, None))


def content(path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_run(found: Path, expected: Path):
    """The same weights, where torch and the processor are the same bit for bit; the same patches; the same mIoU."""
    found, expected = content(found), content(expected)
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=0, atol=0 if SAME else 1e-5, msg=name)
    assert found["model"].keys() == expected["model"].keys()
    assert found["metrics"]["val_miou"] == pytest.approx(expected["metrics"]["val_miou"], abs=0 if SAME else 1e-3)
    for ours, theirs in zip(found["prototypes"], expected["prototypes"], strict=True):
        assert {key: ours[key] for key in ("prototype", "image", "cell", "class_name")} == {
            key: theirs[key] for key in ("prototype", "image", "cell", "class_name")
        }


@pytest.mark.parametrize("written", ["config.yaml", "push_checkpoint.pth"])
def test_a_configuration_means_what_it_meant(written):
    Path("as_written_by_hand.yaml").write_text(CONFIG)
    if written.endswith(".pth"):
        Path("from_checkpoint.yaml").write_text(json.dumps(content(V1 / written)["config"]))
    read = load_config("from_checkpoint.yaml" if written.endswith(".pth") else V1 / written)
    assert read == load_config("as_written_by_hand.yaml")


def test_a_run_that_was_stopped_in_a_phase_ends_in_the_same_weights():
    Path("models").mkdir()
    shutil.copy(V1 / "last_checkpoint.pth", "models")
    train.main(["--config", str(V1 / "config.yaml"), "--resume", "auto"])
    assert_same_run(Path("models/final_checkpoint.pth"), V1 / "final_checkpoint.pth")


def test_a_run_goes_on_from_the_end_of_a_phase():
    train.main(["--config", str(V1 / "config.yaml"), "--phase", "2", "--resume", str(V1 / "push_checkpoint.pth")])
    assert_same_run(Path("models/final_checkpoint.pth"), V1 / "final_checkpoint.pth")


@pytest.mark.parametrize("name", ["pruned", "pruned_last"])
def test_a_pruned_model_goes_on_in_a_folder_of_its_own(name):
    folders = ["--set", "paths.model_dir=models/pruned", "--set", "paths.results_dir=results/pruned"]
    train.main(["--config", str(V1 / "config.yaml"), *folders, "--resume", str(V1 / f"{name}_checkpoint.pth")])
    [written] = Path("models/pruned").glob("*final_checkpoint.pth")
    assert_same_run(written, V1 / "pruned_final_checkpoint.pth")


@pytest.mark.parametrize("name", ["push", "final", "pruned", "pruned_final"])
def test_a_checkpoint_evaluates_to_the_same_numbers(name):
    evaluate.main(["--checkpoint", str(V1 / f"{name}_checkpoint.pth")])
    [path] = Path("results").rglob("*.json")
    report, expected = json.loads(path.read_text()), NUMBERS[name]
    assert report["miou"] == pytest.approx(expected["miou"], abs=1e-12 if SAME else 1e-3)
    if SAME:
        assert report["confusion"] == expected["confusion"]
    ours, theirs = report["explanations"], expected["explanations"]
    for key in ("prototypes", "purity", "used", "similarity", "zeros", "stability", "faithfulness"):
        assert ours[key] == pytest.approx(theirs[key], abs=1e-6 if SAME else 1e-3), key
