"""The README is held to its word: its commands parse, its code runs, its file map is complete."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import dataset
import deeplab_features
import losses
from model import construct_PPNet

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted({c.strip() for c in re.findall(r"(?:^|&& |`)python (\w+\.py[^#`\n]*)", README, flags=re.MULTILINE)})


class Parsed(Exception):
    pass


def block(language: str, marker: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL) if marker in b]
    assert len(found) == 1, f"one {language} block with {marker!r}"
    return found[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command, monkeypatch):
    script, *arguments = shlex.split(command)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    module = importlib.import_module(script.removesuffix(".py"))
    if script == "example_usage.py":
        return  # takes no arguments
    placeholders = {"FILE": "config.yaml", "PATH": "x"}
    with pytest.raises(Parsed):
        module.main([placeholders.get(a, a) for a in arguments])


def test_commands_name_files_that_exist():
    for path in re.findall(r"configs?/?\w*\.yaml", README):
        assert Path(path).is_file(), path


def test_file_map_names_every_file():
    table = README.split("## Which file does what")[1].split("\n## ")[0]
    for path in Path().glob("*.py"):
        assert f"`{path.name}`" in table, path.name
    for name in re.findall(r"`([\w/]+\.(?:py|yaml))`", table):
        assert Path(name).is_file(), name


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README):
        assert Path(path).is_file(), path


def test_nothing_is_left_to_fill_in():
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        names = r"\b(?!RLIMIT_)[A-Z]{3,}_[A-Z_]{3,}[A-Z0-9]*\b(?![^`\n]*`)"
        assert not re.findall(names + r"|\b(?:TODO|TRACE|ABLATIONS)\b", text), path


def test_data_set_example(tmp_path):
    for folder, suffix, pixels in (
        ("photos", "jpg", np.full((40, 60, 3), 90, np.uint8)),
        ("masks", "png", np.repeat(np.array([0, 7, 26], np.uint8), 20)[None].repeat(40, 0)),
    ):
        (tmp_path / folder / "train").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / "train" / f"one.{suffix}")
    try:
        exec(block("python", "class RoadsDataset"), dict(vars(dataset)))  # noqa: S102
        data = config.DatasetConfig(name="roads", root=str(tmp_path))
        model = config.ModelConfig(num_classes=2, prototype_shape=(20, 64, 1, 1))
        samples = dataset.build_dataset(config.Config(dataset=data, model=model), "train")
        assert samples[0][1][0, ::20].tolist() == [255, 0, 1]
    finally:
        dataset.DATASETS.pop("roads", None)


def test_backbone_example():
    try:
        exec(block("python", "resnext50"), dict(vars(deeplab_features)))  # noqa: S102
        chosen = config.ModelConfig(
            num_classes=2, backbone="resnext50", pretrained="none", prototype_shape=(4, 8, 1, 1)
        )
        assert construct_PPNet(chosen).eval()(torch.zeros(1, 3, 33, 41)).logits.shape == (1, 2, 5, 6)
    finally:
        deeplab_features.BACKBONES.pop("resnext50", None)


def test_loss_example():
    names = dict(vars(losses))
    exec(block("python", "def spread_loss"), names)  # noqa: S102
    prototypes = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])[..., None, None]
    assert names["spread_loss"](prototypes, torch.tensor([0, 0, 1, 1])).item() == pytest.approx((1 + np.exp(-1)) / 2)


def test_schedule_example():
    raw, _ = config.parse_yaml(block("yaml", "prototypes, steps"))
    assert [phase.name for phase in config.config_from_dict(raw).training.phases][2] == "prototypes"


def test_settings_table_matches_the_configurations():
    for name, classes, prototypes, window in (
        ("config.yaml", 19, 190, 513),
        ("configs/pascal.yaml", 21, 210, 321),
        ("configs/camvid.yaml", 11, 110, 321),
        ("configs/camvid_small.yaml", 11, 110, 145),
        ("configs/demo.yaml", 6, 30, 129),
    ):
        loaded = config.load_config(name)
        assert (loaded.model.num_classes, loaded.model.prototype_shape[0], loaded.dataset.crop_size) == (
            classes,
            prototypes,
            window,
        )
        steps = " / ".join(f"{phase.steps:,}" for phase in loaded.training.phases)
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert all(str(value) in row for value in (classes, prototypes, window, steps)), row
