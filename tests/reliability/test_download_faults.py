"""Downloads under attack: malicious and cut archives, hostile servers, kill -9 (rows 13 to 16 of the fault battery).

What must hold: a file or data set is exactly the published one or absent, nothing is written outside its folder,
every error is one line that says what to do, and the same command afterwards ends well.
"""

import io
import os
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest

from download import fetch as download
from download import sources
from download import unpack as unpacking
from download.fetch import DownloadError, fetch
from download.unpack import unpack
from runtime.command import stop_flag
from runtime.files import arriving
from tests.archive_server import make_tar, make_zip, noise, publish_voc, serving, tree

OUTSIDE = f"{tempfile.gettempdir()}/protoseg-evil"  # where no archive may write

ROOT = Path(__file__).parents[2]
BODY = noise(5000)
CUTS = (1, 2500, 4999)


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server
    stop_flag.signum = None


def one_line(error):
    message = str(error)
    assert error.exit_code == 4 and "\n" not in message and "again" in message
    return message


# --- row 13: malicious archives --------------------------------------------------------------------------------

GOOD = {"top/a": b"a", "top/sub/b": b"b" * 100}


def tar_with(*members, mode="w", files=GOOD):
    """`files`, then members given as (name, type, fields)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for name, kind, fields in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            for key, value in fields.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(b"e" * info.size))
    return buffer.getvalue()


def zip_with(*members, mode=0):
    """GOOD, then members given as names; `mode` is their Unix type."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        for name, body in GOOD.items():
            zipped.writestr(name, body)
        for name in members:
            info = zipfile.ZipInfo("x")
            info.filename = name  # the constructor would clean it
            info.external_attr = mode << 16
            zipped.writestr(info, b"../../evil" if mode else b"evil")
    return buffer.getvalue()


def encrypted(body):
    """The archive with the flag for "encrypted" in each of its headers."""
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        first, *rest = body.split(signature)
        body = signature.join([first, *(part[: flags - 4] + b"\x01" + part[flags - 3 :] for part in rest)])
    return body


REG, EVIL = tarfile.REGTYPE, {"size": 4}
LINK = {"linkname": "../../outside"}
BAD_NAMES = {
    "parent": "../evil",
    "parent inside": "top/../../evil",
    "parent of a sibling": "top/../other/evil",
    "absolute": OUTSIDE,
    "backslash": "top\\..\\..\\evil",
    "newline": "top/a\nb",
    "escape": "top/a\x1b[2J",
    "long": "top/" + "x/" * 150 + "evil",
    "duplicate": "top/a",
    "same but for case": "top/SUB/B",
    "file in a file": "top/a/evil",
    "file as the folder": "top",
}
MALICIOUS = {
    **{f"tar: {case}": tar_with((name, REG, EVIL)) for case, name in BAD_NAMES.items()},
    **{f"zip: {case}": zip_with(name) for case, name in BAD_NAMES.items() if case != "duplicate"},
    "tgz: parent": tar_with(("../evil", REG, EVIL), mode="w:gz"),
    "tgz: absolute": tar_with((OUTSIDE, REG, EVIL), mode="w:gz"),
    "tgz: symlink": tar_with(("top/link", tarfile.SYMTYPE, LINK), mode="w:gz"),
    "tar: not UTF-8": tar_with(("top/\udcff\udcfe", REG, EVIL)),
    "tar: symlink": tar_with(("top/link", tarfile.SYMTYPE, LINK)),
    "tar: harmless symlink": tar_with(("top/link", tarfile.SYMTYPE, {"linkname": "a"})),
    "tar: write through a symlink": tar_with(("top/l", tarfile.SYMTYPE, LINK), ("top/l/evil", REG, EVIL)),
    "tar: chain of links": tar_with(*((f"top/{i}", tarfile.SYMTYPE, {"linkname": f"{i + 1}/.."}) for i in range(40))),
    "tar: hard link": tar_with(("top/link", tarfile.LNKTYPE, {"linkname": "top/a"})),
    "tar: hard link outside": tar_with(("top/link", tarfile.LNKTYPE, {"linkname": "../../outside/file"})),
    "tar: fifo": tar_with(("top/fifo", tarfile.FIFOTYPE, {})),
    "tar: device": tar_with(("top/null", tarfile.CHRTYPE, {"devmajor": 1, "devminor": 3})),
    "tar: root is a link": tar_with(("top", tarfile.SYMTYPE, LINK), files={}),
    "zip: symlink": zip_with("top/link", mode=stat.S_IFLNK | 0o777),
    "zip: fifo": zip_with("top/fifo", mode=stat.S_IFIFO | 0o777),
    "zip: NUL": zip_with("top/evil#x").replace(b"evil#x", b"evil\0x"),
    "zip: many members": zip_with(*(f"top/{i}" for i in range(300))),
    "tar: many members": tar_with(*((f"top/{i}", REG, {}) for i in range(300))),
    "zip: bomb": make_zip({"top/zeros": bytes(3_000_000)}),
    "tgz: bomb": make_tar({"top/zeros": bytes(3_000_000)}, "w:gz"),
    "zip: encrypted": encrypted(zip_with("top/e")),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_row_13_malicious_archives(tmp_path, monkeypatch, case):
    monkeypatch.setattr(unpacking, "MAX_MEMBERS", 250)
    monkeypatch.setattr(unpacking, "MAX_UNPACKED_BYTES", 2_000_000)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("mine")
    archive = tmp_path / "archive"
    archive.write_bytes(MALICIOUS[case])
    before = tree(tmp_path)
    with pytest.raises(DownloadError, match="not unpacked") as caught:
        with arriving(tmp_path / "root" / "data") as folder:
            unpack(archive, "top", folder)
    one_line(caught.value)
    assert tree(tmp_path) == before and os.listdir(tmp_path / "root") == []
    assert not Path(OUTSIDE).exists()


def test_row_13_what_is_not_wanted_is_not_judged_by_its_kind(tmp_path):
    archive = tmp_path / "archive"
    archive.write_bytes(tar_with(("other/link", tarfile.SYMTYPE, LINK), ("top/x", REG, EVIL | {"mode": 0o6777})))
    with arriving(tmp_path / "data") as folder:
        unpack(archive, "top", folder)
    assert tree(tmp_path / "data") == {"a": b"a", "sub/b": b"b" * 100, "x": b"eeee"}
    assert stat.S_IMODE((tmp_path / "data" / "x").stat().st_mode) & 0o6111 == 0


# --- row 14: cut archives --------------------------------------------------------------------------------------

CUT_FILES = {f"top/{i}": noise(300 + 200 * i, i) for i in range(16)}
CUT_ARCHIVES = {"tar": make_tar(CUT_FILES), "tgz": make_tar(CUT_FILES, "w:gz"), "zip": make_zip(CUT_FILES)}
PADDING = {"tar": 10240, "tgz": 64, "zip": 0}  # what may follow the last file and the block that ends the archive


@pytest.mark.parametrize("kind", CUT_ARCHIVES)
def test_row_14_a_cut_archive_never_passes_with_fewer_files(tmp_path, kind):
    body = CUT_ARCHIVES[kind]
    archive, target = tmp_path / "archive", tmp_path / "data"
    cuts = sorted({*range(0, len(body), 512), *range(100, len(body), 512), len(body) - 1})
    assert len(cuts) >= 60
    for cut in cuts:
        archive.write_bytes(body[:cut])
        try:
            with arriving(target) as folder:
                unpack(archive, "top", folder)
        except DownloadError as error:
            one_line(error)
            assert not target.exists()
        else:
            assert cut >= len(body) - PADDING[kind]
            assert tree(target) == {name.removeprefix("top/"): content for name, content in CUT_FILES.items()}
            target.rename(tmp_path / f"whole at {cut}")


def test_row_14_flipped_bytes_are_found(tmp_path):
    """In a zip by its CRCs; tars have none, which is why theirs are only unpacked after their checksum was right."""
    body, target = CUT_ARCHIVES["zip"], tmp_path / "data"
    with zipfile.ZipFile(io.BytesIO(body)) as zipped:
        starts = [info.header_offset + 30 + len(info.filename) + 100 for info in zipped.infolist()]
    for at in starts:
        (tmp_path / "archive").write_bytes(body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :])
        with pytest.raises(DownloadError):
            with arriving(target) as folder:
                unpack(tmp_path / "archive", "top", folder)
        assert not target.exists()


# --- row 15: hostile servers -----------------------------------------------------------------------------------
# Each fault answers request number `n` (from 1) for a body, with one parameter: the place of the cut.


def truncates(handler, body, n, cut):
    handler.honest(body, cut)


def resets(handler, body, n, cut):
    handler.honest(body, cut)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def stalls(handler, body, n, cut):
    handler.honest(body, cut)
    handler.server.released.wait(60)


def drips(handler, body, n, cut):
    handler.honest(body, cut)
    for _ in range(300):
        handler.send(b"x")
        handler.server.released.wait(0.01)
    handler.server.exhausted = True  # nobody hung up


def fails_then_works(handler, body, n, cut):
    if n > {1: 1, 2500: 3, 4999: 5}[cut]:
        return handler.honest(body)
    handler.answer(500 + n % 4, b"try later")


def vanishes(handler, body, n, cut):
    handler.honest(body, cut) if n == 1 else handler.answer(404, b"")


def flips(handler, body, n, cut):
    handler.answer(200, body[:cut] + bytes([body[cut] ^ 1]) + body[cut + 1 :])


def declares_less(handler, body, n, cut):
    handler.answer(200, body, {"Content-Length": str(cut)})


def declares_more(handler, body, n, cut):
    handler.answer(200, body, {"Content-Length": str(len(body) + cut), "ETag": '"x"'})


def ignores_range(handler, body, n, cut):
    handler.honest(body, cut) if n == 1 else handler.answer(200, body, {"ETag": '"other"'})


def lies_about_the_range(handler, body, n, cut):
    if n != 2:
        return handler.honest(body, cut if n == 1 else None)
    headers = {"ETag": handler.server.etag(body), "Content-Range": f"bytes {cut + 1}-{len(body) - 1}/{len(body)}"}
    handler.answer(206, body[cut + 1 :], headers)


def changes_between_parts(handler, body, n, cut):
    old = bytes(reversed(body))
    handler.honest(old, cut) if n == 1 else handler.honest(body)


def changes_and_hides_it(handler, body, n, cut):
    """The rest of another file, under the old ETag: only the checksum can tell."""
    old = bytes(255 - value for value in body)
    if n == 1:
        return handler.answer(200, old, {"ETag": handler.server.etag(body)}, cut)
    handler.honest(body)


def redirects_for_ever(handler, body, n, cut):
    handler.answer(302, b"", {"Location": f"/file.bin?{n}" if cut == 1 else "/file.bin"})


def redirects_to_http(handler, body, n, cut):
    handler.answer(301, b"", {"Location": f"http://localhost:{handler.server.server_port}/file.bin"})


def redirects_to_a_file(handler, body, n, cut):
    handler.answer(307, b"", {"Location": {1: "file:///etc/hostname", 2500: "ftp://localhost/x"}.get(cut, "data:,x")})


def never_ends(handler, body, n, cut):
    handler.answer(200, body, {"Content-Length": None}, cut)
    for _ in range(1000):  # enough to be told from a body that ended
        handler.send(noise(1000))


def declares_too_much(handler, body, n, cut):
    handler.answer(200, body, {"Content-Length": str(cut * 10**12)})


def sends_garbage_as_gzip(handler, body, n, cut):
    handler.answer(200, noise(cut, 1), {"Content-Encoding": "gzip"})


# fault -> does the file arrive while it lasts (None: depends on the cut), and the most requests it may cost
HOSTILE = {
    truncates: (None, 6), resets: (None, 6), stalls: (None, 6), drips: (None, 6), fails_then_works: (True, 6),
    vanishes: (False, 2), flips: (False, 1), declares_less: (False, 1), declares_more: (False, 6),
    ignores_range: (True, 2), lies_about_the_range: (True, 3), changes_between_parts: (True, 2),
    changes_and_hides_it: (True, 3), redirects_for_ever: (False, 11), redirects_to_http: (False, 1),
    redirects_to_a_file: (False, 1), never_ends: (False, 1), declares_too_much: (False, 1),
    sends_garbage_as_gzip: (False, 1),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("fault", HOSTILE, ids=lambda fault: fault.__name__)
def test_row_15_hostile_servers(server, tmp_path, monkeypatch, fault, cut):
    arrives, most = HOSTILE[fault]
    urls, checksum = server.publish("file.bin", BODY)
    server.files |= {f"file.bin?{n}": BODY for n in range(20)}
    target = tmp_path / "root" / "file.bin"
    server.fault = lambda handler, body: fault(handler, body, len(server.requests), cut) or True
    with monkeypatch.context() as patch:
        if fault in (stalls, drips):
            patch.setattr(download, "READ_TIMEOUT_S", 0.15)
        patch.setattr(download, "MAX_FILE_BYTES", 20_000)
        try:
            fetch(urls, target, checksum)
        except DownloadError as error:
            assert not arrives and not target.exists()
            assert str(target) in one_line(error)
            assert fault is not never_ends or "more than 20000 bytes came" in str(error)
        else:
            assert arrives is not False and target.read_bytes() == BODY
    assert len(server.requests) <= most and not server.exhausted
    server.fault = None
    fetch(urls, target, checksum)
    assert tree(tmp_path) == {"root/file.bin": BODY}


def test_row_15_retries_are_bounded(server, tmp_path):
    urls, checksum = server.publish("file.bin", BODY)
    server.fault = lambda handler, body: not handler.answer(503, b"")
    with pytest.raises(DownloadError, match="HTTP 503"):
        fetch(urls, tmp_path / "file.bin", checksum)
    assert len(server.requests) == 6 and not tree(tmp_path)


# --- row 16: kill -9, and SIGTERM ------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
import download_voc
from download import fetch as download, sources
from runtime import command
import numpy, PIL.JpegImagePlugin, PIL.PngImagePlugin, scipy.io
from pathlib import Path

host, root, how = sys.argv[1], sys.argv[2], sys.argv[3]
download.PLAIN_HTTP_HOSTS, download.BACKOFF_S, download.CHUNK = (host,), (0.0,), 2048
for name in ("VOC_URLS", "VOC_CHECKSUM", "VOC_COUNTS", "SBD_URLS", "SBD_CHECKSUM", "TRAIN_AUG_COUNT"):
    setattr(sources, name, {values}[name])
if how == "run":
    sys.argv = ["download_voc.py", "--root", root, "--with-sbd"]
    command.run(download_voc.main)
    sys.exit()

moments, last = 0, int(how)

def moment(event, *_):
    global moments
    if event in ("poll", "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "socket.connect"):
        moments += 1
        if moments == last:
            os.kill(os.getpid(), signal.SIGKILL)

ask = command.stop_flag.raise_if_set
command.stop_flag.raise_if_set = lambda *args: (moment("poll"), ask(*args))
sys.addaudithook(moment)
sources.get_voc(Path(root), with_sbd=True)
print(moments)
"""


@pytest.fixture
def voc(server, monkeypatch):
    publish_voc(server, monkeypatch)
    return server


def child(voc, root, how):
    names = ("VOC_URLS", "VOC_CHECKSUM", "VOC_COUNTS", "SBD_URLS", "SBD_CHECKSUM", "TRAIN_AUG_COUNT")
    code = CHILD.replace("{values}", repr({name: getattr(sources, name) for name in names}))
    return subprocess.Popen(
        [sys.executable, "-c", code, voc.host, str(root), str(how)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def fetched(voc, name):
    return sum(sent for requested, _, sent in voc.requests if requested == name)


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.nightly)])
def test_row_16_kill_9_at_random_moments(voc, tmp_path, kills):
    undisturbed = child(voc, tmp_path / "whole", 0)
    out, err = undisturbed.communicate(timeout=60)
    assert undisturbed.returncode == 0, err
    moments, whole = int(out), tree(tmp_path / "whole")
    assert moments >= 100
    for at in sorted(random.Random(16).sample(range(1, moments + 1), min(kills, moments))):
        root = tmp_path / f"kill {at}"
        killed = child(voc, root, at)
        killed.communicate(timeout=60)
        assert killed.returncode == -signal.SIGKILL, f"moment {at}"
        owed = {name: bytes_owed(voc, root, name, at) for name in ("voc.tar", "sbd.tgz")}
        voc.requests.clear()
        sources.get_voc(root, with_sbd=True)
        assert tree(root) == whole, f"moment {at}"
        assert not [path for path in root.rglob(".*") if path.suffix != ".lock"], f"moment {at}"
        assert {name: fetched(voc, name) for name in owed} == owed, f"moment {at}"


def bytes_owed(voc, root, name, at):
    """How many bytes of an archive are still to come after a kill: none that is verified, or noted, comes twice."""
    archive, product = {
        "voc.tar": (root / sources.VOC_ARCHIVE, root / "VOCdevkit" / "VOC2012"),
        "sbd.tgz": (root / sources.SBD_ARCHIVE, root / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"),
    }[name]
    part, note = archive.with_name(archive.name + ".part"), archive.with_name(archive.name + ".part.json")
    if archive.exists() or product.exists():
        return 0
    kept = part.stat().st_size if part.exists() and note.exists() and note.read_bytes() else 0
    return len(voc.files[name]) - kept


def test_row_16_sigterm_leaves_with_143_and_is_resumed(voc, tmp_path):
    half, go_on = threading.Event(), threading.Event()

    def fault(handler, body):
        handler.answer(200, body, {"ETag": voc.etag(body)}, len(body) // 2)
        half.set()
        go_on.wait(60)
        handler.send(body[len(body) // 2 :])
        return True

    voc.fault = fault
    process = child(voc, tmp_path, "run")
    assert half.wait(60)
    process.send_signal(signal.SIGTERM)
    go_on.set()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: stopped by SIGTERM: what has come so far is kept")
    assert not (tmp_path / sources.VOC_ARCHIVE).exists()
    voc.fault = None
    sources.get_voc(tmp_path, with_sbd=True)
    assert len(tree(tmp_path)) > 20 and not list(tmp_path.rglob("*.part*"))


def test_row_16_an_error_is_one_line_and_exit_code_4(voc, tmp_path):
    voc.files["voc.tar"] = BODY
    process = child(voc, tmp_path, "run")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 4 and len(err.splitlines()) == 1
    assert err.startswith(f"error: {sources.VOC_ARCHIVE} did not arrive") and str(tmp_path / sources.VOC_ARCHIVE) in err
