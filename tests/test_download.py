"""The download wing: fetch, claimed, unpack. Hostile cases: tests/reliability/test_download_faults.py."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest

from download import fetch as download
from download.fetch import DownloadError, claimed, fetch
from download.unpack import unpack
from runtime.command import Interrupted, stop_flag
from runtime.files import arriving, need_space, replacing
from tests.archive_server import make_tar, make_zip, noise, serving, tree

BODY = noise(5000)


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


@pytest.fixture(autouse=True)
def no_signal():
    yield
    stop_flag.signum = None


def truncating(cut):
    """The first answer ends after `cut` bytes; later ones are honest."""

    def fault(handler, body):
        if len(handler.server.requests) == 1:
            handler.honest(body, cut)
            return True
        return False

    return fault


# --- fetch -----------------------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_alone(server, tmp_path):
    urls, checksum = server.publish("file.bin", BODY)
    fetch(urls, tmp_path / "new" / "file.bin", checksum)
    assert tree(tmp_path) == {"new/file.bin": BODY}
    assert server.requests == [["file.bin", None, len(BODY)]]


def test_what_is_there_is_verified_and_not_fetched_again(server, tmp_path):
    urls, checksum = server.publish("file.bin", BODY)
    target = tmp_path / "file.bin"
    target.write_bytes(BODY)
    fetch(urls, target, checksum)
    fetch(urls, target)
    target.write_bytes(BODY + b"!")
    with pytest.raises(DownloadError, match="wrong content.*remove this file") as caught:
        fetch(urls, target, checksum)
    assert caught.value.exit_code == 4 and target.exists() and not server.requests


def test_the_first_digits_of_a_checksum_are_enough_and_all_of_them_count(server, tmp_path):
    urls, checksum = server.publish("file.bin", BODY)
    fetch(urls, tmp_path / "a", checksum[:15])
    with pytest.raises(DownloadError):
        fetch(urls, tmp_path / "b", checksum[:14] + ("0" if checksum[14] != "0" else "1"))
    assert tree(tmp_path) == {"a": BODY}


def test_a_break_is_resumed_where_it_happened(server, tmp_path, capsys):
    urls, checksum = server.publish("file.bin", BODY)
    server.fault = truncating(1234)
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY}
    assert [request[1:] for request in server.requests] == [[None, 1234], ["bytes=1234-", len(BODY) - 1234]]
    assert "ended after 1234 of 5000 bytes; trying again" in capsys.readouterr().err


def test_a_later_process_resumes_too(server, tmp_path, monkeypatch):
    urls, checksum = server.publish("file.bin", BODY)
    server.fault = truncating(1234)
    monkeypatch.setattr(download, "BACKOFF_S", ())
    with pytest.raises(DownloadError, match=r"file\.bin did not arrive .*run the same command again"):
        fetch(urls, tmp_path / "file.bin", checksum)
    assert (tmp_path / "file.bin.part").read_bytes() == BODY[:1234]
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY} and server.requests[1][1] == "bytes=1234-"


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_without_a_strong_etag_it_starts_over(server, tmp_path, monkeypatch, etag):
    urls, checksum = server.publish("file.bin", BODY)
    monkeypatch.setattr(server, "etag", lambda body: etag)
    server.fault = truncating(1234)
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY} and server.requests[1][1] is None


def test_a_complete_part_is_verified_without_asking(server, tmp_path, monkeypatch):
    urls, checksum = server.publish("file.bin", BODY)
    monkeypatch.setattr(download, "mismatch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch(urls, tmp_path / "file.bin", checksum)
    monkeypatch.undo()
    server.requests.clear()
    monkeypatch.setattr(download, "PLAIN_HTTP_HOSTS", (server.host,))
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY} and not server.requests


def test_a_death_right_after_the_rename_leaves_nothing_behind(server, tmp_path, monkeypatch):
    urls, checksum = server.publish("file.bin", BODY)
    rename = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: (rename(*args), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        fetch(urls, tmp_path / "file.bin", checksum)
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY} and len(server.requests) == 1


def test_a_damaged_part_costs_a_new_start_and_no_more(server, tmp_path, monkeypatch):
    urls, checksum = server.publish("file.bin", BODY)
    server.fault = truncating(1234)
    monkeypatch.setattr(download, "BACKOFF_S", ())
    with pytest.raises(DownloadError):
        fetch(urls, tmp_path / "file.bin", checksum)
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1234)
    monkeypatch.setattr(download, "BACKOFF_S", (0.0,))
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY}


@pytest.mark.parametrize("note", ["", "[]", "{}", '{"url": 1, "etag": 2, "length": 3}', '{"length": "x"'])
def test_a_damaged_note_costs_a_new_start_and_no_more(server, tmp_path, note):
    urls, checksum = server.publish("file.bin", BODY)
    (tmp_path / "file.bin.part").write_bytes(BODY[:10])
    (tmp_path / "file.bin.part.json").write_text(note)
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY} and server.requests == [["file.bin", None, len(BODY)]]


def test_the_next_address_is_tried_and_gets_no_foreign_bytes(server, tmp_path):
    urls, checksum = server.publish("file.bin", BODY)
    fetch([server.url("gone"), *urls], tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY} and [r[0] for r in server.requests] == ["gone", "file.bin"]

    server.files["other"] = BODY
    server.fault = lambda handler, body: "file.bin" in handler.path and not handler.honest(body, 0)
    server.requests.clear()
    fetch([*urls, server.url("other")], tmp_path / "again", checksum)
    assert server.requests[-1] == ["other", None, len(BODY)]


@pytest.mark.parametrize("url", ["http://example.org/f", "ftp://example.org/f", "file:///etc/hostname", "data:,x", "f"])
def test_only_https_is_used(server, tmp_path, url):
    with pytest.raises(DownloadError, match="only https"):
        fetch([server.url("file.bin"), url], tmp_path / "file.bin")
    assert not tree(tmp_path) and not server.requests


def test_nothing_may_be_asked_without_tls_by_default():
    code = "from download import fetch; assert fetch.PLAIN_HTTP_HOSTS == () and len(fetch.BACKOFF_S) <= 5"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_length_needs_a_checksum(server, tmp_path):
    urls, checksum = server.publish("file.bin", BODY)
    server.fault = lambda handler, body: not handler.answer(200, body, {"Content-Length": None})
    fetch(urls, tmp_path / "file.bin", checksum)
    with pytest.raises(DownloadError, match="does not say how long"):
        fetch(urls, tmp_path / "other.bin")
    assert tree(tmp_path) == {"file.bin": BODY}


@pytest.mark.parametrize("whole", [True, False])
def test_chunked_answers_carry_their_own_end(server, tmp_path, whole):
    urls, _ = server.publish("file.bin", BODY)

    def fault(handler, body):
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        end = b"0\r\n\r\n" if whole else b""
        handler.answer(200, b"", {"Content-Length": None, "Transfer-Encoding": "chunked"})
        handler.send(b"%x\r\n" % len(body) + body + b"\r\n" + end)
        return True

    server.fault = fault
    if whole:
        fetch(urls, tmp_path / "file.bin")
        assert tree(tmp_path) == {"file.bin": BODY}
    else:
        with pytest.raises(DownloadError, match="broke"):
            fetch(urls, tmp_path / "file.bin")
        assert not (tmp_path / "file.bin").exists()


def test_a_full_disk_is_seen_before_the_body_is_read(server, tmp_path, monkeypatch):
    urls, checksum = server.publish("file.bin", BODY)
    usage = shutil.disk_usage(tmp_path)._replace(free=4999)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="5000 bytes are needed and 4999 are free") as caught:
        fetch(urls, tmp_path / "file.bin", checksum)
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "file.bin").exists()
    need_space(tmp_path, 4999)


def test_a_stop_is_obeyed_at_once_and_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)
    urls, checksum = server.publish("file.bin", BODY)

    def fault(handler, body):
        if len(handler.server.requests) > 1:
            return False
        handler.answer(200, body, {"ETag": server.etag(body)}, 1234)
        stop_flag.signum = signal.SIGTERM
        handler.send(body[1234:])
        return True

    server.fault = fault
    with pytest.raises(Interrupted, match="the same command goes on from there") as caught:
        fetch(urls, tmp_path / "file.bin", checksum)
    assert caught.value.exit_code == 143 and not (tmp_path / "file.bin").exists()
    assert (tmp_path / "file.bin.part").stat().st_size < len(BODY)
    stop_flag.signum = None
    fetch(urls, tmp_path / "file.bin", checksum)
    assert tree(tmp_path) == {"file.bin": BODY}


def test_a_stop_ends_the_wait_before_a_retry():
    stop_flag.signum = signal.SIGINT
    with pytest.raises(Interrupted):
        download._sleep(3600)


def test_connecting_and_reading_have_time_limits(server, tmp_path, monkeypatch):
    seen = []
    original = download._ReadTimeout.connect

    def connect(self):
        seen.append(self.timeout)
        original(self)
        seen.append(self.sock.gettimeout())

    monkeypatch.setattr(download._ReadTimeout, "connect", connect)
    urls, checksum = server.publish("file.bin", BODY)
    fetch(urls, tmp_path / "file.bin", checksum)
    assert seen == [download.CONNECT_TIMEOUT_S, download.READ_TIMEOUT_S] == [15, 30]


# --- places ----------------------------------------------------------------------------------------------------


def test_the_second_process_is_told(tmp_path):
    target = tmp_path / "new" / "data"
    with claimed(target), pytest.raises(DownloadError, match=rf"data: process {os.getpid()} on .* is working on it"):
        with claimed(target):
            pass
    with claimed(target):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os, sys\nfrom pathlib import Path\nfrom download import fetch\n"
    code += "with fetch.claimed(Path(sys.argv[1])): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")]).returncode == 9
    with claimed(tmp_path / "data"):
        pass


def test_a_folder_arrives_whole_or_not_at_all(tmp_path):
    target = tmp_path / "new" / "data"
    with pytest.raises(ZeroDivisionError):
        with arriving(target) as folder:
            (folder / "file").write_text("x")
            assert not target.exists()
            raise ZeroDivisionError
    assert list((tmp_path / "new").iterdir()) == []
    with arriving(target) as folder:
        (folder / "file").write_text("x")
    assert tree(tmp_path) == {"new/data/file": b"x"}


def test_leftovers_of_a_dead_process_are_swept(tmp_path):
    stale = tmp_path / ".data.tmp"
    stale.mkdir()
    (stale / "half").write_text("x")
    with arriving(tmp_path / "data") as folder:
        (folder / "file").write_text("x")
    assert tree(tmp_path) == {"data/file": b"x"} and not stale.exists()


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("x")
    (tmp_path / ".data.tmp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        with arriving(tmp_path / "data"):
            pass
    assert tree(tmp_path / "elsewhere") == {"mine": b"x"}


def test_a_text_is_replaced_at_once(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_text("old\n")
    monkeypatch.setattr(os, "replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), replacing(path, "w") as file:
        file.write("new\n")
    assert path.read_text() == "old\n"


# --- unpack ----------------------------------------------------------------------------------------------------

FILES = {"top/data/a.txt": b"a", "top/data/deep/er/b.bin": noise(3000), "top/other/c": b"c", "./top/data/d": b""}
MAKERS = {"tar": make_tar, "tgz": lambda files: make_tar(files, "w:gz"), "zip": make_zip}


@pytest.mark.parametrize("kind", MAKERS)
def test_only_the_wanted_folder_is_unpacked(tmp_path, kind):
    archive = tmp_path / "no.suffix"
    archive.write_bytes(MAKERS[kind](FILES))
    with arriving(tmp_path / "data") as folder:
        assert unpack(archive, "top/data", folder) == 3
    assert tree(tmp_path / "data") == {"a.txt": b"a", "deep/er/b.bin": noise(3000), "d": b""}
    with arriving(tmp_path / "some") as folder:
        assert unpack(archive, "top/data", folder, ("a.t", "deep/")) == 2
    assert tree(tmp_path / "some") == {"a.txt": b"a", "deep/er/b.bin": noise(3000)}


@pytest.mark.parametrize("body", [b"", b"PK", b"\x1f\x8b", b"<html>try later</html>", noise(2000), make_zip({})])
def test_what_is_no_archive_is_named(tmp_path, body):
    archive = tmp_path / "data.zip"
    archive.write_bytes(body)
    with pytest.raises(DownloadError, match=r"data\.zip: not unpacked \(.+\); remove this file") as caught:
        with arriving(tmp_path / "data") as folder:
            unpack(archive, "top", folder)
    assert "\n" not in str(caught.value) and tree(tmp_path) == {"data.zip": body}


def test_a_missing_folder_is_named(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(make_tar(FILES))
    (tmp_path / "out").mkdir()
    with pytest.raises(DownloadError, match="no files under elsewhere/"):
        unpack(archive, "elsewhere", tmp_path / "out")


def test_unpacking_can_be_stopped(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(make_tar(FILES))
    stop_flag.signum = signal.SIGTERM
    with pytest.raises(Interrupted, match="the same command unpacks it"):
        with arriving(tmp_path / "data") as folder:
            unpack(archive, "top/data", folder)
    assert set(tree(tmp_path)) == {"a.tar"} and not (tmp_path / ".data.tmp").exists()
