"""The log of a run: rows and events that continue where the run does, and never those of another run."""

import csv
import errno
import os
import sys

import pytest

from runtime.errors import ConfigError
from runtime.metrics_log import MetricsLog

COLUMNS = ("phase", "step", "total", "val_miou")
PHASES = ["a", "b", "c"]


@pytest.fixture
def without_tensorboard(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def places(path):
    return [(row["phase"], int(row["step"])) for row in rows(path)]


def logged(path, *steps, at=("a", -1)):
    """A log with a row of each (phase, step); steps of all phases count on by 10 each."""
    log = MetricsLog(path, COLUMNS)
    log.rewind(PHASES, *at)
    for phase, step in steps:
        log.write({"phase": phase, "step": step, "total": 0.1234567}, 10 * PHASES.index(phase) + step)
    return log


def test_rows_of_steps_that_are_taken_again_are_dropped(tmp_path, without_tensorboard):
    path = tmp_path / "metrics.csv"
    log = logged(path, ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("c", 1))
    log.rewind(PHASES, "b", 2)
    assert places(path) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert rows(path)[0] == {"phase": "a", "step": "1", "total": "0.123457", "val_miou": ""}
    log.rewind(PHASES, "b", -1)
    assert places(path) == [("a", 1), ("a", 2)]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_another_run_keeps_no_row(tmp_path, without_tensorboard):
    log = logged(tmp_path / "metrics.csv", ("a", 1), ("b", 1))
    log.rewind(["b"], "b", -1)
    assert places(tmp_path / "metrics.csv") == []


@pytest.mark.parametrize("end", ["b", "b,", "b,12", "b,1\r", "b,12,0.5", "b,12,0.5,0.1", "b,12,0.5\r\n", "\0\0\0\0"])
def test_a_row_that_a_crash_cut_off_is_dropped(tmp_path, without_tensorboard, end):
    path = tmp_path / "metrics.csv"
    logged(path, ("a", 1), ("b", 1))
    with open(path, "a", newline="") as file:
        file.write(end)
    logged(path, ("b", 99), at=("b", 50))
    assert places(path) == [("a", 1), ("b", 1), ("b", 99)]


def test_columns_of_an_earlier_version_give_way(tmp_path, without_tensorboard):
    path = tmp_path / "metrics.csv"
    path.write_text("phase,step,lost,total\r\na,1,7,0.5\r\n")
    logged(path, ("b", 1), at=("b", -1))
    assert rows(path)[0] == {"phase": "a", "step": "1", "total": "0.5", "val_miou": ""}
    assert places(path) == [("a", 1), ("b", 1)]


@pytest.mark.parametrize(
    "text", ["name,age\nAnn,3\n", "step,phase\n1,a\n", "\n", "phase;step\n", "x" * 200_000 + "\n", "phase,step"]
)
def test_somebody_elses_table_is_kept(tmp_path, without_tensorboard, text):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"metrics.csv: this is no table of a run.*paths.results_dir") as caught:
        logged(path)
    assert path.read_text() == text and "\n" not in str(caught.value)


def test_an_empty_file_is_taken(tmp_path, without_tensorboard):
    (tmp_path / "metrics.csv").touch()
    logged(tmp_path / "metrics.csv", ("a", 1))
    assert places(tmp_path / "metrics.csv") == [("a", 1)]


def test_a_rewind_that_fails_leaves_the_rows(tmp_path, without_tensorboard, monkeypatch):
    path = tmp_path / "metrics.csv"
    log = logged(path, ("a", 1), ("a", 2))
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        log.rewind(PHASES, "a", 1)
    assert places(path) == [("a", 1), ("a", 2)] and [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_what_cannot_be_logged_is_named(tmp_path, without_tensorboard):
    (tmp_path / "results").mkdir()
    log = logged(tmp_path / "results" / "metrics.csv")
    os.remove(log.path)
    os.rmdir(log.path.parent)
    with pytest.raises(OSError, match=r"cannot log this step \(No such file.*metrics.csv") as caught:
        log.write({"phase": "a", "step": 1}, 1)
    assert caught.value.errno == errno.ENOENT


# --- TensorBoard -----------------------------------------------------------------------------------------------


def events(folder):
    """What TensorBoard shows of a folder: the total loss by step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(folder))
    shown.Reload()
    return [event.step for event in shown.Scalars("total")] if "total" in shown.Tags()["scalars"] else []


def test_events_continue_where_the_run_does(tmp_path):
    path = tmp_path / "metrics.csv"
    logged(path, ("a", 1), ("a", 2), ("b", 1), ("b", 2))
    logged(path, ("b", 2), ("b", 3), at=("b", 1))  # stopped at b 1, and went on
    assert events(tmp_path / "tensorboard") == [1, 2, 11, 12, 13]
    logged(path, ("b", 5), at=("b", -1))  # the phase once more
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv", "tensorboard"]


def test_events_of_two_runs_do_not_mix(tmp_path):
    path = tmp_path / "metrics.csv"
    logged(path, ("a", 1), ("a", 2))
    logged(path, ("a", 5), ("a", 6))
    logged(path, ("a", 7), ("b", 1), at=("a", 6))
    logged(path, ("a", 3))
    found = {p.name: events(p) for p in tmp_path.glob("tensorboard*")}
    assert found == {"tensorboard": [1, 2], "tensorboard_2": [5, 6, 7, 11], "tensorboard_3": [3]}
    assert places(path) == [("a", 3)]


def test_a_run_that_logs_nothing_leaves_no_events(tmp_path):
    logged(tmp_path / "metrics.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
