"""The smoke test is itself tested: it runs through, and it fails when a part fails."""

import subprocess
import sys

import pytest

import example_usage


def test_all_parts_work(capsys):
    example_usage.main()
    printed = capsys.readouterr().out
    for part in ("dummy model", "warmup", "joint", "push", "finetune", "save and load", "explanation"):
        assert f"\n{part}" in f"\n{printed}"
    assert "all parts work" in printed


def test_exit_code_tells_of_a_failing_part():
    code = "import example_usage as e; e.dummy_model = lambda: e._expect(False, 'broken'); e.run(e.main)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode != 0


def test_a_broken_push_is_noticed(monkeypatch):
    monkeypatch.setattr(example_usage.PPNet, "project_prototypes", lambda self, vectors: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        example_usage.main()
