"""Checkpoints: whole or not there, plain data, checked before they are believed; and one run to a folder."""

import errno
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

from runtime import checkpoint
from runtime.checkpoint import (
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

STATE = {"config": {"a": [1, 2.5, None, True]}, "phase": 1, "step": 7, "model": {"w": torch.arange(600.0)}, "text": "ü"}


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path / "some.pth", STATE)
    return tmp_path / "some.pth"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(saved):
    state = load_checkpoint(saved)
    assert torch.equal(state["model"]["w"], STATE["model"]["w"])
    assert {k: v for k, v in state.items() if k not in ("model", "format")} == {
        k: v for k, v in STATE.items() if k != "model"
    }
    assert files(saved.parent) == ["some.pth"]


def test_the_folder_is_made(tmp_path):
    save_checkpoint(tmp_path / "a" / "b" / "some.pth", STATE)
    assert load_checkpoint(tmp_path / "a" / "b" / "some.pth")["step"] == 7


def test_the_file_before_is_kept_on_request(saved):
    save_checkpoint(saved, {**STATE, "step": 8}, keep_previous=True)
    save_checkpoint(saved, {**STATE, "step": 9}, keep_previous=True)
    assert files(saved.parent) == ["some.prev.pth", "some.pth"]
    assert (load_checkpoint(previous(saved))["step"], load_checkpoint(saved)["step"]) == (8, 9)


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
        save_checkpoint(saved, {**STATE, "step": 8}, keep_previous=True)
    assert files(saved.parent) == ["some.pth"] and load_checkpoint(saved)["step"] == 7


def test_a_file_that_cannot_be_read_back_replaces_nothing(saved, monkeypatch):
    real_save = torch.save

    def save_a_flipped_bit(state, file):
        real_save(state, file)
        file.seek(1500)
        file.write(b"\xff\x00\xff\x00")

    monkeypatch.setattr(torch, "save", save_a_flipped_bit)
    with pytest.raises(CheckpointError, match="damaged"):
        save_checkpoint(saved, {**STATE, "step": 8})
    assert files(saved.parent) == ["some.pth"] and load_checkpoint(saved)["step"] == 7


def test_an_interruption_leaves_no_temporary_file(saved, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, {**STATE, "step": 8})
    assert files(saved.parent) == ["some.pth"]


def test_what_a_killed_process_left_is_swept_and_a_living_ones_file_is_not(saved):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, used = (saved.with_name(f".some.pth.tmp.{pid}") for pid in (dead.pid, os.getppid()))
    left.write_bytes(b"half")
    used.write_bytes(b"half")
    save_checkpoint(saved, STATE)
    assert files(saved.parent) == sorted([used.name, "some.pth"])


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
    assert load_checkpoint(saved)["step"] == 7


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    good = saved.read_bytes()
    saved.write_bytes(good[: int(share * len(good))])
    with pytest.raises(CheckpointError, match="some.pth: damaged or not a checkpoint"):
        load_checkpoint(saved)


def test_a_pickled_module_is_refused_and_never_run(tmp_path):
    torch.save({"format": 1, **STATE, "model": nn.Linear(2, 2)}, tmp_path / "odd.pth")
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
        ({**STATE, "format": 99}, "format 99, want 1"),
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
    save_checkpoint(saved, {**STATE, "step": 8}, keep_previous=True)
    harm(saved)
    with pytest.warns(UserWarning, match="going back to the one before"):
        state, path = load_last(saved)
    assert (state["step"], path) == (7, previous(saved))


def test_a_good_checkpoint_is_taken_and_a_lost_one_without_predecessor_refused(saved):
    assert load_last(saved)[1] == saved
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError):
        load_last(saved)


# --- one run to a folder ---------------------------------------------------------------------------------------

HOLD = (
    "import sys, pathlib\nfrom runtime import checkpoint\n"
    "with checkpoint.locked_run(pathlib.Path(sys.argv[1])): print('held'); {}"
)


def test_a_folder_in_use_is_refused_with_its_holders_id(tmp_path):
    code = HOLD.format("sys.stdout.flush(); sys.stdin.read()")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunInUseError, match=rf"process {holder.pid} on .* trains there"):
            with locked_run(tmp_path):
                pass
    finally:
        holder.communicate()
    with locked_run(tmp_path):  # the holder is gone, and so is its hold
        pass


def test_the_fsync_comes_before_the_rename(saved, monkeypatch):
    order = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda f: (order.append("fsync"), real_sync(f)))
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (order.append("rename"), real_replace(a, b)))
    save_checkpoint(saved, STATE)
    assert order == ["fsync", "rename", "fsync"]
