"""The layout, read out of the syntax trees: imports point one way, scripts import no script, nothing is unsafe."""

import ast
import subprocess
import sys

import pytest

from tests.tiny import ROOT

WINGS = ("runtime", "download", "datasets", "explanation", "evaluation")
FILES = sorted([*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).glob("*.py"))])
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in FILES
}
SCRIPTS = {"train", "evaluate", "prune", "explain", "benchmark", "example_usage", "download_voc", "download_datasets"}


def imported(tree) -> set[str]:
    """Dotted names of all that a module imports: `from a import b` is `a` and `a.b`."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(name: str) -> set[str]:
    """The project's modules that a module imports; a wing's name plate is none."""
    return (imported(ast.parse(MODULES[name].read_text())) & set(MODULES)) - set(WINGS)


def test_modules_import_in_an_empty_folder_and_do_nothing(tmp_path):
    code = f"import {', '.join(MODULES)}, os, sys, torch; print(os.listdir(), torch.cuda.is_initialized())"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[] False\n")


@pytest.mark.parametrize("name", MODULES)
def test_the_source_has_nothing_unsafe(name):
    source = MODULES[name].read_text()
    assert ".cuda(" not in source and "weights_only=False" not in source
    tree = ast.parse(source)
    assert not {n.split(".")[0] for n in imported(tree)} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec", "os.system")
        if called == "torch.load":
            assert "weights_only=True" in ast.unparse(call)


def test_no_script_is_imported():
    assert {name: ours(name) & SCRIPTS for name in MODULES if ours(name) & SCRIPTS} == {}


def test_imports_have_no_circle():
    left = {name: ours(name) for name in MODULES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}
