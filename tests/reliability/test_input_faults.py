"""Input that nobody would write, and some that people do: configurations, images, labels, degenerate data, hostile
names (rows 17 to 19 and 27 of the fault battery), and that everything is checked before the first step.

What must hold: one line for each problem, all problems at once, exit code 2, never a traceback.
"""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import train
from config import Config, config_to_dict, load_config
from dataset import open_dataset
from datasets.base import MAX_PIXELS, DatasetError
from explanation.prototype_pictures import draw_prototypes
from runtime.checkpoint import load_checkpoint, load_tensors
from runtime.errors import ConfigError
from tests.tiny import ROOT


def examples(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


# --- row 17: fuzzed configurations -------------------------------------------------------------------------------

KEYS = ["dataset", "model", "training", "system", "paths", "phases", "lr", "steps", "name", "batch_size", "<<", "é"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(10**18, 10**40), st.floats(), st.text(max_size=8),
    st.sampled_from(["1e-4", "nan", ".inf", "2001-01-01", "0x10", "1:30", "no", "auto", "~"]),
)  # fmt: skip
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=5), st.integers()), inner, max_size=4),
    ),
    max_leaves=12,
)
PUBLISHED = yaml.safe_load((ROOT / "config.yaml").read_text())


@st.composite
def mutated(draw):
    """A valid configuration in which up to three places are dropped, renamed by a letter, or given another value."""
    tree = yaml.safe_load(yaml.safe_dump(PUBLISHED))
    for _ in range(draw(st.integers(1, 3))):
        target = tree
        while True:
            key = draw(st.sampled_from(sorted(target, key=str) if isinstance(target, dict) else range(len(target))))
            if not isinstance(target[key], (dict, list)) or not target[key] or draw(st.integers(0, 3)) == 0:
                break
            target = target[key]
        if draw(st.booleans()):
            target[key] = draw(TREES)
        elif isinstance(target, dict):
            value = target.pop(key)
            if draw(st.booleans()):
                target[str(key)[:-1] + draw(st.characters(codec="utf-8"))] = value
        elif len(target) > 1:
            del target[key]
    return yaml.safe_dump(tree, allow_unicode=True)


TEXTS = st.one_of(
    st.text(), TREES.map(lambda tree: yaml.safe_dump(tree, allow_unicode=True)), mutated(),
    st.text(alphabet="{}[]:,-&*!|>'\"%@`#? \n\taé0", max_size=40),
)  # fmt: skip
NASTY = [
    "&a [*a]", "a: &x 1\nb: *x", "[" * 5000, "{a: " * 3000, "!!int ''", "!!bool maybe", "!!float x", "!!timestamp x",
    "!!binary '*'", "!!python/object/apply:os.system ['true']", "? [a, b]\n: c",
    "training: {batch_size: 0x" + "f" * 4000 + "}",
    "training: {batch_size: " + "9" * 5000 + "}", "training: {seed: 1" + "0" * 30 + "}", "a: 1\na: 2", "---\n---\n",
    "%YAML 9.9\n---\na", "\x00", "\ufeff", "training: {phases: {0: 1}}", "model: {prototype_shape: [1e3, 64, 1, 1]}",
    "<<: {model: {}}", "model: !!set {a, b}", "training: !!omap [a: 1]", "2001-02-30: x",
    "system: {num_workers: 1000000}",
    "dataset: {crop_size: 8000001}", "training: {weight_decay: .inf}", "training: {phases: []}",
]  # fmt: skip


def loads_or_refuses(path):
    try:
        config = load_config(path)
    except ConfigError as error:
        told = str(error)
        assert error.exit_code == 2 and told and str(path) in told
        return told
    assert isinstance(config, Config)
    path.write_text(yaml.safe_dump(config_to_dict(config)), encoding="utf-8")
    assert load_config(path) == config
    return None


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_row_17_nasty_configurations(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    told = loads_or_refuses(tmp_path / "x.yaml")
    assert told or text in ("\ufeff",)


def fuzz_configurations(folder, count):
    @examples(count)
    @given(TEXTS)
    @example("training: {batch_sise: 1}")
    def check(text):
        path = folder / "x.yaml"
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        told = loads_or_refuses(path)
        try:
            tree = yaml.safe_load(text)
        except Exception:
            return
        if isinstance(tree, dict) and any(key not in PUBLISHED for key in tree):
            assert told is not None, "an unknown key has to be told"

    check()


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_row_17_fuzzed_configurations(tmp_path, count):
    fuzz_configurations(tmp_path, count)


@pytest.mark.parametrize("count", [200, pytest.param(5_000, marks=pytest.mark.nightly)])
def test_row_17_fuzzed_overrides(tmp_path, count):
    (tmp_path / "x.yaml").write_text("")
    keys = st.sampled_from(
        ["training.phases.0.steps", "model.prototype_shape.9", "training", "", ".", "a.b", "dataset.root"]
    )

    @examples(count)
    @given(st.lists(st.one_of(st.text(), st.tuples(keys, st.text(max_size=9)).map("=".join)), max_size=3))
    def check(overrides):
        try:
            assert isinstance(load_config(tmp_path / "x.yaml", overrides), Config)
        except ConfigError:
            pass

    check()


# --- row 18: fuzzed images and labels ----------------------------------------------------------------------------


def encoded(mode, size, form, ids=3, **how):
    """An image file of random values, of a mode."""
    values = np.random.default_rng(1).integers(0, ids, (size[1], size[0] * len(mode)), dtype=np.uint8)
    if mode in ("RGB", "RGBA", "LA", "CMYK"):
        image = Image.frombytes(mode, size, values.tobytes())
    else:
        image = Image.frombytes("L", size, values[:, : size[0]].tobytes()).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def png_of_size(width, height):
    """A PNG whose header claims a size, with almost nothing in it."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


SIZE = (20, 12)
GOOD = [encoded("RGB", SIZE, "PNG"), encoded("L", SIZE, "PNG"), encoded("P", SIZE, "PNG"), encoded("RGB", SIZE, "JPEG"),
        encoded("RGB", SIZE, "BMP"), encoded("RGB", SIZE, "WEBP")]  # fmt: skip
ODD = {
    "empty": b"", "text": b"not an image", "1 bit": encoded("1", SIZE, "PNG"), "LA": encoded("LA", SIZE, "PNG"),
    "RGBA": encoded("RGBA", SIZE, "PNG"), "CMYK": encoded("CMYK", SIZE, "JPEG"), "16 bit": encoded("I;16", SIZE, "PNG"),
    "32 bit": encoded("I", SIZE, "TIFF"), "float": encoded("F", SIZE, "TIFF"), "GIF": encoded("P", SIZE, "GIF"),
    "another size": encoded("L", (12, 20), "PNG"), "one pixel": encoded("L", (1, 1), "PNG"),
    "width 0": png_of_size(0, 12), "a bomb": png_of_size(9000, 9000), "a larger bomb": png_of_size(60_000, 60_000),
    "more than there is": png_of_size(*SIZE),
    "palette of transparency": encoded("P", SIZE, "PNG", transparency=b"\0" * 9),
    "animated": encoded("RGB", SIZE, "PNG", save_all=True, append_images=[Image.new("RGB", SIZE)]),
    "ids that are not there": encoded("L", SIZE, "PNG", ids=200),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A data set of one image, and a function that replaces its image or label and reads the item."""
    for name in ("images/train", "labels/train"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    (tmp_path / "x.yaml").write_text(f"dataset: {{name: folder, root: '{tmp_path}'}}")
    image, label = tmp_path / "images/train/a.png", tmp_path / "labels/train/a.png"
    image.write_bytes(GOOD[0])
    label.write_bytes(GOOD[1])
    config = load_config(tmp_path / "x.yaml").dataset

    def read(body, is_label):
        image.write_bytes(GOOD[0] if is_label else body)
        label.write_bytes(body if is_label else GOOD[1])
        try:
            pixels, classes = open_dataset(config, "train")[0]
        except DatasetError as error:
            told = str(error)
            assert "\n" not in told and ("a.png" in told), told
            return told
        assert pixels.shape[1:] == classes.shape and pixels.isfinite().all()
        assert set(classes.unique().tolist()) <= {0, 1, 2, 255}
        return None

    return read


@pytest.mark.parametrize("is_label", [False, True], ids=["image", "label"])
@pytest.mark.parametrize("case", ODD)
def test_row_18_odd_files(folder, case, is_label):
    told = folder(ODD[case], is_label)
    if case in (
        "empty",
        "text",
        "width 0",
        "a bomb",
        "a larger bomb",
        "more than there is",
        "another size",
        "one pixel",
    ):
        assert told
    if case == "a bomb":
        assert f"at most {MAX_PIXELS:,}" in told
    if is_label and case in ("LA", "RGBA", "CMYK", "16 bit", "32 bit", "float", "ids that are not there"):
        assert told


@pytest.mark.parametrize("cases", [400, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_row_18_harmed_files(folder, rng, cases):
    refused = 0
    for case in range(cases):
        body = bytearray(GOOD[case % len(GOOD)])
        harm = case // len(GOOD) % 4
        if harm == 0:
            del body[rng.randrange(len(body)) :]
        for _ in range((0, 1, 4, 0)[harm]):
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        if harm == 3:
            start = rng.randrange(len(body))
            body[start : start + 8] = rng.randbytes(rng.randrange(16))
        refused += folder(bytes(body), case % 2 == 0) is not None
    assert refused > cases / 4


# --- row 19: degenerate data -------------------------------------------------------------------------------------


def labelled(place, images, classes=3, size=40):
    """A folder data set; images: for each one the label that all its pixels have."""
    (place.folder / "data" / "classes.txt").parent.mkdir()
    (place.folder / "data" / "classes.txt").write_text("".join(f"class {c}\n" for c in range(classes)))
    for split in ("train", "val"):
        for i, value in enumerate(images):
            for kind, mode, color in (("images", "RGB", (40 * i, 90, 7)), ("labels", "L", value)):
                path = place.folder / "data" / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (size, size), color).save(path)
    classes_and_prototypes = (f"model.num_classes={classes}", "model.prototype_shape=[6,8,1,1]")
    return ("dataset.name=folder", "dataset.root=../data", *classes_and_prototypes)


DEGENERATE = {
    "one image": ("dataset.shapes.train_images=1", "dataset.shapes.val_images=1"),
    "batches of one": ("training.batch_size=1", "training.iter_size=1"),
    "a batch of more than all images": ("training.batch_size=8",),
    "an update at the end alone": ("training.iter_size=100",),
    "images smaller than the crop": ("dataset.crop_size=97", "dataset.shapes.image_size=33"),
    "hardly anything of an image": ("dataset.scale_range=[0.05, 0.05]",),
    "more prototypes than cells": ("model.prototype_shape=[600,8,1,1]",),
    "a date for a seed": ("training.seed=20261122",),
    "one step each": tuple(f"training.phases.{i}.steps=1" for i in range(3)),
    "sparse": ("training.phases.2.sparse=true", "training.phases.2.early_stopping=0", "training.loss_weights.l1=10"),
}
LABELS = {"one class in all": [1] * 4, "nothing labelled": [255] * 4, "a class in one image": [0, 0, 0, 2]}


@pytest.mark.parametrize("case", [*DEGENERATE, *LABELS])
def test_row_19_degenerate_data(place, case):
    place.overrides = list(DEGENERATE[case] if case in DEGENERATE else labelled(place, LABELS[case]))
    assert place.train("run") == 0
    for name in ("warmup", "joint", "push", "final"):
        state = load_checkpoint(place.folder / "run" / "models" / f"{name}_checkpoint.pth")
        assert all(value.isfinite().all() for value in state.model.values())
    if case in LABELS:
        absent = {0, 1, 2} - set(LABELS[case])
        assert all(f"class 'class {c}' never occurs in the training data" in place.said("run") for c in absent)


# --- everything is checked before the first step -----------------------------------------------------------------


def test_all_problems_of_a_run_are_told_at_once(place):
    """Data of both splits, and the checkpoint."""
    overrides = labelled(place, [0, 1, 2, 1])
    shutil.rmtree(place.folder / "data" / "labels" / "val")
    (place.folder / "data" / "images" / "train" / "0.png").write_bytes(b"rubbish")
    Image.new("L", (40, 40), 77).save(place.folder / "data" / "labels" / "train" / "3.png")
    place.overrides = [*overrides, "system.device=cuda:9"]
    assert place.train("run", "--resume", "nowhere.pth") == 3
    said = place.said("run")
    for told in (
        "nowhere.pth: there is no such", "cuda:9", "train/0.png: cannot read", "train/3.png: label ids 77",
        "4 files are missing",
    ):  # fmt: skip
        assert told in said, said
    assert all(line.startswith("error: ") for line in said.splitlines())
    assert not list((place.folder / "run").rglob("*.pth")) and not (place.folder / "run" / "results").exists()


def test_nothing_is_replaced_by_a_run_that_cannot_start(place):
    """With --overwrite: what stands there goes only when all is checked."""
    assert place.train("run") == 0
    run = place.folder / "run"
    warmup = run / "models" / "warmup_checkpoint.pth"
    state = load_tensors(warmup)
    del state["model"]["last_layer.weight"]
    torch.save(state, warmup)

    def files():
        return {p: p.read_bytes() for name in ("models", "results") for p in (run / name).rglob("*") if p.is_file()}

    before = files()
    usage = shutil.disk_usage(place.folder)._replace(free=0)
    assert place.train("run", "--overwrite", before=lambda: setattr(shutil, "disk_usage", lambda path: usage)) == 4
    assert "MB are free" in place.said("run")
    assert place.train("run", "--phase", "1", "--overwrite") == 3
    assert "last_layer.weight is missing" in place.said("run")
    assert files() == before


# --- row 27: hostile names ---------------------------------------------------------------------------------------
# The pages' own tests try hostile names of classes and files with a parser and a browser; here they go through a run.

NAMES = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "../../etc/passwd", "a\u202egnp", "x" * 200,
    "'; DROP TABLE", "{{7*7}}", "%s%n", "日本語", "con",
]  # fmt: skip


def test_row_27_hostile_names_go_through_a_run(place, monkeypatch):
    monkeypatch.setattr(train, "draw_prototypes", draw_prototypes)
    overrides = labelled(place, [0, 1, 2, 1], classes=10)
    data = place.folder / "data"
    (data / "classes.txt").write_text("\n".join(NAMES) + "\n")
    evil = [b"<img src=x>.png", b"a\nb.png", b"\xff\xfe.png", "ü\u202e.png".encode()]
    for kind in ("images", "labels"):
        for old, new in zip(sorted((data / kind / "train").iterdir()), evil, strict=True):
            old.rename(Path(os.fsdecode(os.fsencode(old.parent) + b"/" + new)))
    place.overrides = [*overrides, "model.prototype_shape=[20,8,1,1]"]
    assert place.train("run") == 0
    written = [path.relative_to(place.folder / "run") for path in (place.folder / "run").rglob("*") if path.is_file()]
    assert all(set(path.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-") for path in written)
    assert len([path for path in written if path.suffix == ".png"]) > 3
    records = load_checkpoint(place.folder / "run" / "models" / "final_checkpoint.pth").prototypes
    assert {r["class_name"] for r in records} == set(NAMES)
