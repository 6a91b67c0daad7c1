"""Data sets in their published layouts, the transforms, the order of the batches, and the check command."""

import os
import signal
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import train
from config import Config, DatasetConfig, ShapesConfig, load_config
from dataset import DATASETS, balanced_weights, build_dataset
from datasets import batches
from datasets.base import MEAN, STD, DatasetError, normalize, read_image, voc_palette
from datasets.batches import StepSampler, TrainingSamples, TrainTransform, eval_batches, train_batches
from runtime.errors import ConfigError
from tests import trees
from tests.tiny import CONFIG

IGNORE = 255
CLASSES = {"cityscapes": 19, "pascal": 21, "camvid": 11, "folder": 3}
WRITE = {"cityscapes": trees.cityscapes, "pascal": trees.voc, "camvid": trees.camvid, "folder": trees.folder}


def load(name, root, split="train"):
    return DATASETS[name](DatasetConfig(name=name, root=str(root)), split)


def config_for(name, root):
    (root / "data.yaml").write_text(
        f"dataset: {{name: {name}, root: {root}}}\n"
        f"model: {{num_classes: {CLASSES[name]}, prototype_shape: [{CLASSES[name]}, 8, 1, 1]}}\n"
    )
    return ["--config", str(root / "data.yaml")]


@pytest.fixture
def tree(tmp_path, request):
    """(name, root) of a data set that was just written."""
    WRITE[request.param](tmp_path)
    return request.param, tmp_path


every_tree = pytest.mark.parametrize("tree", WRITE, indirect=True)


# --- the published layouts -------------------------------------------------------------------------------------


@every_tree
def test_a_tree_loads_and_maps_to_classes(tree):
    name, root = tree
    for split, count in (("train", 3), ("val", 2)):
        data = load(name, root, split)
        assert len(data) == count and data.num_classes == CLASSES[name] == len(data.mapping.palette)
        labels = [data[i][1] for i in range(count)]
        found = set(torch.cat([label.flatten() for label in labels]).tolist())
        assert found == {*range(CLASSES[name]), IGNORE}
        for image, label in (data[i] for i in range(count)):
            assert image.dtype == torch.float32 and label.dtype == torch.int64 and image.shape[1:] == label.shape


def test_the_cityscapes_ids_are_the_official_ones(tmp_path):
    trees.cityscapes(tmp_path)
    data = load("cityscapes", tmp_path)
    official = {file_id: i for i, file_id in enumerate(trees.CITYSCAPES_IDS)}
    for i in range(3):
        ids = np.asarray(Image.open(data.paths(i)[1])).astype(int)
        expected = np.vectorize(lambda v: official.get(v, IGNORE))(ids)
        assert np.array_equal(data[i][1].numpy(), expected)
    assert data.mapping.names[0] == "road" and data.mapping.names[13] == "car" and data.mapping.names[18] == "bicycle"
    assert data.mapping.id_to_class[-1] == IGNORE


def test_a_cityscapes_label_of_minus_one_is_ignored(tmp_path):
    trees.cityscapes(tmp_path)
    data = load("cityscapes", tmp_path)
    trees.save(np.full((40, 48), 255, dtype=np.uint8), data.paths(0)[1])
    assert (data[0][1] == IGNORE).all()


def test_cityscapes_test_images_need_no_labels(tmp_path):
    trees.cityscapes(tmp_path)
    assert load("cityscapes", tmp_path, "test").paths(0)[1] is not None
    os.remove(load("cityscapes", tmp_path, "test").paths(0)[1])
    data = load("cityscapes", tmp_path, "test")
    assert data.paths(0)[1] is None and (data[0][1] == IGNORE).all()


def test_voc_palette_files_keep_their_indices(tmp_path):
    trees.voc(tmp_path)
    data = load("pascal", tmp_path)
    with Image.open(data.paths(1)[1]) as label:
        assert label.mode == "P"
        assert np.array_equal(data[1][1].numpy(), np.array(label))
    assert [c for color in data.mapping.palette for c in color] == trees.voc_colors()[: 21 * 3]
    assert data.mapping.palette[15] == (192, 128, 128) and data.mapping.names[15] == "person"


@pytest.mark.parametrize("move", ["", "VOCdevkit", "VOCdevkit/VOC2012", "up"])
def test_voc_is_found_wherever_it_was_unpacked(tmp_path, move):
    trees.voc(tmp_path / "here")
    root = tmp_path if move == "up" else tmp_path / "here" / move
    assert len(load("pascal", root)) == 3


@pytest.mark.parametrize("place", ["Segmentation", "SegmentationAug"])
def test_voc_with_sbd_takes_its_list_and_labels(tmp_path, place):
    trees.voc(tmp_path)
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets"
    (lists / place).mkdir(exist_ok=True)
    (lists / "Segmentation" / "train_aug.txt").rename(lists / place / "train_aug.txt")
    data = load("pascal", tmp_path, "train_aug")
    assert [data.paths(i)[1].parent.name for i in range(3)] == ["SegmentationClassAug"] * 3
    assert torch.equal(data[0][1], load("pascal", tmp_path)[0][1])


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("lists", ["segnet", "names", "none"])
def test_camvid_loads_with_either_list_or_none_as_png_or_jpeg(tmp_path, suffix, lists):
    trees.camvid(tmp_path, suffix, lists)
    data = load("camvid", tmp_path)
    assert [data.image_id(i) for i in range(3)] == [f"train/0001TP_{n:06d}{suffix}" for n in (6690, 6720, 6750)]
    with Image.open(data.paths(2)[1]) as label:
        ids = np.array(label).astype(int)
    assert np.array_equal(data[2][1].numpy(), np.where(ids == 11, IGNORE, ids))


def test_a_folder_has_its_classes_from_its_list(tmp_path):
    trees.folder(tmp_path)
    data = load("folder", tmp_path)
    assert data.mapping.names == ("sea", "sand", "palm tree") and len(set(data.mapping.palette)) == 3
    assert [data.image_id(i) for i in range(3)] == ["images/train/a.png", "images/train/b.jpg", "images/train/c.JPEG"]


@pytest.mark.parametrize("text", ["only one\n", "a\nb\na\n", "", "\n".join(f"c{i}" for i in range(254))])
def test_a_list_of_classes_that_cannot_be_is_refused(tmp_path, text):
    trees.folder(tmp_path)
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DatasetError, match="classes.txt: want 2 to 253 different names"):
        load("folder", tmp_path)


def test_shapes_splits_are_different_scenes_and_no_other_split_is_there():
    config = DatasetConfig(name="shapes", shapes=ShapesConfig(train_images=3, val_images=2, image_size=33))
    train_set, val_set = (DATASETS["shapes"](config, split) for split in ("train", "val"))
    assert (len(train_set), len(val_set)) == (3, 2) and not torch.equal(train_set[0][0], val_set[0][0])
    with pytest.raises(DatasetError, match="no split 'all', only train, val, test"):
        DATASETS["shapes"](config, "all")
    with pytest.raises(IndexError):
        train_set[3]


@every_tree
def test_a_tree_trains_and_is_pushed(tree, workdir, monkeypatch):
    name, root = tree
    (root / "data.yaml").write_text(CONFIG)
    monkeypatch.setattr(train, "draw_prototypes", lambda *args: args[2])
    train.main([
        "--config", "data.yaml", "--set", f"dataset.name={name}", "--set", f"dataset.root={root}",
        "--set", f"model.num_classes={CLASSES[name]}", "--set", f"model.prototype_shape=[{CLASSES[name]}, 8, 1, 1]",
    ])  # fmt: skip
    state = torch.load("models/push_checkpoint.pth", weights_only=True)
    data = load(name, root)
    assert [r["class"] for r in state["prototypes"]] == list(range(CLASSES[name]))
    for record in state["prototypes"]:
        x, y = record["pixel"]
        assert data[record["image_index"]][1][y, x] == record["class"]
        assert data.image_id(record["image_index"]) == record["image"]
    assert state["class_names"] == list(data.mapping.names)


@pytest.mark.parametrize("name", ["cityscapes", "pascal"])
def test_resnet18_trains_on_the_official_layout(name, tmp_path, monkeypatch):
    """With torchvision's own network; all else is as above."""
    WRITE[name](tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text(CONFIG)
    train.main([
        "--config", "data.yaml", "--phase", "0", "--set", f"dataset.name={name}", "--set", "dataset.root=.",
        "--set", f"model.num_classes={CLASSES[name]}", "--set", f"model.prototype_shape=[{CLASSES[name]}, 8, 1, 1]",
    ])  # fmt: skip
    assert (tmp_path / "models" / "warmup_checkpoint.pth").is_file()


# --- what is missing or wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_missing_data_set_says_where_what_how_and_that_the_demo_needs_none(tmp_path, name):
    with pytest.raises(DatasetError) as caught:
        load(name, tmp_path / "nowhere")
    message = str(caught.value)
    data = DATASETS[name]
    for part in (f"'{tmp_path}/nowhere'", data.layout, data.fetch, "--set dataset.root=", "configs/demo.yaml"):
        assert part in message
    assert "\n" not in message and caught.value.exit_code == 2


@pytest.mark.parametrize(("name", "command"), [("cityscapes", "download_datasets.py"), ("pascal", "download_voc.py")])
def test_a_missing_data_set_names_the_command_that_fetches_it(tmp_path, name, command):
    with pytest.raises(DatasetError, match=f"python {command}"):
        load(name, tmp_path)


def test_missing_files_are_named_before_anything_starts(tmp_path):
    trees.camvid(tmp_path)
    config = load_config(config_for("camvid", tmp_path)[1])
    os.remove(tmp_path / "trainannot" / "0001TP_006720.png")
    os.remove(tmp_path / "train" / "0001TP_006750.png")
    with pytest.raises(DatasetError, match=r"2 files are missing: .*train.*006720.png, .*train/0001TP_006750.png"):
        build_dataset(config, "train")


def test_a_wrong_number_of_classes_is_refused_with_the_right_one(tmp_path):
    trees.camvid(tmp_path)
    config = load_config(config_for("camvid", tmp_path)[1], ["model.num_classes=1"] and ["model.num_classes=11"])
    assert build_dataset(config, "train").num_classes == 11
    wrong = load_config(config_for("camvid", tmp_path)[1], ["model.num_classes=2", "model.prototype_shape.0=4"])
    with pytest.raises(ConfigError, match=r"model.num_classes: 2, but camvid has 11 classes: set model.num_classes=11"):
        build_dataset(wrong, "train")


@pytest.mark.parametrize(
    ("name", "ids", "told"),
    [
        ("cityscapes", [34, 99], "34, 99 are not ids of cityscapes (-1..33, 255 = ignore)"),
        ("pascal", [21], "21 are not ids of pascal (0..20, 255 = ignore)"),
        ("camvid", [12, 254], "12, 254 are not ids of camvid (0..11, 255 = ignore)"),
        ("folder", [3, *range(100, 120)], "109 ... are not ids of folder (0..2, 255 = ignore)"),
    ],
)
def test_ids_outside_the_map_are_told_with_their_file(tmp_path, name, ids, told):
    WRITE[name](tmp_path)
    data = load(name, tmp_path)
    path = data.paths(1)[1]
    ids_there = np.array(Image.open(path))
    ids_there.flat[: len(ids)] = ids
    trees.save(ids_there, path)
    with pytest.raises(DatasetError) as caught:
        data[1]
    assert str(caught.value).startswith(f"{path}: label ids") and told.removeprefix("109 ...") in str(caught.value)
    data[0]


def test_a_fault_in_a_workers_file_arrives_as_one_line(tmp_path):
    trees.camvid(tmp_path)
    data = load("camvid", tmp_path)
    data.paths(1)[0].write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(DatasetError) as caught:
            list(eval_batches(data, workers))
        assert str(caught.value).startswith(f"{data.paths(1)[0]}: cannot read this image")
        assert "\n" not in str(caught.value)


# --- reading ---------------------------------------------------------------------------------------------------


@every_tree
def test_two_reads_of_an_item_are_equal(tree):
    data, again = load(*tree), load(*tree)
    for i in range(len(data)):
        assert all(torch.equal(a, b) for a, b in zip(data[i], data[i], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(data[i], again[i], strict=True))


def unnormalized(image):
    """The pixels (H, W, 3) of a normalized image (3, H, W)."""
    values = (image.numpy() * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]) * 255
    return values.round().astype(int).transpose(1, 2, 0)


def test_normalization(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = normalize(Image.fromarray(pixels))
    expected = (pixels.transpose(2, 0, 1) / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_other_modes_are_read_as_rgb(tmp_path, mode):
    Image.new("RGB", (6, 4), (200, 30, 60)).convert(mode).save(tmp_path / "image.tiff")
    image = read_image(tmp_path / "image.tiff")
    assert image.mode == "RGB" and image.size == (6, 4)


def test_a_photograph_is_turned_as_its_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (6, 4)
    assert read_image(tmp_path / "photo.jpg", upright=True).size == (4, 6)


def test_the_palette_of_voc_is_the_published_bit_pattern():
    assert [c for color in voc_palette(256) for c in color] == trees.voc_colors()


# --- the training transform ------------------------------------------------------------------------------------


def painted(width, height, along):
    """An image and a label that both show the coordinate along x or y."""
    ramp = np.arange(width)[None] if along == "x" else np.arange(height)[:, None]
    values = np.broadcast_to(ramp, (height, width)).astype(np.uint8)
    return Image.fromarray(np.stack([values] * 3, -1)), Image.fromarray(np.ascontiguousarray(values))


@pytest.mark.parametrize("along", ["x", "y"])
@pytest.mark.parametrize("size", [(200, 180), (60, 40), (30, 240)])
@pytest.mark.parametrize("scales", [(0.5, 0.5), (1.0, 1.0), (1.9, 1.9), (0.5, 1.5)])
def test_the_transform_keeps_image_and_label_aligned(along, size, scales):
    image, label = painted(*size, along)
    transform = TrainTransform(DatasetConfig(crop_size=65, scale_range=scales))
    flips = set()
    for seed in range(12):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        assert pixels.shape == (3, 65, 65) and classes.shape == (65, 65)
        seen = torch.from_numpy(unnormalized(pixels)[..., 0])
        counted = classes != IGNORE
        assert (pixels[:, ~counted] == 0).all()
        if not counted.any():
            continue
        difference = (seen - classes)[counted]
        assert difference.abs().max() <= 1.0 / scales[0] + 1 and difference.float().mean().abs() < 0.6
        steps = classes.diff(dim=1 if along == "x" else 0)
        inner = counted[:, 1:] & counted[:, :-1] if along == "x" else counted[1:] & counted[:-1]
        flips.add(bool(steps[inner].sum() < 0))
        assert steps[inner].abs().float().mean() == pytest.approx(np.mean(1 / np.array(scales)), rel=0.6)
    assert flips == ({True, False} if along == "x" else {False})


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.4])
def test_labels_are_never_mixed(scale):
    label = np.random.default_rng(0).choice([0, 7, 200], (120, 120)).astype(np.uint8)
    transform = TrainTransform(DatasetConfig(crop_size=65, scale_range=(scale, scale)))
    _, classes = transform(Image.new("RGB", (120, 120)), Image.fromarray(label), np.random.default_rng(0))
    assert set(classes.unique().tolist()) == {0, 7, 200}


def test_without_scaling_the_crop_is_a_piece_of_the_image():
    image, label = painted(200, 180, "x")
    transform = TrainTransform(DatasetConfig(crop_size=65, scale_range=(1.0, 1.0), flip=False))
    lefts = set()
    for seed in range(20):
        pixels, classes = transform(image, label, np.random.default_rng(seed))
        left = int(classes[0, 0])
        lefts.add(left)
        assert torch.equal(classes, (left + torch.arange(65)).expand(65, 65))
        assert torch.equal(pixels, normalize(image.crop((left, 0, left + 65, 65))))
    assert len(lefts) > 10 and min(lefts) >= 0 and max(lefts) <= 200 - 65


def test_an_image_that_is_too_small_is_padded_with_the_mean_and_ignored_labels():
    image, label = painted(40, 40, "y")
    transform = TrainTransform(DatasetConfig(crop_size=65, scale_range=(1.0, 1.0), flip=False))
    pixels, classes = transform(image, label, np.random.default_rng(0))
    assert (classes != IGNORE).sum() == 40 * 40 and (pixels != 0).any(0).sum() == 40 * 40


def test_the_scale_is_uniform_over_its_range():
    """At scale s one pixel of the crop covers 1 / s source pixels."""
    image, label = painted(250, 250, "x")
    transform = TrainTransform(DatasetConfig(crop_size=65, scale_range=(0.5, 1.5), flip=False))
    spans = []
    for seed in range(300):
        _, classes = transform(image, label, np.random.default_rng(seed))
        spans.append(64 / float(classes[0, -1] - classes[0, 0]))
    assert np.quantile(spans, [0.02, 0.5, 0.98]) == pytest.approx([0.52, 1.0, 1.48], abs=0.09)


# --- batches ---------------------------------------------------------------------------------------------------


def loader_of(tmp_path, seed=0, phase=0, first=0, last=6, workers=0):
    if not (tmp_path / "train").is_dir():
        trees.camvid(tmp_path)
    samples = TrainingSamples(load("camvid", tmp_path), TrainTransform(DatasetConfig(crop_size=33)), seed, phase)
    sampler = StepSampler(3, 2, seed, phase, first, last)
    return list(train_batches(samples, sampler, workers))


def equal(batches, others):
    return len(batches) == len(others) and all(
        torch.equal(a, b) for one, two in zip(batches, others, strict=True) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(tmp_path, workers):
    assert equal(loader_of(tmp_path), loader_of(tmp_path, workers=workers))


def test_batches_do_not_depend_on_where_a_run_was_resumed(tmp_path):
    assert equal(loader_of(tmp_path)[4:], loader_of(tmp_path, first=4))


def test_batches_depend_on_seed_and_phase(tmp_path):
    assert not equal(loader_of(tmp_path), loader_of(tmp_path, seed=1))
    assert not equal(loader_of(tmp_path), loader_of(tmp_path, phase=1))


def test_making_batches_leaves_the_global_random_state(tmp_path):
    before = torch.get_rng_state()
    loader_of(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("images", "batch_size"), [(5, 2), (3, 4), (1, 2), (7, 7)])
def test_every_epoch_has_every_image_once_in_a_new_order(images, batch_size):
    sampler = StepSampler(images, batch_size, seed=0, phase=0, last=5 * images)
    keys = [key for batch in sampler for key in batch]
    assert len(sampler) == 5 * images and all(len(batch) == batch_size for batch in sampler)
    epochs = [[index for e, index in keys if e == epoch] for epoch in range(5)]
    assert all(sorted(order) == list(range(images)) for order in epochs)
    assert images < 3 or len({tuple(order) for order in epochs}) > 1


def test_a_crop_is_a_function_of_seed_phase_epoch_and_index(tmp_path):
    trees.camvid(tmp_path)
    data, transform = load("camvid", tmp_path), TrainTransform(DatasetConfig(crop_size=33))

    def crop(seed, phase, epoch, index):
        return TrainingSamples(data, transform, seed, phase)[epoch, index][0]

    first = crop(0, 0, 0, 1)
    assert torch.equal(first, crop(0, 0, 0, 1))
    for other in ((1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (0, 0, 0, 2)):
        assert not torch.equal(first, crop(*other))


def test_evaluation_goes_through_whole_images_in_order(tmp_path):
    trees.folder(tmp_path)
    data = load("folder", tmp_path)
    for workers in (0, 2):
        batches = list(eval_batches(data, workers))
        assert [tuple(image.shape) for image, _ in batches] == [(1, 3, 33, 40), (1, 3, 34, 48), (1, 3, 35, 56)]
        assert all(torch.equal(batches[i][1][0], data[i][1]) for i in range(3))


def test_workers_leave_signals_to_the_main_process(monkeypatch):
    taken = {}
    monkeypatch.setattr(signal, "signal", taken.__setitem__)
    batches._ignore_signals(0)
    assert taken == dict.fromkeys((signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), signal.SIG_IGN)


# --- the check command -----------------------------------------------------------------------------------------


def bomb(width, height):
    """A PNG of a few hundred bytes whose header claims width x height pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def as_folder(path):
    path.unlink()
    path.mkdir()


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def changed(path, change):
    with Image.open(path) as image:
        image.load()
    result = change(image)
    result.save(path)


def grey_palette(label):
    label.putpalette([v for v in range(256) for _ in range(3)])
    return label


FAULTS = {  # what is done to the second training pair (image, label), and what is told
    "image missing": (lambda image, label: image.unlink(), "{image}: this image is missing"),
    "label missing": (lambda image, label: label.unlink(), "{label}: this label is missing"),
    "truncated image": (lambda image, label: truncated(image), "{image}: cannot read this image"),
    "truncated label": (lambda image, label: truncated(label), "{label}: cannot read this label"),
    "empty file": (lambda image, label: image.write_bytes(b""), "{image}: cannot read this image"),
    "other size": (
        lambda image, label: changed(label, lambda im: im.crop((0, 0, 40, 40))),
        "{label}: the label is 40x40, its image 48x40",
    ),
    "RGB label": (lambda image, label: changed(label, lambda im: im.convert("RGB")), "{label}: the label has mode RGB"),
    "16-bit label": (
        lambda image, label: Image.fromarray(np.full((40, 48), 300, dtype=np.uint16)).save(label),
        "{label}: the label has mode I;16",
    ),
    "palette lost": (lambda image, label: changed(label, grey_palette), "{label}: the palette was changed"),
    "unknown id": (
        lambda image, label: trees.save(np.full((40, 48), 77, dtype=np.uint8), label),
        "{label}: label ids 77 are not ids of pascal",
    ),
    "empty label": (
        lambda image, label: trees.save(np.full((40, 48), 255, dtype=np.uint8), label),
        "{label}: no pixel of this label has a class",
    ),
    "a folder for an image": (lambda image, label: as_folder(image), "{image}: cannot read this image"),
    "a folder for a label": (lambda image, label: as_folder(label), "{label}: cannot read this label"),
    "a large image": (lambda image, label: image.write_bytes(bomb(9000, 9000)), "{image}: 9000x9000 pixels"),
    "a bomb": (lambda image, label: image.write_bytes(bomb(60000, 60000)), "{image}: cannot read this image"),
}


def check(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        dataset.main(arguments)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds(tmp_path, capsys, fault):
    trees.voc(tmp_path)
    plant, told = FAULTS[fault]
    image, label = load("pascal", tmp_path).paths(1)
    plant(image, label)
    with pytest.raises(DatasetError, match="pascal: 1 faults"):
        check(config_for("pascal", tmp_path))
    out = capsys.readouterr().out
    assert "  fault: " + told.format(image=image, label=label) in out
    assert "pascal train: 3 images, 1 faults" in out and "pascal val: 2 images, 0 faults" in out


def test_the_check_tells_all_faults_at_once(tmp_path, capsys):
    trees.voc(tmp_path)
    pairs = [load("pascal", tmp_path).paths(i) for i in range(3)] + [load("pascal", tmp_path, "val").paths(0)]
    for pair, fault in zip(pairs, ("label missing", "truncated image", "unknown id", "other size"), strict=True):
        FAULTS[fault][0](*pair)
    with pytest.raises(DatasetError, match="pascal: 4 faults"):
        check(config_for("pascal", tmp_path))
    assert capsys.readouterr().out.count("  fault: ") == 4


@every_tree
def test_the_check_has_nothing_against_a_good_tree_and_counts_its_classes(tree, capsys):
    name, root = tree
    check(config_for(name, root))
    out = capsys.readouterr().out
    assert f"{name} train: 3 images, 0 faults" in out and "no faults. Next: python train.py --config" in out
    data = load(name, root)
    labels = torch.cat([data[i][1].flatten() for i in range(3)])
    for c, class_name in enumerate(data.mapping.names):
        share = 100 * (labels == c).sum().item() / len(labels)
        assert f"  {class_name:<16}{share:6.2f} %" in out
    assert f"  {'(ignored)':<16}{100 * (labels == IGNORE).sum().item() / len(labels):6.2f} %" in out


def test_the_check_suggests_class_weights(tmp_path, capsys):
    assert balanced_weights(np.array([400, 100, 0, 4])).tolist() == [1, 2, 1, 10]
    trees.folder(tmp_path)
    check(config_for("folder", tmp_path))
    data = load("folder", tmp_path)
    labels = torch.cat([data[i][1].flatten() for i in range(len(data))])
    pixels = [(labels == c).sum().item() for c in range(data.num_classes)]
    weights = ", ".join(f"{(max(pixels) / count) ** 0.5:.3g}" for count in pixels)
    assert f"training.class_weights: [{weights}]" in capsys.readouterr().out


def test_the_check_names_a_class_that_never_occurs(tmp_path, capsys):
    trees.folder(tmp_path)
    for split in ("train", "val"):
        data = load("folder", tmp_path, split)
        for i in range(len(data)):
            changed(data.paths(i)[1], lambda label: Image.fromarray(np.where(np.array(label) == 2, 0, np.array(label))))
    check(config_for("folder", tmp_path))
    assert capsys.readouterr().out.count("palm tree         0.00 %   (never occurs)") == 2


def test_a_list_with_crlf_blank_lines_and_a_byte_order_mark_is_accepted(tmp_path):
    trees.voc(tmp_path)
    listed = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    names = "\r\n\r\n".join(trees.VOC_NAMES["train"])
    listed.write_bytes(b"\xef\xbb\xbf" + names.encode() + b"\r\n  \r\n")
    check(config_for("pascal", tmp_path))
    assert len(load("pascal", tmp_path)) == 3


def test_an_image_that_is_listed_twice_is_a_fault(tmp_path, capsys):
    trees.voc(tmp_path)
    listed = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt"
    listed.write_text(listed.read_text() * 2)
    with pytest.raises(DatasetError, match="pascal: 3 faults"):
        check(config_for("pascal", tmp_path))
    assert "2007_000032.jpg: listed 2 times" in capsys.readouterr().out


def test_the_check_compares_the_number_of_classes(tmp_path, capsys):
    trees.folder(tmp_path)
    with pytest.raises(DatasetError, match="1 faults"):
        check([*config_for("folder", tmp_path), "--set", "model.num_classes=2", "--set", "model.prototype_shape.0=2"])
    assert "model.num_classes is 2, the data set has 3 classes" in capsys.readouterr().out


def test_a_good_label_of_sbd_needs_no_palette(tmp_path):
    trees.voc(tmp_path)
    check([*config_for("pascal", tmp_path), "--set", "dataset.train_split=train_aug"])


def test_the_default_data_set_is_there_for_every_name():
    assert set(DATASETS) == {"cityscapes", "pascal", "camvid", "folder", "shapes"}
    assert Config().dataset.name in DATASETS


@pytest.mark.parametrize("name", ["camvid", "folder"])
def test_a_label_without_an_image_is_a_missing_image(name, tmp_path):
    folders = {"camvid": ("train", "trainannot"), "folder": ("images/train", "labels/train")}[name]
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for folder, stems in zip(folders, (["one"], ["one", "two"]), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        for stem in stems:
            Image.new("RGB" if folder == folders[0] else "L", (9, 9)).save(tmp_path / folder / f"{stem}.png")
    opened = dataset.open_dataset(DatasetConfig(name=name, root=str(tmp_path)), "train")
    assert [path.name for path in dataset.missing_files(opened)] == ["two.png"]
