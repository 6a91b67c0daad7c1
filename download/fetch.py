"""How data arrives: fetched whole or not at all, verified, and unpacked so that nothing lands outside its folder.

`fetch` puts a file in its place once its length and checksum are right. `arriving` gives a temporary folder that
becomes the real one when it is complete, `unpack` writes an archive's regular files into it, `locked` keeps a
second process away. What is fetched, and from where, stands in `sources.py`.

Standard library on purpose: torch.hub and torchvision set no time limit, do not resume, and take a short body for
the whole one where no checksum is known; torchvision unpacks `..` and links as they come; pooch starts anew after
a break. Python's own `tarfile` filter was bypassed more than once, so what may be unpacked is decided here.

Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import http.client
import json
import os
import shutil
import socket
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Literal, NamedTuple

from tqdm import tqdm

from runtime.command import STORAGE_ERROR, stop_flag
from runtime.errors import UserError

CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 30.0
MIN_BYTES_PER_S = 1024  # a server that stays below this for READ_TIMEOUT_S counts as stalled
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # the waits before each retry; as many retries as waits
CHUNK = 1 << 18
MAX_FILE_BYTES = 4 << 30
MAX_MEMBERS = 100_000
MAX_UNPACKED_BYTES = 32 << 30
MAX_NAME_LENGTH = 200
PLAIN_HTTP_HOSTS: tuple[str, ...] = ()  # "host:port" that may be asked without TLS: none; tests name their own server

KEPT = "what has come so far is kept; the same command goes on from there"


class DownloadError(UserError):
    """Data could not be fetched, verified or unpacked; nothing half done is in its place."""

    exit_code = STORAGE_ERROR


class _Failed(Exception):
    """One attempt failed. `again`: another one may help; `discard`: the bytes that came are of no use for it."""

    def __init__(self, reason: str, again: bool = False, discard: bool = False):
        super().__init__(" ".join(reason.split()))
        self.again, self.discard = again, discard


# --- fetching --------------------------------------------------------------------------------------------------


def fetch(urls: Sequence[str], target: Path, checksum: str = "") -> None:
    """Put the file that one of the URLs delivers at `target`, verified; where it is already, only verify it.

    checksum: "md5:..." or "sha256:...", hexadecimal; the first digits are enough. Without one, the length that
    the server declares is all that is checked. The URLs are tried in turn. Call it inside `locked`.
    Raises DownloadError, or OSError where the disk fails; after both, the same call resumes.
    """
    part = target.with_name(target.name + ".part")
    if target.exists():
        _state_file(part).unlink(missing_ok=True)  # of a process that died between the last rename and this
        if problem := _mismatch(target, checksum):
            raise DownloadError(f"{target}: {problem}; remove this file, then run the same command again")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if refused := [url for url in urls if not _allowed(url)]:
        raise DownloadError(f"{refused[0]}: not fetched, only https addresses are used; give one that is")
    reasons = []
    for url in urls:
        try:
            return _fetch_from(url, part, target, checksum)
        except _Failed as error:
            reasons.append(f"{url}: {error}")
    raise DownloadError(
        f"{target.name} did not arrive ({'; '.join(reasons)}); run the same command again later, "
        f"or download this file by other means to {target} and then run it"
    )


def _fetch_from(url: str, part: Path, target: Path, checksum: str) -> None:
    for wait in (*BACKOFF_S, None):
        stop_flag.raise_if_set(KEPT)
        try:
            resumed = _receive(url, part, checksum)
            if problem := _mismatch(part, checksum):
                # bytes of two visits may not belong together; a file that came in one piece will not improve
                raise _Failed(problem, again=resumed, discard=True)
            break
        except _Failed as error:
            if error.discard:
                _state_file(part).unlink(missing_ok=True)
                part.unlink(missing_ok=True)
            if wait is None or not error.again:
                raise
            print(f"{target.name}: {error}; trying again in {wait:g} s", file=sys.stderr)
        _sleep(wait)
    _sync(part)
    os.replace(part, target)
    _state_file(part).unlink(missing_ok=True)
    _sync(target.parent)


def _receive(url: str, part: Path, checksum: str) -> bool:
    """Bring `part` to its full length; whether that continued bytes of an earlier visit."""
    known = _known(part, url)
    offset = part.stat().st_size if known else 0
    if known and offset == known["length"]:
        return True  # it was stopped between the last byte and the verification
    with _ask(url, offset, known) as response:
        if offset and response.status == 206:
            _check_range(response, offset, known)
            length = known["length"]
        else:
            offset, length = 0, _start_over(response, url, part, checksum)
        need_space(part.parent, (length or 0) - offset)
        _append(response, part, offset, length)
    return offset > 0


def _state_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _known(part: Path, url: str) -> dict:
    """What was noted about the bytes in `part`: url, etag, length; {} where they can't be continued from this URL."""
    try:
        known = json.loads(_state_file(part).read_text())
        usable = known["url"] == url and isinstance(known["etag"], str) and part.stat().st_size <= known["length"]
    except (OSError, ValueError, TypeError, KeyError):
        return {}
    return known if usable else {}


def _start_over(response: http.client.HTTPResponse, url: str, part: Path, checksum: str) -> int | None:
    """Empty `part`, note what is needed to resume it, return the length that the server declares."""
    if response.status != 200:
        raise _Failed(f"unexpected answer {response.status}")
    chunked = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
    declared = response.headers.get("Content-Length", "")
    length = int(declared) if declared.isdecimal() and not chunked else None
    if length is None and not chunked and not checksum:
        raise _Failed("the server does not say how long the file is")
    if length is not None and length > MAX_FILE_BYTES:
        raise _Failed(f"{length} bytes are declared, more than any file of this project ({MAX_FILE_BYTES})")
    part.write_bytes(b"")  # first, so that old bytes never stand beside the new note
    etag = response.headers.get("ETag", "")
    if length is not None and etag.startswith('"'):  # a weak ETag (W/...) does not promise equal bytes
        _state_file(part).write_text(json.dumps({"url": url, "etag": etag, "length": length}))
    else:
        _state_file(part).unlink(missing_ok=True)
    return length


def _check_range(response: http.client.HTTPResponse, offset: int, known: dict) -> None:
    want = f"bytes {offset}-{known['length'] - 1}/{known['length']}"
    got = response.headers.get("Content-Range", "nothing")
    if got != want or response.headers.get("ETag", known["etag"]) != known["etag"]:
        raise _Failed(f"asked for {want}, the server sent {got}", again=True, discard=True)


def _append(response: http.client.HTTPResponse, part: Path, offset: int, length: int | None) -> None:
    size, limit = offset, MAX_FILE_BYTES if length is None else length
    bar = tqdm(total=length, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with open(part, "ab") as file, bar:
        for chunk in _chunks(response):
            size += len(chunk)
            if size > limit:
                raise _Failed(f"more than {limit} bytes came", discard=True)
            file.write(chunk)
            bar.update(len(chunk))
    if length is not None and size != length:
        raise _Failed(f"the connection ended after {size} of {length} bytes", again=True)


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    start, received = time.monotonic(), 0
    while True:
        stop_flag.raise_if_set(KEPT)
        try:
            chunk = response.read1(CHUNK)  # read() would wait until all of CHUNK is there, however slowly it comes
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Failed(f"the connection broke ({error or type(error).__name__})", again=True) from None
        if not chunk:
            return
        yield chunk
        received += len(chunk)
        if time.monotonic() - start >= READ_TIMEOUT_S:
            if received < MIN_BYTES_PER_S * READ_TIMEOUT_S:
                raise _Failed(f"only {received} bytes came in {READ_TIMEOUT_S:g} s", again=True)
            start, received = time.monotonic(), 0


def _ask(url: str, offset: int, known: dict) -> http.client.HTTPResponse:
    headers = {"User-Agent": "protoseg", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": known["etag"]}
    try:
        return _opener().open(urllib.request.Request(url, headers=headers), timeout=CONNECT_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        passing = error.code >= 500 or error.code in (408, 416, 429)
        raise _Failed(f"HTTP {error.code} {error.msg}", again=passing, discard=error.code == 416) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        hopeless = isinstance(reason, (ValueError, http.client.InvalidURL))  # certificate errors are ValueErrors
        hopeless |= getattr(reason, "errno", None) == socket.EAI_NONAME
        raise _Failed(f"no answer ({reason or type(reason).__name__})", again=not hopeless) from None


def _allowed(url: str) -> bool:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme == "https" or parts.scheme == "http" and parts.netloc in PLAIN_HTTP_HOSTS


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _allowed(newurl):
            raise _Failed(f"refused to be sent on to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _ReadTimeout:
    def connect(self):
        super().connect()
        self.sock.settimeout(READ_TIMEOUT_S)


class _HTTPConnection(_ReadTimeout, http.client.HTTPConnection):
    pass


class _HTTPSConnection(_ReadTimeout, http.client.HTTPSConnection):
    pass


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req):
        return self.do_open(_HTTPConnection, req)


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req):
        return self.do_open(_HTTPSConnection, req, context=ssl.create_default_context())


def _opener() -> urllib.request.OpenerDirector:
    """urllib without its handlers for ftp:, file: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
        _HTTP(),
        _HTTPS(),
    ):
        opener.add_handler(handler)
    return opener


def _mismatch(path: Path, checksum: str) -> str:
    """Why the file is not the published one, or an empty string."""
    if not checksum:
        return ""
    kind, _, want = checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)  # md5 is what was published; some systems forbid it otherwise
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            stop_flag.raise_if_set(KEPT)
            digest.update(chunk)
    got = digest.hexdigest()
    return "" if got.startswith(want) else f"wrong content: its {kind} is {got[: len(want)]}, not {want}"


def _sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        stop_flag.raise_if_set(KEPT)
        time.sleep(min(left, 0.2))


# --- places ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Only one process at a time works on `target`; a second one gets a DownloadError at once.

    The lock ends with the process, however that ends; its empty file stays, because removing it would let a third
    process lock a file that the second no longer sees.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f".{target.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{target}: another process is working on it; wait until that is done, then run this again"
            raise DownloadError(message) from None
        yield


@contextlib.contextmanager
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
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def need_space(folder: Path, size: int) -> None:
    """Raise OSError (no space left) unless `size` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < size:
        message = f"{size} bytes are needed and {free} are free; make room, then run the same command again"
        raise OSError(errno.ENOSPC, message, str(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- unpacking -------------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    name: str
    kind: Literal["file", "folder", "link or device"]
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
            kind = "folder" if info.isdir() else "file" if plain else "link or device"
            yield _Member(info.name, kind, info.size, partial(tar.extractfile, info))
        # tarfile takes a cut between two members, or a damaged header, for the end; a real end is a block of zeros
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("its end is missing")


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
            kind = "folder" if info.is_dir() else "file" if plain else "link or device"
            # orig_filename is what the archive says; filename is cut at the first NUL
            yield _Member(info.orig_filename, kind, info.file_size, partial(zipped.open, info))
