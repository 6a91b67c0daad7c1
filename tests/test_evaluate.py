"""The evaluation against torchmetrics, its views against the whole image, and what it writes."""

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchmetrics.functional.classification import multiclass_jaccard_index

import evaluate
from config import config_to_dict
from dataset import build_dataset
from datasets.base import voc_palette
from datasets.cityscapes import CityscapesDataset
from datasets.pascal import PascalVOCDataset
from evaluation import submission as submissions
from evaluation.labelling import View, label_image, sliding_logits, tta_logits
from evaluation.measuring import evaluate as measure
from evaluation.report import weights_digest
from evaluation.submission import Submission, SubmissionError
from grid import Grid
from inference import Inference, open_model
from metrics import ConfusionMatrix, bootstrap_difference, iou_of_tallies
from model import LinearNet, construct_PPNet
from runtime.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from runtime.errors import ConfigError
from tests.tiny import EveryEighthPixel, tiny_config

CPU = torch.device("cpu")


def save_model(path, *overrides, seed=0):
    """A checkpoint of an untrained model, which decides for many classes."""
    torch.manual_seed(seed)
    config = tiny_config(*overrides)
    model = construct_PPNet(config.model)
    if config.model.head == "prototype":
        nn.init.normal_(model.last_layer.weight)
    save_checkpoint(path, Checkpoint(config_to_dict(config), "joint", 1, 5, dict(model.state_dict())))
    return config


def all_pixels(path, split="val"):
    """Predictions and labels of all pixels of a split, one long tensor each, counted independently of evaluate.py."""
    saved = open_model(path)
    model, config = saved.model, saved.config
    with torch.no_grad():
        pairs = [
            (model.predict(image[None]).argmax(1).flatten(), label.flatten()) for image, label in data(config, split)
        ]
    return [torch.cat(values) for values in zip(*pairs, strict=True)]


def data(config, split="val"):
    dataset = build_dataset(config, split)
    return [dataset[i] for i in range(len(dataset))]


def read_json(name):
    return json.loads((evaluate.Path("results/evaluation") / f"{name}.json").read_text())


# --- the numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["prototype", "linear"])
def test_miou_is_that_of_torchmetrics(workdir, head):
    save_model("a.pth", f"model.head={head}")
    evaluate.main(["--checkpoint", "a.pth"])
    report = read_json("a")
    predictions, labels = all_pixels("a.pth")
    theirs = multiclass_jaccard_index(predictions, labels, 6, average=None, ignore_index=255)
    ious = [c["iou"] for c in report["classes"]]
    assert ious == pytest.approx(theirs.tolist(), abs=1e-6)
    assert report["miou"] == pytest.approx(float(theirs.mean()), abs=1e-6)
    assert (report["explanations"] is None) == (head == "linear")


def test_it_agrees_with_validation_during_training(workdir):
    config = save_model("a.pth")
    inference, dataset = open_model("a.pth").inference, build_dataset(config, "val")
    result = measure(inference, dataset, View())
    assert torch.equal(result.matrix.counts, inference.validate(dataset).counts)


def test_the_images_add_up_to_the_whole_however_they_are_sharded(workdir):
    config = save_model("a.pth", "dataset.shapes.val_images=5")
    result = measure(open_model("a.pth").inference, build_dataset(config, "val"), View())
    assert torch.equal(result.tallies.sum(0), result.matrix.tallies())
    for shard in (result.tallies[::2], result.tallies[:1]):
        rest = result.tallies.sum(0) - shard.sum(0)
        assert torch.equal(iou_of_tallies(shard.sum(0) + rest), result.matrix.iou())


def test_tallies_of_one_class_images_and_of_ignored_ones():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.full((4, 4), 1), torch.full((4, 4), 1))
    matrix.update(torch.full((4, 4), 2), torch.full((4, 4), 255))
    assert iou_of_tallies(matrix.tallies()).tolist() == pytest.approx([float("nan"), 1, float("nan")], nan_ok=True)
    torch.testing.assert_close(iou_of_tallies(matrix.tallies()), matrix.iou(), equal_nan=True)


def random_tallies(seed, count=30, classes=4):
    tallies = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(classes, (50,), generator=generator)
        wrong = torch.rand(50, generator=generator) < 0.3
        matrix = ConfusionMatrix(classes)
        matrix.update(torch.where(wrong, torch.randint(classes, (50,), generator=generator), labels), labels)
        tallies.append(matrix.tallies())
    return torch.stack(tallies)


def test_the_bootstrap_interval():
    ours, same = random_tallies(0), random_tallies(0)
    assert bootstrap_difference(ours, same) == (0, 0)
    better = ours.clone()
    better[:, 0] = better[:, 1]
    better[:, 2] = better[:, 1]  # every pixel right
    low, high = bootstrap_difference(ours, better)
    exact = float((iou_of_tallies(better.sum(0)) - iou_of_tallies(ours.sum(0))).mean())
    assert 0 < low < exact < high < 1
    assert bootstrap_difference(ours, better) == (low, high)
    assert bootstrap_difference(ours, better, seed=1) != (low, high)
    assert bootstrap_difference(better, ours) == pytest.approx((-high, -low))
    one = bootstrap_difference(ours[:1], better[:1])
    assert one[0] == pytest.approx(one[1])


def test_the_bootstrap_covers_as_often_as_it_says():
    truth, hits = 0.0, 0
    for seed in range(40):
        pair = random_tallies(seed), random_tallies(1000 + seed)
        low, high = bootstrap_difference(*pair, samples=300)
        hits += low <= truth <= high
    assert hits >= 33


# --- views -----------------------------------------------------------------------------------------------------


def pixel_net():
    """A network of five classes without context, whose labels vary from cell to cell."""
    return LinearNet(EveryEighthPixel(), 5).eval()


class WithContext(EveryEighthPixel):
    """Features whose cells also see their neighbours, zeros beyond the border: what makes windows differ."""

    def __init__(self):
        super().__init__()
        self.blur = nn.Conv2d(5, 5, 5, padding=2, groups=5, bias=False)
        nn.init.constant_(self.blur.weight, 0.01)

    def forward(self, images):
        cells = super().forward(images)
        return cells + self.blur(cells)


def smooth_image(height, width, seed=0):
    coarse = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return Grid().upsample(coarse, (height, width))


@pytest.mark.parametrize("size", [(33, 33), (129, 97), (70, 200), (41, 35)])
@pytest.mark.parametrize("window", [33, 65, 1025])
def test_windows_are_put_together_where_they_belong(workdir, size, window):
    inference = Inference(pixel_net(), CPU)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        whole, _ = label_image(inference, image, View())
        assert len(whole.unique()) == 5
        slid, distances = label_image(inference, image, View(window=window))
    assert whole.shape == slid.shape == (1, *size)
    assert (whole == slid).float().mean() > 0.9999  # sums in another order may turn a tie
    assert distances is None


def test_windows_agree_with_the_whole_image_where_context_matters():
    inference = Inference(LinearNet(WithContext(), 5).eval(), CPU)
    with torch.no_grad():
        views = [label_image(inference, smooth_image(257, 385), view)[0] for view in (View(), View(window=129))]
    assert len(views[0].unique()) > 1
    assert 0.99 <= (views[0] == views[1]).float().mean() < 1


def test_a_window_counts_less_towards_its_border():
    seen = []

    def classify(images):
        seen.append(images.shape[-2:])
        return torch.full((1, 2, 5, 5), float(len(seen)))

    logits = sliding_logits(classify, torch.zeros(1, 3, 33, 49), 33, Grid())
    assert len(seen) == 2  # at 0 and, ending with the image, at 16
    assert logits[0, 0, 0].tolist() == [1, 1, 1.25, 1.5, 1.75, 2, 2]


def test_flips_are_turned_back_and_scales_averaged():
    model, image = pixel_net(), smooth_image(41, 57)
    with torch.no_grad():
        ours = tta_logits(lambda view: model(view).logits, image, Grid())
        expected = torch.zeros_like(ours)
        for size in ((33, 41), (41, 57), (49, 73)):  # 0.75, 1 and 1.25 of 5 x 7 squares, in whole squares
            logits = model(Grid().upsample(image, size)).logits
            expected += Grid().upsample(logits.softmax(1), (41, 57)) / 3  # without context a flip changes nothing
    torch.testing.assert_close(ours, expected)


# --- what is written -------------------------------------------------------------------------------------------


def write_folder(root, names, labels):
    """A `folder` data set of random 40x48 images whose labels hold the given classes only."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            for kind, pixels in (
                ("images", rng.integers(0, 255, (40, 48, 3))),
                ("labels", rng.choice(labels, (40, 48))),
            ):
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    (root / "classes.txt").write_text("\n".join(names))


def folder_overrides(classes):
    return [
        "dataset.name=folder", "dataset.root=own", f"model.num_classes={classes}",
        f"model.prototype_shape=[{2 * classes}, 8, 1, 1]",
    ]  # fmt: skip


def test_absent_classes_are_shown_as_such_and_left_out(workdir, capsys):
    write_folder(workdir / "own", ["one", "two", "three"], [0, 1, 255])
    save_model("a.pth", *folder_overrides(3))
    model, _, state = open_model("a.pth").inference.model, *open_model("a.pth")[1:]
    with torch.no_grad():
        model.last_layer.weight.zero_()
        model.last_layer.weight[0] = 1  # always the first class
    save_checkpoint("a.pth", state.with_(model=dict(model.state_dict())))
    evaluate.main(["a.pth"])
    printed = capsys.readouterr().out
    report = read_json("a")
    assert [c["iou"] for c in report["classes"]][1:] == [0, None]
    assert report["miou"] == pytest.approx(report["classes"][0]["iou"] / 2)
    assert "three" in printed and "'-' = in no label and no prediction, left out of the mean: three" in printed
    assert "left out of the mean" in (workdir / "results/evaluation/a.html").read_text()


def test_other_classes_than_those_of_the_training_are_refused(workdir):
    write_folder(workdir / "own", ["road", "car", "sky"], [0, 1, 2])
    save_model("a.pth", *folder_overrides(3))
    save_checkpoint("a.pth", load_checkpoint("a.pth").with_(class_names=("road", "car", "sky")))
    evaluate.main(["a.pth"])
    (workdir / "own/classes.txt").write_text("car\nroad\nsky")
    with pytest.raises(ConfigError, match="a.pth: it was trained with 'road' as class 0.*in another order"):
        evaluate.main(["a.pth"])


def test_the_page_is_self_contained_and_names_are_data(workdir):
    write_folder(workdir / "own", ["<script>alert(1)</script>", "b & c"], [0, 1])
    save_model("a.pth", *folder_overrides(2))
    evaluate.main(["--checkpoint", "a.pth"])
    page = (workdir / "results/evaluation/a.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert "default-src &#39;none&#39;" in page
    for outside in ("http:", "https:", 'src="/', "url(", "@import", "<link"):
        assert outside not in page
    assert page.count('src="data:image/jpeg;base64,') == 2 * 3  # two images: photograph, truth, prediction


def test_two_checkpoints_are_compared(workdir, capsys):
    save_model("a.pth", "dataset.shapes.val_images=4")
    save_model("b.pth", "dataset.shapes.val_images=4", "model.head=linear", seed=1)
    evaluate.main(["a.pth", "b.pth"])
    both = read_json("a_vs_b")
    first, second = both["checkpoints"]
    difference = both["difference"]
    assert difference["miou"] == pytest.approx(second["miou"] - first["miou"])
    assert difference["low"] <= difference["miou"] <= difference["high"]
    for mine, a, b in zip(difference["classes"], first["classes"], second["classes"], strict=True):
        assert mine is None or mine == pytest.approx(b["iou"] - a["iou"])
    assert "95 % interval" in capsys.readouterr().out
    assert "95 % interval" in (workdir / "results/evaluation/a_vs_b.html").read_text()
    save_model("c.pth", "dataset.shapes.val_images=3")
    with pytest.raises(ConfigError, match="cannot be compared"):
        evaluate.main(["a.pth", "c.pth"])


def test_what_was_asked_is_in_the_file_name(workdir):
    save_model("a.pth")
    evaluate.main(["--checkpoint", "a.pth", "--split", "train", "--tta", "--sliding", "33"])
    report = read_json("a_train_tta_sliding33")
    assert (report["split"], report["tta"], report["window"], report["images"]) == ("train", True, 33, 5)
    assert report["explanations"] is None


# --- what it is of ---------------------------------------------------------------------------------------------


def written():
    return sorted(path.name for path in evaluate.Path("results/evaluation").iterdir())


def test_a_report_says_what_it_is_of(workdir):
    config = save_model("a.pth")
    evaluate.main(["a.pth", "--set", "model.msc_scales=[0.5]", "--set", "system.device=cpu"])
    report = read_json("a")
    assert (report["checkpoint"], report["stage"], report["step"]) == ("a.pth", "joint", 5)
    assert report["weights"] == weights_digest(load_checkpoint("a.pth").model)
    settings = report["settings"]
    assert (settings["precision"], settings["device"]) == ("float32", "cpu")
    assert settings["model"] == config_to_dict(config)["model"] | {"msc_scales": [0.5]}
    assert settings["dataset"]["root"] == str(evaluate.Path(config.dataset.root).absolute())
    assert (report["dataset"], report["split"], report["images"]) == ("shapes", "val", 2)
    assert {"version", "commit", "torch", "command"} <= report["made_with"].keys()
    page = (workdir / "results/evaluation/a.html").read_text()
    for words in (
        report["weights"][:12],
        "step 5 of joint",
        "float32 on cpu",
        "maximum of the logits at scales 1, 0.5",
    ):
        assert words in page


def test_the_digest_is_of_names_and_values():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3), "c": torch.zeros(0)}
    same = dict(reversed([(name, value.clone()) for name, value in state.items()]))
    assert weights_digest(state) == weights_digest(same) and len(weights_digest(state)) == 64
    others = [
        {"a": torch.tensor([1.0, 2.5])},
        {"b": torch.tensor(4)},
        {"a": torch.tensor([[1.0, 2.0]])},
        {"d": state["b"]},
    ]
    assert len({weights_digest(state | other) for other in others} | {weights_digest(state)}) == 5


def test_a_report_of_something_else_is_not_replaced(workdir, capsys):
    (workdir / "twin").mkdir()
    save_model("a.pth")
    save_model("twin/a.pth", seed=1)
    evaluate.main(["a.pth"])
    first = read_json("a")
    for arguments, name in (
        (["twin/a.pth"], "a_2"),  # other weights
        (["a.pth", "--set", "model.msc_scales=[0.5]"], "a_3"),  # other settings
        (["a.pth", "--set", "dataset.shapes.val_images=1"], "a_4"),  # other data
    ):
        capsys.readouterr()
        evaluate.main(arguments)
        said = capsys.readouterr().out
        assert f"written: results/evaluation/{name}.json" in said and "a.json is of another checkpoint" in said
        assert read_json(name)["checkpoint"] == arguments[0] and read_json("a") == first
    evaluate.main(["a.pth", "twin/a.pth"])
    evaluate.main(["twin/a.pth", "a.pth"])
    names = ["a", "a_2", "a_3", "a_4", "a_vs_a", "a_vs_a_2"]
    assert written() == sorted(f"{name}{kind}" for name in names for kind in (".html", ".json"))


def test_the_same_evaluation_takes_its_own_place(workdir, capsys):
    (workdir / "twin").mkdir()
    save_model("a.pth")
    save_model("twin/a.pth", seed=1)
    for path in ("a.pth", "twin/a.pth", "a.pth", "twin/a.pth"):
        evaluate.main([path])
    (workdir / "a.pth").rename("twin/b.pth")
    (workdir / "twin/b.pth").rename("twin/a.pth")  # the same weights in another place
    evaluate.main(["twin/a.pth"])
    assert "is of another" not in capsys.readouterr().out.splitlines()[-2]
    assert written() == ["a.html", "a.json", "a_2.html", "a_2.json"]
    assert (read_json("a")["checkpoint"], read_json("a_2")["checkpoint"]) == ("twin/a.pth", "twin/a.pth")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.html", "mine"),
        ("a.json", "mine"),
        ("a.json", "[1]"),
        ("a.json", '{"checkpoints": [1]}'),
        ("a.json", "[" * 9999),
    ],
)
def test_a_file_that_is_not_ours_stays(workdir, name, content):
    save_model("a.pth")
    path = workdir / "results/evaluation" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    evaluate.main(["a.pth"])
    assert path.read_text() == content and {"a_2.json", "a_2.html", name} == set(written())


def test_a_checkpoint_does_not_say_where_its_report_goes(workdir):
    save_model("a.pth", f"paths.results_dir={workdir / 'theirs'}")
    evaluate.main(["a.pth"])
    assert not (workdir / "theirs").exists() and written() == ["a.html", "a.json"]
    evaluate.main(["a.pth", "--set", "paths.results_dir=mine"])
    assert (workdir / "mine/evaluation/a.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one checkpoint"),
        (["a.pth", "b.pth", "c.pth"], "name one checkpoint"),
        (["a.pth", "b.pth", "--export", "out"], "name one checkpoint"),
        (["a.pth", "--sliding", "512"], "whole cells of this model, for example 513"),
        (["a.pth", "--sliding", "25"], "at least 33"),
        (["a.pth", "--set", "dataset.nam=x"], "dataset.nam"),
        (["a.pth", "--set", "model.head=linear"], "the model is the checkpoint's"),
        (["a.pth", "--export", "out"], "only cityscapes and pascal"),
        (["a.pth", "--split", "../val"], "split"),
        (["missing.pth"], "there is no such"),
    ],
)
def test_bad_command_lines_say_why(workdir, arguments, message):
    save_model("a.pth")
    with pytest.raises(Exception, match=message) as error:
        evaluate.main(arguments)
    assert hasattr(error.value, "exit_code") and "\n" not in str(error.value)


# --- exports ---------------------------------------------------------------------------------------------------

CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]  # facts.md 5b


def write_cityscapes(root, split, count=3, size=(96, 48)):
    rng = np.random.default_rng(1)
    for i in range(count):
        path = root / f"leftImg8bit/{split}/berlin/berlin_{i:06}_000019_leftImg8bit.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)).save(path)


def test_the_cityscapes_export_is_what_the_server_takes(workdir, capsys):
    write_cityscapes(workdir / "own", "test")
    save_model("a.pth", "dataset.name=cityscapes", "dataset.root=own", "model.num_classes=19",
               "model.prototype_shape=[38, 8, 1, 1]")  # fmt: skip
    evaluate.main(["--checkpoint", "a.pth", "--split", "test", "--export", "out"])
    printed = capsys.readouterr().out
    assert "packed and checked 3 images: out/cityscapes_test.zip" in printed and "nothing was measured" in printed
    with zipfile.ZipFile("out/cityscapes_test.zip") as archive:
        assert archive.namelist() == [f"berlin_{i:06}_000019.png" for i in range(3)]
        archive.extractall("submitted")
    predictions, _ = all_pixels("a.pth", "test")
    for i, predicted in enumerate(predictions.view(3, 48, 96).numpy()):
        with Image.open(f"submitted/berlin_{i:06}_000019.png") as picture:
            assert (picture.mode, picture.size) == ("L", (96, 48))
            assert np.array_equal(np.array(picture), np.array(CITYSCAPES_IDS)[predicted])
        label = workdir / f"own/gtFine/test/berlin/berlin_{i:06}_000019_gtFine_labelIds.png"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_bytes((workdir / f"submitted/berlin_{i:06}_000019.png").read_bytes())
    dataset = CityscapesDataset(open_model("a.pth").config.dataset, "test")  # which now reads the predictions as labels
    assert torch.equal(torch.stack([label for _, label in dataset]).flatten(), predictions)


def write_voc(root, names=("2008_000001", "2008_000003")):
    voc = root / "VOCdevkit/VOC2012"
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/test.txt").write_text("\n".join(names))
    rng = np.random.default_rng(2)
    for i, name in enumerate(names):
        pixels = rng.integers(0, 255, (40 + 9 * i, 51, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(voc / f"JPEGImages/{name}.jpg")
    return voc


def test_the_voc_export_is_what_the_server_takes(workdir):
    voc = write_voc(workdir / "own")
    save_model("a.pth", "dataset.name=pascal", "dataset.root=own", "model.num_classes=21",
               "model.prototype_shape=[42, 8, 1, 1]")  # fmt: skip
    evaluate.main(["--checkpoint", "a.pth", "--split", "test", "--export", "out"])
    folder = "results/VOC2012/Segmentation/comp6_test_cls"
    with tarfile.open("out/voc2012_test.tar.gz", "r:gz") as archive:
        files = sorted(member.name for member in archive if member.isfile())
        archive.extractall("submitted", filter="data")
    assert files == [f"{folder}/2008_000001.png", f"{folder}/2008_000003.png"]
    with Image.open(f"submitted/{folder}/2008_000003.png") as picture:
        assert (picture.mode, picture.size) == ("P", (51, 49))
        palette = picture.getpalette()
    assert palette[: 3 * 21] == [channel for color in voc_palette(21) for channel in color]
    (voc / "SegmentationClass").mkdir()
    (voc / "ImageSets/Segmentation/back.txt").write_text("2008_000001\n2008_000003")
    for name in ("2008_000001", "2008_000003"):
        (voc / f"SegmentationClass/{name}.png").write_bytes((workdir / f"submitted/{folder}/{name}.png").read_bytes())
    dataset = PascalVOCDataset(open_model("a.pth").config.dataset, "back")
    predictions, _ = all_pixels("a.pth", "test")
    assert torch.equal(torch.cat([label.flatten() for _, label in dataset]), predictions)


def cityscapes_export(workdir, count=2):
    write_cityscapes(workdir / "own", "test", count)
    config = tiny_config("dataset.name=cityscapes", "dataset.root=own")
    return Submission(CityscapesDataset(config.dataset, "test"), workdir / "out")


def test_an_incomplete_export_is_refused(workdir):
    submission = cityscapes_export(workdir)
    submission.write(0, np.zeros((48, 96), dtype=np.uint8))
    with pytest.raises(SubmissionError, match="1 images, want 2"):
        submission.finish()


@pytest.mark.parametrize("fault", ["ids", "mode", "size", "extra"])
def test_a_file_that_was_changed_is_refused(workdir, fault, monkeypatch):
    submission = cityscapes_export(workdir)
    for index in range(2):
        submission.write(index, np.full((48, 96), 3, dtype=np.uint8))
    path = workdir / "out/berlin_000001_000019.png"
    changed = {
        "ids": Image.new("L", (96, 48), 13),  # a valid id, but not that of class 3
        "mode": Image.new("RGB", (96, 48)),
        "size": Image.new("L", (95, 48), 12),
        "extra": Image.new("L", (96, 48), 12),
    }[fault]
    changed.save(path)
    if fault == "extra":
        monkeypatch.setattr(submissions, "_members", lambda archive: [("berlin_000009_000019.png", b"")])
    with pytest.raises(SubmissionError, match="berlin_00000[19]_000019"):
        submission.finish()


def test_an_export_does_not_mix_with_an_older_one(workdir):
    (workdir / "out").mkdir()
    (workdir / "out/old.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="not empty"):
        cityscapes_export(workdir)


def test_padding_leaves_no_trace_in_the_labels(workdir):
    """An image of any size is labelled as its padded self, cut back."""
    inference = Inference(pixel_net(), CPU)
    image = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        odd, _ = label_image(inference, image, View())
        padded, _ = label_image(inference, Grid().pad(image, 0.0), View())
    assert torch.equal(odd, padded[:, :37, :50])


def test_other_classes_than_the_checkpoint_knows_are_refused(workdir):
    write_folder(workdir / "own", ["two", "one"], [0, 1])
    save_model("a.pth", *folder_overrides(2))
    known = load_checkpoint(Path("a.pth")).with_(class_names=("one", "two"), palette=((1, 1, 1), (2, 2, 2)))
    save_checkpoint(Path("a.pth"), known)
    with pytest.raises(ConfigError, match=r"a\.pth: it was trained with 'one' as class 0, .* in another order"):
        evaluate.main(["--checkpoint", "a.pth"])
    assert not (workdir / "results").exists()
