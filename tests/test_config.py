"""The configuration: what it accepts, what it refuses, and in which words."""

import argparse
import dataclasses
import os

import pytest
import torch
import yaml

from config import (
    GROUPS,
    Config,
    PathsConfig,
    config_arguments,
    config_from_dict,
    config_to_dict,
    load_config,
    parse_yaml,
)
from model import construct_PPNet
from runtime.command import add_config_arguments
from runtime.errors import ConfigError
from runtime.typed_yaml import dump_yaml
from tests.tiny import ROOT


def load(tmp_path, text, *overrides):
    (tmp_path / "some.yaml").write_text(text)
    return load_config(tmp_path / "some.yaml", overrides)


def refusal(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


# --- what is in the repository ---------------------------------------------------------------------------------


def test_the_defaults_are_cityscapes_as_published():
    config = Config()
    assert (config.dataset.name, config.model.num_classes, config.dataset.crop_size) == ("cityscapes", 19, 513)
    assert config.model.prototype_shape == (190, 64, 1, 1) and config.model.backbone == "resnet101"
    assert (config.training.batch_size, config.training.iter_size) == (2, 5)
    assert dataclasses.astuple(config.training.loss_weights) == (1.0, 1e-4, 0.25, 0.0)
    assert (config.training.weight_decay, config.training.poly_power) == (5e-4, 0.9)
    found = [(p.name, p.steps, p.schedule, p.push, p.lr.trained) for p in config.training.phases]
    head = {"add_on": 2.5e-4, "prototypes": 2.5e-4, "last_layer": 2.5e-4}
    assert found == [
        ("warmup", 15_000, "constant", False, head),
        ("joint", 150_000, "poly", True, {"backbone": 2.5e-5, **head}),
        ("finetune", 10_000, "constant", False, {"last_layer": 1e-5}),
    ]
    assert config.training.phases[2].early_stopping > 0


def test_config_yaml_repeats_the_defaults():
    assert load_config(ROOT / "config.yaml") == Config()


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_builds_its_network(path):
    config = load_config(path)
    with torch.device("meta"):
        model = construct_PPNet(config.model, load_pretrained=False)
    assert model.num_classes == config.model.num_classes


# --- what is accepted ------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(tmp_path, "") == Config()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "1.0e-4", "0.0001", "+1e-4"])
def test_numbers_with_exponents_are_numbers(tmp_path, text):
    assert load(tmp_path, f"training: {{weight_decay: {text}}}").training.weight_decay == 1e-4


def test_a_whole_number_serves_as_a_number(tmp_path):
    value = load(tmp_path, "model: {distance_scale: 2}").model.distance_scale
    assert value == 2.0 and type(value) is float


def test_overrides_are_yaml_and_go_into_lists_by_index(tmp_path):
    config = load(
        tmp_path, "training: {batch_size: 3}",
        "training.phases.0.steps=12", "training.phases.1.lr.backbone=null", "training.batch_size=4",
        "dataset.scale_range=[0.8, 1.25]", "dataset.scale_range.1=2", "model.freeze_bn=false",
        "training.weight_decay=1e-3",
    )  # fmt: skip
    assert config.training.phases[0].steps == 12 and config.training.batch_size == 4
    assert config.training.phases[1].lr.backbone is None
    assert config.dataset.scale_range == (0.8, 2.0) and config.model.freeze_bn is False
    assert config.training.weight_decay == 1e-3
    assert config.training.phases[1].steps == 150_000


def test_the_last_of_two_overrides_wins(tmp_path):
    assert load(tmp_path, "", "training.seed=1", "training.seed=2").training.seed == 2


def test_plain_values_and_yaml_lead_back_to_the_same_configuration(tmp_path):
    changed = load(
        tmp_path,
        f"model: {{msc_scales: [0.5, 0.75], freeze_bn: true}}\ntraining: {{class_weights: {[1.5] * 19}}}",
        "training.phases.2.lr.last_layer=1e-7",
    )
    for config in (Config(), changed):
        assert config_from_dict(config_to_dict(config)) == config
        assert load(tmp_path, yaml.safe_dump(config_to_dict(config))) == config


def test_batch_norm_is_frozen_where_it_is_pretrained(tmp_path):
    for text, frozen in (
        ("{pretrained: imagenet}", True),
        ("{pretrained: none}", False),
        ("{pretrained: some/file.pth}", True),
        ("{pretrained: none, freeze_bn: true}", True),
        ("{pretrained: imagenet, freeze_bn: false}", False),
    ):
        assert load(tmp_path, f"model: {text}").model.bn_is_frozen == frozen


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 1


# --- what is refused -------------------------------------------------------------------------------------------

REFUSED = {
    "unknown key": ("training: {batchsize: 2}", "training.batchsize: unknown key; did you mean 'batch_size'?"),
    "unknown section": ("trainings: {}", "trainings: unknown key; did you mean 'training'?"),
    "nothing alike": ("xyz: 1", "xyz: unknown key; known are dataset, model, training, system, paths"),
    "text for a whole number": ("training: {batch_size: two}", "training.batch_size: want a whole number, got 'two'"),
    "fraction for a whole number": ("training: {batch_size: 2.5}", "want a whole number, got 2.5"),
    "boolean for a whole number": ("training: {batch_size: true}", "want a whole number, got True"),
    "boolean for a number": ("training: {weight_decay: yes}", "want a finite number, got True"),
    "number for text": ("paths: {model_dir: 3}", "paths.model_dir: want text, got 3"),
    "text for a boolean": ("dataset: {flip: 'yes'}", "dataset.flip: want true or false, got 'yes'"),
    "not a number": ("training: {weight_decay: .nan}", "training.weight_decay: want a finite number, got nan"),
    "too few class weights": ("training: {class_weights: [1, 2]}", "training.class_weights: want 19 weights"),
    "negative class weight": (
        "{model: {num_classes: 2, prototype_shape: [2, 8, 1, 1]}, training: {class_weights: [1, -2]}}",
        "training.class_weights: want 2 weights of at least 0",
    ),
    "infinity": ("model: {distance_scale: .inf}", "model.distance_scale: want a finite number, got inf"),
    "overflow": ("model: {distance_scale: 1e999}", "model.distance_scale: want a finite number, got inf"),
    "negative": ("training: {weight_decay: -1e-4}", "training.weight_decay: want at least 0, got -0.0001"),
    "zero steps": ("training: {phases: [{name: a, steps: 0, lr: {add_on: 1}}]}", "training.phases.0.steps"),
    "negative rate": ("training: {phases: [{name: a, steps: 1, lr: {add_on: -1}}]}", "phases.0.lr.add_on: want a lear"),
    "no rate": ("training: {phases: [{name: a, steps: 1, lr: {}}]}", "nothing is trained"),
    "no phases": ("training: {phases: []}", "training.phases: want at least one phase"),
    "missing key": ("training: {phases: [{name: a, lr: {add_on: 1}}]}", "training.phases.0: 'steps' is missing"),
    "two phases of one name": (
        "training: {phases: [{name: a, steps: 1, lr: {add_on: 1}}, {name: a, steps: 1, lr: {add_on: 1}}]}",
        "training.phases.1.name",
    ),
    "name of another file": ("training: {phases: [{name: final, steps: 1, lr: {add_on: 1}}]}", "phases.0.name"),
    "path for a name": ("training: {phases: [{name: ../a, steps: 1, lr: {add_on: 1}}]}", "phases.0.name"),
    "not among the choices": ("model: {head: conv}", "model.head: want prototype | linear, got 'conv'"),
    "list of wrong length": ("model: {prototype_shape: [190, 64]}", "want a list of 4 (a whole number), got a list"),
    "value for a section": ("training: 3", "training: want a section with keys, got 3"),
    "list for a file": ("[1, 2]", "the file: want a section with keys, got a list"),
    "7 prototypes for 5 classes": (
        "model: {num_classes: 5, prototype_shape: [7, 64, 1, 1]}",
        "7 prototypes cannot be shared evenly by 5 classes: want a multiple, for example 5",
    ),
    "large prototypes": ("model: {prototype_shape: [190, 64, 3, 3]}", "want [P, D, 1, 1], got [3, 3] at the end"),
    "crop beside the grid": ("dataset: {crop_size: 512}", "dataset.crop_size: want a multiple of 8 plus 1"),
    "scales upside down": ("dataset: {scale_range: [2, 1]}", "want 0.05 <= low <= high <= 20, got [2.0, 1.0]"),
    "odd device": ("system: {device: gpu}", "system.device: want auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
    "too many classes": ("model: {num_classes: 300, prototype_shape: [300, 64, 1, 1]}", "want at most 255"),
    "key twice": ("model: {}\ntraining: {seed: 1, seed: 2}", "some.yaml:2: not valid YAML: 'seed' stands here twice"),
    "aliases": ("model: &m {}\ntraining: *m", "some.yaml:2: not valid YAML: aliases are not allowed here"),
    "a tab": ("model:\n\tseed: 1", "some.yaml:2: not valid YAML"),
    "an open bracket": ("model: [1, 2", "not valid YAML"),
    "two documents": ("{}\n---\n{}", "not valid YAML"),
    "an object": ("model: !!python/object/apply:os.getcwd []", "model"),
    "a merge": ("model: {<<: {head: linear}}", "model.<<: unknown key"),
    "deep nesting": ("[" * 3000 + "]" * 3000, "not valid YAML"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path, case):
    text, message = REFUSED[case]
    assert message in refusal(tmp_path, text)


def test_a_refusal_names_file_and_line(tmp_path):
    message = refusal(tmp_path, "dataset:\n  flip: true\n\ntraining:\n  seed: 1\n  batch_size: 0\n")
    assert message == f"{tmp_path}/some.yaml:6: training.batch_size: want at least 1, got 0"


def test_all_problems_are_told_at_once(tmp_path):
    message = refusal(tmp_path, "training: {seed: -1, batch_size: 0}\nmodel: {num_classes: 1, distance_scale: 0}")
    assert len(message.splitlines()) == 4
    message = refusal(tmp_path, "training: {seed: a}\nmodle: {}\nmodel: {head: 3}")
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.batchsize=3", "--set: training.batchsize: unknown key; did you mean 'batch_size'?"),
        ("training.phases.7.steps=3", "there is no 'training.phases.7.steps' in the configuration"),
        ("training.phases.x.steps=3", "there is no 'training.phases.x.steps' in the configuration"),
        ("nothing.at.all=3", "there is no 'nothing.at.all' in the configuration"),
        ("training.seed.deeper=3", "there is no 'training.seed.deeper' in the configuration"),
        ("training.seed", "want section.key=value"),
        ("=3", "want section.key=value"),
        ("training.batch_size=two", "--set: training.batch_size: want a whole number, got 'two'"),
        ("training.batch_size=", "want a whole number, got None"),
        ("training.batch_size=[1", "not valid YAML"),
        ("training.batch_size=-2", "want at least 1, got -2"),
        ("model.prototype_shape=[7, 64, 1, 1]", "7 prototypes cannot be shared evenly by 19 classes"),
    ],
)
def test_refuses_the_override(tmp_path, override, message):
    assert message in refusal(tmp_path, "", override)


def test_an_overrides_message_has_one_line(tmp_path):
    assert "\n" not in refusal(tmp_path, "", "training.batch_size=two")


def test_a_file_that_does_not_exist_is_named_beside_those_that_do(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match="configs/dmo.yaml: cannot read.*No such file.*config.yaml, configs/demo.yaml"
    ):
        load_config("configs/dmo.yaml")


def test_a_folder_and_a_picture_are_no_configurations(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    for path, reason in ((tmp_path, "directory"), (tmp_path / "image.yaml", "not UTF-8 text")):
        with pytest.raises(ConfigError, match=reason):
            load_config(path)


def test_lines_of_dotted_keys():
    _, lines = parse_yaml("a:\n  b: 1\n  c:\n    - {d: 2}\n    - {d: 3}\n")
    assert (lines["a.b"], lines["a.c.0.d"], lines["a.c.1.d"]) == (2, 4, 5)


# --- paths, names and text -------------------------------------------------------------------------------------

TYPED = ["2024-05-01", "123", "1e3", "no", "a#b", "runs #3", "a: b", "[x]", "ünï cødé", "=a=b", "-"]


@pytest.mark.parametrize("text", TYPED)
def test_a_folder_is_called_what_was_typed(tmp_path, text):
    config = load(tmp_path, "", f"paths.model_dir={text}")
    assert config.paths.model_dir == text
    assert load(tmp_path, dump_yaml(config_to_dict(config))) == config  # and results/config.yaml says the same


@pytest.mark.parametrize("key", ["dataset.root", "paths.model_dir", "paths.results_dir", "model.pretrained"])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, key):
    section, name = key.split(".")
    monkeypatch.setenv("HOME", "/home/of me")
    for config in (load(tmp_path, "", f"{key}=~/a#b"), load(tmp_path, f"{section}: {{{name}: ~/a#b}}")):
        assert getattr(getattr(config, section), name) == "/home/of me/a#b"
    for home in ("", None):
        monkeypatch.setenv("HOME", home) if home is not None else monkeypatch.delenv("HOME")
        assert f"--set: {key}: want a path; there is no home folder for ~ here" in refusal(tmp_path, "", f"{key}=~/a")
    assert "no home folder for ~nobody-at-all here" in refusal(tmp_path, "", f"{key}=~nobody-at-all/a")


@pytest.mark.parametrize("split", ["../images/train", "a/b", "a\\b", "..", ".", "", "a\0b", "a\nb"])
@pytest.mark.parametrize("key", ["train_split", "val_split"])
def test_a_split_that_leads_elsewhere_is_refused(tmp_path, key, split):
    assert f"--set: dataset.{key}: want " in refusal(tmp_path, "", f"dataset.{key}={split}")
    raw = config_to_dict(Config())
    raw["dataset"][key] = split  # as a checkpoint may say
    with pytest.raises(ConfigError, match=f"dataset.{key}: want "):
        config_from_dict(raw)


@pytest.mark.parametrize("key", ["dataset.root", "paths.model_dir", "paths.results_dir"])
def test_a_path_is_not_empty(tmp_path, key):
    assert f"--set: {key}: want a line of UTF-8 text, got ''" in refusal(tmp_path, "", f"{key}=")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_classes=0", "model.num_classes: want at least 2, got 0"),
        ("training.seed=0501", "training.seed: want a whole number, got '0501'"),
        ("training.batch_size=1:30", "training.batch_size: want a whole number, got '1:30'"),
        ("training.batch_size=4 # four", "'#' begins no comment here"),
        ("system.device=cuda:300", "system.device: want auto, cpu, mps, cuda or cuda:N, got 'cuda:300'"),
        ("system.device=cuda:٣", "system.device: want auto"),
        ("training.phases.0.early_stopping=-1", "training.phases.0.early_stopping: want at least 0, got -1"),
        ("training.phases.0.lr.backbone=2", "phases.0.lr.backbone: want a learning rate in (0, 1], or null to freeze"),
        ("training.phases.0.lr.bakbone=2", "training.phases.0.lr.bakbone: unknown key; did you mean 'backbone'?"),
        ("training.phases.1.name=warmup", "training.phases.1.name: want a new name, 'warmup' is phase 0"),
        ("model.msc_scales=[0.5, 5]", "model.msc_scales.1: want at most 4, got 5.0"),
        ("paths.model_dir=a\udcffb", "paths.model_dir: want a line of UTF-8 text"),
    ],
)
def test_refuses_what_no_run_can_use(tmp_path, override, message):
    assert message in refusal(tmp_path, "", override)


def test_a_problem_of_a_default_is_told_at_its_section(tmp_path):
    message = refusal(tmp_path, "\nmodel:\n  num_classes: 4\n")
    assert f"{tmp_path}/some.yaml:2: model.prototype_shape: 190 prototypes cannot be shared" in message


def test_every_parameter_group_has_a_rate():
    assert GROUPS == ("backbone", "add_on", "prototypes", "last_layer")


# --- files that are none ---------------------------------------------------------------------------------------


def test_a_configuration_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    for path, reason in (
        (tmp_path / "pipe.yaml", "it is no file"),
        ("/dev/zero", "it is no file"),
        (tmp_path, "it is a directory"),
        ("", "it is a directory"),
        ("-", "No such file"),
        ("a\0b", "null"),
        ("x" * 5000, "too long"),
        (tmp_path / "large.yaml", "2,000,000 bytes are more"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, encoding, line_end):
    (tmp_path / "some.yaml").write_bytes(
        line_end.join(["training:", "  seed: 7", "  batch_size: 3", ""]).encode(encoding)
    )
    assert load_config(tmp_path / "some.yaml").training.seed == 7


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_another_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "some.yaml").write_bytes("paths: {model_dir: é}\n".encode(encoding))
    with pytest.raises(ConfigError, match="some.yaml.*not UTF-8 text"):
        load_config(tmp_path / "some.yaml")


# --- the command to go on with ---------------------------------------------------------------------------------


def test_the_options_give_the_same_configuration_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some.yaml").write_text("paths: {model_dir: my models}\ndataset: {root: data}")
    overrides = ["training.seed=3", "paths.results_dir=a #b", "model.pretrained=weights.pth"]
    config = load_config("some.yaml", overrides)
    options = config_arguments(config, "some.yaml", overrides)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    arguments = parser.parse_args(options)
    again = load_config(arguments.config, arguments.overrides)
    assert again.paths == PathsConfig(model_dir=f"{tmp_path}/my models", results_dir=f"{tmp_path}/a #b")
    assert (again.dataset.root, again.model.pretrained) == (f"{tmp_path}/data", f"{tmp_path}/weights.pth")
    assert again.training == config.training
    assert config_arguments(again, arguments.config, arguments.overrides) == options
