"""What all scripts share: exit codes, signals; and what every source file promises: quiet imports, no unsafe calls."""

import os
import signal

import pytest
import torch

from dataset import DatasetError
from module import NotFiniteError
from runtime import command
from runtime.checkpoint import CheckpointError, RunInUseError
from runtime.command import Interrupted, StopFlag
from runtime.errors import ConfigError


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


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
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
    flag, before = StopFlag(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
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
