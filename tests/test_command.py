"""What all scripts share: exit codes, signals; and what every source file promises: quiet imports, no unsafe calls."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dataset import DatasetError
from module import NotFiniteError
from runtime import command
from runtime.checkpoint import CheckpointError, RunInUseError
from runtime.command import Interrupted, StopFlag
from runtime.errors import ConfigError
from tests.tiny import ROOT

STOPS = [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]


@pytest.fixture
def no_handlers(monkeypatch):
    monkeypatch.setattr(command.stop_flag, "install", lambda: None)


def leave(error, capsys):
    """The exit code and the message of a script that ends with an error."""

    def main(argv):
        raise error

    with pytest.raises(SystemExit) as caught:
        command.run(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("this"), 2),
        (DatasetError("this"), 2),
        (CheckpointError("this"), 3),
        (OSError("this"), 4),
        (RunInUseError("this"), 5),
        (NotFiniteError("this"), 6),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(no_handlers, capsys, error, code):
    assert leave(error, capsys) == (code, "error: this\n")


def test_a_failed_compilation_names_the_setting(no_handlers, capsys):
    code, error = leave(torch._dynamo.exc.TorchDynamoException("no g++"), capsys)
    assert code == 4 and "torch.compile failed" in error and "--set system.compile=false" in error


@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_a_stop_says_by_what_and_what_next(no_handlers, capsys, signum, code):
    name = signal.Signals(signum).name
    assert leave(Interrupted(signum, "go on"), capsys) == (code, f"error: stopped by {name}: go on\n")


def test_each_problem_has_its_line(no_handlers, capsys):
    assert leave(ConfigError("one\ntwo"), capsys) == (2, "error: one\nerror: two\n")


def test_several_checks_tell_all_their_problems_each_once():
    def fail(error):
        raise error

    assert command.all_at_once(lambda: 1, lambda: 2) == [1, 2]
    checks = [lambda m=m, e=e: fail(e(m)) for e, m in ((DatasetError, "one"), (OSError, "two"), (DatasetError, "one"))]
    with pytest.raises(DatasetError) as caught:
        command.all_at_once(*checks)
    assert str(caught.value) == "one\ntwo"
    with pytest.raises(Interrupted):
        command.all_at_once(checks[0], lambda: fail(Interrupted(signal.SIGTERM, "go on")))


def test_a_bug_keeps_its_traceback(no_handlers):
    with pytest.raises(ZeroDivisionError):
        command.run(lambda argv: 1 / 0)


def test_the_flag_remembers_the_first_signal():
    flag, before = StopFlag(), {s: signal.getsignal(s) for s, _ in STOPS}
    flag.raise_if_set()
    try:
        flag.install()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert flag.signum == signal.SIGUSR1
    with pytest.raises(Interrupted, match="stopped by SIGUSR1"):
        flag.raise_if_set()


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    flag, left = StopFlag(), []
    monkeypatch.setattr(os, "_exit", left.append)
    flag._handle(signal.SIGINT, None)
    assert left == []
    flag._handle(signal.SIGINT, None)
    assert left == [130]


# --- a script of its own: streams that break, a terminal that goes away ----------------------------------------

SCRIPT = """
import os, signal, sys
from pathlib import Path
from runtime import command

def main(argv):
    print("first line", flush=True)
    if "hang up" in sys.argv:
        signal.raise_signal(signal.SIGHUP)
    for i in command.each(range(20_000), "counting", "line", what_next="go on"):
        print("line", i)
    Path("done.txt").write_text("the work was done")
    if "fail" in sys.argv:
        raise command.UserError("bad input")

command.run(main)
"""


def shell(folder: Path, line: str, **how) -> subprocess.CompletedProcess:
    """What a line of bash does, in which $SCRIPT is the command that runs SCRIPT."""
    (folder / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "SCRIPT": f"{shlex.quote(sys.executable)} {folder}/script.py"}
    line = line.replace("$SCRIPT", env["SCRIPT"])
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, **how)


LOST = "standard output cannot be written ({}): the work goes on, what it prints is lost\n"
BROKEN = {
    "a reader that leaves": ("set -o pipefail; $SCRIPT | head -1", 0, "first line\n", LOST.format("Broken pipe")),
    "a full disk": ("$SCRIPT > /dev/full", 0, "", LOST.format("No space left on device")),
    "no output": ("$SCRIPT >&-", 0, "", ""),
    "no error output": ("$SCRIPT 2>&- > /dev/null", 0, "", ""),
    "nothing open": ("$SCRIPT <&- >&- 2>&-", 0, "", ""),
    "nothing open, and an error": ("$SCRIPT fail <&- >&- 2>&-", 2, "", ""),
    "an error that nobody reads": ("$SCRIPT fail > /dev/null 2> /dev/full", 2, "", ""),
    "an error after the reader left": (
        "set -o pipefail; $SCRIPT fail | head -1", 2, "first line\n", LOST.format("Broken pipe") + "error: bad input\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_output_that_breaks_loses_what_is_printed_and_nothing_else(tmp_path, case):
    line, code, printed, said = BROKEN[case]
    done = shell(tmp_path, line)
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, said)
    assert (tmp_path / "done.txt").read_text() == "the work was done"


def test_output_that_nobody_reads_for_a_while_is_waited_for(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as some programs leave the pipes of those that they start
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([sys.executable, "script.py"], cwd=tmp_path, env=env, stdout=writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as lines:
        assert sum(1 for _ in lines) == 20_001
    assert started.wait() == 0


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    code = r"from runtime import command; command.run(lambda argv: print('stra\u00dfe \udcff'))"
    for encoding, shown in (("ascii", b"stra\\xdfe \\udcff\n"), ("utf-8", b"stra\xc3\x9fe \\udcff\n")):
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, shown, b"")


def test_a_terminal_that_goes_away_is_a_stop(tmp_path):
    done = shell(tmp_path, "$SCRIPT 'hang up'")
    assert (done.returncode, done.stderr) == (129, "error: stopped by SIGHUP: go on\n")
    assert not (tmp_path / "done.txt").exists()


def test_nohup_goes_on_when_the_terminal_goes_away(tmp_path):
    done = shell(tmp_path, "nohup $SCRIPT 'hang up' < /dev/null")
    assert done.returncode == 0 and (tmp_path / "done.txt").exists()


def test_a_terminal_that_is_gone_loses_what_is_printed_and_nothing_else(tmp_path):
    terminal, end = os.openpty()
    (tmp_path / "script.py").write_text("import sys; sys.stdin.readline()\n" + SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, "script.py", "fail"]
    started = subprocess.Popen(command_line, cwd=tmp_path, env=env, stdin=subprocess.PIPE, stdout=end, stderr=end)
    os.close(end)
    os.close(terminal)  # before the script has printed anything
    started.communicate(b"go\n")
    assert started.returncode == 2 and (tmp_path / "done.txt").exists()


@pytest.mark.parametrize(("ending", "code"), [("raise command.UserError('bad input')", 2), ("1 / 0", 1), ("pass", 0)])
def test_no_end_waits_for_a_process_that_loads_data(tmp_path, ending, code):
    script = f"""
import multiprocessing, time
from runtime import command
def main(argv):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
    {ending}
command.run(main)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, timeout=60).returncode == code


@pytest.mark.parametrize(("name", "told"), [("_MultiProcessingDataLoaderIter", False), ("Other", True)])
def test_a_loader_that_trips_over_its_own_end_says_nothing(tmp_path, name, told):
    script = f"""
from runtime import command
class {name}:
    def __del__(self):
        raise AttributeError("_workers_status")
command.run(lambda argv: {name}() and None)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0 and (b"_workers_status" in done.stderr) == told


def test_a_working_folder_that_is_gone_is_named(tmp_path):
    (tmp_path / "gone").mkdir()
    done = shell(tmp_path, "cd gone; rmdir ../gone; $SCRIPT")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: the folder in which this was started does not exist any more")


# --- bars, and the command to go on with -----------------------------------------------------------------------


def test_a_signal_stops_between_two_items(monkeypatch):
    flag = StopFlag()
    monkeypatch.setattr(command, "stop_flag", flag)
    seen = []
    with pytest.raises(Interrupted, match="stopped by SIGTERM: go on"):
        for item in command.each("abcd", "spelling", "letter", what_next="go on"):
            seen.append(item)
            if item == "b":
                flag._handle(signal.SIGTERM, None)
    assert seen == ["a", "b"]
    assert list(command.each([], "nothing", "letter")) == []


def test_a_printed_command_does_the_same_in_whatever_folder(tmp_path):
    words = ["--config", f"{tmp_path}/it's #1.yaml", "--set", "paths.model_dir=/a b", "--resume", "auto"]
    printed = command.go_on_command("train.py", words)
    assert shlex.split(printed) == ["python", str(ROOT / "train.py"), *words]
    (tmp_path / "python").symlink_to("/bin/echo")
    env = {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    done = subprocess.run(["bash", "-c", printed], cwd="/", env=env, capture_output=True, text=True)
    assert done.stdout.strip() == " ".join([str(ROOT / "train.py"), *words])


@pytest.mark.parametrize(
    ("local", "processes", "start"),
    [
        (None, 2, "torchrun --nproc_per_node 2"),
        ("4", 4, "torchrun --nproc_per_node 4"),
        ("4", 8, "torchrun --nproc_per_node 4 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint node7:29500"),
        ("garbage", 2, "torchrun --nproc_per_node 2"),
    ],
)
def test_the_printed_command_starts_as_many_processes(monkeypatch, local, processes, start):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert command.go_on_command("train.py", [], processes) == f"{start} {ROOT}/train.py"
