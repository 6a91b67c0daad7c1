"""`python explain.py`: the report's files, what its pages say, and what no name or photograph can do to them."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import explain
from dataset import build_dataset
from datasets.base import ClassMapping, DatasetError
from datasets.scenes import ShapesDataset
from evaluation.labelling import View, label_image
from explanation import gallery, image_page
from explanation.gallery import count_decided, deciding_prototypes
from explanation.pages import render, script_json, write_page
from grid import Grid
from inference import Inference, open_model
from runtime.checkpoint import CheckpointError
from runtime.command import Interrupted, stop_flag
from runtime.errors import ConfigError
from runtime.files import MANIFEST, OutputFolder
from tests.explained import Page, Patches, check_folder, files, make_checkpoint, unpack
from tests.test_pixel_data import smooth_model
from tests.tiny import RandomImages, tiny_config, tiny_ppnet

CHECKPOINT = ["--checkpoint", "model.pth"]
HOSTILE = [
    "<script>alert(1)</script>", "../../x", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "a\nb\r\nc",
    "</", "x" * 300, "\u202egnp.exe", "{{ 7 * 7 }}{% raw %}", "&lt;b&gt;", "]]>--><!--", "\u2028",
    "javascript:alert(1)", "CON",
]  # fmt: skip


@pytest.fixture
def photograph():
    """A function that saves a small photograph."""

    def save(path, size=(50, 30), **how):
        pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **how)
        return str(path)

    return save


def explained(out, *arguments):
    explain.main([*CHECKPOINT, "--out", str(out), *arguments])
    check_folder(out)
    return Page(out / "index.html")


# --- what is written -------------------------------------------------------------------------------------------


def test_a_report_of_the_val_split(workdir, capsys):
    make_checkpoint("model.pth")
    index = explained(workdir / "out", "--count", "2", "--png")
    assert [name for name in files(workdir / "out") if "/" not in name] == [
        MANIFEST, "001-scene-val-00000.html", "001-scene-val-00000.png", "002-scene-val-00001.html",
        "002-scene-val-00001.png",
        "index.html", "report.json",
    ]  # fmt: skip
    assert "shapes · 12 prototypes of 6 classes · val mIoU 0.500" in index.text
    assert all(f"Prototype {p}" in index.text for p in range(12))
    assert "Purity" in index.text and "Decides" in index.text and "scene train" in index.text
    assert "12 prototypes and 2 images" in capsys.readouterr().out
    with Image.open(workdir / "out" / "001-scene-val-00000.png") as figure:
        assert figure.width > 640


def test_results_go_where_the_configuration_says(workdir):
    make_checkpoint("model.pth")
    explain.main([*CHECKPOINT, "--count", "1", "--set", "paths.results_dir=elsewhere"])
    assert (workdir / "elsewhere" / "explanations" / "index.html").is_file()


def test_a_page_holds_the_models_numbers(workdir):
    model = make_checkpoint("model.pth")
    explained(workdir / "out", "--count", "1")
    page = Page(workdir / "out" / "001-scene-val-00000.html")
    images, labels = build_dataset(tiny_config(), "val")[0]
    scores, _, prediction, truth = unpack(page.data)
    output = model(Grid().pad(images[None], 0.0))
    np.testing.assert_allclose(scores, output.logits[0].detach(), atol=5e-4)
    np.testing.assert_array_equal(truth, labels)
    np.testing.assert_array_equal(prediction, model.predict(images[None])[0].argmax(0))
    np.testing.assert_allclose(page.data["weights"], model.last_layer.weight.detach(), rtol=1e-6)
    assert f"{100 * (prediction == truth).mean():.1f} % of the labelled pixels are right" in page.text


def test_the_images_of_a_split_are_evenly_spread(workdir):
    dataset = build_dataset(tiny_config("dataset.shapes.val_images=10"), "val")
    assert [item.name[-2:] for item in explain.find_items([], dataset, 4)] == ["00", "02", "05", "07"]
    assert len(explain.find_items([], dataset, 99)) == 10


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files(folder)}


def test_a_second_report_replaces_the_first(workdir, photograph):
    make_checkpoint("model.pth")
    explained(workdir / "out", "--count", "2", "--png")
    explained(workdir / "out", photograph("a.png"))
    assert [name for name in files(workdir / "out") if not name.startswith("patches/")] == [
        MANIFEST, "001-a.html", "index.html", "photographs/001-a-small.jpg", "photographs/001-a.jpg", "report.json",
    ]  # fmt: skip


def own_photographs(folder, photograph):
    for name in ("2024-01.png", "2023-notes.html", "index.html", "photographs/2022-01.jpg", "patches/1-a.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    photograph(folder / "2024-02.png")


@pytest.mark.parametrize("out", ["album", ".", "album/", "../{here}/album", "link", "link/", "album/2024-02.png"])
def test_what_we_did_not_write_is_not_touched(workdir, photograph, out):
    make_checkpoint("model.pth")
    own_photographs(workdir / "album", photograph)
    (workdir / "link").symlink_to("album")
    before = contents(workdir)
    with pytest.raises(ConfigError, match="nothing was changed.*--out FOLDER") as caught:
        explain.main([*CHECKPOINT, "album", "--out", out.format(here=workdir.name)])
    assert contents(workdir) == before and caught.value.exit_code == 2


def test_a_folder_with_files_beside_the_report_is_refused_by_their_name(workdir, photograph):
    make_checkpoint("model.pth")
    explained(workdir / "out", photograph("a.png"))
    (workdir / "out" / "photographs" / "notes.txt").write_text("mine")
    before = contents(workdir)
    with pytest.raises(ConfigError, match="it holds photographs/notes.txt"):
        explain.main([*CHECKPOINT, "--out", "out", "a.png"])
    assert contents(workdir) == before


def test_an_album_may_hold_its_report(workdir, photograph):
    make_checkpoint("model.pth")
    (workdir / "album").mkdir()
    photograph("album/a.png")
    for _ in range(2):
        index = explained(workdir / "album" / "report", "album")
        assert [name for name in index.links if name.endswith(".html")] == ["001-a.html"]
    assert [name for name in files(workdir / "album") if not name.startswith("report/")] == ["a.png"]


@pytest.mark.parametrize("names", [["holiday.jgp"], ["gone/", "gone.png"], ["pipe.png"], ["/dev/zero"]])
def test_names_are_looked_at_before_anything_else(workdir, monkeypatch, names):
    make_checkpoint("model.pth")
    explained(workdir / "out", "--count", "1")
    os.mkfifo("pipe.png")
    before = contents(workdir / "out")
    monkeypatch.setattr(explain, "open_model", None)
    with pytest.raises(DatasetError, match="no such photograph|not a file"):
        explain.main([*CHECKPOINT, "--out", "out", *names])
    assert contents(workdir / "out") == before


@pytest.mark.parametrize("where", ["explanation.gallery.draw", "explain.render", "explain.write_index"])
@pytest.mark.parametrize("error", [DatasetError("gone"), OSError(28, "disk full"), Interrupted(15, "")])
def test_the_report_of_before_stays_until_its_successor_is_whole(workdir, photograph, monkeypatch, where, error):
    make_checkpoint("model.pth")
    explained(workdir / "out", "--count", "1")
    before = contents(workdir / "out")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(type(error)):
            explain.main([*CHECKPOINT, "--out", "out", photograph("a.png")])
    assert contents(workdir / "out") == before
    explained(workdir / "out", "a.png")


def test_what_a_killed_process_left_is_cleared_away(workdir, photograph):
    make_checkpoint("model.pth")
    explained(workdir / "out", "--count", "1")
    new = OutputFolder(workdir / "out").begin()
    new.add(".next/patches/1.jpg").write_text("half a picture")
    explained(workdir / "out", photograph("a.png"))
    assert not (workdir / "out" / ".next").exists()


def test_a_checkpoint_does_not_say_where_anything_is_written(workdir, photograph):
    def change(state):
        state["config"]["paths"] = {"model_dir": "victim", "results_dir": "victim"}
        state["config"]["dataset"]["cache"] = "disk"
        state["config"]["dataset"] |= {"name": "folder", "root": "data"}

    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (workdir / "data" / kind / split).mkdir(parents=True)
        photograph(workdir / "data" / "images" / split / "a.png")
        Image.new("L", (50, 30)).save(workdir / "data" / "labels" / split / "a.png")
    names = build_dataset(tiny_config(), "val").mapping.names
    (workdir / "data" / "classes.txt").write_text("\n".join(names))
    make_checkpoint("model.pth", pushed=False, change=change)
    before = files(workdir)
    explain.main([*CHECKPOINT, "--count", "1"])
    check_folder(workdir / "results" / "explanations")
    assert {name for name in files(workdir) if not name.startswith("results/explanations/")} == set(before)
    explain.main([*CHECKPOINT, "--count", "1", "--set", "paths.results_dir=mine"])
    assert (workdir / "mine" / "explanations" / "index.html").is_file()


@pytest.mark.parametrize("split", ["../images/train", "a/b", ".."])
def test_a_split_that_leads_elsewhere_is_refused(workdir, split):
    def change(state):
        state["config"]["dataset"]["train_split"] = split

    with pytest.raises(CheckpointError):
        make_checkpoint("model.pth", pushed=False, change=change)
    with pytest.raises(CheckpointError, match="split"):
        explain.main(CHECKPOINT)


def test_a_report_says_what_it_was_made_from(workdir):
    make_checkpoint("model.pth")
    index = explained(workdir / "out", "--count", "1", "--set", "system.num_workers=0")
    digest = hashlib.sha256((workdir / "model.pth").read_bytes()).hexdigest()
    assert f"val mIoU 0.500 Stage finetune, step 4, SHA-256 {digest[:12]}" in index.text
    assert "patches of the split train, decisions of val, data in “.” · system.num_workers=0" in index.text
    about = json.loads((workdir / "out" / "report.json").read_text())
    assert (about["checkpoint"], about["sha256"]) == ("../model.pth", digest)


def test_without_out_the_report_of_another_checkpoint_stays(workdir, photograph):
    make_checkpoint("model.pth")
    make_checkpoint("other.pth")
    photograph("a.png")
    explain.main([*CHECKPOINT, "a.png"])
    explain.main([*CHECKPOINT, "--count", "1"])  # the same one
    before = contents(workdir)
    with pytest.raises(ConfigError, match="holds the report of .*model.pth; name another folder: --out"):
        explain.main(["--checkpoint", "other.pth", "a.png"])
    assert contents(workdir) == before
    explain.main(["--checkpoint", "other.pth", "a.png", "--out", "results/explanations"])


def test_several_processes_are_refused(workdir, monkeypatch):
    make_checkpoint("model.pth")
    monkeypatch.setattr("runtime.distributed.world_size", lambda: 2)
    with pytest.raises(ConfigError, match="not with torchrun"):
        explain.main(CHECKPOINT)
    assert not (workdir / "results").exists()


@pytest.mark.parametrize("names", [list("abcdef"), ["grass", "sky", "road", "house", "car", "person"]])
def test_a_checkpoint_of_other_classes_is_refused(workdir, photograph, names):
    def change(state):
        state["class_names"] = tuple(names)

    make_checkpoint("model.pth", pushed=False, change=change)
    with pytest.raises(ConfigError, match="model.pth: it was trained"):
        explain.main([*CHECKPOINT, photograph("a.png")])
    assert not (workdir / "results").exists()


def test_the_classes_of_a_page_are_those_of_the_evaluation(workdir, monkeypatch):
    monkeypatch.setattr("model.DeepLabFeatures", Patches)
    seen = {}
    for precision in ("bfloat16", "float32"):
        make_checkpoint("model.pth", "dataset.shapes.image_size=133", f"system.precision={precision}")
        explained(workdir / "out", "--count", "2")
        saved = open_model("model.pth")
        dataset = build_dataset(saved.config, "val")
        for i in range(2):
            image = dataset[i][0][None]
            expected, _ = label_image(saved.inference, image, View())
            scores, _, seen[precision, i], _ = unpack(Page(workdir / f"out/00{i + 1}-scene-val-0000{i}.html").data)
            np.testing.assert_array_equal(seen[precision, i], expected[0])
            np.testing.assert_allclose(scores, saved.inference.output(image).logits[0], atol=5e-4)
    assert any((seen["bfloat16", i] != seen["float32", i]).any() for i in range(2))  # or this would show nothing


# --- the gallery -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_deciding_prototypes_equal_brute_force(monkeypatch):
    model, dataset = tiny_ppnet(), RandomImages(3)
    expected = torch.zeros(6, dtype=torch.int64)
    for image, _ in dataset:
        output = model(Grid().pad(image[None], 0.0))
        contributions = model.contributions(output.distances)[0]
        for i in range(0, image.shape[1], 8):
            for j in range(0, image.shape[2], 8):
                c = output.logits[0, :, i // 8, j // 8].argmax()
                expected[contributions[c, :, i // 8, j // 8].argmax()] += 1
    assert count_decided(Inference(model, torch.device("cpu")), dataset).tolist() == expected.tolist()
    winners, classes = deciding_prototypes(model, model(torch.zeros(1, 3, 17, 17)), (16, 9))
    assert winners.shape == classes.shape == (2, 2)


def test_the_gallery_tells_what_each_prototype_is(workdir):
    def change(state):
        state["prototypes"][0]["merged"] = [0, 7]
        state["model"]["prototype_vectors"][3] = state["model"]["prototype_vectors"][1]
        state["model"]["last_layer.weight"][:, 5] = -9.0  # the others are larger everywhere
        state["model"]["last_layer.weight"][4, 5] = -9.5

    make_checkpoint("model.pth", change=change)
    text = explained(workdir / "out", "--count", "1").text
    assert "Prototype 0 stands for 2 that became this patch" in text
    assert "Prototype 3 duplicate of 1" in text
    assert "Prototype 5 never decides" in text
    assert "−9.50 car" in text


def test_before_the_push_the_nearest_patch_is_shown_as_such(workdir):
    make_checkpoint("model.pth", pushed=False)
    index = explained(workdir / "out", "--count", "1")
    assert index.text.count("not projected yet: the nearest patch") == 12
    assert len(list((workdir / "out" / "patches").glob("*-place.jpg"))) == 12


def test_a_class_that_never_occurs_is_named(workdir):
    def change(state):
        state["prototypes"][2].update(dict.fromkeys(("image", "image_index", "split", "cell", "pixel", "distance")))

    make_checkpoint("model.pth", change=change)
    assert "Prototype 2 not projected: class never in training" in explained(workdir / "out", "--count", "1").text


def resized(monkeypatch, size):
    """The data are a copy in another size, of the same names."""
    read = ShapesDataset.read

    def smaller(dataset, index):
        image, label = read(dataset, index)
        return image.resize(size), label.resize(size, Image.Resampling.NEAREST)

    monkeypatch.setattr(ShapesDataset, "read", smaller)


@pytest.mark.parametrize("size", [(22, 22), (88, 88), (44, 22)])
@pytest.mark.parametrize("is_old", [False, True])
def test_an_image_in_another_size_is_not_taken_for_the_pushed_one(workdir, monkeypatch, size, is_old):
    """Records of before knew no size: then a cell outside the grid is all that can be noticed."""

    def change(state):
        if is_old:
            for record in state["prototypes"]:
                record["cell"] = [5, 5]
                del record["image_size"]

    make_checkpoint("model.pth", change=change)
    resized(monkeypatch, size)
    text = explained(workdir / "out", "--count", "1").text
    is_seen = not is_old or min(size) == 22
    assert text.count("no picture: the image here has another size than when it was pushed") == 12 * is_seen
    assert len(list((workdir / "out").glob("patches/*-place.jpg"))) == 12 * (not is_seen)
    assert "scene train" in text and "at x " in text


def test_scales_are_mentioned(workdir):
    make_checkpoint("model.pth", "model.msc_scales=[0.5, 0.75]")
    note = "at several scales (1, 0.5, 0.75); explained is its prediction at scale 1 alone"
    assert note in explained(workdir / "out", "--count", "1").text
    assert note in Page(workdir / "out" / "001-scene-val-00000.html").text


def test_the_twin_has_predictions_and_says_why_no_more(workdir, capsys):
    model = make_checkpoint("model.pth", "model.head=linear")
    index = explained(workdir / "out", "--count", "1", "--png")
    assert "It has no prototypes to show" in capsys.readouterr().out
    assert "It has no prototypes to show" in index.text and "Prototype 0" not in index.text
    page = Page(workdir / "out" / "001-scene-val-00000.html")
    images, _ = build_dataset(tiny_config(), "val")[0]
    scores, tiles, _, _ = unpack(page.data)
    np.testing.assert_allclose(scores, model(Grid().pad(images[None], 0.0)).logits[0].detach(), atol=5e-4)
    assert tiles == [] and page.data["prototypes"] == []


# --- photographs -----------------------------------------------------------------------------------------------


def test_photographs_of_any_kind(workdir, photograph):
    make_checkpoint("model.pth")
    (workdir / "folder").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photograph("folder/turned.jpg", exif=exif)
    photograph("folder/b.PNG", (1, 1))
    (workdir / "folder" / "readme.txt").write_text("no photograph")
    Image.new("RGBA", (9, 40)).save("alone.png")
    index = explained(workdir / "out", "folder", "alone.png")
    assert [name for name in index.links if name.endswith(".html")] == [
        "001-b.html",
        "002-turned.html",
        "003-alone.html",
    ]
    turned = Page(workdir / "out" / "002-turned.html")
    assert (turned.data["width"], turned.data["height"]) == (30, 50)
    assert "Ground truth" not in turned.text and "% right" not in index.text
    assert (unpack(turned.data)[3] == 255).all()


def test_photographs_and_a_split_together(workdir, photograph):
    make_checkpoint("model.pth")
    index = explained(workdir / "out", photograph("a.png"), "--split", "train", "--count", "1")
    assert [name for name in index.links if name.endswith(".html")] == ["001-a.html", "002-scene-train-00000.html"]


def test_a_large_photograph_is_made_smaller(workdir, photograph, monkeypatch):
    monkeypatch.setattr(image_page, "MAX_PHOTOGRAPH", 800)
    make_checkpoint("model.pth")
    explained(workdir / "out", photograph("a.png", (80, 40)))
    page = Page(workdir / "out" / "001-a.html")
    assert (page.data["width"], page.data["height"]) == (40, 20) and "has 80 × 40 pixels" in page.text


@pytest.mark.parametrize("size", [(20_000, 20), (1, 60_000), (70_000, 3)])
def test_a_photograph_with_a_very_long_side(workdir, photograph, monkeypatch, size):
    make_checkpoint("model.pth")
    photograph("long.png", size)
    explained(workdir / "out", "long.png", photograph("b.png"), "--png")
    long = Page(workdir / "out" / "001-long.html")
    assert max(long.data["width"], long.data["height"]) <= image_page.MAX_SIDE
    assert ("made smaller" in long.text) == (max(size) > image_page.MAX_SIDE)
    for path in (workdir / "out").rglob("*.[pj][np]g"):
        with Image.open(path) as picture:
            assert max(picture.size) <= image_page.MAX_SIDE


def test_a_data_set_image_that_no_browser_can_show_is_skipped_by_name(workdir, monkeypatch, capsys):
    make_checkpoint("model.pth")
    monkeypatch.setattr(image_page, "MAX_SIDE", 40)
    with pytest.raises(DatasetError, match="2 of 2 images"):
        explain.main([*CHECKPOINT, "--out", "out"])
    assert "skipped: scene val 00000: 44x44 pixels; a page shows at most 40" in capsys.readouterr().err
    check_folder(workdir / "out")


def test_training_images_with_a_very_long_side_have_pictures(workdir, monkeypatch):
    make_checkpoint("model.pth", pushed=False)
    resized(monkeypatch, (9_000, 9))
    explained(workdir / "out", "--count", "1", "--png")
    assert len(list((workdir / "out").glob("patches/*-place.jpg"))) == 12


def test_a_damaged_photograph_is_named_and_the_others_are_done(workdir, photograph, capsys):
    make_checkpoint("model.pth")
    (workdir / "bad.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(DatasetError, match="2 of 4 images could not be read"):
        explain.main([*CHECKPOINT, "--out", "out", photograph("a.png"), "bad.jpg", "gone.png", photograph("z.png")])
    errors = capsys.readouterr().err
    assert "skipped: bad.jpg" in errors and "skipped: gone.png" in errors
    check_folder(workdir / "out")
    assert [name for name in files(workdir / "out") if name.endswith(".html")] == [
        "001-a.html", "004-z.html", "index.html",
    ]  # fmt: skip


def test_without_the_data_set_photographs_are_explained_without_pictures(workdir, photograph, capsys, monkeypatch):
    make_checkpoint("model.pth")

    def missing(dataset):
        raise DatasetError("shapes: no images")

    monkeypatch.setattr(ShapesDataset, "_get_data_paths", missing)
    index = explained(workdir / "out", photograph("a.png"))
    assert "without pictures of the train split: shapes: no images" in capsys.readouterr().err
    assert "The training data were not there" in index.text and "scene train" in index.text
    assert not (workdir / "out" / "patches").exists()
    assert "rgb(120 180 230)" in index.source  # the palette that the checkpoint holds
    with pytest.raises(DatasetError, match="no images"):
        explain.main([*CHECKPOINT, "--out", "out"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count 0"),
        (["--set", "model.head=linear"], "the model is the checkpoint's"),
        (["--split", "holiday"], "no split 'holiday'"),
        (["empty"], "no photograph in this folder"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(workdir, arguments, message):
    make_checkpoint("model.pth")
    (workdir / "empty").mkdir()
    with pytest.raises((ConfigError, DatasetError), match=message):
        explain.main([*CHECKPOINT, *arguments])


def test_a_missing_checkpoint(workdir):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        explain.main(["--checkpoint", "gone.pth"])


def test_a_signal_stops_it(workdir, monkeypatch):
    make_checkpoint("model.pth")
    monkeypatch.setattr(stop_flag, "signum", 15)
    with pytest.raises(Interrupted):
        explain.main(CHECKPOINT)


# --- hostile names ---------------------------------------------------------------------------------------------


def test_hostile_names_change_no_markup_and_leave_no_file_outside(workdir, photograph, monkeypatch):
    names = [name for name in HOSTILE if "/" not in name and len(name) < 250]
    (workdir / "photographs").mkdir()
    structures = []
    for titles, classes in (([f"photo {i}" for i in range(len(names))], list("abcdef")), (names, HOSTILE[:6])):
        for old in (workdir / "photographs").iterdir():
            old.unlink()
        paths = [photograph(workdir / "photographs" / title, format="PNG") for title in titles]

        def change(state, names=tuple(classes)):
            for record in state["prototypes"]:
                record["image"] = names[record["class"]]
                record["class_name"] = names[record["class"]]
            state["class_names"] = list(names)

        make_checkpoint("model.pth", change=change)
        before = files(workdir)
        mapping = ClassMapping(tuple(classes), ((1, 2, 3),) * 6, {c: c for c in range(6)})
        with monkeypatch.context() as patch:
            patch.setattr(ShapesDataset, "_setup_class_mappings", lambda dataset, mapping=mapping: mapping)
            explained(workdir / "out", *paths, "--png")
        assert [name for name in files(workdir) if name not in before and not name.startswith("out/")] == []
        structures.append([Page(page).structure for page in sorted((workdir / "out").glob("*.html"))])
    assert structures[0] == structures[1]


def test_two_names_with_one_slug_are_two_pages(workdir, photograph):
    make_checkpoint("model.pth")
    index = explained(workdir / "out", photograph("a b.png"), photograph("a-b.png"), photograph("äß文.png"))
    pages = [name for name in index.links if name.endswith(".html")]
    assert pages == ["001-a-b.html", "002-a-b.html", "003-a.html"]


def test_a_name_that_is_no_text_is_shown_as_far_as_it_can_be(workdir, photograph):
    make_checkpoint("model.pth")
    photograph(workdir / "bad.png").encode()
    (workdir / "bad.png").rename(workdir / "caf\udce9.png")
    explained(workdir / "out", str(workdir / "caf\udce9.png"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=60).filter(str.strip))
def test_any_name_is_data(tmp_path, name):
    structures = []
    for title in ("plain", name):
        legend = [{"index": 0, "name": title, "share": 1.0}]
        text = render(
            "image.html", [(1, 2, 3)], data={"classes": [title]}, legend=legend, notes=[title], photograph="a.jpg",
            entry=image_page.Entry(title, "a.html", "a-small.jpg", None, None), width=1, height=1, stride=8,
        )  # fmt: skip
        write_page(tmp_path / "page.html", text)
        page = Page(tmp_path / "page.html")
        structures.append(page.structure)
        assert page.data["classes"] == [title.encode(errors="replace").decode()] or page.data["classes"] == [title]
    assert structures[0] == structures[1]


def test_data_cannot_end_their_script():
    text = script_json(["</script><!--", "&", "\u2028\udce9"])
    assert not set("<>&\u2028") & set(text) and text.isascii()


# --- size ------------------------------------------------------------------------------------------------------


def test_the_page_of_a_cityscapes_image_stays_below_3_mb(workdir):
    config = tiny_config("dataset.name=cityscapes", "model.num_classes=19", "model.prototype_shape=[190, 64, 1, 1]")
    names = tuple(f"class {c}" for c in range(19))
    mapping = ClassMapping(names, ((9, 9, 9),) * 19, {})
    subject = gallery.Subject(Inference(smooth_model(), torch.device("cpu")), config, mapping, None, None)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (64, 128, 3), dtype=np.uint8)).resize((2048, 1024), Image.BICUBIC)
    image = Image.fromarray((np.asarray(coarse) * 0.9 + rng.normal(0, 5, (1024, 2048, 3)).clip(0, 25)).astype(np.uint8))
    faces = [{"index": p // 10, "source": f"aachen/aachen_000{p}", "picture": f"patches/{p}.jpg"} for p in range(190)]
    item = image_page.Item(1, "a.png", lambda: (image, None))
    with OutputFolder(workdir / "out").successor() as out:
        entry = image_page.write_image(subject, item, out, faces, png=False)
    page = workdir / "out" / entry.page
    assert page.stat().st_size + (workdir / "out" / "photographs" / "001-a.jpg").stat().st_size < 3_000_000
