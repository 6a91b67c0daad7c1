"""How an archive is unpacked: regular files alone, and so that nothing lands outside its folder.

Python's own `tarfile` filter was bypassed more than once, and torchvision unpacks `..` and links as they come, so
what may be unpacked is decided here. Sizes are bytes.
"""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from tqdm import tqdm

from download.fetch import CHUNK, DownloadError
from runtime.command import stop_flag
from runtime.files import need_space

MAX_MEMBERS = 100_000
MAX_UNPACKED_BYTES = 32 << 30
MAX_NAME_LENGTH = 200

Kind = Literal["file", "folder", "link or device"]


class _Member(NamedTuple):
    name: str
    kind: Kind
    size: int
    open: Callable[[], IO[bytes]]


# What reading a damaged or hostile archive raises; the last three come from a name that is a file and a folder.
_ARCHIVE_ERRORS = (
    tarfile.TarError, zipfile.BadZipFile, zipfile.LargeZipFile, gzip.BadGzipFile, zlib.error, EOFError, ValueError,
    OverflowError, RuntimeError, FileExistsError, NotADirectoryError, IsADirectoryError,
)  # fmt: skip


def unpack(archive: Path, folder: str, destination: Path, only: tuple[str, ...] = ("",)) -> int:
    """Write what lies under `folder` in a tar, tgz or zip into `destination`, and return how many files that were.

    only: beginnings of the paths (below `folder`) that are wanted. Regular files and folders are written, nothing
    else; owners, permissions and times are not taken over. Call it inside `arriving`: files written before a bad
    member was met stay where they are. Raises DownloadError, or OSError where the disk fails.
    """
    size = archive.stat().st_size
    destination.mkdir(parents=True, exist_ok=True)
    need_space(destination, size)
    files = 0
    try:
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"unpack {archive.name}", disable=None) as bar:
            for member, path in _wanted(archive, folder, only):
                if member.kind == "folder":
                    (destination / path).mkdir(parents=True, exist_ok=True)
                else:
                    _write_member(member, destination / path)
                    files += 1
                bar.update(member.size)
        if not files:
            raise ValueError(f"it has no files under {folder}/")
    except _ARCHIVE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DownloadError(f"{archive}: not unpacked ({reason}); remove this file and fetch it again") from None
    return files


def _wanted(archive: Path, folder: str, only: tuple[str, ...]) -> Iterator[tuple[_Member, str]]:
    """The members to write, with their paths below `folder`. Raises ValueError on the first that is not harmless."""
    seen: set[str] = set()
    total = 0
    for count, member in enumerate(_members(archive), start=1):
        stop_flag.raise_if_set("the archive is kept; the same command unpacks it")
        if count > MAX_MEMBERS:
            raise ValueError(f"more than {MAX_MEMBERS} members")
        path = _clean(member.name)
        if not path.is_relative_to(folder) or not (name := str(path.relative_to(folder))).startswith(only):
            continue
        if member.kind == "link or device":
            raise ValueError(f"{member.name!r} is neither a file nor a folder")
        if member.kind == "file" and name.casefold() in seen:
            raise ValueError(f"{member.name!r} is there twice")
        seen.add(name.casefold())
        total += member.size
        if total > MAX_UNPACKED_BYTES:
            raise ValueError(f"more than {MAX_UNPACKED_BYTES} bytes")
        yield member, name


def _clean(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise ValueError(f"unsafe name {name[:MAX_NAME_LENGTH]!r}")
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"a name of {len(name)} characters")
    return path


def _write_member(member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    need_space(path.parent, member.size)
    with member.open() as source, open(path, "xb") as file:
        shutil.copyfileobj(source, file, CHUNK)
        if file.tell() != member.size:
            raise ValueError(f"{member.name!r} has {file.tell()} of {member.size} bytes")


def _members(archive: Path) -> Iterator[_Member]:
    with open(archive, "rb") as file:
        magic = file.read(2)
    if magic == b"PK":
        return _zip_members(archive)
    return _tar_members(archive, "r:gz" if magic == b"\x1f\x8b" else "r:")


def _tar_members(archive: Path, mode: Literal["r:", "r:gz"]) -> Iterator[_Member]:
    with tarfile.open(archive, mode) as tar:
        for info in tar:
            plain = info.isreg() and not info.issparse()
            kind: Kind = "folder" if info.isdir() else "file" if plain else "link or device"
            content = partial(tar.extractfile, info)  # None of a folder or device, which nobody opens
            yield _Member(info.name, kind, info.size, content)  # type: ignore[arg-type]  # see above
        # tarfile takes a cut between two members, or a damaged header, for the end; a real end is a block of zeros
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            kind: Kind = "folder" if info.is_dir() else "file" if plain else "link or device"
            # orig_filename is what the archive says; filename is cut at the first NUL
            yield _Member(info.orig_filename, kind, info.file_size, partial(zipped.open, info))
