"""Pictures of labels and of prototypes, on scenes and under hostile names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from config import DatasetConfig, ShapesConfig
from datasets.base import normalize
from datasets.scenes import ShapesDataset
from explanation.figure import explained_figure
from explanation.pictures import colorize, draw_box, fit, heat, overlay, sheet, slug
from explanation.prototype_pictures import draw_prototypes, similarity_map
from grid import Grid
from inference import Inference
from push import push_prototypes
from runtime.errors import ConfigError
from runtime.files import MANIFEST, OutputFolder
from tests.tiny import tiny_ppnet

PALETTE = ((10, 20, 30), (200, 100, 0))
LABELS = np.array([[0, 1], [255, 0]])


@pytest.fixture
def pushed():
    """A model after its push, the data set, the report."""
    dataset = ShapesDataset(DatasetConfig(name="shapes", shapes=ShapesConfig(train_images=3, image_size=44)), "train")
    model = tiny_ppnet(12, 6)
    return model, dataset, push_prototypes(Inference(model, torch.device("cpu")), dataset)


def test_labels_have_their_colours_and_ignored_ones_are_black():
    colors = np.asarray(colorize(LABELS, PALETTE))
    assert colors.tolist() == [[[10, 20, 30], [200, 100, 0]], [[0, 0, 0], [10, 20, 30]]]


def test_an_overlay_mixes_colours_and_leaves_ignored_pixels():
    image = Image.new("RGB", (2, 2), (100, 100, 100))
    mixed = np.asarray(overlay(image, LABELS, PALETTE, opacity=0.6))
    assert mixed[1, 0].tolist() == [100, 100, 100]
    np.testing.assert_allclose(mixed[0, 1], 0.6 * np.array(PALETTE[1]) + 0.4 * 100, atol=1)


def test_heat_is_nothing_at_zero_and_yellow_at_one():
    image = Image.new("RGB", (2, 1), (0, 0, 200))
    pixels = np.asarray(heat(image, np.array([[0.0, 1.0]]))).astype(int)
    assert pixels[0, 0].tolist() == [0, 0, 200]
    assert pixels[0, 1, 0] > 150 and pixels[0, 1, 1] > 150 and pixels[0, 1, 2] < 100


def test_a_box_is_drawn_around_its_pixels_and_not_on_them():
    image = Image.new("RGB", (20, 20), "white")
    framed = np.asarray(draw_box(image, [5, 6, 9, 11]))
    assert (framed[6:11, 5:9] == 255).all() and (framed[5, 4:10] != 255).any(-1).all()
    assert (np.asarray(image) == 255).all()


def test_fit_keeps_the_shape_of_an_image():
    assert fit(Image.new("RGB", (100, 50)), 10).size == (20, 10)
    assert fit(Image.new("RGB", (1, 500)), 10).size == (1, 10)


@pytest.mark.parametrize("size", [(20_000, 20), (60_000, 1), (1, 60_000), (20_000, 2)])
def test_pictures_of_very_long_images_are_bounded(size):
    image = Image.new("RGB", size)
    assert max(fit(image, 220).size) <= 16 * 220 and min(fit(image, 220).size) >= 1
    row = {
        "name": "a",
        "color": (1, 2, 3),
        "share": 1.0,
        "prototypes": [{"prototype": 1, "picture": None, "share": 1.0, "at": (0, 0)}],
    }
    figure = explained_figure(image, image, [row])
    assert max(figure.size) < 4000
    assert size[0] < size[1] or figure.getpixel((600, 0)) == (0, 0, 0)  # the photograph, as wide as any


def test_a_sheet_holds_every_picture():
    red, lime, blue = (Image.new("RGB", *how) for how in (((30, 20), "red"), ((10, 25), "lime"), ((8, 8), "blue")))
    rows = [[(red, "a"), (lime, "b")], [(blue, "c")]]
    pixels = np.asarray(sheet(rows, "title")).reshape(-1, 3).tolist()
    assert [pixels.count(c) for c in ([255, 0, 0], [0, 255, 0], [0, 0, 255])] == [600, 250, 64]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("traffic light", "traffic-light"), ("../../etc/passwd", "etc-passwd"), ("<script>", "script"),
        ("Žába", "zaba"), ("", "class"), ("道路", "class"), ("a" * 300, "a" * 40), ("new\nline", "new-line"),
        ("\u202eabc", "abc"), ("..", "class"),
    ],
)  # fmt: skip
def test_a_slug_is_a_harmless_part_of_a_file_name(name, expected):
    assert slug(name) == expected


def test_the_similarity_map_is_highest_at_the_nearest_patch(pushed):
    model, dataset, report = pushed
    record = report.records[0]
    image, _ = dataset.read(record["image_index"])
    grid, share = similarity_map(Inference(model, torch.device("cpu")), image, record["prototype"])
    with torch.no_grad():
        distances = model(Grid().pad(normalize(image)[None], 0.0)).distances[:, :1]
        assert torch.equal(grid, model.activations(distances)[0, 0])
    assert share.shape == (image.height, image.width) and share.min() == 0.0 and share.max() == 1.0
    x, y = record["pixel"]
    assert share[y, x] == 1.0


def draw(model, dataset, records, folder):
    return draw_prototypes(Inference(model, torch.device("cpu")), dataset, records, OutputFolder(folder))


def test_every_prototype_has_a_picture_and_every_class_a_sheet(pushed, tmp_path):
    model, dataset, report = pushed
    folder = tmp_path / "prototypes"
    given = json.dumps(report.records)
    drawn = draw(model, dataset, report.records, folder)
    assert json.dumps(report.records) == given  # the caller's are as they were
    assert json.loads((folder / "prototypes.json").read_text()) == drawn
    assert [{k: r[k] for k in r if k not in ("box", "picture")} for r in drawn] == report.records
    expected = {r["picture"] for r in drawn} | {"prototypes.json", MANIFEST}
    expected |= {f"class_{c:02d}_{name}.png" for c, name in enumerate(dataset.mapping.names)}
    assert {path.name for path in folder.iterdir()} == expected
    for record in drawn:
        with Image.open(folder / record["picture"]) as picture:
            assert picture.size[1] > 160
        x0, y0, x1, y1 = record["box"]
        assert x0 <= record["pixel"][0] < x1 and y0 <= record["pixel"][1] < y1


def test_pictures_replace_those_of_the_push_before_when_they_are_whole(pushed, tmp_path, monkeypatch):
    model, dataset, report = pushed
    folder = tmp_path / "prototypes"
    draw(model, dataset, report.records, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("explanation.prototype_pictures._draw_classes", lambda *how: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(model, dataset, report.records[:3], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    drawn = draw(model, dataset, report.records[:3], folder)
    assert len(list(folder.glob("prototype_*.png"))) == len(drawn) == 3


def test_pictures_of_somebody_else_are_not_replaced(pushed, tmp_path):
    model, dataset, report = pushed
    (tmp_path / "prototype_000_sky.png").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="prototype_000_sky.png"):
        draw(model, dataset, report.records, tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"mine"]


def test_a_class_that_never_occurs_has_a_record_and_no_picture(pushed, tmp_path):
    model, dataset, report = pushed
    report.records[-1].update(dict.fromkeys(("image", "image_index", "split", "cell", "pixel", "distance")))
    (written,) = draw(model, dataset, report.records[-1:], tmp_path / "p")
    assert written["box"] is None and written["picture"] is None
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"prototypes.json", MANIFEST}


def test_hostile_class_names_stay_inside_the_folder(pushed, tmp_path):
    model, dataset, report = pushed
    for record in report.records:
        record["class_name"] = "../../<b>\n" + "x" * 300
    dataset.mapping = dataset.mapping._replace(names=("../../<b>\n" + "x" * 300,) * 6)
    draw(model, dataset, report.records[:1], tmp_path / "inside" / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert len(list((tmp_path / "inside" / "p").glob("*.png"))) == 2 and len(list((tmp_path / "inside").iterdir())) == 1
