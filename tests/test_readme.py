"""The README and docs/ are held to their word: commands parse, code runs, links lead somewhere, figures are those of
the results, and messages name pages and sections that exist."""

import argparse
import ast
import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import config
import dataset
import deeplab_features
import losses
import module
from model import construct_PPNet
from runtime.provenance import VERSION
from tests.test_architecture import MODULES, SCRIPTS, WINGS

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
}
README, EXTENDING = PAGES["README.md"], PAGES["docs/extending.md"]
PLACEHOLDERS = {"FILE": "config.yaml", "N": "1", "WINDOW": "513"}


def shell_commands(text: str) -> list[list[str]]:
    """The commands of a page, as words: in blocks (fenced as sh, or indented) and between backticks."""
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    blocks += re.findall(r"(?:^    .*\n)+", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    blocks += re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    commands = []
    for block in blocks:
        pending = ""
        for line in block.splitlines():
            pending += line.rstrip("\\") + "\n"
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:
                continue  # within quotes
            if not line.endswith("\\"):
                commands.append(words)
                pending = ""
    return commands


def script_calls(text: str) -> list[tuple[str, ...]]:
    """The calls of scripts at the top, with arguments that can be parsed: no shell variables, nothing left out."""
    calls = set()
    for words in shell_commands(text):
        for i, word in enumerate(words):
            if re.fullmatch(r"\w+\.py", word) and word != "SCRIPT.py" and {"python", "torchrun"} & set(words[:i]):
                arguments = [PLACEHOLDERS.get(w, w) for w in words[i + 1 :]]
                if not any("$" in w or w.startswith("[as") or w == "--help" for w in arguments):
                    calls.add((word, *arguments))
    return sorted(calls)


CALLS = sorted({call for text in PAGES.values() for call in script_calls(text)})


class Parsed(Exception):
    pass


def test_the_commands_are_found():
    assert {call[0] for call in CALLS} == {f"{name}.py" for name in (*SCRIPTS, "dataset")}
    assert len(script_calls(README)) >= 12


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_every_command_parses(call, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    script = importlib.import_module(call[0].removesuffix(".py"))
    if call[0] == "example_usage.py":
        return  # takes no arguments
    with pytest.raises(Parsed):
        script.main(list(call[1:]))


# --- what stands where -----------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.encode()) <= 9_000


def test_the_order_of_reading_names_every_file_and_every_wing():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README or f"python {path.name}" in README, path.name
    for wing in WINGS:
        assert f"`{wing}/`" in README, wing


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    known = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    if page not in ("CHANGELOG.md", "docs/reliability.md"):  # these tell of files as they were called
        for name in re.findall(r"`([\w/]+\.(?:py|yaml))`", PAGES[page]):
            made = name.startswith("results/") or name in ("datasets/roads.py", "SCRIPT.py")
            assert made or (ROOT / name).is_file() or name in known, name
    for path in re.findall(r"\bconfigs?/?\w*\.yaml", PAGES[page]):
        assert (ROOT / path).is_file(), path


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_index_names_every_page():
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({Path(page).name})" in PAGES["docs/README.md"], page


def test_nothing_is_left_to_fill_in():
    for page, text in PAGES.items():
        names = r"\b(?!RLIMIT_)[A-Z]{3,}_[A-Z_]{3,}[A-Z0-9]*\b(?![^`\n]*`)"
        assert not re.findall(names + r"|\b(?:TODO|TRACE|ABLATIONS)\b", text), page


def test_the_figures_of_the_readme_are_those_of_the_results():
    table = README.split("| CamVid, validation | |")[1].split("\n\n")[0]
    found = re.findall(r"\d+\.\d ± \d\.\d", table)
    rows = PAGES["docs/results.md"].splitlines()
    model = next(row for row in rows if row.startswith("| settled, push, finetuned |"))
    twin = next(row for row in rows if row.startswith("| twin, 100 + 600 + 300 steps |"))
    assert len(found) == 3 and found[0] in model and found[1] in twin and found[2] in model


def test_settings_table_matches_the_configurations():
    for name, classes, prototypes, window in (
        ("config.yaml", 19, 190, 513),
        ("configs/pascal.yaml", 21, 210, 321),
        ("configs/camvid.yaml", 11, 110, 321),
        ("configs/camvid_small.yaml", 11, 110, 145),
        ("configs/demo.yaml", 6, 30, 129),
    ):
        loaded = config.load_config(name)
        assert (loaded.model.num_classes, loaded.model.prototype_shape[0], loaded.dataset.crop_size) == (
            classes,
            prototypes,
            window,
        )
        steps = " / ".join(f"{phase.steps:,}" for phase in loaded.training.phases)
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert all(str(value) in row for value in (classes, prototypes, window, steps)), row


# --- messages --------------------------------------------------------------------------------------------------


def texts(tree: ast.Module) -> list[str]:
    """The literal text of a module, each string whole: neighbours, f-strings and sums are joined."""

    def text(node) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(part) or "{}" for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts = text(node.left), text(node.right)
            return "".join(part or "{}" for part in parts) if any(parts) else None
        return None

    return [found for node in ast.walk(tree) if (found := text(node))]


def missing_sections(source: str) -> set[str]:
    """Pages and sections that a module's text names and that are not there."""
    missing = set()
    for message in texts(ast.parse(source)):
        for page in re.findall(r"\b(?:docs/)?\w+\.md\b", message):
            missing |= {page} - PAGES.keys()
        for section, page in re.findall(r"'([^']+)' in (?:the )?((?:docs/)?\w+\.md|README)\b", message):
            headings = re.findall(r"^#+ (.+)$", PAGES.get(page.replace("README", "README.md", 1), ""), re.MULTILINE)
            missing |= {f"'{section}' in {page}"} - {f"'{heading}' in {page}" for heading in headings}
    return missing


@pytest.mark.parametrize("name", MODULES)
def test_messages_name_sections_that_exist(name):
    assert missing_sections(MODULES[name].read_text(encoding="utf-8")) == set()


def test_a_message_that_names_a_section_in_vain_is_found():
    assert missing_sections("raise E('a' f'{b}' + \" see 'Data' \" 'in the README')") == {"'Data' in README"}
    assert missing_sections("x = \"'Nothing' in docs/troubleshooting.md\"") == {"'Nothing' in docs/troubleshooting.md"}
    assert missing_sections("x = 'see docs/no_page.md'") == {"docs/no_page.md"}
    assert not missing_sections("x = \"'It diverges' in docs/troubleshooting.md; 'Limits' in the README\"")


# --- code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "```python" in text])
def test_code_imports_what_there_is(page):
    ours = {name.split(".")[0] for name in MODULES}
    for code in re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            name = node.module if isinstance(node, ast.ImportFrom) else ""
            if name.split(".")[0] in ours and name != "datasets.roads":  # the example itself
                there = vars(importlib.import_module(name))
                assert {alias.name for alias in node.names} <= there.keys(), ast.unparse(node)


def block(language: str, marker: str) -> str:
    found = [b for b in re.findall(rf"```{language}\n(.*?)```", EXTENDING, flags=re.DOTALL) if marker in b]
    assert len(found) == 1, f"one {language} block with {marker!r}"
    return found[0]


def test_data_set_example(tmp_path, monkeypatch):
    for folder, suffix, pixels in (
        ("photos", "jpg", np.full((40, 60, 3), 90, np.uint8)),
        ("masks", "png", np.repeat(np.array([0, 7, 26], np.uint8), 20)[None].repeat(40, 0)),
    ):
        (tmp_path / folder / "train").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / folder / "train" / f"one.{suffix}")
    roads = types.ModuleType("datasets.roads")
    exec(block("python", "class RoadsDataset"), vars(roads))  # noqa: S102
    monkeypatch.setitem(sys.modules, "datasets.roads", roads)
    try:
        exec(block("python", "from datasets.roads"), dict(vars(dataset)))  # noqa: S102
        data = config.DatasetConfig(name="roads", root=str(tmp_path))
        model = config.ModelConfig(num_classes=2, prototype_shape=(20, 64, 1, 1))
        samples = dataset.build_dataset(config.Config(dataset=data, model=model), "train")
        assert samples[0][1][0, ::20].tolist() == [255, 0, 1]
    finally:
        dataset.DATASETS.pop("roads", None)


def test_backbone_example():
    try:
        exec(block("python", "resnext50"), dict(vars(deeplab_features)))  # noqa: S102
        chosen = config.ModelConfig(
            num_classes=2, backbone="resnext50", pretrained="none", prototype_shape=(4, 8, 1, 1)
        )
        assert construct_PPNet(chosen).eval()(torch.zeros(1, 3, 33, 41)).logits.shape == (1, 2, 5, 6)
    finally:
        deeplab_features.BACKBONES.pop("resnext50", None)


def test_features_example():
    names: dict = {}
    exec(block("python", "class Patches"), names)  # noqa: S102
    assert names["labels"].shape == (1, 50, 70)
    assert names["model"](torch.zeros(1, 3, 64, 80)).logits.shape == (1, 3, 4, 5)


def test_loss_example(monkeypatch):
    names = dict(vars(losses))
    exec(block("python", "def spread_loss"), names)  # noqa: S102
    prototypes = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])[..., None, None]
    classes = torch.tensor([0, 0, 1, 1])
    assert names["spread_loss"](prototypes, classes).value.item() == pytest.approx((1 + np.exp(-1)) / 2)
    assert names["spread_loss"](prototypes, torch.arange(4)).value == 0
    monkeypatch.setattr(module, "LOSSES", dict(module.LOSSES))
    exec(block("python", 'LOSSES["spread"]'), vars(module) | {"spread_loss": names["spread_loss"]})  # noqa: S102
    what, loss = module.LOSSES["spread"]
    model = types.SimpleNamespace(prototype_vectors=prototypes)
    inputs = module.LossInputs(model, None, None, None, None, classes)
    assert what == "weights" and loss(inputs).value.item() == pytest.approx((1 + np.exp(-1)) / 2)


def test_schedule_example():
    raw, _ = config.parse_yaml(block("yaml", "prototypes, steps"))
    assert [phase.name for phase in config.config_from_dict(raw).training.phases][2] == "prototypes"


# --- the version -----------------------------------------------------------------------------------------------


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    newest = re.findall(r"^## (\d+\.\d+\.\d+)$", PAGES["CHANGELOG.md"], flags=re.MULTILINE)[0]
    assert citation["version"] == newest == VERSION


def test_the_citation_has_what_the_format_needs_and_names_the_paper_of_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert paper["year"] == 2023 and names == ["Sacha", "Rymarczyk", "Struski", "Tabor", "Zieliński"]
    assert paper["title"] in README.replace("{ProtoSeg}", "ProtoSeg").replace("{", "").replace("}", "")
