"""Files that are there whole or not at all, places that one process holds, and folders that know what we wrote there.

`replacing` writes a file and `arriving` a folder so that a crash or a full disk leaves the one of before; `locked`
keeps a second process away; an `OutputFolder` touches nothing but what its manifest lists.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO

from runtime.errors import ConfigError, UserError

MANIFEST = ".written.json"  # of an OutputFolder: a name, relative to the folder, as a JSON string in each line
NEXT = ".next"  # where in an OutputFolder its successor lies until it is whole
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave in every folder that was looked at


# --- whole or not at all ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path, mode: str = "wb", **how) -> Iterator[IO]:
    """A file to write into, which becomes `path` when the block ends well; else `path` is as before, nothing is left.

    mode, how: as for `open`. It is written beside `path`, flushed to the disk, renamed. Raises OSError, also where
    a link, a pipe or a device stands: none of them is ours.
    """
    path = Path(path)
    if _mode(path) and not stat.S_ISREG(_mode(path)):
        raise FileExistsError(errno.EEXIST, "this is no regular file, and is not replaced", str(path))
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        _sweep(path)
        with open(temporary, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def arriving(target: Path) -> Iterator[Path]:
    """An empty temporary folder beside `target` that becomes `target` when the block ends well; else it is removed.

    Call it inside `locked`: whoever holds the lock knows that a temporary folder found here belongs to a process
    that died, and removes it.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.sync()  # once for all files: tens of thousands of single fsyncs take minutes
        os.rename(temporary, target)
        sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_folder(path: str | Path) -> None:
    """Have the disk keep which names a folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def need_space(folder: Path, size: int) -> None:
    """Raise OSError (no space left) unless `size` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < size:
        message = f"{size} bytes are needed and {free} are free; make room, then run the same command again"
        raise OSError(errno.ENOSPC, message, str(folder))


def _sweep(path: Path) -> None:
    """Remove what killed processes left of writing to the same place."""
    for leftover in path.parent.glob(glob.escape(f".{path.name}.tmp.") + "*"):
        pid = leftover.name.removeprefix(f".{path.name}.tmp.").removesuffix(".prev")
        if pid.isdecimal() and not _is_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


# --- one process at a time -------------------------------------------------------------------------------------


@contextmanager
def locked(path: Path, busy: Callable[[str], Exception]) -> Iterator[None]:
    """Hold the lock file at `path`, or raise `busy(holder)` at once where another process does.

    The lock ends with the process, however that ends; its file stays, because removing it would let a third process
    lock a file that the second no longer sees.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        os.register_at_fork(after_in_child=file.close)  # or the workers of a killed process would hold it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise busy(" ".join(file.read(200).split()) or "another process") from None
        file.seek(0)
        if file.read(8) in ("", "process "):  # anything else is somebody's file of this name: it is locked, and kept
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


class FolderInUseError(UserError):
    """Another process writes into the same output folder."""

    exit_code = 5


# --- what is ours ----------------------------------------------------------------------------------------------


class OutputFolder:
    """A folder of files that we wrote, as its manifest says; nothing else is ever replaced or removed in it.

        out = OutputFolder(path).begin()         refuses a folder that is not ours, or makes it; removes nothing yet
        with out.successor() as new:             a good end replaces all that was written before; an error, nothing
            image.save(new.add("pictures/1.png"))    a name is in the manifest first: a killed process's files are known

    remedy: what the user is told to do where the folder is refused. Raises ConfigError, naming what is foreign.
    """

    def __init__(self, path: str | Path, remedy: str = "name another folder: --out FOLDER"):
        self.path, self._remedy = Path(path), remedy
        self._written: set[str] = set()

    def begin(self) -> OutputFolder:
        """Refuse the folder if it is a link or holds anything foreign; make it if it is not there."""
        if self.path.is_symlink():
            self._refuse("it is a link")
        if self.path.exists():
            if not self.path.is_dir():
                self._refuse("it is no folder")
            self._read_manifest()
            self._survey()
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / MANIFEST, "a"):  # now, not after an hour, it shows whether we may write here
            return self

    @contextmanager
    def successor(self) -> Iterator[Successor]:
        """Files that take the place of those written before once the block ends well; else all is as it was.

        One process at a time, or the pictures of two would mix. Raises FolderInUseError.
        """
        self.begin()
        with self._held():
            yield from self._succeed()

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Lock the folder itself: a lock file would be mailed with it."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FolderInUseError(f"{self.path}: another process writes there; wait, or {self._remedy}") from None
            yield
        finally:
            os.close(descriptor)

    def _succeed(self) -> Iterator[Successor]:
        self.begin()  # again: who held it may have written
        before = {name for name in self._written if not name.startswith(f"{NEXT}/")}
        self._keep(before)  # without what a killed process left
        new = Successor(self)
        try:
            yield new
            self._survey()  # others may have been there meanwhile
        except BaseException:
            with suppress(ConfigError, OSError):
                self._keep(before)
            raise
        for name in new.names:
            os.replace(new.path / name, self.add(name))
        self._keep(set(new.names))

    def clear(self) -> None:
        """Remove what we wrote; the folder is looked at again first, since others may have been there meanwhile."""
        self.begin()
        self._keep(set())

    def _keep(self, names: set[str]) -> None:
        """Remove what we wrote but `names`, and folders that are empty then."""
        files, folders = self._survey()
        for path in files:
            if path.relative_to(self.path).as_posix() not in names:
                path.unlink(missing_ok=True)
        for path in reversed(folders):
            with suppress(OSError):
                path.rmdir()
        with replacing(self.path / MANIFEST, "w", encoding="ascii") as file:
            file.writelines(json.dumps(name) + "\n" for name in sorted(names))
        self._written = set(names)

    def add(self, name: str) -> Path:
        """The path at which to write the file `name`, relative to the folder; it counts as written from now on."""
        if not _is_inside(name):
            raise ValueError(f"{name!r} is no name inside a folder")
        path = self.path / name
        if name not in self._written:
            if os.path.lexists(path):
                self._refuse_foreign(name)
            with open(self.path / MANIFEST, "a", encoding="ascii") as file:
                file.write(json.dumps(name) + "\n")
            self._written.add(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _read_manifest(self) -> None:
        """Take over the names of the manifest. A line that names nothing inside is nobody's: it is left out."""
        path, self._written = self.path / MANIFEST, set()
        if stat.S_ISREG(_mode(path)):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, RecursionError):
                    if _is_inside(name := json.loads(line)):
                        self._written.add(name)

    def _survey(self) -> tuple[list[Path], list[Path]]:
        """All of our files and folders that are there, without the manifest. Refuses the first thing that is foreign.

        A file that was replaced by a folder, a link or a device is foreign, and so is a folder that is a link now.
        """
        files, folders = [], []
        parents = {parent.as_posix() for name in self._written for parent in PurePosixPath(name).parents}
        for folder, inner, names in os.walk(self.path, onerror=_raise):
            for path in (Path(folder, name) for name in sorted(inner + names)):
                mode, name = _mode(path), path.relative_to(self.path).as_posix()
                if stat.S_ISDIR(mode) and name in parents:
                    folders.append(path)
                elif not stat.S_ISREG(mode) or not (self._wrote(name) or path.name in LITTER):
                    self._refuse_foreign(name)
                elif path.name not in (MANIFEST, *LITTER):
                    files.append(path)
        return files, folders

    def _wrote(self, name: str) -> bool:
        """Whether a file is in the manifest, is the manifest, or what `replacing` left of one of them when killed."""
        folder, _, last = name.rpartition("/")
        temporary = re.fullmatch(r"\.(.+)\.tmp\.\d+", last)
        whole = f"{folder}/{temporary[1]}".lstrip("/") if temporary else name
        return whole == MANIFEST or whole in self._written

    def _refuse_foreign(self, name: str) -> None:
        self._refuse(f"it holds {name}, which this project did not write there")

    def _refuse(self, reason: str) -> None:
        raise ConfigError(f"{self.path}: {reason}; nothing was changed, {self._remedy}")


class Successor:
    """What is to take the place of an output folder's files: they lie in `path` meanwhile, a folder inside it."""

    def __init__(self, folder: OutputFolder):
        self.path, self._folder = folder.path / NEXT, folder
        self.names: list[str] = []

    def add(self, name: str) -> Path:
        """The path at which to write the file that is going to be `name` in the folder."""
        path = self._folder.add(f"{NEXT}/{name}")
        self.names.append(name)
        return path


def _is_inside(name: object) -> bool:
    return (
        isinstance(name, str)
        and name == PurePosixPath(name).as_posix()
        and name not in (".", MANIFEST)
        and not (name.startswith("/") or ".." in name.split("/") or "\0" in name)
    )


def _mode(path: Path) -> int:
    """The kind of a thing, not followed if it is a link; 0 if nothing is there."""
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return 0


def _raise(error: OSError) -> None:
    raise error
