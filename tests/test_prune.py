"""Pruning: which prototypes go, that what stays is untouched, and that the result can be finetuned."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch

import prune
import train
from config import load_config
from inference import open_model
from prune import choose_prototypes, renumber
from push import Neighbours
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.command import Interrupted, stop_flag
from runtime.errors import ConfigError
from tests.tiny import ROOT, tiny_ppnet

CLASS_OF = torch.tensor([0, 0, 1, 1, 2, 2])


def neighbours(own_counts, distances=(0.0,) * 6, k=6):
    """Six prototypes of which so many of k nearest patches have the own class."""
    label = torch.tensor(
        [[c] * n + [(c + 1) % 3] * (k - n) for c, n in zip(CLASS_OF.tolist(), own_counts, strict=True)]
    )
    distance = torch.tensor(distances)[:, None].expand(-1, k)
    return Neighbours(distance, torch.zeros(6, k), torch.zeros(6, k, 2), label, torch.zeros(6, k, 0))


@pytest.mark.parametrize(
    ("own_counts", "kept", "spared"),
    [
        ([6, 3, 4, 5, 6, 6], [0, 1, 2, 3, 4, 5], []),
        ([6, 2, 4, 0, 6, 6], [0, 2, 4, 5], []),
        ([6, 6, 1, 2, 6, 6], [0, 1, 3, 4, 5], [3]),
        ([6, 6, 0, 0, 6, 2], [0, 1, 3, 4], [3]),  # equal: the nearer one
    ],
)
def test_the_rule(own_counts, kept, spared):
    found = neighbours(own_counts, (0.0, 0.0, 0.9, 0.1, 0.0, 0.0))
    indices, last_ones = choose_prototypes(found, CLASS_OF, 3)
    assert (indices.tolist(), last_ones) == (kept, spared)


def test_a_prototype_with_zero_weights_changes_no_logit():
    model, images = tiny_ppnet(), torch.randn(1, 3, 41, 33)
    with torch.no_grad():
        model.last_layer.weight[:, 3] = 0
        before = model(images).logits
        model.keep_prototypes(torch.tensor([0, 1, 2, 4, 5]))
        torch.testing.assert_close(model(images).logits, before)
    assert model.prototype_class.tolist() == [0, 0, 1, 2, 2]


def test_records_are_numbered_anew_and_otherwise_kept():
    records = [{"prototype": i, "image": f"image {i}", "merged": [i]} for i in range(4)]
    assert renumber(records, [1, 3]) == [
        {"prototype": 0, "image": "image 1", "merged": [1]},
        {"prototype": 1, "image": "image 3", "merged": [3]},
    ]
    assert renumber([], [1, 3]) == []  # before a push there are none


@pytest.fixture
def pushed(workdir):
    """A trained and pushed model, in models/."""
    for phase in ("0", "1"):
        train.main(["--config", "tiny.yaml", "--phase", phase])
    return workdir / "models/push_checkpoint.pth"


def rule(k, threshold):
    return ["--k", str(k), "--threshold", str(threshold)]


def pasted(printed):
    """What is to be typed after `python .../train.py` in the command that was printed last."""
    words = shlex.split(printed.splitlines()[-1].split("further: ")[1])
    assert words[:2] == ["python", str(ROOT / "train.py")]
    return words[2:]


def test_pruning_nothing_changes_nothing(pushed, workdir):
    prune.main(["--checkpoint", str(pushed), *rule(2, 0)])
    before, after = load_checkpoint(pushed), load_checkpoint(workdir / "models/pruned/push_checkpoint.pth")
    assert before.model.keys() == after.model.keys()
    for name, value in before.model.items():
        assert torch.equal(value, after.model[name]), name
    assert before.prototypes == after.prototypes and len(before.prototypes) > 0
    assert before.metrics == after.metrics and before.palette == after.palette
    assert (after.stage, after.phase, after.step) == ("push", 1, 5)


def plant(path, wrong):
    """Give prototype `wrong` the vector of one of another class: its nearest patches are then of that class."""
    state = load_checkpoint(path)
    classes = state.model["prototype_class"]
    other = int((classes != classes[wrong]).nonzero()[0])
    state.model["prototype_vectors"][wrong] = state.model["prototype_vectors"][other]
    save_checkpoint(path, state)


def test_what_goes_is_said_and_the_rest_is_finetuned(pushed, workdir, capsys, monkeypatch):
    plant(pushed, 3)
    before, files = load_checkpoint(pushed), {path: path.read_bytes() for path in pushed.parent.glob("*.pth")}
    prune.main(["--checkpoint", str(pushed), *rule(1, 1)])  # a patch of the training data is nearest to itself
    printed = capsys.readouterr().out
    after = load_checkpoint(workdir / "models/pruned/push_checkpoint.pth")
    kept = [r["prototype"] for r in before.prototypes]
    gone = [int(line.split()[1]) for line in printed.splitlines() if " goes: " in line]
    assert gone and set(gone) <= set(kept)
    kept = [p for p in kept if p not in gone]
    assert f"{len(kept)} of {len(before.prototypes)} prototypes are left" in printed
    assert [r["prototype"] for r in after.prototypes] == list(range(len(kept)))
    assert [r["image"] for r in after.prototypes] == [before.prototypes[p]["image"] for p in kept]
    assert [r["class"] for r in after.prototypes] == after.model["prototype_class"].tolist()
    assert torch.equal(after.model["prototype_vectors"], before.model["prototype_vectors"][kept])
    assert torch.equal(after.model["last_layer.weight"], before.model["last_layer.weight"][:, kept])
    pictures = json.loads(Path("results/pruned/prototypes/prototypes.json").read_text())
    assert [r["prototype"] for r in pictures] == list(range(len(kept))) and pictures == list(after.prototypes)
    assert len(list(Path("results/pruned/prototypes").glob("prototype_*.png"))) == len(kept)
    assert {path: path.read_bytes() for path in pushed.parent.glob("*.pth")} == files

    (workdir / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    train.main(pasted(printed))
    assert list(Path().iterdir()) == []
    monkeypatch.chdir(workdir)
    final = open_model("models/pruned/final_checkpoint.pth").checkpoint
    assert len(final.model["prototype_class"]) == len(kept)
    assert not (workdir / "models/final_checkpoint.pth").exists()
    json.dumps(final.prototypes)


SETTLE = "{name: settle, steps: 2, push: true, lr: {backbone: 1e-2, prototypes: 1e-2, last_layer: 1e-2}}"


@pytest.mark.parametrize(
    ("pruned", "begins", "expected"),
    [
        ("joint_push", "joint_push", {"settle", "settle_push", "final"}),
        ("final", "settle_push", {"final"}),
    ],
)
def test_the_printed_command_trains_all_that_comes_after(workdir, capsys, pruned, begins, expected):
    lines = (workdir / "tiny.yaml").read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "name: finetune" in line)
    (workdir / "tiny.yaml").write_text("".join([*lines[:at], f"    - {SETTLE}\n", *lines[at:]]))
    train.main(["--config", "tiny.yaml"])
    plant(f"models/{pruned}_checkpoint.pth", 3)
    prune.main(["--checkpoint", f"models/{pruned}_checkpoint.pth", *rule(1, 1)])
    train.main(pasted(capsys.readouterr().out))
    there = {path.name.removesuffix("_checkpoint.pth") for path in (workdir / "models/pruned").glob("*.pth")}
    assert there == {begins, "best"} | expected
    left = load_checkpoint(f"models/pruned/{begins}_checkpoint.pth").prototypes
    final = load_checkpoint("models/pruned/final_checkpoint.pth")
    assert len(final.prototypes) == len(final.model["prototype_class"]) <= len(left) < 12


def test_a_pruned_run_that_is_stopped_goes_on_with_the_pruned_model(pushed, workdir, capsys, monkeypatch):
    plant(pushed, 3)
    for _ in range(2):
        prune.main(["--checkpoint", str(pushed), *rule(1, 1)])
    whole = pasted(capsys.readouterr().out)
    train.main(whole)
    real_step, taken = train.TrainingModule.training_step, []

    def step_then_stop(trainer, *batch):
        real_step(trainer, *batch)
        taken.append(1)
        if len(taken) == 3:
            monkeypatch.setattr(stop_flag, "signum", signal.SIGTERM)

    monkeypatch.setattr(train.TrainingModule, "training_step", step_then_stop)
    first = [word.replace("pruned_2", "pruned") for word in whole]
    with pytest.raises(Interrupted, match="SIGTERM: go on with: "):
        train.main(first)
    monkeypatch.setattr(stop_flag, "signum", None)
    train.main(first)
    again, expected = (load_checkpoint(f"models/{name}/final_checkpoint.pth") for name in ("pruned", "pruned_2"))
    assert len(expected.model["prototype_class"]) == len(load_checkpoint(pushed).model["prototype_class"]) - 1
    assert all(torch.equal(again.model[name], value) for name, value in expected.model.items())


def test_a_pruned_file_does_not_go_into_the_folder_of_another_run(pushed, workdir, capsys):
    prune.main(["--checkpoint", str(pushed), *rule(2, 1)])
    before = sorted(workdir.rglob("*"))
    for words in ([], ["--overwrite"], ["--phase", "2"]):
        with pytest.raises(ConfigError, match="holds another run") as caught:
            train.main(["--config", "tiny.yaml", "--resume", "models/pruned/push_checkpoint.pth", *words])
    assert sorted(workdir.rglob("*")) == before
    train.main(shlex.split(str(caught.value).split("folders of its own: ")[1])[2:])
    assert (workdir / "models/pruned/final_checkpoint.pth").exists() and not Path(
        "models/final_checkpoint.pth"
    ).exists()


def test_a_class_keeps_its_last_prototype_and_it_is_said(pushed, workdir, capsys):
    classes = load_checkpoint(pushed).model["prototype_class"]
    first = (classes == classes[0]).nonzero().flatten().tolist()
    for p in first:
        plant(pushed, p)
    prune.main(["--checkpoint", str(pushed), *rule(1, 1)])
    assert "stays, as the best of its class" in capsys.readouterr().out
    after = load_checkpoint(workdir / "models/pruned/push_checkpoint.pth")
    assert set(after.model["prototype_class"].tolist()) == set(classes.tolist())


def test_a_second_pruning_overwrites_nothing(pushed, workdir):
    command = ["--checkpoint", str(pushed), *rule(2, 1)]
    prune.main(command)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    prune.main(command)
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in Path("models").iterdir() if path.is_dir()} == {"pruned", "pruned_2"}
    assert Path("models/pruned_2/push_checkpoint.pth").is_file() and Path("results/pruned_2/prototypes").is_dir()


def test_a_recorded_miou_is_that_of_the_file(pushed, workdir):
    prune.main(["--checkpoint", str(pushed), *rule(2, 1), "--set", "dataset.shapes.val_images=3"])
    opened = open_model("models/pruned/push_checkpoint.pth")
    data = train.build_dataset(opened.config, "val")
    measured = opened.inference.validate(data).summary()["miou"]
    assert len(data) == 3 and measured == opened.checkpoint.val_miou
    assert load_config("results/pruned/config.yaml").dataset.root == os.path.abspath(".")


def test_a_pruning_that_fails_leaves_no_run(pushed, workdir, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prune, "save_checkpoint", no_space)
    with pytest.raises(OSError):
        prune.main(["--checkpoint", str(pushed), *rule(2, 1)])
    assert not Path("models/pruned").exists()


def test_prototypes_of_other_data_are_refused(pushed):
    with pytest.raises(ConfigError, match="its prototypes come from other data: image 4 of the split 'train' was"):
        prune.main(["--checkpoint", str(pushed), *rule(2, 1), "--set", "dataset.shapes.train_images=4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (rule(6, 3), "there are only 5 training images"),
        (rule(2, 3), "want 0 <= threshold <= k"),
        (rule(0, 0), "k >= 1"),
        (["--set", "dataset.shape.train_images=3"], "dataset.shape"),
    ],
)
def test_bad_command_lines_say_why(pushed, arguments, message):
    with pytest.raises(ConfigError, match=message):
        prune.main(["--checkpoint", str(pushed), *arguments])


def test_the_twin_has_nothing_to_prune(workdir):
    train.main(["--config", "tiny.yaml", "--phase", "0", "--set", "model.head=linear"])
    with pytest.raises(ConfigError, match="has no prototypes"):
        prune.main(["--checkpoint", "models/warmup_checkpoint.pth", *rule(2, 1)])
