"""Where a result comes from: the project's version and commit, torch's version, and the command that was typed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import torch

VERSION = "2.0.0"  # of this project; CHANGELOG.md says what it means for checkpoints and configurations


def provenance() -> dict[str, str]:
    """What goes into checkpoints and results: version, commit ("" outside a checkout), torch, command."""
    command = shlex.join(["python", *sys.argv]).encode("utf-8", "backslashreplace").decode()
    return {
        "version": VERSION,
        "commit": commit(Path(__file__).resolve().parent.parent),
        "torch": str(torch.__version__),
        "command": command,
    }


def commit(folder: Path) -> str:
    """The commit that a git checkout stands on, read from its files without starting git; "" where that fails."""
    try:
        git = folder / ".git"
        if git.is_file():  # of a worktree: it says where its own files are, and those say where the common ones are
            git = folder / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        name = (git / "HEAD").read_text(encoding="utf-8").strip().removeprefix("ref: ")
        shared = git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git
        loose = common / name
        if loose.is_file():
            name = loose.read_text(encoding="utf-8").strip()
        elif (common / "packed-refs").is_file():
            packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
            name = next((line.split()[0] for line in packed if line.endswith(f" {name}")), name)
    except (OSError, UnicodeDecodeError):
        return ""
    return name if re.fullmatch(r"[0-9a-f]{40,64}", name) else ""
