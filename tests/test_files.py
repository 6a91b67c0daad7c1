"""Files that are whole or as before, places that one process holds, and folders where only our own files go."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.files import MANIFEST, FolderInUseError, OutputFolder, arriving, locked, need_space, replacing
from tests.tiny import ROOT


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- whole or not at all ---------------------------------------------------------------------------------------


def test_a_file_is_written_and_replaced(tmp_path):
    for text in ("ä\n", "b\n"):
        with replacing(tmp_path / "some.txt", "w", encoding="utf-8", newline="") as file:
            file.write(text)
        assert (tmp_path / "some.txt").read_bytes() == text.encode()
    with replacing(tmp_path / "[some].bin") as file:
        file.write(b"\0")
    assert names(tmp_path) == ["[some].bin", "some.txt"]


def stop(*_):
    raise KeyboardInterrupt


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("error", [stop, no_space])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name, error):
    (tmp_path / "some.txt").write_text("old")
    monkeypatch.setattr(os, name, error)
    with pytest.raises((KeyboardInterrupt, OSError)):
        with replacing(tmp_path / "some.txt", "w") as file:
            file.write("new")
    assert names(tmp_path) == ["some.txt"] and (tmp_path / "some.txt").read_text() == "old"


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "some.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "some.txt", "w") as file:
        file.write("new")
        file.write(str(1 / 0))
    assert names(tmp_path) == ["some.txt"] and (tmp_path / "some.txt").read_text() == "old"


def test_the_file_is_synced_before_it_is_renamed_and_its_folder_after(tmp_path, monkeypatch):
    order, kinds = [], []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("sync"), kinds.append(os.fstat(f).st_mode), real_sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), real_replace(a, b)))
    with replacing(tmp_path / "some.bin") as file:
        file.write(b"x")
    assert order == ["sync", "rename", "sync"]
    assert [os.path.stat.S_ISDIR(kind) for kind in kinds] == [False, True]


def test_what_a_killed_process_left_is_swept_and_a_living_ones_file_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".a[1].txt.tmp.{dead.pid}").write_bytes(b"half")
    others = [f".a[1].txt.tmp.{os.getppid()}", ".a[1].txt.tmp.note", f".b.txt.tmp.{dead.pid}"]
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    with replacing(tmp_path / "a[1].txt"):
        pass
    assert names(tmp_path) == sorted(["a[1].txt", *others])


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.mkdir(),
        os.mkfifo,
        lambda path: path.symlink_to("other"),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
    ],
)
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    (tmp_path / "other").write_text("mine")
    make(tmp_path / "some")
    before = (tmp_path / "some").lstat()
    with pytest.raises(OSError, match="some") as caught, replacing(tmp_path / "some"):
        pytest.fail("it was opened")
    assert caught.value.errno == errno.EEXIST and (tmp_path / "some").lstat() == before
    assert names(tmp_path) == ["other", "some"] and (tmp_path / "other").read_text() == "mine"


def test_a_folder_arrives_whole_or_not_at_all(tmp_path):
    target = tmp_path / "a" / "data"
    with pytest.raises(ZeroDivisionError), arriving(target) as folder:
        (folder / "half").write_text(str(1 / 0))
    assert names(tmp_path) == ["a"]
    (tmp_path / "a" / ".data.tmp").mkdir()
    (tmp_path / "a" / ".data.tmp" / "old").touch()
    with arriving(target) as folder:
        (folder / "one").touch()
        assert not target.exists()
    assert names(tmp_path) == ["a", "a/data", "a/data/one"]


def test_missing_space_is_said_before_it_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 4, 5))
    need_space(tmp_path, 5)
    with pytest.raises(OSError, match="6 bytes are needed and 5 are free") as caught:
        need_space(tmp_path, 6)
    assert caught.value.errno == errno.ENOSPC


# --- one process at a time -------------------------------------------------------------------------------------


class Busy(Exception):
    pass


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "deep" / ".lock"
    code = (
        "import sys, pathlib\nfrom runtime.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), None): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(Busy, match=rf"^process {holder.pid} on \S+$"), locked(path, Busy):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked(path, Busy):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_forked_process_does_not_hold_the_lock(tmp_path):
    lives, says = os.pipe()
    with locked(tmp_path / ".lock", Busy):
        child = os.fork()
        if child == 0:
            os.write(says, b"x")
            signal.pause()
    try:
        os.read(lives, 1)
        with locked(tmp_path / ".lock", Busy):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def test_somebodys_file_of_that_name_is_kept(tmp_path):
    (tmp_path / ".lock").write_text("a key to the garden\n")
    with locked(tmp_path / ".lock", Busy), pytest.raises(Busy, match="a key to the garden"):
        with locked(tmp_path / ".lock", Busy):
            pass
    assert (tmp_path / ".lock").read_text() == "a key to the garden\n"


# --- what is ours ----------------------------------------------------------------------------------------------


def write(folder, *written):
    """What a command does with its output folder."""
    out = OutputFolder(folder).begin()
    out.clear()
    for name in written:
        out.add(name).write_text("ours")
    return out


def everything(folder):
    """All there is, links and their targets included, to see that nothing was touched."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else path.is_file() and path.read_text()
        for path in sorted(folder.rglob("*"))
    }


def refused(path, reason, base):
    before = everything(base)
    for step in ("begin", "clear"):
        with pytest.raises(ConfigError) as caught:
            getattr(OutputFolder(path), step)()
        assert reason in str(caught.value) and str(path) in str(caught.value) and "--out" in str(caught.value)
        assert "\n" not in str(caught.value) and caught.value.exit_code == 2
        assert everything(base) == before


def test_what_was_written_before_goes_and_nothing_is_left_of_it(tmp_path):
    write(tmp_path / "a" / "out", "index.html", "patches/deep/1.jpg", "patches/2.jpg")
    out = OutputFolder(tmp_path / "a" / "out").begin()
    assert names(out.path) == [
        MANIFEST, "index.html", "patches", "patches/2.jpg", "patches/deep", "patches/deep/1.jpg"
    ]  # fmt: skip
    out.clear()
    assert names(out.path) == [MANIFEST] and (out.path / MANIFEST).read_text() == ""
    out.add("other.html").write_text("new")
    write(out.path, "index.html")
    assert names(out.path) == [MANIFEST, "index.html"]


def test_an_empty_folder_and_one_that_was_looked_at_are_taken(tmp_path):
    (tmp_path / "out" / "patches").mkdir(parents=True)
    (tmp_path / "out" / "patches").rmdir()
    write(tmp_path / "out", "patches/1.jpg")
    (tmp_path / "out" / ".DS_Store").write_text("finder's")
    (tmp_path / "out" / "patches" / "Thumbs.db").write_text("explorer's")
    write(tmp_path / "out", "index.html", "patches/1.jpg")
    assert everything(tmp_path / "out")[".DS_Store"] == "finder's"
    assert everything(tmp_path / "out")["patches/Thumbs.db"] == "explorer's"


def test_a_name_is_in_the_manifest_before_its_file_is_there(tmp_path):
    out = OutputFolder(tmp_path).begin()
    for _ in range(2):
        path = out.add("pictures/ü 1.png")
    assert not path.exists() and path.parent.is_dir()
    assert [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()] == ["pictures/ü 1.png"]


def test_a_killed_process_is_cleaned_up_after(tmp_path):
    code = (
        "import os\nfrom runtime import files\nout = files.OutputFolder('out').begin()\nout.clear()\n"
        "out.add('b/1.png').write_text('half')\nos.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "with files.replacing(out.add('b/index.html'), 'w') as file: file.write('half')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert any(".index.html.tmp." in name for name in names(tmp_path / "out"))
    write(tmp_path / "out", "new.html")
    assert names(tmp_path / "out") == [MANIFEST, "new.html"]


def test_a_process_killed_at_its_first_manifest_is_cleaned_up_after(tmp_path):
    (tmp_path / f".{MANIFEST}.tmp.1234567").write_text("")
    write(tmp_path, "a.html")
    assert names(tmp_path) == [MANIFEST, "a.html"]


@pytest.mark.parametrize("foreign", ["2024-01.png", ".notes", "deep/2.txt", "index.html", "001-a.html", "empty/"])
def test_a_folder_with_something_foreign_is_refused(tmp_path, foreign):
    path = tmp_path / "album" / foreign
    (path if foreign.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
    if not foreign.endswith("/"):
        path.write_text("mine")
    refused(tmp_path / "album", foreign.split("/")[0], tmp_path)


def test_the_folder_one_stands_in_is_refused_as_any_other(tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("mine")
    monkeypatch.chdir(tmp_path)
    refused(Path("."), "thesis.tex", tmp_path)


def test_a_foreign_file_among_ours_is_refused(tmp_path):
    write(tmp_path / "out", "index.html", "patches/1.jpg")
    (tmp_path / "out" / "patches" / "2.jpg").write_text("mine")
    refused(tmp_path / "out", "patches/2.jpg", tmp_path)


def by_a_folder(path):
    path.unlink()
    path.mkdir()


def by_a_link(path):
    path.unlink()
    path.symlink_to(path.parents[2] / "other.txt")


def by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def above_by_a_link(path):
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(path.parents[2] / "photographs")


@pytest.mark.parametrize("replace", [by_a_folder, by_a_link, by_a_pipe, above_by_a_link])
def test_what_was_put_in_the_place_of_ours_is_foreign(tmp_path, replace):
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "1.jpg").write_text("mine")
    write(tmp_path / "out", "patches/1.jpg")
    replace(tmp_path / "out" / "patches" / "1.jpg")
    refused(tmp_path / "out", "patches", tmp_path)


@pytest.mark.parametrize("target", ["full", "nowhere", "out"])
def test_a_link_is_refused(tmp_path, target):
    (tmp_path / "full").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    refused(tmp_path / "out", "it is a link", tmp_path)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(tmp_path / "out", "it is no folder", tmp_path)


@pytest.mark.parametrize(
    "line", ['"../mine.txt"', '"/etc/passwd"', '"a/../../mine.txt"', '"."', '".."', '""', '"a//../../mine.txt"', "[1]",
             "7", "null", '"a', "[" * 100_000, '"\\u0000"', f'"{MANIFEST}"', '"{out}/../mine.txt"'],
)  # fmt: skip
def test_a_manifest_names_nothing_outside(tmp_path, line):
    (tmp_path / "mine.txt").write_text("mine")
    write(tmp_path / "out", "a/1.html")
    with open(tmp_path / "out" / MANIFEST, "a") as file:
        file.write(line.replace("{out}", str(tmp_path / "out")) + "\n")
    write(tmp_path / "out", "b.html")
    assert names(tmp_path) == ["mine.txt", "out", f"out/{MANIFEST}", "out/b.html"]
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_manifest_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text('"a.txt"\n')
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("mine")
    (tmp_path / "out" / MANIFEST).symlink_to(tmp_path / "mine.txt")
    refused(tmp_path / "out", MANIFEST, tmp_path)


def test_a_manifest_that_lost_its_end_lists_less(tmp_path):
    write(tmp_path / "out", "a.html", "b.html")
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_text(manifest.read_text()[:-3])
    refused(tmp_path / "out", "b.html", tmp_path)


def test_what_comes_between_begin_and_the_end_is_not_touched(tmp_path):
    write(tmp_path / "out", "a.html")
    out = OutputFolder(tmp_path / "out").begin()
    (tmp_path / "out" / "mine.html").write_text("mine")
    with pytest.raises(ConfigError, match="mine.html"):
        out.clear()
    (tmp_path / "out" / "mine.html").unlink()
    out.clear()
    (tmp_path / "out" / "mine.html").write_text("mine")
    with pytest.raises(ConfigError, match="mine.html"):
        out.add("mine.html")
    assert (tmp_path / "out" / "mine.html").read_text() == "mine"


def test_only_names_inside_are_added(tmp_path):
    out = OutputFolder(tmp_path / "out").begin()
    for name in ("../a", "/a", "a//b", "", ".", MANIFEST):
        with pytest.raises(ValueError):
            out.add(name)


def test_the_remedy_is_the_callers(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="mine.*, use --set paths.results_dir=FOLDER$"):
        OutputFolder(tmp_path, "use --set paths.results_dir=FOLDER").begin()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_looked_into_is_an_error_of_the_disk(tmp_path):
    write(tmp_path / "out", "a/b.html")
    (tmp_path / "out" / "a").chmod(0)
    try:
        with pytest.raises(PermissionError):
            OutputFolder(tmp_path / "out").begin()
    finally:
        (tmp_path / "out" / "a").chmod(0o700)


def test_nothing_here_needs_torch():
    code = "import sys; from runtime import files; assert not {'torch', 'numpy'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_two_at_once_do_not_mix_in_a_folder(tmp_path):
    with OutputFolder(tmp_path / "out").successor() as first:
        first.add("a.txt").write_text("first")
        with (
            pytest.raises(FolderInUseError, match="another process writes there"),
            OutputFolder(tmp_path / "out").successor(),
        ):
            pass
    assert (tmp_path / "out/a.txt").read_text() == "first"
