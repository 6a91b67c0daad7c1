"""How a file arrives: fetched whole or not at all, and verified. What is fetched, and from where: `sources.py`.

Standard library on purpose: torch.hub and torchvision set no time limit, do not resume, and take a short body for
the whole one where no checksum is known; pooch starts anew after a break.

Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from tqdm import tqdm

from runtime.command import STORAGE_ERROR, stop_flag
from runtime.errors import UserError
from runtime.files import locked, need_space, sync_folder

CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 30.0
MIN_BYTES_PER_S = 1024  # a server that stays below this for READ_TIMEOUT_S counts as stalled
BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # the waits before each retry; as many retries as waits
CHUNK = 1 << 18
MAX_FILE_BYTES = 4 << 30
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


def claimed(target: Path) -> AbstractContextManager[None]:
    """Only one process at a time works on `target`; a second one gets a DownloadError at once."""
    return locked(
        target.with_name(f".{target.name}.lock"),
        lambda holder: DownloadError(
            f"{target}: {holder} is working on it; wait until that is done, then run this again"
        ),
    )


def fetch(urls: Sequence[str], target: Path, checksum: str = "") -> None:
    """Put the file that one of the URLs delivers at `target`, verified; where it is already, only verify it.

    checksum: "md5:..." or "sha256:...", hexadecimal; the first digits are enough. Without one, the length that
    the server declares is all that is checked. The URLs are tried in turn. Call it inside `claimed`.
    Raises DownloadError, or OSError where the disk fails; after both, the same call resumes.
    """
    part = target.with_name(target.name + ".part")
    if target.exists():
        _state_file(part).unlink(missing_ok=True)  # of a process that died between the last rename and this
        if problem := mismatch(target, checksum):
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
            if problem := mismatch(part, checksum):
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
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    _state_file(part).unlink(missing_ok=True)
    sync_folder(target.parent)


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


def mismatch(path: Path, checksum: str) -> str:
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
