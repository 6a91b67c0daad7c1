"""Checkpoints: whole or not there, plain data, checked before they are believed; and one run to a folder."""

import errno
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from config import Config, config_of, config_to_dict
from runtime.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunInUseError,
    load_checkpoint,
    load_last,
    load_tensors,
    locked_run,
    previous,
    save_checkpoint,
)
from tests.tiny import ROOT

CONTENT = {"config": {"a": [1, 2.5, None, True]}, "phase": 1, "step": 7, "model": {"w": torch.arange(600.0)}}
STATE = Checkpoint(**CONTENT, stage="ü", class_names=("a", "b"), palette=((0, 1, 2), (255, 0, 0)))


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "some.pth", STATE)
    return tmp_path / "some.pth"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(saved):
    state = load_checkpoint(saved)
    assert torch.equal(state.model["w"], STATE.model["w"]) and state.origin == str(saved)
    assert state.with_(model={}, origin="") == STATE.with_(model={}, origin="")
    assert files(saved.parent) == ["some.pth"]


def test_a_file_of_the_bare_minimum_is_read(tmp_path):
    torch.save({"format": 1, **CONTENT, "pruned": True, "later": 3}, tmp_path / "some.pth")
    state = load_checkpoint(tmp_path / "some.pth")
    assert (state.stage, state.prototypes, state.class_names, state.palette, state.metrics) == ("", (), (), (), {})
    assert state.provenance == {} and not state.is_midway
    with pytest.raises(CheckpointError, match="some.pth: it does not say which mIoU it has"):
        state.val_miou  # noqa: B018


def test_a_checkpoint_cannot_be_changed():
    with pytest.raises(AttributeError):
        STATE.step = 8
    assert STATE.with_(step=8).step == 8 and STATE.step == 7


def test_the_folder_is_made(tmp_path):
    save_checkpoint(tmp_path / "a" / "b" / "some.pth", STATE)
    assert load_checkpoint(tmp_path / "a" / "b" / "some.pth").step == 7


def test_the_file_before_is_kept_on_request(saved):
    save_checkpoint(saved, STATE.with_(step=8), keep_previous=True)
    save_checkpoint(saved, STATE.with_(step=9), keep_previous=True)
    assert files(saved.parent) == ["some.prev.pth", "some.pth"]
    assert (load_checkpoint(previous(saved)).step, load_checkpoint(saved).step) == (8, 9)


# --- failing saves ---------------------------------------------------------------------------------------------


def fail_to_write(state, file):
    """As torch does on a full disk: the OSError hides behind a RuntimeError."""
    file.write(b"half a checkpoint")
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904


def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    monkeypatch.setattr(torch, "save", fail_to_write)
    with pytest.raises(OSError, match=r"some.pth: cannot save.*No space left.*MB are free.*--resume auto"):
        save_checkpoint(saved, STATE.with_(step=8), keep_previous=True)
    assert files(saved.parent) == ["some.pth"] and load_checkpoint(saved).step == 7


def test_a_file_that_cannot_be_read_back_replaces_nothing(saved, monkeypatch):
    real_save = torch.save

    def save_a_flipped_bit(state, file):
        real_save(state, file)
        file.seek(1500)
        file.write(b"\xff\x00\xff\x00")

    monkeypatch.setattr(torch, "save", save_a_flipped_bit)
    with pytest.raises(CheckpointError, match="damaged"):
        save_checkpoint(saved, STATE.with_(step=8))
    assert files(saved.parent) == ["some.pth"] and load_checkpoint(saved).step == 7


def test_an_interruption_leaves_no_temporary_file(saved, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, STATE.with_(step=8))
    assert files(saved.parent) == ["some.pth"]


def test_what_could_not_be_loaded_is_not_saved(saved):
    with pytest.raises(CheckpointError, match="model: w is not finite"):
        save_checkpoint(saved, STATE.with_(model={"w": torch.tensor(torch.nan)}))
    assert files(saved.parent) == ["some.pth"] and load_checkpoint(saved).step == 7


# --- what is refused -------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_record_is_noticed(saved):
    good = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        places = [(info.header_offset + 30 + len(info.filename), info) for info in archive.infolist()]
    for start, info in places:
        extra = int.from_bytes(good[info.header_offset + 28 : info.header_offset + 30], "little")
        place = start + extra + info.file_size // 2
        saved.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(CheckpointError, match="some.pth: damaged"):
            load_checkpoint(saved)
    saved.write_bytes(good)
    assert load_checkpoint(saved).step == 7


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    good = saved.read_bytes()
    saved.write_bytes(good[: int(share * len(good))])
    with pytest.raises(CheckpointError, match="some.pth: damaged or not a checkpoint"):
        load_checkpoint(saved)


def test_a_pickled_module_is_refused_and_never_run(tmp_path):
    torch.save({"format": 1, **CONTENT, "model": nn.Linear(2, 2)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="could run code.*Linear") as caught:
        load_checkpoint(tmp_path / "odd.pth")
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_a_compressed_archive_is_refused(saved):
    with zipfile.ZipFile(saved) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="untrusted file: it is compressed"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.ones(1)}, "not a checkpoint of this version.*model.pretrained"),
        ([1, 2], "not a checkpoint of this version"),
        ({**CONTENT, "format": 99}, "format 99, want 1"),
        ({**CONTENT, "format": True}, "format bool, want 1"),
        ({**CONTENT, "format": 10**500}, "format int, want 1"),
        ({"format": 1, "config": {}, "step": 1}, "incomplete, without model, phase"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "odd.pth")


def test_a_missing_file_is_named(tmp_path):
    for load in (load_checkpoint, load_tensors):
        with pytest.raises(CheckpointError, match="nowhere.pth: there is no such"):
            load(tmp_path / "nowhere.pth")


# --- the predecessor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: path.write_bytes(b"PK")])
def test_a_lost_checkpoint_falls_back_to_the_one_before_and_says_so(saved, harm):
    save_checkpoint(saved, STATE.with_(step=8), keep_previous=True)
    harm(saved)
    with pytest.warns(UserWarning, match="going back to the one before"):
        state, path = load_last(saved)
    assert (state.step, path) == (7, previous(saved))


def test_a_good_checkpoint_is_taken_and_a_lost_one_without_predecessor_refused(saved):
    assert load_last(saved)[1] == saved
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_last(saved)


# --- one run to a folder ---------------------------------------------------------------------------------------

HOLD = (
    "import sys, pathlib\nfrom runtime import checkpoint\n"
    "with checkpoint.locked_run(*map(pathlib.Path, sys.argv[1:])): print('held'); {}"
)


def test_folders_in_use_are_refused_with_their_holders_id(tmp_path):
    code = HOLD.format("sys.stdout.flush(); sys.stdin.read()")
    models, results = tmp_path / "models", tmp_path / "results"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, models, results], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    both = "--set paths.model_dir=FOLDER --set paths.results_dir=FOLDER"
    try:
        assert holder.stdout.readline() == b"held\n"
        for folders in ([models], [results], [tmp_path / "other", results]):
            with pytest.raises(RunInUseError, match=rf"process {holder.pid} on .* trains there.*{both}"):
                with locked_run(*folders):
                    pass
        with locked_run(tmp_path / "other"):  # which the last one held for a moment
            pass
    finally:
        holder.communicate()
    with locked_run(models, results):  # the holder is gone, and so is its hold
        pass


def test_one_folder_for_models_and_results_is_held_once(tmp_path):
    (tmp_path / "same").symlink_to(tmp_path)
    with locked_run(tmp_path, tmp_path / "same"), pytest.raises(RunInUseError):
        with locked_run(tmp_path / "same"):
            pass


def test_the_fsync_comes_before_the_rename(saved, monkeypatch):
    order = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), real_sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), real_replace(a, b)))
    save_checkpoint(saved, STATE, keep_previous=True)
    assert order == ["fsync", "rename", "fsync", "rename", "fsync"]  # the predecessor's, then its own


# --- its configuration -----------------------------------------------------------------------------------------


def of(**changes):
    """A checkpoint with the default configuration, in which `section.key` is changed as written `section__key`."""
    raw = config_to_dict(Config())
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw[section][name] = value
    return STATE.with_(config=raw, class_names=(), palette=(), origin="a.pth")


def test_a_configuration_says_what_is_read_and_never_where_is_written():
    config = config_of(of(
        dataset__name="folder", dataset__root="/data", dataset__train_split="a", dataset__cache="disk",
        paths__model_dir="/etc", paths__results_dir="../x",
    ))  # fmt: skip
    assert (config.dataset.name, config.dataset.root, config.dataset.train_split) == ("folder", "/data", "a")
    assert (config.paths, config.dataset.cache) == (Config().paths, Config().dataset.cache)
    config_of(STATE.with_(config={"paths": 7, "dataset": {"cache": 7}}, class_names=(), palette=()))


@pytest.mark.parametrize("split", ["../images/train", "a/b", "..", ".", "", "a\\b", "/etc", "a\0"])
@pytest.mark.parametrize("key", ["train_split", "val_split"])
def test_a_split_with_a_path_is_refused(key, split):
    with pytest.raises(CheckpointError, match=f"^a.pth: its configuration cannot be used: .*dataset.{key}: want "):
        config_of(of(**{f"dataset__{key}": split}))


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (of(model__num_clases=3, training__batch_size="x"), "cannot be used: .*num_clases.*; .*batch_size"),
        (of().with_(config={"model": 3}), "cannot be used: .*model"),
        (of().with_(config={"dataset": [1]}), "cannot be used: .*dataset"),
        (of().with_(class_names=("a", "b")), "it names 2 classes, its model has 19"),
        (of().with_(phase=3), "phase 3, step 7 is not in its configuration"),
        (of().with_(step=150_001), "phase 1, step 150001 is not in its configuration"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(checkpoint, message):
    with pytest.raises(CheckpointError, match=f"^a.pth: .*{message}") as caught:
        config_of(checkpoint)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
