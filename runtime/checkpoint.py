"""Checkpoints as plain data: written so that a crash cannot harm them, read so that a bad file cannot harm us.

A file is written under a temporary name in the same folder, flushed to the disk, read back, and only then renamed.
It is read with `weights_only=True` (no code can hide in it) after its CRCs were checked, which `torch.load` does
not do: it loads three of four random bit flips without a word. All that it says is checked once, when it is read:
whoever has a `Checkpoint` need not check again. What only a model or a configuration can know, which names and sizes
the weights have, is left to `inference.load_weights` and `config.config_of`.

In the file a checkpoint is one flat dict with `format: 1`; a phase's result has no `optimizer`.
"""

from __future__ import annotations

import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoint_content import WrongContent, check_content
from runtime.errors import UserError
from runtime.files import locked, replacing

FORMAT = 1
OUTSIDE = ("midway", "origin")  # fields of a Checkpoint that do not stand in the file under their names


class CheckpointError(UserError):
    """A checkpoint that is damaged, untrusted, or does not fit."""

    exit_code = 3


class RunInUseError(UserError):
    """Another process trains in the same folder."""

    exit_code = 5


@dataclass(frozen=True)
class Midway:
    """What going on within a phase needs besides the weights.

    optimizer: the state dict of a plain Adam. gradients: of the steps since its last update, by parameter. sums (N,)
    float64: the losses and counts of `batches` steps that are not logged yet. progress: of early stopping and of the
    best checkpoint. processes: how many began the run.
    """

    optimizer: dict
    gradients: dict[str, Tensor]
    sums: Tensor
    batches: int
    progress: dict
    processes: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """A model at the end of a stage, or in the midst of a phase, and all that was known about it.

    config: plain data, see `config.config_of`. stage, phase, step: where the schedule stands, after `step` batches of
    that phase. model: its state dict. prototypes: the push's record of each, or none. metrics: `val_miou` in 0..1,
    NaN where nothing was validated yet. class_names, palette, file_ids: of the C classes, colours in 0..255, and the
    ids that stand for them in the data set's own files; empty in a file without. provenance: see
    `runtime.provenance`. origin: the file that it was read from, for messages.
    """

    config: dict
    stage: str
    phase: int
    step: int
    model: dict[str, Tensor]
    prototypes: tuple[dict, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    file_ids: tuple[int, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    midway: Midway | None = None
    origin: str = "a checkpoint"

    @property
    def is_midway(self) -> bool:
        """Whether it stands within its phase, and has what going on needs."""
        return self.midway is not None

    @property
    def val_miou(self) -> float:
        """The mIoU that it is known for. Raises CheckpointError where a file has none."""
        found = self.metrics.get("val_miou", float("nan"))
        if found != found:
            raise CheckpointError(f"{self.origin}: it does not say which mIoU it has; train again or remove it")
        return found

    def with_(self, **changes) -> Checkpoint:
        """The same with other values."""
        return replace(self, **changes)


# --- writing ---------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, keep_previous: bool = False) -> None:
    """Write a checkpoint to `path`; afterwards it is there whole, or what was there before.

    keep_previous: the file that stood there stays as `NAME.prev.pth`. Raises OSError (disk full, no permission)
    with the path in its message; then the old file is untouched and nothing is left behind.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(_to_file(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
            load_checkpoint(file.name)
            if keep_previous and path.exists():
                _keep_as_previous(path)
    except BaseException as error:
        cause = _os_error(error)
        if cause is None:
            raise
        there = next(folder for folder in path.absolute().parents if folder.exists())
        free = shutil.disk_usage(there).free
        raise OSError(
            f"{path}: cannot save this checkpoint ({cause.strerror or cause}); {free / 1e6:.0f} MB are free there."
            " The file that was there before is unharmed. Make room, then give the same command with --resume auto"
        ) from error


def _to_file(checkpoint: Checkpoint) -> dict:
    """The flat dict that stands in the file: lists for tuples, as ever."""
    flat = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint) if f.name not in OUTSIDE}
    flat |= {"prototypes": list(checkpoint.prototypes), "class_names": list(checkpoint.class_names)}
    flat["palette"] = [list(color) for color in checkpoint.palette]
    flat["file_ids"] = list(checkpoint.file_ids)
    return {"format": FORMAT, **flat, **(vars(checkpoint.midway) if checkpoint.midway else {})}


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


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch hides a full disk in the context of a RuntimeError."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def locked_run(*folders: Path) -> Iterator[None]:
    """Hold a run's folders: no second process can. A process that died holds nothing. Raises RunInUseError."""
    with ExitStack() as held:
        for folder in sorted({Path(folder).resolve(): folder for folder in folders}.values()):

            def busy(holder: str, folder: Path = folder) -> RunInUseError:
                elsewhere = "--set paths.model_dir=FOLDER --set paths.results_dir=FOLDER"
                return RunInUseError(f"{folder}: {holder} trains there; wait for it, or use {elsewhere}")

            held.enter_context(locked(folder / ".lock", busy))
        yield


# --- reading ---------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint of this project, on the CPU. Raises CheckpointError if it is missing, damaged, foreign or wrong."""
    path = Path(path)
    if not path.is_file():  # a pipe or a device would be waited for
        raise CheckpointError(f"{path}: there is no such checkpoint")
    if not _is_archive(path):
        raise CheckpointError(f"{path}: damaged or not a checkpoint of this project; train again or name another file")
    content: Any = load_tensors(path)
    found = content.get("format") if isinstance(content, dict) else None
    if type(found) is not int or found != FORMAT:
        found = found if type(found) is int and 0 <= found < 1000 else type(found).__name__
        raise CheckpointError(
            f"{path}: not a checkpoint of this version of the project (format {found}, want {FORMAT});"
            " a state dict from elsewhere goes into model.pretrained"
        )
    try:
        check_content(content)
    except WrongContent as error:
        raise CheckpointError(f"{path}: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path}: untrusted file: what it holds is nested without end") from None
    return _from_file(content, str(path))


def _from_file(content: dict, origin: str) -> Checkpoint:
    """The checkpoint that a checked flat dict stands for; what it holds besides is left out."""
    known = {f.name: content[f.name] for f in fields(Checkpoint) if f.name in content and f.name not in OUTSIDE}
    midway = {f.name: content[f.name] for f in fields(Midway) if f.name in content}
    known |= {"stage": content.get("stage", ""), "model": dict(content["model"])}
    known |= {key: tuple(content.get(key, ())) for key in ("prototypes", "class_names")}
    known["palette"] = tuple(tuple(color) for color in content.get("palette", ()))
    known["file_ids"] = tuple(content.get("file_ids", ()))
    return Checkpoint(**known, midway=Midway(**midway) if "optimizer" in content else None, origin=origin)


def load_last(path: str | Path) -> tuple[Checkpoint, Path]:
    """The newest readable one of a checkpoint and its predecessor, and which file it was; says so if it falls back."""
    path = Path(path)
    try:
        return load_checkpoint(path), path
    except CheckpointError as error:
        if not previous(path).is_file():
            raise
        checkpoint = load_checkpoint(previous(path))
        warnings.warn(f"{error}; going back to the one before, {previous(path)}", stacklevel=2)
        return checkpoint, previous(path)


def previous(path: Path) -> Path:
    """Where the predecessor of a checkpoint is kept."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def load_tensors(path: str | Path) -> object:
    """What a file of `torch.save` holds, if it is plain data and undamaged. Raises CheckpointError."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # ten types, from UnpicklingError to KeyError, depending on which byte is wrong
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            reason = f"it holds more than tensors and plain data, and could run code ({_unsafe_globals(path)})"
        raise CheckpointError(f"{path}: damaged or untrusted file: {reason}") from None


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # of some damage to the end of the file it is sure
        return False


def _check_archive(path: str | Path) -> None:
    """Refuse what torch would load without noticing: a wrong CRC, or a record that unpacks to more than it is."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(info.compress_type != zipfile.ZIP_STORED for info in records):
            raise CheckpointError(f"{path}: untrusted file: it is compressed, and torch never writes that")
        if sum(info.file_size for info in records) > os.path.getsize(path):
            raise CheckpointError(f"{path}: untrusted file: its records claim to be larger than all of it")
        damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: the checksum of '{damaged}' is wrong")


def _unsafe_globals(path: str | Path) -> str:
    try:
        return ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) or "unknown"
    except Exception:
        return "not listed: the file is not in today's format"
