"""Where a result comes from: version, commit and command."""

import subprocess
import sys

import pytest
import torch

from runtime.provenance import VERSION, commit, provenance
from tests.tiny import ROOT

HASH = "0123456789abcdef0123456789abcdef01234567"


def test_what_is_said_of_this_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "a b.yaml", "\udcff"])
    found = provenance()
    assert found.keys() == {"version", "commit", "torch", "command"} and found["version"] == VERSION
    assert found["command"] == "python train.py --config 'a b.yaml' '\\udcff'" and found["torch"] == torch.__version__
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert not (ROOT / ".git").exists() or found["commit"] == asked.stdout.strip()


def git(folder, **files):
    (folder / ".git" / "refs" / "heads").mkdir(parents=True)
    for name, text in files.items():
        (folder / ".git" / name.replace("__", "/").replace("_", "-")).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {"HEAD": f"{HASH}\n"},
        {"HEAD": "ref: refs/heads/main\n", "refs__heads__main": f"{HASH}\n"},
        {"HEAD": "ref: refs/heads/main\n", "packed_refs": f"# pack-refs\n{'9' * 40} refs/heads/domain\n"
                                                          f"{HASH} refs/heads/main\n^{'8' * 40}\n"},
    ],
)  # fmt: skip
def test_the_commit_is_read_from_a_checkout(tmp_path, files):
    git(tmp_path, **files)
    assert commit(tmp_path) == HASH


def test_the_commit_is_read_from_a_worktree(tmp_path):
    git(tmp_path / "main", HEAD="ref: refs/heads/main\n", refs__heads__other=f"{HASH}\n")
    own = tmp_path / "main" / ".git" / "worktrees" / "other"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/other\n")
    (own / "commondir").write_text("../..\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".git").write_text(f"gitdir: {own}\n")
    assert commit(tmp_path / "other") == HASH


@pytest.mark.parametrize(
    "files", [None, {}, {"HEAD": ""}, {"HEAD": "ref: refs/heads/main\n"}, {"HEAD": "ref: ../../../secret\n"}]
)
def test_without_a_commit_there_is_none(tmp_path, files):
    if files is not None:
        git(tmp_path, **files)
    assert commit(tmp_path) == ""
