"""Pictures of labels and of prototypes, on scenes and under hostile names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from config import DatasetConfig, ShapesConfig
from dataset import ShapesDataset, normalize
from explanation.pictures import colorize, draw_box, draw_prototypes, fit, heat, overlay, sheet, similarity_map, slug
from model import pad_to_grid
from push import push_prototypes
from tests.tiny import tiny_ppnet

PALETTE = ((10, 20, 30), (200, 100, 0))
LABELS = np.array([[0, 1], [255, 0]])


@pytest.fixture
def pushed():
    """A model after its push, the data set, the report."""
    dataset = ShapesDataset(DatasetConfig(name="shapes", shapes=ShapesConfig(train_images=3, image_size=44)), "train")
    model = tiny_ppnet(12, 6)
    return model, dataset, push_prototypes(model, dataset, torch.device("cpu"))


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
    grid, share = similarity_map(model, image, record["prototype"])
    with torch.no_grad():
        distances = model(pad_to_grid(normalize(image)[None], 0.0)).distances[:, :1]
        assert torch.equal(grid, model.activations(distances)[0, 0])
    assert share.shape == (image.height, image.width) and share.min() == 0.0 and share.max() == 1.0
    x, y = record["pixel"]
    assert share[y, x] == 1.0


def test_every_prototype_has_a_picture_and_every_class_a_sheet(pushed, tmp_path):
    model, dataset, report = pushed
    folder = tmp_path / "prototypes"
    folder.mkdir()
    (folder / "prototype_999_old.png").write_bytes(b"from the push before")
    draw_prototypes(model, dataset, report.records, folder)
    written = json.loads((folder / "prototypes.json").read_text())
    assert written == report.records and len(written) == len(model.prototype_class)
    expected = {r["picture"] for r in written} | {"prototypes.json"}
    expected |= {f"class_{c:02d}_{name}.png" for c, name in enumerate(dataset.mapping.names)}
    assert {path.name for path in folder.iterdir()} == expected
    for record in written:
        assert Image.open(folder / record["picture"]).size[1] > 160
        x0, y0, x1, y1 = record["box"]
        assert x0 <= record["pixel"][0] < x1 and y0 <= record["pixel"][1] < y1


def test_a_class_that_never_occurs_has_a_record_and_no_picture(pushed, tmp_path):
    model, dataset, report = pushed
    record = report.records[-1]
    record.update(dict.fromkeys(("image", "image_index", "split", "cell", "pixel", "distance")))
    draw_prototypes(model, dataset, report.records[-1:], tmp_path / "p")
    (written,) = json.loads((tmp_path / "p" / "prototypes.json").read_text())
    assert written["box"] is None and written["picture"] is None
    assert [path.name for path in (tmp_path / "p").iterdir()] == ["prototypes.json"]


def test_hostile_class_names_stay_inside_the_folder(pushed, tmp_path):
    model, dataset, report = pushed
    for record in report.records:
        record["class_name"] = "../../<b>\n" + "x" * 300
    dataset.mapping = dataset.mapping._replace(names=("../../<b>\n" + "x" * 300,) * 6)
    draw_prototypes(model, dataset, report.records[:1], tmp_path / "inside" / "p")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert len(list((tmp_path / "inside" / "p").glob("*.png"))) == 2 and len(list((tmp_path / "inside").iterdir())) == 1
