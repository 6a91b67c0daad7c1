"""The layout, read out of the syntax trees: imports point down, every idea keeps to its owner, nothing is unsafe."""

import ast
import subprocess
import sys

import pytest

from tests.tiny import ROOT

LAYERS = (  # a module imports from the rows above its own, and from its own row; a wing is all modules in it
    ("grid", "runtime"),
    ("config",),
    ("datasets", "download", "pretrained", "deeplab_features", "losses", "metrics"),
    ("dataset",),
    ("model",),
    ("inference", "push"),
    ("module", "schedule"),
    ("explanation",),
    ("evaluation",),
    (
        "train",
        "evaluate",
        "prune",
        "explain",
        "predict",
        "benchmark",
        "example_usage",
        "download_voc",
        "download_datasets",
    ),
)
SCRIPTS = LAYERS[-1]
WINGS = ("runtime", "download", "datasets", "explanation", "evaluation")
FILES = sorted([*ROOT.glob("*.py"), *(path for wing in WINGS for path in (ROOT / wing).glob("*.py"))])
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in FILES
}
OWNERS = {"stride": ("grid", "deeplab_features"), "weight": ("model", "benchmark")}  # dilation; naive forms
CALLS = {  # what computes with its arguments without an operator, torch's in-place forms included
    "stride": {"divmod", "div", "floor_divide", "remainder", "fmod", "mul", "multiply", "range", "arange"},
    "weight": {"mul", "multiply", "matmul", "mm", "bmm", "mv", "einsum", "linear"},
}


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imported(tree) -> set[str]:
    """Dotted names of all that a module imports: `from a import b` is `a` and `a.b`; a relative import is `.`."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {"."} if node.level else {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(name: str) -> set[str]:
    """The project's modules that a module imports; a wing's name plate is none."""
    return (imported(tree_of(name)) & set(MODULES)) - set(WINGS)


def row(name: str) -> int:
    """The row of LAYERS that a module, or its wing, stands in."""
    return next(i for i, names in enumerate(LAYERS) if name.split(".")[0] in names)


def upward(name: str, imports: set[str]) -> set[str]:
    """Which of these imports run up, or from a script to a script."""
    return {other for other in imports if row(other) > row(name) or (other in SCRIPTS and other != name)}


# --- owners ----------------------------------------------------------------------------------------------------


def chain(node):
    """The links of `a.b[c].d()`, from the last to the first; `int(x)` and `float(x)` are x."""
    while node is not None:
        yield node
        if isinstance(node, ast.Call):
            is_cast = isinstance(node.func, ast.Name) and node.func.id in ("int", "float") and len(node.args) == 1
            node = node.args[0] if is_cast else node.func
        else:
            node = getattr(node, "value", None) if isinstance(node, (ast.Attribute, ast.Subscript)) else None


def is_idea(node, idea: str, aliases: frozenset = frozenset()) -> bool:
    """Whether an expression is a grid's stride or offset, or is made of the weight of a last layer."""
    for link in chain(node):
        if isinstance(link, ast.Name) and (link.id in aliases or (idea, link.id) == ("stride", "stride")):
            return True
        if isinstance(link, ast.Attribute) and idea == "stride" and link.attr in ("stride", "output_stride", "offset"):
            return True
        if idea == "weight" and ast.unparse(link).split(".")[-2:] == ["last_layer", "weight"]:
            return True
    return False


def operands(node, idea: str) -> list:
    """What a node computes with: all arithmetic for a stride, products for a weight."""
    is_product = isinstance(getattr(node, "op", None), (ast.Mult, ast.MatMult))
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and (idea == "stride" or is_product):
        return [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
    if idea == "stride" and isinstance(node, (ast.UnaryOp, ast.Slice)):
        return [getattr(node, "operand", None) or getattr(node, "step", None)]
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called.rstrip("_") in CALLS[idea]:
            return [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
    return []


def aliases_of(function, idea: str) -> frozenset:
    """The names that a function gives to the idea: `s = grid.stride`, `s, n = grid.stride, 3`."""
    pairs = []
    for node in ast.walk(function):
        if isinstance(node, (ast.Assign, ast.NamedExpr)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                pairs += zip(target.elts, node.value.elts, strict=False) if both else [(target, node.value)]
    return frozenset(t.id for t, value in pairs if isinstance(t, ast.Name) and is_idea(value, idea))


def computed_with(tree, idea: str) -> set[int]:
    """The lines that compute with an idea, under its own name or under one that a function gave it."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    return {
        getattr(node, "lineno", 0) or node.step.lineno
        for scope, aliases in [(tree, frozenset()), *((f, aliases_of(f, idea)) for f in functions)]
        for node in ast.walk(scope)
        if any(is_idea(operand, idea, aliases) for operand in operands(node, idea))
    }


@pytest.mark.parametrize("idea", OWNERS)
def test_only_its_owner_computes_with_a_grids_stride_or_the_last_layers_weight(idea):
    lines = {name: computed_with(tree_of(name), idea) for name in MODULES if name not in OWNERS[idea]}
    assert {name: sorted(found) for name, found in lines.items() if found} == {}


@pytest.mark.parametrize(
    ("idea", "source"),
    [
        ("stride", "x = column * model.grid.stride"),
        ("stride", "x = (n - 1) // features.output_stride + 1"),
        ("stride", "x = pixel - grid.offset"),
        ("stride", "x = -int(grid.offset)"),
        ("stride", "def f(x, stride):\n    return x % stride"),
        ("stride", "def f(grid):\n    s, n = grid.stride, 3\n    return n // s"),
        ("stride", "def f(grid):\n    if s := grid.stride:\n        return lambda x: x * s"),
        ("stride", "x *= grid.stride"),
        ("stride", "x = labels[:, :: grid.stride]"),
        ("stride", "x = divmod(y, grid.stride)"),
        ("stride", "x = torch.arange(0, n, self.grid.stride)"),
        ("weight", "x = model.last_layer.weight @ activations"),
        ("weight", "x = self.model.last_layer.weight[classes].movedim(-1, 1) * activations"),
        ("weight", "def f(net):\n    weight = net.last_layer.weight.detach()\n    return activations @ weight.T"),
        ("weight", "x = F.linear(activations, net.last_layer.weight)"),
        ("weight", "x = net.last_layer.weight[:, p].mul_(2)"),
        ("weight", "net.last_layer.weight *= 2"),
    ],
)
def test_what_computes_with_an_idea_is_found(idea, source):
    assert computed_with(ast.parse(source), idea)


@pytest.mark.parametrize(
    ("idea", "source"),
    [
        ("stride", "x = grid.cells(n) * 2; nn.Conv2d(3, 8, 3, stride=2); Grid(stride=16, offset=7.5)"),
        ("stride", "values = {'stride': model.grid.stride, 'offset': model.grid.offset}"),
        ("weight", "def f(net, x):\n    weight = net.last_layer.weight\n    return l1_loss(weight, x) * 2"),
        ("weight", "x = net.last_layer.weight.shape; y = net.other.weight * 2"),
    ],
)
def test_what_only_hands_an_idea_on_is_not(idea, source):
    assert not computed_with(ast.parse(source), idea)


# --- imports ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    assert name.split(".")[0] in {known for names in LAYERS for known in names}, f"{name}: give it a place in LAYERS"
    assert upward(name, ours(name)) == set()
    assert "." not in imported(tree_of(name)), "imports are absolute, from the root"


def test_an_import_that_runs_up_is_found():
    assert upward("runtime.checkpoint", {"config", "grid"}) == {"config"}
    assert upward("explanation.gallery", {"evaluation.report", "push"}) == {"evaluation.report"}
    assert upward("train", {"evaluate", "module"}) == {"evaluate"}
    assert upward("model", {"train", "model"}) == {"train"}
    assert imported(ast.parse("def f():\n    from a.b import c\nfrom . import d")) == {"a.b", "a.b.c", "."}


def test_imports_have_no_circle():
    left = {name: ours(name) for name in MODULES}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("wing", WINGS)
def test_a_wings_name_plate_is_a_docstring(wing):
    tree = tree_of(wing)
    assert ast.get_docstring(tree) and len(tree.body) == 1


def test_modules_import_in_an_empty_folder_and_do_nothing(tmp_path):
    code = f"import {', '.join(MODULES)}, os, sys, torch; print(os.listdir(), torch.cuda.is_initialized())"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[] False\n")


# --- safety ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_the_source_has_nothing_unsafe(name):
    source = MODULES[name].read_text(encoding="utf-8")
    assert ".cuda(" not in source and "weights_only=False" not in source
    tree = ast.parse(source)
    assert not {n.split(".")[0] for n in imported(tree)} & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        called = ast.unparse(call.func)
        assert called not in ("eval", "exec", "os.system")
        if called == "torch.load":
            assert "weights_only=True" in ast.unparse(call)
