"""Which stages run from which file, what a run folder holds, and the command that goes on."""

import json
import shlex
from pathlib import Path

import pytest

from config import config_to_dict, load_config
from runtime.checkpoint import Checkpoint, CheckpointError, Midway, save_checkpoint
from runtime.errors import ConfigError, UserError
from schedule import (
    Command,
    Found,
    ResultsFolder,
    RunFolder,
    asked_for,
    choose_stages,
    differences,
    folders_of_pruned,
    following,
    left_by_an_earlier_version,
    locked_folders,
    outputs_to_replace,
    plan,
)
from tests.tiny import ROOT, tiny_config

STAGES = ("warmup", "joint", "push", "finetune")
PHASES = {"warmup": 0, "joint": 1, "push": 1, "finetune": 2}


def checkpoint(stage="warmup", midway=False, **what):
    config = what.pop("config", None) or tiny_config()
    state = Midway({"state": {0: {}}}, {}, None, 0, {}) if midway else None
    return Checkpoint(config_to_dict(config), stage, PHASES[stage], 2, {}, midway=state, **what)


@pytest.fixture
def folder(workdir, monkeypatch):
    """A run folder of which checkpoints are read from a table, by path; `put` adds one."""
    there = {}

    def load_last(path):
        if Path(path) not in there:
            raise CheckpointError(f"{path}: there is no such checkpoint")
        return there[Path(path)], Path(path)

    monkeypatch.setattr("schedule.load_last", load_last)
    monkeypatch.setattr("schedule.load_checkpoint", lambda path: load_last(path)[0])
    made = RunFolder(tiny_config())

    def put(stage, midway=False, path=None):
        path = path or (made.last if midway else made.file(next(s for s in made.schedule if s.name == stage)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        there[path] = checkpoint(stage, midway)
        return path

    made.put = put
    return made


def command(phase=None, skip_push=False, overrides=()):
    return Command("tiny.yaml", tiny_config(*overrides), tuple(overrides), skip_push, phase)


def chosen(folder, phase=None, resume=None, skip_push=False):
    stages, found = choose_stages(folder, command(phase, skip_push), resume)
    return [stage.name for stage in stages], found and found.path.name


# --- the schedule ----------------------------------------------------------------------------------------------


def test_the_plan_names_a_file_for_each_stage():
    config = load_config(ROOT / "configs" / "demo.yaml")
    assert [(s.name, s.phase, s.is_push, s.file) for s in plan(config)] == [
        ("warmup", 0, False, "warmup_checkpoint.pth"),
        ("joint", 1, False, "joint_checkpoint.pth"),
        ("push", 1, True, "push_checkpoint.pth"),
        ("finetune", 2, False, "final_checkpoint.pth"),
    ]
    assert [s.file for s in plan(config, skip_push=True)] == [
        f"{name}_checkpoint.pth" for name in ("warmup", "joint", "final")
    ]


def test_what_follows_a_checkpoint():
    schedule = plan(load_config(ROOT / "configs" / "demo.yaml"))
    for i, stage in enumerate(schedule):
        found = Found(checkpoint("warmup", config=load_config(ROOT / "configs/demo.yaml")), Path("x"), stage)
        assert following(schedule, found) == schedule[i + 1 :]
        midway = found._replace(checkpoint=found.checkpoint.with_(midway=Midway({}, {}, None, 0, {})))
        assert following(schedule, midway) == schedule[i:]
    assert following(schedule, None) == schedule


def test_what_is_asked_for():
    schedule = plan(load_config(ROOT / "configs" / "demo.yaml"))
    assert asked_for(schedule, schedule[1:], None, False) == schedule[1:]
    assert asked_for(schedule, schedule[2:], 1, False) == schedule[2:3]
    assert asked_for(schedule, schedule[3:], 1, False) == []
    assert asked_for(schedule, schedule[3:], 1, True) == schedule[1:3]


@pytest.mark.parametrize(
    ("there", "phase", "resume", "expected"),
    [
        ([], None, None, (list(STAGES), None)),
        ([], None, "auto", (list(STAGES), None)),
        ([], 0, "auto", (["warmup"], None)),
        (["warmup"], None, None, (list(STAGES), None)),  # what is there is looked at later
        (["warmup"], 1, None, (["joint", "push"], "warmup_checkpoint.pth")),
        (["warmup"], None, "auto", (["joint", "push", "finetune"], "warmup_checkpoint.pth")),
        (["warmup"], 0, "auto", ([], "warmup_checkpoint.pth")),
        (["warmup", "joint"], 1, "auto", (["push"], "joint_checkpoint.pth")),
        (["warmup", "joint", "push"], 1, "auto", ([], "push_checkpoint.pth")),
        (["warmup", "joint", "push"], 2, "auto", (["finetune"], "push_checkpoint.pth")),
        (["warmup", "joint", "push", "finetune"], 1, "auto", ([], "final_checkpoint.pth")),
        (["warmup", "joint", "push", "finetune"], None, "auto", ([], "final_checkpoint.pth")),
        (["warmup", "joint-"], None, "auto", (["joint", "push", "finetune"], "last_checkpoint.pth")),
        (["warmup", "joint-"], 1, "auto", (["joint", "push"], "last_checkpoint.pth")),
        (["warmup", "joint-"], 0, "auto", ([], "last_checkpoint.pth")),
        (["warmup", "joint", "joint-"], None, "auto", (["push", "finetune"], "joint_checkpoint.pth")),
    ],
)
def test_where_a_run_starts_and_what_it_does(folder, there, phase, resume, expected):
    for name in there:
        folder.put(name.rstrip("-"), midway=name.endswith("-"))
    assert chosen(folder, phase, resume) == expected


def test_without_the_push(folder):
    folder.put("warmup")
    folder.put("joint")
    assert chosen(folder, None, "auto", skip_push=True) == (["finetune"], "joint_checkpoint.pth")
    assert chosen(folder, 2, None, skip_push=True) == (["finetune"], "joint_checkpoint.pth")
    folder.put("push")
    assert chosen(folder, None, "auto", skip_push=True) == (["finetune"], "push_checkpoint.pth")


def test_what_is_missing_is_named_with_the_command_that_makes_it(folder):
    folder.put("joint", midway=True)
    with pytest.raises(ConfigError, match="--phase 2 starts from models/push_checkpoint.pth, which is not there") as e:
        chosen(folder, 2, "auto")
    assert shlex.split(str(e.value))[-4:] == ["--phase", "1", "--resume", "auto"]
    with pytest.raises(ConfigError, match="stands in phase 1: give --phase 1, or none"):
        chosen(folder, 2, str(folder.last))
    with pytest.raises(
        CheckpointError, match="ends the stage 'warmup'; this schedule has other, joint, push, finetune"
    ):
        RunFolder(tiny_config("training.phases.0.name=other")).load(folder.put("warmup"))


def test_a_phase_that_a_named_file_has_behind_it_is_trained_again_from_there(folder):
    elsewhere = folder.put("push", path=Path("other/push_checkpoint.pth"))
    assert chosen(folder, 1, str(elsewhere)) == (["joint", "push"], "push_checkpoint.pth")


# --- folders ---------------------------------------------------------------------------------------------------


def test_a_file_of_another_run_is_refused_in_a_folder_that_holds_one(folder):
    pruned = folder.put("push", path=Path("models/pruned/push_checkpoint.pth"))
    beside = folder.put("push", path=Path("models/pruned_checkpoint.pth"))  # as an earlier version called it
    assert chosen(folder, None, str(pruned)) == (["finetune"], "push_checkpoint.pth")  # the folder is still empty
    own = folder.put("push")
    for path, models, results in ((pruned, "pruned", "pruned"), (beside, "pruned_2", "pruned")):
        with pytest.raises(ConfigError, match="models holds another run than that of models/pruned") as caught:
            chosen(folder, None, str(path))
        told = shlex.split(str(caught.value).split("folders of its own: ")[1])
        assert told[-2:] == ["--resume", str(path.absolute())]
        assert f"paths.model_dir={Path('models').absolute() / models}" in told
        assert f"paths.results_dir={Path('results').absolute() / results}" in told
    assert chosen(folder, None, str(own)) == (["finetune"], "push_checkpoint.pth")


def test_a_pruned_model_of_an_earlier_version_is_not_forgotten(folder):
    assert left_by_an_earlier_version(folder, command()) is None
    for name in ("pruned", "pruned_last"):
        last = folder.put("push", path=Path(f"models/{name}_checkpoint.pth"))
        told = left_by_an_earlier_version(folder, command())
        assert told.startswith(f"{last} is of a pruned model") and told.endswith(f"--resume {last.absolute()}")
        assert f"paths.model_dir={Path('models/pruned').absolute()} " in told
    folder.put("finetune", path=Path("models/pruned_final_checkpoint.pth"))
    assert left_by_an_earlier_version(folder, command()) is None


def test_what_a_run_would_replace(folder):
    for name in STAGES:
        folder.put(name)
    schedule = folder.schedule
    with pytest.raises(ConfigError, match="models/warmup_checkpoint.pth is there from an earlier run.*--overwrite"):
        outputs_to_replace(folder, schedule, None, False)
    found = folder.load(folder.file(schedule[1]))
    names = [path.name for path in outputs_to_replace(folder, schedule[2:], found, True)]
    assert names == ["push_checkpoint.pth", "final_checkpoint.pth"]
    with pytest.raises(
        ConfigError, match="joint_checkpoint.pth: --overwrite would replace the file that it starts from"
    ):
        outputs_to_replace(folder, schedule[1:], found, True)
    (Path("models") / "best_checkpoint.pth").write_text("somebody's own")
    with pytest.raises(CheckpointError):
        outputs_to_replace(folder, schedule, None, True)


def test_files_of_a_run_that_is_replaced_stay_until_their_successors_are_there(folder):
    for name in STAGES:
        folder.put(name)
    folder.set_outdated({"joint_checkpoint.pth", "push_checkpoint.pth", "final_checkpoint.pth", "foreign.txt"})
    assert folder.newest().path.name == "warmup_checkpoint.pth" and len(list(Path("models").glob("*.pth"))) == 4
    folder.replaced(folder.file(folder.schedule[1]))
    assert folder.newest().path.name == "joint_checkpoint.pth"
    Path("models/foreign.txt").touch()
    folder.forget_outdated()
    assert {path.name for path in Path("models").iterdir()} == {
        "warmup_checkpoint.pth", "joint_checkpoint.pth", "foreign.txt",
    }  # fmt: skip


def test_results_know_their_run(workdir):
    for name in ("models", "other"):
        Path(name).mkdir()
        Path(name, "warmup_checkpoint.pth").touch()
    Path("results").mkdir()
    ours, others = (ResultsFolder(Path("results"), Path(name)) for name in ("models", "other"))
    ours.check()
    about = {"train_images": "5", "version": "2.0.0"}
    ours.claim(tiny_config(), about)
    assert json.loads(Path("results/run.json").read_text()) == {"models": "../models", **about}
    assert load_config("results/config.yaml") == tiny_config()
    ours.check()
    with pytest.raises(
        ConfigError, match="results: these are the results of the run in .*/models.*model_dir=.*results"
    ):
        others.check()
    Path("moved").mkdir()
    Path("models").rename("moved/models")
    Path("results").rename("moved/results")
    ResultsFolder(Path("moved/results"), Path("moved/models")).check()
    Path("moved/models/warmup_checkpoint.pth").unlink()
    ResultsFolder(Path("moved/results"), Path("other")).check()  # of a run that is not there any more


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.csv"])
def test_somebodys_own_files_are_not_results(workdir, name):
    Path(name).write_text("mine, 1\n")
    with pytest.raises(ConfigError, match=f"{name}: this project did not write this file"):
        ResultsFolder(Path(), Path("models")).check()
    Path("metrics.csv").write_text("phase,step,lr_backbone\n")  # of a run of an earlier version
    ResultsFolder(Path(), Path("models")).check()


def test_who_is_refused_leaves_no_trace(workdir):
    def refuse():
        raise ConfigError("no")

    with pytest.raises(ConfigError), locked_folders([Path("models"), Path("results")], refuse):
        pass
    assert not Path("models").exists() and not Path("results").exists()
    calls = []
    with locked_folders([Path("models"), Path("models/../models")], lambda: calls.append(Path("models").exists())):
        assert calls == [False, True]
        with pytest.raises(UserError, match="trains there.*paths.model_dir=FOLDER --set paths.results_dir=FOLDER"):
            with locked_folders([Path("results"), Path("models")], lambda: None):
                pass
    assert not Path("results").exists()


def test_a_pruned_model_gets_folders_that_are_free_in_both_places(workdir):
    models, results = Path("m"), Path("r")
    assert folders_of_pruned(models, results) == (models / "pruned", results / "pruned")
    (results / "pruned").mkdir(parents=True)
    assert folders_of_pruned(models, results) == (models / "pruned", results / "pruned_2")
    (models / "pruned").mkdir(parents=True)
    (models / "pruned_2").touch()
    assert folders_of_pruned(models, results) == (models / "pruned_3", results / "pruned_2")


# --- what differs ----------------------------------------------------------------------------------------------


def test_what_differs_from_the_run_before_is_said(workdir):
    about = {"train_images": "5", "processes": "1"}
    assert differences(tiny_config("system.num_workers=3", "paths.model_dir=x"), checkpoint(), about) == []
    assert differences(tiny_config(f"dataset.root={workdir}"), checkpoint(), about) == []  # "." made absolute
    before = checkpoint(provenance={"train_images": "6", "processes": "2"})
    assert differences(tiny_config("training.seed=1", "training.phases.0.lr.add_on=1e-6"), before, about) == [
        "training.seed is 1, was 0",
        "training.phases.0.lr.add_on is 1e-06, was 0.01",
        "5 training images, were 6",
        "1 processes, were 2",
    ]


def test_a_printed_command_is_complete_and_means_the_same_anywhere(workdir):
    overrides = ("training.seed=3", "paths.model_dir=a b", "dataset.root=data")
    text = command(1, True, overrides).text("auto")
    words = shlex.split(text)
    assert words[:4] == ["python", str(ROOT / "train.py"), "--config", str(workdir / "tiny.yaml")]
    assert words[-5:] == ["--phase", "1", "--skip-push", "--resume", "auto"]
    settings = [word for before, word in zip(words, words[1:], strict=False) if before == "--set"]
    assert set(settings) == {
        "training.seed=3", f"paths.model_dir={workdir}/a b", f"paths.results_dir={workdir}/results",
        f"dataset.root={workdir}/data",
    }  # fmt: skip
    assert command().text("m/x.pth").endswith(f" --resume {workdir}/m/x.pth")


def test_a_real_file_is_found_too(workdir):
    folder = RunFolder(tiny_config())
    save_checkpoint(folder.file(folder.schedule[0]), checkpoint("warmup"))
    assert folder.newest().stage == folder.schedule[0]
