"""`python predict.py`: masks where they belong, the labels of evaluate.py, and no photograph that stops the others."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from datasets.base import ClassMapping, DatasetError, normalize, read_image
from evaluation.labelling import View, label_image
from grid import IGNORE
from inference import Inference, open_model
from runtime.command import Interrupted, stop_flag
from runtime.errors import ConfigError
from tests.explained import make_checkpoint

PALETTE = [(10 * c, 255 - 10 * c, c) for c in range(6)]


@pytest.fixture
def model(workdir):
    def change(state):
        state.update(palette=PALETTE, file_ids=[7, 8, 11, 26, 0, 200])
        state["model"]["features.aspp.branches.0.weight"] *= 1000  # so that not all cells are of one class
        state["model"]["last_layer.weight"] -= state["model"]["last_layer.weight"].mean(1, keepdim=True)

    make_checkpoint("a.pth", change=change)
    return "a.pth"


def photo(path, size=(50, 37), seed=0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((7, 5)).resize(size, Image.Resampling.NEAREST).save(path, **how)
    return path


def run(*arguments):
    predict.main(["--checkpoint", "a.pth", *map(str, arguments)])


def written(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def expected(path):
    """The classes of evaluate.py's labelling, upright."""
    inference = open_model("a.pth").inference
    return label_image(inference, normalize(read_image(path, upright=True))[None], View())[0][0].numpy()


def test_masks_have_the_labels_of_evaluation_the_ids_of_the_files_and_the_colours(workdir, model):
    path = photo(workdir / "in" / "street.jpg")
    run(path, "--out", "out")
    mask = Image.open("out/street.png")
    assert mask.mode == "P" and mask.size == (50, 37)
    ids, classes = np.array([7, 8, 11, 26, 0, 200]), expected(path)
    assert len(np.unique(classes)) > 1
    np.testing.assert_array_equal(np.array(mask), ids[classes])
    np.testing.assert_array_equal(np.array(mask.convert("RGB")), np.array(PALETTE, np.uint8)[classes])


def test_a_folder_keeps_its_subfolders_and_what_is_broken_is_skipped(workdir, model, capsys):
    photo(workdir / "in" / "a.jpg"), photo(workdir / "in" / "deep" / "er" / "a.PNG", seed=1)
    photo(workdir / "in" / ".hidden" / "x.jpg"), photo(workdir / "in" / "._a.jpg")
    (workdir / "in" / "broken.jpg").write_bytes(b"no picture")
    (workdir / "in" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="1 of 3 photographs could not be read"):
        run("in", "--out", "out", "--overlay", "--probabilities")
    assert "skipped: " in (said := capsys.readouterr().err) and "broken.jpg" in said and said.count("skipped") == 1
    names = ["a", "deep/er/a"]
    kinds = (".png", "_overlay.png", "_probabilities.npz")
    assert written(workdir / "out") == sorted([f"{n}{k}" for n in names for k in kinds] + ["predictions.json"])
    assert Image.open("out/a_overlay.png").size == Image.open("out/a.png").size
    values = np.load("out/a_probabilities.npz")["probabilities"]
    assert values.shape == (6, 37, 50) and np.allclose(values.astype(float).sum(0), 1, atol=5e-3)
    chosen = np.take_along_axis(values, expected("in/a.jpg")[None], 0)[0]
    assert (chosen >= values.max(0) - 1e-3).all()  # half precision makes ties


def test_two_of_one_stem_keep_their_suffix_and_names_never_meet(workdir, model):
    for name in ("a.jpg", "a.png", "b.jpg", "b_overlay.jpg", "c.jpg"):
        photo(workdir / "in" / name)
    run("in", "--out", "out", "--overlay")
    masks = {"a.jpg", "a.png", "b.jpg", "b_overlay.jpg", "c"}
    assert written(workdir / "out") == sorted(
        [f"{m}.png" for m in masks] + [f"{m}_overlay.png" for m in masks] + ["predictions.json"]
    )
    photo(workdir / "other" / "c.jpg")
    with pytest.raises(ConfigError, match="would get one mask"):
        run("in", "other", "--out", "out2")
    assert not (workdir / "out2").exists()


@pytest.mark.parametrize("orientation", [3, 6])
def test_photographs_are_labelled_upright(workdir, model, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = photo(workdir / "a.jpg", exif=exif, quality=95)
    run(path, "--out", "out")
    mask = Image.open("out/a.png")
    assert mask.size == ((50, 37) if orientation == 3 else (37, 50))
    np.testing.assert_array_equal(np.array(mask), np.array([7, 8, 11, 26, 0, 200])[expected(path)])


def test_transparent_and_sixteen_bit_photographs(workdir, model, capsys):
    photo(workdir / "in" / "rgba.png")
    Image.open(workdir / "in" / "rgba.png").convert("RGBA").save(workdir / "in" / "rgba.png")
    Image.fromarray(np.full((20, 30), 40_000, np.uint16)).save(workdir / "in" / "deep.png")
    with pytest.raises(DatasetError, match="1 of 2"):
        run("in", "--out", "out")
    assert "deep.png: more than 8 bits" in capsys.readouterr().err and (workdir / "out" / "rgba.png").is_file()


def test_large_photographs_go_by_windows_as_evaluation_does(workdir, model, monkeypatch):
    monkeypatch.setattr(predict, "LARGE", 40 * 40)
    monkeypatch.setattr(predict, "WINDOW", 33)
    path = photo(workdir / "a.png", size=(90, 60))
    run(path, "--out", "out")
    inference = open_model("a.pth").inference
    classes = label_image(inference, normalize(read_image(path))[None], View(window=33))[0][0].numpy()
    np.testing.assert_array_equal(np.array(Image.open("out/a.png")), np.array([7, 8, 11, 26, 0, 200])[classes])


def test_a_run_that_was_stopped_goes_on_where_it_stopped(workdir, model, monkeypatch, capsys):
    for i in range(4):
        photo(workdir / "in" / f"{i}.png", seed=i)
    real, done = predict.label_photograph, []

    def stopping(*arguments):
        real(*arguments)
        done.append(arguments[2].name)
        if len(done) == 2:
            monkeypatch.setattr(stop_flag, "signum", 15)

    monkeypatch.setattr(predict, "label_photograph", stopping)
    with pytest.raises(Interrupted, match="the same command goes on"):
        run("in", "--out", "out")
    monkeypatch.setattr(stop_flag, "signum", None)
    run("in", "--out", "out")
    assert done == ["0", "1", "2", "3"] and "2 masks" in (said := capsys.readouterr().out) and "(2 were there)" in said
    os.utime("in/1.png", (2e9, 2e9))  # a photograph that was changed is labelled anew
    run("in", "--out", "out")
    assert done[4:] == ["1"]


def test_masks_of_another_model_and_foreign_files_stay(workdir, model):
    path = photo(workdir / "in" / "a.png")
    run(path, "--out", "out")
    before = (workdir / "out" / "a.png").read_bytes()
    with pytest.raises(ConfigError, match="another model, or made with other options"):
        run(path, "--out", "out", "--overlay")
    with pytest.raises(ConfigError, match="holds a.png, which this project did not write"):
        run("in", "--out", "in")
    assert (workdir / "out" / "a.png").read_bytes() == before and written(workdir / "in") == ["a.png"]


@pytest.mark.parametrize("name", ["nothing.jpg", "empty"])
def test_what_is_not_there_is_named(workdir, model, name):
    (workdir / "empty").mkdir()
    with pytest.raises(DatasetError):
        run(name, "--out", "out")


def test_checkpoints_without_ids_and_colours_give_the_classes_numbers(workdir):
    make_checkpoint("a.pth", change=lambda state: state.update(palette=[], file_ids=[], class_names=[]))
    path = photo(workdir / "a.png")
    run(path, "--out", "out")
    np.testing.assert_array_equal(np.array(Image.open("out/a.png")), expected(path))
    assert json.loads((workdir / "out" / "predictions.json").read_text())["overlay"] is False


@pytest.mark.parametrize("values", [1, 7 * 9 * 2, 10**9])
def test_classes_in_pieces_are_the_classes_in_one_go(values, monkeypatch):
    import inference as module

    class Net(torch.nn.Module):
        from grid import Grid

        grid = Grid()

    monkeypatch.setattr(module, "MOST_VALUES", values)
    labelling = Inference(Net(), torch.device("cpu"))
    logits = torch.randint(0, 3, (2, 11, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    found = labelling.classes(logits, (7, 9))
    assert torch.equal(found, labelling.upsample(logits, (7, 9)).argmax(1))


def test_a_mapping_knows_the_ids_of_its_files():
    mapping = ClassMapping(("a", "b"), ((0, 0, 0), (1, 1, 1)), {0: IGNORE, 7: 0, 26: 1})
    assert mapping.file_ids == (7, 26)
    assert mapping._replace(id_to_class={7: 0}).file_ids == ()
