"""Checkpoints as plain data: written so that a crash cannot harm them, read so that a bad file cannot harm us.

A file is written under a temporary name in the same folder, flushed to the disk, read back, and only then renamed.
It is read with `weights_only=True` (no code can hide in it) after its CRCs were checked, which `torch.load` does
not do: it loads three of four random bit flips without a word.
"""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from runtime.errors import UserError

FORMAT = 1
NEEDED = {"config": dict, "phase": int, "step": int, "model": dict}
OPTIONAL = {
    "stage": str, "prototypes": list, "metrics": dict, "class_names": list, "palette": list, "optimizer": dict,
    "gradients": dict, "sums": torch.Tensor, "batches": int, "progress": dict, "processes": int, "pruned": bool,
}  # fmt: skip


class CheckpointError(UserError):
    """A checkpoint that is damaged, untrusted, or does not fit."""

    exit_code = 3


class RunInUseError(UserError):
    """Another process trains in the same folder."""

    exit_code = 5


def save_checkpoint(path: str | Path, state: dict, keep_previous: bool = False) -> None:
    """Write `state` (tensors, numbers, text, lists, mappings) to `path`; afterwards it is there whole, or as before.

    keep_previous: the file that stood there stays as `NAME.prev.pth`. Raises OSError (disk full, no permission)
    with the path in its message; then the old file is untouched and nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        load_tensors(temporary)
        if keep_previous and path.exists():
            _keep_as_previous(path)
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        cause = _os_error(error)
        if cause is None:
            raise
        free = _free_bytes(path.parent)
        raise OSError(
            f"{path}: cannot save this checkpoint ({cause.strerror or cause}); {free / 1e6:.0f} MB are free there."
            " The file that was there before is unharmed. Make room, then go on with: python train.py --resume auto"
        ) from error


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of this project, on the CPU. Raises CheckpointError if it is missing, damaged or foreign."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    if not _is_archive(path):
        raise CheckpointError(f"{path}: damaged or not a checkpoint of this project; train again or name another file")
    state = load_tensors(path)
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version of the project (format {found!r}, want {FORMAT});"
            " a state dict from elsewhere goes into model.pretrained"
        )
    missing = NEEDED.keys() - state.keys()
    if missing:
        raise CheckpointError(f"{path}: incomplete, without {', '.join(sorted(missing))}")
    kinds = NEEDED | OPTIONAL
    wrong = [key for key in kinds if key in state and not isinstance(state[key], kinds[key])]
    if wrong:
        found, wanted = type(state[wrong[0]]).__name__, kinds[wrong[0]].__name__
        raise CheckpointError(f"{path}: {wrong[0]} is a {found}, want {wanted}")
    return state


def load_last(path: str | Path) -> tuple[dict, Path]:
    """The newest readable one of a checkpoint and its predecessor, and which file it was; says so if it falls back."""
    path = Path(path)
    try:
        return load_checkpoint(path), path
    except CheckpointError as error:
        if not previous(path).is_file():
            raise
        state = load_checkpoint(previous(path))
        warnings.warn(f"{error}; going back to the one before, {previous(path)}", stacklevel=2)
        return state, previous(path)


def previous(path: Path) -> Path:
    """Where the predecessor of a checkpoint is kept."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def _keep_as_previous(path: Path) -> None:
    """Give a file the name of its predecessor as a second one, so that at every moment it is there under its own."""
    second = path.with_name(f".{path.name}.tmp.{os.getpid()}.prev")
    try:
        os.link(path, second)
        os.replace(second, previous(path))
    except OSError:  # a file system without second names
        os.replace(path, previous(path))
    finally:  # a rename to another name of the same file does nothing
        with suppress(OSError):
            second.unlink()


def load_tensors(path: str | Path) -> object:
    """What a file of `torch.save` holds, if it is plain data and undamaged. Raises CheckpointError."""
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # ten types, from UnpicklingError to KeyError, depending on which byte is wrong
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            reason = f"it holds more than tensors and plain data, and could run code ({_unsafe_globals(path)})"
        raise CheckpointError(f"{path}: damaged or untrusted file: {reason}") from None


def _is_archive(path: str | Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of some damage to the end of the file it is sure
        return False


def _check_archive(path: str | Path) -> None:
    """Refuse what torch would load without noticing: a wrong CRC, or a record that unpacks to more than it is."""
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise CheckpointError(f"{path}: untrusted file: it is compressed, and torch never writes that")
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of '{damaged}' is wrong")


def _unsafe_globals(path: str | Path) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) or "unknown"
    except Exception:
        return "not listed: the file is not in today's format"


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Hold a run's model folder: no second process can. A process that died holds nothing. Raises RunInUseError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        os.register_at_fork(after_in_child=file.close)  # or the workers of a killed run would hold its folder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise RunInUseError(
                f"{folder}: {holder} trains there; wait for it, or use --set paths.model_dir=FOLDER"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def _sweep(path: Path) -> None:
    """Remove what a killed process left of a save to the same place."""
    for leftover in path.parent.glob(f".{path.name}.tmp.*"):
        pid = leftover.name.rsplit(".", 1)[1]
        if not pid.isdigit() or not _is_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch hides a full disk in the context of a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _free_bytes(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize
