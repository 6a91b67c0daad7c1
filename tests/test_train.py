"""The command line of train.py: phases, files, resuming bit by bit, what it refuses, and what it does with NaN."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import module
import train
from config import config_of, load_config
from datasets.base import DatasetError
from inference import open_model
from losses import cross_entropy
from module import NotFiniteError
from runtime.checkpoint import CheckpointError, load_checkpoint
from runtime.command import Interrupted, stop_flag
from runtime.errors import ConfigError, UserError
from schedule import RunFolder, locked_folders
from tests import trees
from tests.tiny import CONFIG, ROOT, tiny_config

STAGES = ("warmup", "joint", "push", "final")


def run(*arguments, models="models", results="results", config="tiny.yaml"):
    paths = ("--set", f"paths.model_dir={models}", "--set", f"paths.results_dir={results}")
    train.main(["--config", config, *paths, *arguments])


def changed(*overrides):
    return [word for override in overrides for word in ("--set", override)]


def weights(name="final", models="models"):
    return load_checkpoint(Path(models) / f"{name}_checkpoint.pth").model


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def rows(results="results"):
    with open(Path(results) / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_speed(table):
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "peak_memory_mb")} for row in table]


def refused(error, *arguments, **how):
    """The message of a refusal that wrote nothing."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(error) as caught:
        run(*arguments, **how)
    assert sorted(Path().rglob("*")) == before
    return str(caught.value)


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """No pictures and no TensorBoard, unless a test asks for them: most of a tiny run's time goes there."""
    if getattr(request, "param", True):
        monkeypatch.setattr(train, "draw_prototypes", lambda inference, data, records, folder: records)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


# --- a whole run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False], indirect=True)
def test_a_run_leaves_every_file_of_the_design(workdir):
    run("--set", "training.checkpoint_every=3")
    for name in (*STAGES, "last", "best"):
        assert load_checkpoint(f"models/{name}_checkpoint.pth").model
    assert load_config("results/config.yaml") == tiny_config(
        "training.checkpoint_every=3", "paths.model_dir=models", "paths.results_dir=results"
    )
    assert list(Path("results/tensorboard").glob("events.*"))
    assert Path("results/prototypes/prototypes.json").is_file() and list(Path("results/prototypes").glob("class_*.png"))


def test_what_a_checkpoint_holds(workdir):
    run("--set", "training.checkpoint_every=2")
    for name, stage, phase, step in (("warmup", "warmup", 0, 3), ("joint", "joint", 1, 5), ("push", "push", 1, 5)):
        state = load_checkpoint(f"models/{name}_checkpoint.pth")
        assert (state.stage, state.phase, state.step) == (stage, phase, step)
        assert not state.is_midway
        assert config_of(state) == load_config("results/config.yaml")
        assert 0 <= state.metrics["val_miou"] <= 1 and state.class_names[0] == "sky"
    state = load_checkpoint("models/final_checkpoint.pth")
    assert [r["prototype"] for r in state.prototypes] == list(range(len(state.model["prototype_vectors"])))
    assert state.prototypes == load_checkpoint("models/push_checkpoint.pth").prototypes
    assert load_checkpoint("models/joint_checkpoint.pth").prototypes == ()
    last = load_checkpoint("models/last_checkpoint.pth")
    assert (last.stage, last.step) == ("finetune", 2) and set(last.midway.progress) == set(train.Progress.STORED)


def test_metrics_have_the_columns_of_the_design_and_a_row_per_logged_step(workdir):
    run()
    table = rows()
    assert list(table[0]) == [
        "phase", "step", "lr_backbone", "lr_add_on", "lr_prototypes", "lr_last_layer", "total", "cross_entropy", "l1",
        "diversity", "purity", "train_accuracy", "val_miou", "images_per_second", "peak_memory_mb",
    ]  # fmt: skip
    found = [(row["phase"], int(row["step"]), bool(row["val_miou"])) for row in table]
    assert found == [
        ("warmup", 2, False), ("warmup", 3, True),
        ("joint", 2, False), ("joint", 3, True), ("joint", 4, False), ("joint", 5, True),
        ("finetune", 0, True), ("finetune", 2, False), ("finetune", 3, True), ("finetune", 4, True),
    ]  # fmt: skip
    for row in table:
        assert bool(row["lr_backbone"]) == (row["phase"] == "joint") and row["lr_last_layer"]
        if row["step"] != "0":
            total = float(row["cross_entropy"]) + 1e-4 * float(row["l1"]) + 0.25 * float(row["diversity"])
            assert float(row["total"]) == pytest.approx(total, rel=1e-4)


def test_the_best_checkpoint_has_the_best_miou(workdir):
    run()
    measured = [float(row["val_miou"]) for row in rows() if row["val_miou"]]
    best = load_checkpoint("models/best_checkpoint.pth").metrics["val_miou"]
    assert best == pytest.approx(max(measured), rel=1e-5)
    final = load_checkpoint("models/final_checkpoint.pth")
    data = train.build_dataset(tiny_config(), "val")
    measured = open_model("models/final_checkpoint.pth").inference.validate(data).summary()["miou"]
    assert measured == pytest.approx(final.metrics["val_miou"], abs=1e-9)


def test_the_push_is_written_and_survives_finetuning(workdir):
    run()
    joint, push, final = (weights(name) for name in ("joint", "push", "final"))
    assert len(push["prototype_vectors"]) <= len(joint["prototype_vectors"])
    assert not torch.equal(push["prototype_vectors"][0], joint["prototype_vectors"][0])
    for name, value in push.items():
        assert torch.equal(final[name], value) == (name != "last_layer.weight"), name


def test_skip_push_keeps_the_prototypes(workdir, capsys):
    run("--skip-push")
    assert not Path("models/push_checkpoint.pth").exists()
    assert torch.equal(weights()["prototype_vectors"], weights("joint")["prototype_vectors"])
    assert load_checkpoint("models/final_checkpoint.pth").prototypes == ()
    assert "push" not in capsys.readouterr().out


def test_the_twin_trains_with_the_same_command(workdir, capsys):
    run("--set", "model.head=linear")
    out = capsys.readouterr().out
    assert "push: the linear head has no prototypes; nothing to do" in out
    assert "phase 2 (finetune): the linear head has nothing that it trains" in out
    assert_same(weights(), weights("joint"))
    aspp = "features.aspp.branches.0.weight"
    assert not torch.equal(weights("joint")[aspp], weights("warmup")[aspp])


def test_a_backbone_of_timm_trains_is_pushed_and_comes_back(workdir):
    """The whole way, the sizes of its checkpoints included, which are worked out without weights."""
    settings = ["model.backbone=timm/mobilenetv3_small_050", *(f"training.phases.{i}.steps=1" for i in range(3))]
    run(*(word for setting in settings for word in ("--set", setting)))
    saved = open_model("models/final_checkpoint.pth")
    assert saved.config.model.backbone == "timm/mobilenetv3_small_050" and saved.checkpoint.prototypes[0]["image"]


def test_multi_scale_training_runs(workdir):
    run("--set", "model.msc_scales=[0.5, 0.75]")
    assert all(torch.isfinite(value).all() for value in weights().values())


def test_the_same_command_gives_the_same_weights(workdir):
    run(models="a", results="ra")
    run("--set", "system.num_workers=1", models="b", results="rb")
    assert_same(weights(models="b"), weights(models="a"))
    assert without_speed(rows("rb")) == without_speed(rows("ra"))
    run("--set", "training.seed=1", models="c", results="rc")
    assert not torch.equal(weights(models="c")["last_layer.weight"], weights(models="a")["last_layer.weight"])


def test_early_stopping_ends_with_its_best_weights(workdir, monkeypatch):
    scores = iter([0.5, 0.2, 0.6, 0.4, 0.3, 0.9])
    seen = []

    def validate(job):
        seen.append(job.module.model.last_layer.weight.detach().clone())
        return next(scores)

    monkeypatch.setattr(train.Run, "_validate", validate)
    phase = "training.phases=[{name: only, steps: 40, lr: {last_layer: 1e-2}, early_stopping: 2}]"
    run(*changed(phase, "training.val_every=2", "training.iter_size=1"))
    final = load_checkpoint("models/final_checkpoint.pth")
    assert [row["step"] for row in rows() if row["val_miou"]] == ["0", "2", "4", "6", "8"]
    assert torch.equal(final.model["last_layer.weight"], seen[2]) and final.metrics["val_miou"] == 0.6
    assert not torch.equal(seen[2], seen[4]) and final.step == 8


# --- phase by phase --------------------------------------------------------------------------------------------


def test_three_calls_end_where_one_ends(workdir):
    run(models="one", results="r1")
    for phase in "012":
        run("--phase", phase, models="three", results="r3")
    for name in STAGES:
        assert_same(weights(name, "three"), weights(name, "one"))
    assert without_speed(rows("r3")) == without_speed(rows("r1"))


def test_three_processes_end_where_one_ends(tmp_path, monkeypatch):
    """As a user types it, with torchvision's ResNet-18."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    short = changed(*(f"training.phases.{i}.steps=2" for i in range(3)), "training.val_every=99")
    for phase in "012":
        command = [sys.executable, str(ROOT / "train.py"), "--config", "tiny.yaml", "--phase", phase, *short]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
    monkeypatch.setattr(train, "draw_prototypes", lambda inference, data, records, folder: records)
    run(*short, models="one", results="r1")
    assert_same(weights(), weights(models="one"))


@pytest.mark.parametrize("stage", ["warmup", "joint", "push"])
def test_resume_from_a_phases_end_goes_on_with_the_next(workdir, capsys, stage):
    run(models="one")
    capsys.readouterr()
    Path("two").mkdir()
    shutil.copy(f"one/{stage}_checkpoint.pth", "two")
    run("--resume", f"two/{stage}_checkpoint.pth", models="two", results="r2")
    out = capsys.readouterr().out
    assert ("phase 0" in out, "phase 1" in out, "searching" in out) == (False, stage == "warmup", stage != "push")
    assert_same(weights(models="two"), weights(models="one"))


def test_phase_with_resume_starts_from_that_checkpoint(workdir):
    run("--phase", "0", models="one")
    run("--phase", "1", "--resume", "one/warmup_checkpoint.pth", models="two", results="r2")
    run("--phase", "1", models="one")
    assert_same(weights("push", "two"), weights("push", "one"))


# --- resuming --------------------------------------------------------------------------------------------------

CUTS = changed(
    "training.checkpoint_every=1", "training.val_every=1", "training.log_every=1", "training.phases.2.early_stopping=2"
)
SCORES = {"warmup": (0, 0.1, 0.1, 0.2), "joint": (0, 0.3, 0.4, 0.3, 0.2, 0.3), "finetune": (0.5, 0.9, 0.3, 0.4, 1.0)}


@pytest.fixture
def every_cut(workdir, monkeypatch):
    """A whole run in models/ and results/; cuts/N holds both folders as they were when last_checkpoint was saved.

    Its val mIoU rises and falls as SCORES say, and stops finetuning early, with weights of some steps before.
    """
    monkeypatch.setattr(train.Run, "_validate", lambda job: SCORES[job.module.phase.config.name][job.module.phase.step])
    real_save = train.save_checkpoint

    def save_and_copy(path, *arguments, **how):
        real_save(path, *arguments, **how)
        if Path(path).name == "last_checkpoint.pth":
            cut = Path("cuts") / f"{len(list(Path('cuts').glob('*'))):02d}"
            shutil.copytree("models", cut / "models")
            shutil.copytree("results", cut / "results")

    Path("cuts").mkdir()
    monkeypatch.setattr(train, "save_checkpoint", save_and_copy)
    run(*CUTS)
    monkeypatch.setattr(train, "save_checkpoint", real_save)
    return sorted(Path("cuts").iterdir())


def test_a_run_resumed_at_any_step_of_any_phase_ends_bit_equal(every_cut):
    assert len(every_cut) == (3 - 1) + (5 - 1) + (3 - 1)
    assert load_checkpoint("models/final_checkpoint.pth").metrics["val_miou"] == 0.9
    for cut in every_cut:
        run(*CUTS, "--resume", "auto", models=cut / "models", results=cut / "results")
        for name in (*STAGES, "best"):
            whole = load_checkpoint(f"models/{name}_checkpoint.pth")
            again = load_checkpoint(cut / "models" / f"{name}_checkpoint.pth")
            assert_same(again.model, whole.model)
            for key in ("stage", "step", "metrics", "prototypes"):
                assert getattr(again, key) == getattr(whole, key)
        assert without_speed(rows(cut / "results")) == without_speed(rows())


@pytest.mark.parametrize(
    ("steps", "log_every"), [(1, 1), (4, 3), (6, 4), (9, 2)], ids=["warmup", "joint", "between updates", "finetune"]
)
def test_a_signal_stops_at_a_step_and_resume_goes_on_to_the_same_end(workdir, monkeypatch, steps, log_every):
    how = changed(f"training.log_every={log_every}")
    run(*how, models="one", results="r1")
    real_step, taken = module.TrainingModule.training_step, []

    def step_then_stop(trainer, *batch):
        real_step(trainer, *batch)
        taken.append(1)
        if len(taken) == steps:
            monkeypatch.setattr(stop_flag, "signum", signal.SIGTERM)

    monkeypatch.setattr(module.TrainingModule, "training_step", step_then_stop)
    with pytest.raises(Interrupted, match="SIGTERM: go on with: .* --resume auto$") as e:
        run(*how)
    assert e.value.exit_code == 143
    monkeypatch.setattr(stop_flag, "signum", None)
    run(*how, "--resume", "auto")
    assert len(taken) == 12
    assert_same(weights(), weights(models="one"))
    assert without_speed(rows()) == without_speed(rows("r1"))


def test_auto_takes_the_newest(workdir, every_cut):
    folder = every_cut[-1] / "models"  # in the middle of finetuning
    run_folder = RunFolder(tiny_config(f"paths.model_dir={folder}"))
    for expected in ("last", "push", "joint", "warmup"):
        assert run_folder.newest().path == folder / f"{expected}_checkpoint.pth"
        (folder / f"{expected}_checkpoint.pth").unlink()
        (folder / "last_checkpoint.prev.pth").unlink(missing_ok=True)
    assert run_folder.newest() is None


def test_auto_prefers_a_phases_end_to_a_step_of_that_phase(workdir):
    run("--phase", "0", *changed("training.checkpoint_every=1"))
    assert load_checkpoint("models/last_checkpoint.pth").stage == "warmup"
    assert RunFolder(tiny_config()).newest().path == Path("models/warmup_checkpoint.pth")


def test_auto_without_anything_starts_at_the_beginning(workdir):
    run("--resume", "auto")
    run(models="one", results="r1")
    assert_same(weights(), weights(models="one"))


def test_auto_on_a_finished_run_has_nothing_to_do(workdir, capsys):
    run()
    before = {path: path.stat().st_mtime_ns for path in Path("models").iterdir()}
    run("--resume", "auto")
    assert "this run is finished; nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("models").iterdir()} == before


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(every_cut):
    cut = every_cut[4]
    last = cut / "models" / "last_checkpoint.pth"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="going back to the one before"):
        run(*CUTS, "--resume", "auto", models=cut / "models", results=cut / "results")
    assert_same(weights(models=cut / "models"), weights())


def test_a_checkpoint_of_another_model_is_refused_by_key(workdir):
    run("--phase", "0")
    message = refused(CheckpointError, "--phase", "1", "--set", "model.add_on_layers_type=bottleneck")
    assert "warmup_checkpoint.pth: made by another model: model.add_on_layers_type is 'deeplab_simple' there" in message


def test_rates_and_decay_are_those_that_are_asked_for_now(workdir, capsys):
    """The remedy of a divergence: smaller rates, then --resume auto."""
    stop = changed("training.checkpoint_every=1", "training.log_every=1")
    run("--phase", "0", *stop)
    Path("models/warmup_checkpoint.pth").unlink()
    smaller = changed(
        "training.phases.0.lr={add_on: 1e-6, prototypes: 1e-6, last_layer: 1e-6}", "training.weight_decay=0.1"
    )
    capsys.readouterr()
    run("--phase", "0", "--resume", "auto", *stop, *smaller)
    out = capsys.readouterr().out
    assert (
        "not as in the run before: training.weight_decay is 0.1, was 0.0005; training.phases.0.lr.add_on is 1e-06"
        in out
    )
    assert [row["lr_add_on"] for row in rows()] == ["0.01", "0.01", "1e-06"]


def test_what_is_as_before_is_not_mentioned(workdir, capsys):
    run("--phase", "0")
    capsys.readouterr()
    run("--phase", "1", "--set", "system.num_workers=1")
    assert "not as in" not in capsys.readouterr().out


def test_classes_in_another_order_are_refused(workdir, monkeypatch):
    run("--phase", "0")
    names = list(load_checkpoint("models/warmup_checkpoint.pth").class_names)
    checkpoint = load_checkpoint("models/warmup_checkpoint.pth").with_(class_names=tuple(reversed(names)))
    train.save_checkpoint("models/warmup_checkpoint.pth", checkpoint)
    for arguments in (["--phase", "1"], ["--resume", "auto"]):
        assert "the same classes in another order" in refused(ConfigError, *arguments)


def test_a_finished_phase_that_is_asked_for_again_has_nothing_left_to_do(workdir, capsys):
    run("--phase", "0")
    run("--phase", "1")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.name != ".lock"}
    for phase in "01":
        run("--phase", phase, "--resume", "auto")
        assert f"phase {phase} is finished; nothing is left to do" in capsys.readouterr().out
        assert "--resume auto" in refused(ConfigError, "--phase", phase)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_last_checkpoint_records_no_miou_of_other_weights(workdir):
    run(*changed("training.checkpoint_every=2", "training.val_every=1"))
    assert load_checkpoint("models/last_checkpoint.pth").metrics == {}


def test_a_phase_that_a_checkpoint_does_not_fit_any_more_names_the_file_and_the_remedy(workdir):
    run("--phase", "0", *changed("training.checkpoint_every=2"))
    Path("models/warmup_checkpoint.pth").unlink()
    message = r"^models/last_checkpoint.pth: .* of step 2; 'warmup' has 1 steps; give it the settings of the run before"
    with pytest.raises(CheckpointError, match=message):
        run("--resume", "auto", *changed("training.phases.0.steps=1"))


def test_what_differs_from_a_finished_run_is_said(workdir, capsys):
    run()
    capsys.readouterr()
    run("--resume", "auto")
    assert "not as in" not in capsys.readouterr().out
    run("--resume", "auto", *changed("training.phases.2.steps=9"))
    said = capsys.readouterr().out
    assert "not as in the run before: training.phases.2.steps is 9, was 4" in said
    assert "this run is finished; nothing is left to do" in said


def test_a_push_that_was_skipped_or_not_is_said(workdir, capsys):
    for models, before, now, told in (
        ("skipped", ["--skip-push"], [], "the push was skipped"),
        ("pushed", [], ["--skip-push"], "the prototypes were pushed"),
    ):
        results = f"results_{models}"
        run(*before, *changed("training.checkpoint_every=2"), models=models, results=results)
        Path(models, "final_checkpoint.pth").unlink()
        for options in (before, now):
            capsys.readouterr()
            run("--resume", "auto", *options, models=models, results=results)
            assert (f"not as in the run before: {told}" in capsys.readouterr().out) == (options is now)


@pytest.mark.parametrize(("before", "now", "expected"), [(5, 0, 0.4), (0, 5, 0.4), (5, 5, 0.6)])
def test_early_stopping_that_is_switched_meanwhile_has_the_miou_of_its_weights(
    workdir, monkeypatch, before, now, expected
):
    def score(job):
        step = job.module.phase.step
        seen[step] = job.module.model.last_layer.weight.detach().clone()
        if step == 2:
            stop_flag.signum = signal.SIGTERM
        return {0: 0.5, 2: 0.6, 4: 0.3, 6: 0.4}[step]

    seen = {}
    monkeypatch.setattr(stop_flag, "signum", None)
    monkeypatch.setattr(train.Run, "_validate", score)

    def arguments(patience):
        phase = f"{{name: only, steps: 6, lr: {{last_layer: 1e-2}}, early_stopping: {patience}}}"
        return changed(f"training.phases=[{phase}]", "training.val_every=2", "training.iter_size=1")

    with pytest.raises(Interrupted):
        run(*arguments(before))
    stop_flag.signum = None
    run("--resume", "auto", *arguments(now))
    final = load_checkpoint("models/final_checkpoint.pth")
    assert final.val_miou == expected
    assert torch.equal(final.model["last_layer.weight"], seen[{0.4: 6, 0.6: 2}[expected]])


def test_early_stopping_brings_back_the_statistics_of_batch_norm(workdir, monkeypatch):
    """So that the final checkpoint is the model whose mIoU it records."""
    scores = iter([0.5, 0.2, 0.1])
    real, seen = train.Run._validate, []

    def validate(job):
        seen.append({name: value.clone() for name, value in job.module.model.state_dict().items()})
        return next(scores)

    monkeypatch.setattr(train.Run, "_validate", validate)
    phase = "training.phases=[{name: only, steps: 9, lr: {backbone: 1e-2, add_on: 1e-2}, early_stopping: 2}]"
    run(*changed(phase, "training.val_every=2", "training.iter_size=1"))
    assert real and not torch.equal(
        seen[0]["features.backbone.bn1.running_mean"], seen[2]["features.backbone.bn1.running_mean"]
    )
    assert_same(weights(), seen[0])


def test_results_say_what_made_them(workdir):
    run("--phase", "0")
    about = json.loads(Path("results/run.json").read_text())
    assert about["models"] == "../models" and about["torch"] == torch.__version__
    assert {"command", "commit", "version"} <= about.keys()
    assert load_checkpoint("models/warmup_checkpoint.pth").provenance == {k: about[k] for k in about if k != "models"}


# --- something goes wrong in mid-run -----------------------------------------------------------------------------


def no_space(log, row, total_step):
    if row["phase"] == "joint" and row["step"] == 2:
        raise OSError(28, "cannot log this step (No space left on device)", str(log.path))


def vanish(log, row, total_step):
    if row["phase"] == "joint" and row["step"] == 2:
        shutil.rmtree(log.path.parent)


@pytest.mark.parametrize("fault", [no_space, vanish])
def test_the_state_is_saved_where_the_log_cannot_be_written(workdir, monkeypatch, fault):
    run(models="one", results="r1")
    real = train.MetricsLog.write

    def write(log, row, total_step):
        fault(log, row, total_step)
        real(log, row, total_step)

    monkeypatch.setattr(train.MetricsLog, "write", write)
    with pytest.raises(OSError, match=r"results/metrics.csv: .*When that is mended, go on with: .*--resume auto$"):
        run()
    last = load_checkpoint("models/last_checkpoint.pth")
    assert (last.stage, last.step) == ("joint", 2)
    monkeypatch.setattr(train.MetricsLog, "write", real)
    run("--resume", "auto")
    assert_same(weights(), weights(models="one"))
    expected = without_speed(rows("r1"))
    assert without_speed(rows()) == (expected if fault is no_space else expected[2:])


def test_the_state_is_saved_where_an_image_vanishes(workdir, monkeypatch):
    run(models="one", results="r1")
    real, read = train.TrainingSamples.__getitem__, []

    def getitem(samples, key):
        read.append(key)
        if len(read) == 2 * 5 + 1:  # after 5 batches of two
            raise DatasetError("train/0001.png: this image is missing")
        return real(samples, key)

    monkeypatch.setattr(train.TrainingSamples, "__getitem__", getitem)
    with pytest.raises(DatasetError, match="^train/0001.png: this image is missing. When that is mended, go on with: "):
        run()
    assert load_checkpoint("models/last_checkpoint.pth").step == 2
    monkeypatch.setattr(train.TrainingSamples, "__getitem__", real)
    run("--resume", "auto")
    assert_same(weights(), weights(models="one"))
    assert without_speed(rows()) == without_speed(rows("r1"))


def test_a_class_of_which_no_cell_sees_a_pixel_is_told_from_one_that_is_not_there(workdir, monkeypatch, capsys):
    real = train.push_prototypes
    monkeypatch.setattr(
        train, "push_prototypes", lambda *a: (r := real(*a))._replace(not_found=[0, len(r.records) - 1])
    )
    real_images = train.own_images

    def without_the_first_class(*arguments):
        for index, image, label in real_images(*arguments):
            yield index, image, label.where(label != 0, torch.tensor(255))

    monkeypatch.setattr(train, "own_images", without_the_first_class)
    run("--phase", "0")
    run("--phase", "1")
    out = capsys.readouterr().out
    assert "prototype 0: class 'sky' never occurs in the training data; kept as it is" in out
    assert "has pixels, but no cell looks at one: too small for a grid of stride 8; kept as it is" in out


# --- refusals --------------------------------------------------------------------------------------------------


def test_a_phase_without_its_start_names_the_file_and_the_command(workdir):
    message, command = refused(ConfigError, "--phase", "1").split(" It is made by: ")
    assert message == "--phase 1 starts from models/warmup_checkpoint.pth, which is not there."
    assert command.startswith(f"python {ROOT / 'train.py'} --config {workdir / 'tiny.yaml'} --set ")
    assert command.endswith(" --phase 0 --resume auto")
    assert "models/push_checkpoint.pth" in refused(ConfigError, "--phase", "2")
    assert "models/joint_checkpoint.pth" in refused(ConfigError, "--phase", "2", "--skip-push")
    assert refused(ConfigError, "--phase", "3") == "--phase 3: there are phases 0 to 2"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--set", "training.batchsize=3"], ConfigError, "did you mean 'batch_size'?"),
        (["--set", "training.batch_size=many"], ConfigError, "want a whole number, got 'many'"),
        (
            changed("model.num_classes=5", "model.prototype_shape.0=7"),
            ConfigError,
            "7 prototypes cannot be shared evenl",
        ),
        (["--config", "nowhere.yaml"], ConfigError, "nowhere.yaml: cannot read this configuration"),
        (["--resume", "nowhere.pth"], CheckpointError, "nowhere.pth: there is no such checkpoint"),
        (changed("dataset.name=camvid", "dataset.root=nowhere"), DatasetError, "'nowhere'"),
        (changed("model.num_classes=2"), ConfigError, "2, but shapes has 6 classes"),
        (changed("system.device=cuda:77"), ConfigError, "there is no cuda:77 here"),
    ],
)
def test_a_bad_command_line_is_told_once_a_problem_and_writes_nothing(workdir, arguments, error, message):
    told = refused(error, *arguments)
    lines = told.splitlines()  # a missing data set is missing in both splits
    assert message in told and len(set(lines)) == len(lines) <= (2 if error is DatasetError else 1)


@pytest.mark.parametrize(
    "arguments", [["--config", "nowhere.yaml"], ["--config", "tiny.yaml", "--set", "training.batch_size=two"]]
)
def test_a_bad_command_line_exits_with_2_and_one_line(workdir, arguments):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [path.name for path in workdir.iterdir()] == ["tiny.yaml"]


def test_a_finished_run_is_not_overwritten_silently(workdir):
    run()
    before = {path: path.read_bytes() for path in Path("models").glob("*.pth")}
    for arguments in ([], ["--phase", "0"], ["--phase", "1"], ["--phase", "2"]):
        message = refused(ConfigError, *arguments)
        assert "is there from an earlier run" in message and "--overwrite" in message and "--resume auto" in message
    assert {path: path.read_bytes() for path in Path("models").glob("*.pth")} == before


def test_overwrite_replaces_a_run(workdir):
    run()
    run("--overwrite", "--set", "training.seed=1")
    run(*changed("training.seed=1"), models="one", results="r1")
    assert_same(weights(), weights(models="one"))
    assert_same(weights("best"), weights("best", "one"))
    assert without_speed(rows()) == without_speed(rows("r1"))


def test_overwriting_a_phase_removes_what_was_made_from_it(workdir):
    run()
    run("--phase", "1", "--overwrite")
    assert Path("models/push_checkpoint.pth").exists() and not Path("models/final_checkpoint.pth").exists()
    assert {row["phase"] for row in rows()} == {"warmup", "joint"}


def test_resume_after_an_overwritten_phase_goes_on_from_the_new_weights(workdir):
    """The last_checkpoint of the run that was overwritten stands further in the schedule than the new weights."""
    run(*changed("training.checkpoint_every=1"))
    other = changed("training.checkpoint_every=100", "training.phases.1.lr.add_on=3e-2")
    run("--phase", "1", "--overwrite", *other)
    assert not list(Path("models").glob("last_*"))
    run("--resume", "auto", *other)
    assert torch.equal(weights()["prototype_vectors"], weights("push")["prototype_vectors"])


def test_overwriting_from_the_push_on_writes_the_rows_of_finetuning_once(workdir):
    run()
    before = without_speed(rows())
    run("--resume", "models/joint_checkpoint.pth", "--overwrite")
    assert without_speed(rows()) == before


def test_a_run_that_is_overwritten_stays_until_its_successor_is_whole(workdir, monkeypatch, capsys):
    run(*changed("training.checkpoint_every=2"))
    before = {path: path.read_bytes() for path in Path("models").glob("*.pth")}
    other = changed("training.seed=1", "training.checkpoint_every=100")
    run(*other, models="one", results="r1")
    real_step, taken = module.TrainingModule.training_step, []

    def step_then_stop(trainer, *batch):
        real_step(trainer, *batch)
        taken.append(1)
        if len(taken) in (1, 5):
            monkeypatch.setattr(stop_flag, "signum", signal.SIGTERM)

    monkeypatch.setattr(module.TrainingModule, "training_step", step_then_stop)
    with pytest.raises(Interrupted):
        run("--overwrite", *other)
    saved = {path for path in before if "last" in path.name}
    assert {path: path.read_bytes() for path in before if path not in saved} == {
        path: value for path, value in before.items() if path not in saved
    }
    assert "is there from an earlier run" in refused(ConfigError, *other)
    monkeypatch.setattr(stop_flag, "signum", None)
    with pytest.raises(Interrupted):
        run("--resume", "auto", *other)  # in joint
    assert Path("models/final_checkpoint.pth").read_bytes() == before[Path("models/final_checkpoint.pth")]
    monkeypatch.setattr(stop_flag, "signum", None)
    run("--resume", "auto", *other)
    for name in (*STAGES, "best"):
        assert_same(weights(name), weights(name, "one"))
    assert without_speed(rows()) == without_speed(rows("r1"))
    assert not Path("models/.outdated.json").exists()


def test_the_file_that_a_run_starts_from_is_never_overwritten(workdir):
    run()
    before = {path: path.read_bytes() for path in Path("models").glob("*.pth")}
    for name, phase in (("final", "2"), ("push", "1"), ("best", "2")):
        file = f"models/{name}_checkpoint.pth"
        message = refused(ConfigError, "--phase", phase, "--resume", file, "--overwrite")
        assert f"{file}: --overwrite would replace the file that it starts from" in message
        assert "paths.model_dir=FOLDER --set paths.results_dir=FOLDER" in message
    assert {path: path.read_bytes() for path in Path("models").glob("*.pth")} == before


def test_results_of_another_run_are_refused(workdir):
    run("--phase", "0")
    for arguments in ([], ["--overwrite"], ["--resume", "auto"]):
        message = refused(ConfigError, *arguments, models="other")
        assert message.startswith("results: these are the results of the run in ") and "paths.model_dir" in message
    run("--phase", "0", models="other", results="results/other")


@pytest.mark.parametrize("name", ["last_checkpoint.pth", "last_checkpoint.prev.pth"])
@pytest.mark.parametrize("how", [["--phase", "1"], ["--resume", "models/warmup_checkpoint.pth"]])
def test_a_foreign_file_under_the_name_of_a_last_checkpoint_stays(workdir, name, how):
    run("--phase", "0")
    Path("models", name).write_bytes(b"mine")
    assert name in refused(CheckpointError, *how, "--set", "training.checkpoint_every=1")
    assert Path("models", name).read_bytes() == b"mine"


@pytest.mark.parametrize("how", [["--phase", "1"], ["--resume", "auto"]])
def test_a_list_of_outdated_files_makes_no_foreign_file_ours(workdir, how):
    run("--phase", "0")
    Path("models/final_checkpoint.pth").write_bytes(b"mine")
    Path("models/.outdated.json").write_text('["final_checkpoint.pth"]')
    assert "final_checkpoint.pth" in refused(CheckpointError, *how)
    assert Path("models/final_checkpoint.pth").read_bytes() == b"mine"


def test_a_foreign_list_of_outdated_files_stays(workdir):
    Path("models").mkdir()
    Path("models/.outdated.json").write_text('{"mine": 1}')
    run("--phase", "0")
    assert Path("models/.outdated.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("text", ['{"models": "resnet50"}', '{"models": ""}', '{"models": "../x", "lr": 1}'])
def test_a_users_own_run_json_is_no_result(workdir, text):
    Path("mine").mkdir()
    Path("mine/run.json").write_text(text)
    assert "mine/run.json: this project did not write" in refused(ConfigError, results="mine")
    assert Path("mine/run.json").read_text() == text


def test_a_users_own_files_are_no_results(workdir):
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("mine: 1\n")
    for arguments in ([], ["--overwrite"]):
        assert "mine/config.yaml: this project did not write this file" in refused(
            ConfigError, *arguments, results="mine"
        )
    Path("r/prototypes").mkdir(parents=True)
    Path("r/prototypes/holiday.png").touch()
    with pytest.raises(ConfigError, match="r/prototypes: .*holds holiday.png"):
        run(results="r")
    assert Path("r/prototypes/holiday.png").exists() and not list(Path("models").glob("*.pth"))


@pytest.mark.parametrize("fault", ["a damaged image", "a signal"])
def test_a_run_with_workers_that_fails_ends_all_the_same(tmp_path, fault):
    """Workers ignore signals, and Python waits for them at exit: somebody has to tell them."""
    trees.camvid(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    plan = "import train, signal\nfrom runtime import command\nstep = train.TrainingModule.training_step\n"
    plan += f"{FAULTS[fault]}\n"
    code = plan + f"command.run(lambda argv: train.main({CAMVID}))"
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == (2 if fault == "a damaged image" else 143), done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr


CAMVID = ["--config", "tiny.yaml", "--phase", "0", *changed(
    "dataset.name=camvid", "model.num_classes=11", "model.prototype_shape.0=11", "system.num_workers=2",
    "training.phases.0.steps=50",
)]  # fmt: skip
FAULTS = {
    "a damaged image": "open('train/0001TP_006720.png', 'wb').write(b'no image')",
    "a signal": "train.TrainingModule.training_step = lambda *a: (step(*a), signal.raise_signal(signal.SIGTERM))",
}


def test_a_folder_in_use_is_left_alone(workdir):
    for folder in ("models", "results"):
        with locked_folders([Path(folder)], lambda: None):
            with pytest.raises(
                UserError, match=f"{folder}: .* trains there.*model_dir=FOLDER.*results_dir=FOLDER"
            ) as e:
                run(models="models" if folder == "models" else "other")
        assert e.value.exit_code == 5 and not list(Path().rglob("*.pth"))


# --- a loss that is not finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 100], ids=["found when logging", "found at the next step"])
@pytest.mark.parametrize("bad_step", [4, 5, 8], ids=["joint 1", "joint 2", "last of joint"])
def test_nan_ends_the_run_with_its_terms_and_images_and_overwrites_nothing(workdir, monkeypatch, bad_step, log_every):
    calls = []

    def spoiled(*tensors):
        calls.append(1)
        loss = cross_entropy(*tensors)
        return loss._replace(total=loss.total * (torch.nan if len(calls) == bad_step else 1.0))

    monkeypatch.setattr(module, "cross_entropy", spoiled)
    saved = {}
    real_save = train.save_checkpoint

    def save_and_note(path, *arguments, **how):
        assert len(calls) < bad_step
        real_save(path, *arguments, **how)
        saved[Path(path)] = Path(path).read_bytes()

    monkeypatch.setattr(train, "save_checkpoint", save_and_note)
    with pytest.raises(NotFiniteError) as caught:
        run(*changed(f"training.log_every={log_every}", "training.val_every=100", "training.checkpoint_every=1"))
    assert caught.value.exit_code == 6
    message = str(caught.value)
    assert f"phase 'joint', step {bad_step - 3}, is not finite: cross_entropy = nan, l1 = " in message
    keys = train.StepSampler(5, 2, 0, 1).batch(bad_step - 4)
    assert message.endswith("The images of that batch: " + ", ".join(f"scene train {i:05d}" for _, i in keys))
    assert {path: path.read_bytes() for path in saved} == saved


# --- the schedule ----------------------------------------------------------------------------------------------


def test_another_schedule_is_an_edit_of_the_yaml(workdir):
    raw = yaml.safe_load(CONFIG)
    raw["training"]["phases"] = [
        {"name": "first", "steps": 2, "push": True, "lr": {"add_on": 0.01, "prototypes": 0.01}},
        {"name": "second", "steps": 2, "push": True, "lr": {"backbone": 0.01}},
    ]
    Path("other.yaml").write_text(yaml.safe_dump(raw))
    run(config="other.yaml")
    assert {path.name for path in Path("models").glob("*.pth")} == {
        f"{name}_checkpoint.pth" for name in ("first", "first_push", "second", "final", "best")
    }
