"""A file is read as what it is, or refused by name: by the check command and by what training opens, alike."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import dataset
import train
from config import DatasetConfig, load_config
from dataset import (
    DATASETS,
    ClassMapping,
    DatasetError,
    build_dataset,
    check_classes,
    check_sample,
    check_split,
    class_warnings,
    look_for_classes,
    open_dataset,
    read_image,
)
from evaluation.submission import Submission
from runtime.errors import ConfigError
from tests import trees

SIZE = (20, 12)  # width, height
GREY = np.arange(240, dtype=np.uint8).reshape(12, 20)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], -1)
LABEL = (np.arange(240).reshape(12, 20) % 20 // 7).astype(np.uint8)  # three classes in columns


class Place:
    """A `folder` data set of two images a split; `image` and `label` are the first of train."""

    def __init__(self, root):
        self.root = root
        for split in ("train", "val"):
            for name in ("a", "b"):
                trees.save(RGB, root / "images" / split / f"{name}.png")
                trees.save(LABEL, root / "labels" / split / f"{name}.png")
        self.classes = root / "classes.txt"
        self.classes.write_text("sea\nsand\npalm tree\n")
        self.image, self.label = root / "images/train/a.png", root / "labels/train/a.png"
        self.config = root / "x.yaml"
        self.config.write_text(
            f"dataset: {{name: folder, root: '{root}'}}\nmodel: {{num_classes: 3, prototype_shape: [3, 8, 1, 1]}}\n"
        )

    def put(self, path, data):
        """Replace the first image or label by a file of another name and content."""
        (self.image if path.parent == self.image.parent else self.label).unlink()
        if isinstance(data, Image.Image):
            data.save(path)
        else:
            path.write_bytes(data)

    def read(self):
        """The first item, as arrays."""
        return tuple(np.array(part) for part in open_dataset(load_config(self.config).dataset, "train").read(0))

    def train(self):
        """What training opens and looks at before its first step."""
        check_sample(build_dataset(load_config(self.config), "train"))


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def refused(place, capsys, told, name):
    """Assert that both refuse, in lines that name the file."""
    with pytest.raises(DatasetError):
        dataset.main(["--config", str(place.config)])
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  fault: ")]
    assert any(told in fault and name in fault for fault in faults), faults
    with pytest.raises(DatasetError) as caught:
        place.train()
    assert any(told in line and name in line for line in str(caught.value).splitlines()), str(caught.value)


def accepted(place, capsys):
    """Assert that both accept; what the check says."""
    dataset.main(["--config", str(place.config)])
    place.train()
    return capsys.readouterr().out


def encoded(image, form, **how):
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def png(depth, color, row, extra=b""):
    """A PNG of SIZE with every row the same bytes. color: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *SIZE, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * SIZE[1]))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def turned(orientation, pixels=RGB, form="JPEG"):
    """A picture that says that it was taken with the camera turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(np.ascontiguousarray(pixels)), form, exif=exif)


def in_planes():
    """A TIFF of 16 bits a channel whose channels lie one behind the other."""
    count = SIZE[0] * SIZE[1] * 2
    depths, places, lengths = struct.pack("<3H", 16, 16, 16), (8, 8 + count, 8 + 2 * count), (count,) * 3
    behind = 8 + 3 * count
    entries = [
        (256, 3, 1, SIZE[0]), (257, 3, 1, SIZE[1]), (258, 3, 3, behind), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 3, behind + 6), (277, 3, 1, 3), (278, 3, 1, SIZE[1]), (279, 4, 3, behind + 18), (284, 3, 1, 2),
    ]  # fmt: skip
    tags = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    pixels = np.stack([GREY, GREY[::-1], GREY]).astype("<u2").tobytes()
    return b"II*\0" + struct.pack("<I", behind + 30) + pixels + depths + struct.pack("<6I", *places, *lengths) + tags


def keyed():
    """An RGB image in which one colour stands for transparent."""
    return encoded(Image.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[3, 4])))


def pages(form, mode="RGB"):
    return encoded(Image.new(mode, SIZE), form, save_all=True, append_images=[Image.new(mode, SIZE, "white")])


ALPHA = np.full((12, 20), 255, np.uint8)
HOLED = np.where(np.arange(20) > 15, 0, ALPHA).astype(np.uint8)
PALETTE = Image.fromarray(GREY).convert("P")

# --- bit depth, transparency, orientation, several pictures ------------------------------------------------------

REFUSED_IMAGES = {  # ending, content, what is told
    "16-bit grey": (".png", Image.fromarray(GREY.astype(np.uint16) * 257), "more than 8 bits a channel (mode I;16)"),
    "16-bit grey below 256": (".png", Image.fromarray(GREY.astype(np.uint16)), "more than 8 bits a channel"),
    "16-bit grey, high byte first": (".tif", encoded(Image.new("I;16B", SIZE), "TIFF"), "more than 8 bits a channel"),
    "16-bit RGB": (".png", png(16, 2, bytes(120)), "more than 8 bits a channel (mode RGB)"),
    "16-bit RGB in planes": (".tif", in_planes(), "more than 8 bits a channel (mode RGB)"),
    "16-bit grey and alpha": (".png", png(16, 4, b"\xff" * 80), "more than 8 bits a channel"),
    "32-bit": (".tif", Image.fromarray(GREY.astype(np.int32)), "more than 8 bits a channel (mode I)"),
    "float": (".tiff", Image.fromarray(GREY / np.float32(255)), "more than 8 bits a channel (mode F)"),
    "transparent RGBA": (".png", Image.fromarray(np.dstack([RGB, HOLED])), "20 % of its pixels are transparent"),
    "transparent grey": (".png", Image.fromarray(np.dstack([GREY, HOLED])), "20 % of its pixels are transparent"),
    "transparent WebP": (
        ".webp",
        encoded(Image.fromarray(np.dstack([RGB, HOLED])), "WEBP", lossless=True),
        "20 % of its pixels are transparent",
    ),
    "transparent palette": (".png", encoded(PALETTE, "PNG", transparency=b"\0" * 256), "pixels are transparent"),
    "transparent colour": (".png", keyed(), "pixels are transparent"),
    "upside down": (".jpg", turned(3), "turned or mirrored, and not whether its label was, too"),
    "mirrored PNG": (".png", turned(2, form="PNG"), "turned or mirrored"),
    "animated PNG": (".png", pages("PNG"), "2 pictures in this image; save each as a file of its own"),
    "animated GIF": (".gif", pages("GIF", "L"), "2 pictures in this image"),
    "animated WebP": (".webp", pages("WEBP"), "2 pictures in this image"),
    "TIFF stack": (".tif", pages("TIFF"), "2 pictures in this image"),
    "array": (".npy", b"\x93NUMPY\1\0v\0{'descr': '|u1'}", "cannot read this image"),
    "HEIC": (".heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "cannot read this image"),
}


@pytest.mark.parametrize("case", REFUSED_IMAGES)
def test_an_image_that_takes_a_guess_is_refused(place, capsys, case):
    ending, content, told = REFUSED_IMAGES[case]
    place.put(place.image.with_suffix(ending), content)
    refused(place, capsys, told, f"images/train/a{ending}")


def test_a_square_image_that_was_turned_is_refused(place, capsys):
    place.put(place.image.with_suffix(".jpg"), turned(6, RGB[:12, :12]))
    trees.save(LABEL[:12, :12], place.label)
    refused(place, capsys, "turned or mirrored", "images/train/a.jpg")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_an_upright_label_turns_its_image_upright(place, capsys, orientation):
    stored = Image.fromarray(RGB).rotate(90, expand=True)
    place.put(place.image, turned(orientation, np.asarray(stored), "PNG"))
    image, label = place.read()
    with Image.open(place.image) as file:
        expected = {5: 5, 6: 4, 7: 6, 8: 2}[
            orientation
        ]  # Image.Transpose: TRANSPOSE, ROTATE_270, TRANSVERSE, ROTATE_90
        assert np.array_equal(image, np.asarray(file.transpose(expected)))
    assert np.array_equal(label, LABEL)
    accepted(place, capsys)


def test_a_label_of_the_stored_pixels_leaves_its_image_as_stored(place, capsys):
    place.put(place.image, turned(6, RGB, "PNG"))
    assert np.array_equal(place.read()[0], RGB)
    accepted(place, capsys)


def test_a_turned_image_with_a_label_of_neither_size_is_refused(place, capsys):
    place.put(place.image, turned(6, RGB[:10], "PNG"))
    refused(place, capsys, "turned or mirrored", "images/train/a.png")


READ_IMAGES = {  # ending, content, pixels
    "opaque RGBA": (".png", Image.fromarray(np.dstack([RGB, ALPHA])), RGB),
    "opaque grey and alpha": (".png", Image.fromarray(np.dstack([GREY, ALPHA])), np.dstack([GREY] * 3)),
    "palette": (".png", PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "4-bit grey": (".png", png(4, 0, bytes([0x0F] * 10)), np.tile(np.array([[[0], [255]]], np.uint8), (12, 10, 3))),
    "1-bit": (".png", Image.fromarray(GREY > 100), np.dstack([np.where(GREY > 100, 255, 0).astype(np.uint8)] * 3)),
    "TIFF": (".tif", Image.fromarray(RGB), RGB),
    "TIFF, compressed": (".TIFF", encoded(Image.fromarray(RGB), "TIFF", compression="tiff_lzw"), RGB),
    "BMP": (".bmp", Image.fromarray(RGB), RGB),
    "still GIF": (".gif", Image.fromarray(GREY), np.dstack([GREY] * 3)),
    "PPM": (".ppm", encoded(Image.fromarray(RGB), "PPM"), RGB),
    "no turn": (".png", turned(1, form="PNG"), RGB),
    "a turn that does not exist": (".png", turned(0, form="PNG"), RGB),
}  # fmt: skip


@pytest.mark.parametrize("case", READ_IMAGES)
def test_an_image_is_read_as_what_it_is(place, capsys, case):
    ending, content, pixels = READ_IMAGES[case]
    place.put(place.image.with_suffix(ending), content)
    assert np.array_equal(place.read()[0], pixels)
    accepted(place, capsys)


def test_a_photograph_is_seen_as_it_is_shown_elsewhere(tmp_path):
    """Which has no label that it could miss: on white, and upright."""
    colors = np.dstack([RGB, np.where(np.arange(20) > 15, 0, np.where(np.arange(20) < 2, 51, ALPHA)).astype(np.uint8)])
    Image.fromarray(colors).save(tmp_path / "a.png")
    seen = np.asarray(read_image(tmp_path / "a.png", upright=True)).astype(int)
    assert (seen[:, 16:] == 255).all() and np.array_equal(seen[:, 2:16], RGB[:, 2:16])
    assert np.abs(seen[:, :2] - (0.2 * RGB[:, :2] + 0.8 * 255)).max() <= 1
    (tmp_path / "b.jpg").write_bytes(turned(6))
    assert read_image(tmp_path / "b.jpg", upright=True).size == (12, 20)
    (tmp_path / "c.png").write_bytes(png(16, 4, bytes(80)))
    with pytest.raises(DatasetError, match="more than 8 bits a channel"):
        read_image(tmp_path / "c.png", upright=True)


def test_a_photograph_with_a_preview_is_one_picture(place, capsys):
    still = Image.fromarray(RGB)
    place.put(place.image.with_suffix(".jpg"), encoded(still, "MPO", save_all=True, append_images=[still]))
    assert place.read()[0].shape == RGB.shape
    accepted(place, capsys)


def test_broken_exif_data_are_a_line(place):
    body = bytearray(turned(6))
    at = body.index(b"Exif\0\0") + 6
    for count in range(8, 30, 2):
        harmed = bytes(body[: at + 4]) + b"\xff" * count + bytes(body[at + 4 + count :])
        place.image.write_bytes(harmed)
        try:
            place.read()
        except DatasetError as error:
            assert str(error).startswith(str(place.image))


# --- labels ------------------------------------------------------------------------------------------------------


def renumbered():
    """An 8-bit grey label as a program that makes PNGs smaller leaves it: the colours are the ids, the indices not."""
    label = Image.fromarray(2 - LABEL).convert("P")
    label.putpalette([2, 2, 2, 1, 1, 1, 0, 0, 0])
    return label


def of_colors(*colors):
    label = Image.frombytes("P", SIZE, LABEL.tobytes())
    label.putpalette([channel for color in colors for channel in color])
    return label


REFUSED_LABELS = {
    "JPEG": (".jpg", encoded(Image.fromarray(LABEL), "JPEG"), "JPEG changes the ids of a label"),
    "JPEG called PNG": (".png", encoded(Image.fromarray(LABEL), "JPEG"), "JPEG changes the ids of a label"),
    "4 bits a pixel": (".png", png(4, 0, bytes([0x01] * 10)), "the label has 4 bits a pixel; save the ids as 8-bit"),
    "2 bits a pixel": (".png", png(2, 0, bytes(5)), "the label has 2 bits a pixel"),
    "1 bit a pixel": (".png", Image.fromarray(LABEL > 0), "the label has mode 1"),
    "16-bit": (".png", Image.fromarray(LABEL.astype(np.uint16)), "the label has mode I;16"),
    "grey as RGB": (".png", Image.fromarray(np.dstack([LABEL] * 3)), "the label has mode RGB"),
    "renumbered palette": (".png", renumbered(), "the greys of its palette are other ids than its indices"),
    "stack": (".tif", pages("TIFF", "L"), "2 pictures in this label"),
    "array": (".npy", b"\x93NUMPY", "cannot read this label"),
    "JPEG in TIFF": (".tif", encoded(Image.fromarray(LABEL), "TIFF", compression="jpeg"), "JPEG changes the ids"),
    "JPEG 2000": (".jp2", encoded(Image.fromarray(LABEL), "JPEG2000"), "JPEG changes the ids of a label"),
    "PGM up to 127": (".pgm", b"P5 20 12 127\n" + LABEL.tobytes(), "its greys go up to 127, not 255"),
    "plain PGM up to 1": (".pgm", b"P2 20 12 1\n" + b"0 1 " * 120, "its greys go up to 1, not 255"),
    "turned": (".png", turned(3, LABEL, "PNG"), "the label was turned or mirrored"),
}


@pytest.mark.parametrize("case", REFUSED_LABELS)
def test_a_label_that_takes_a_guess_is_refused(place, capsys, case):
    ending, content, told = REFUSED_LABELS[case]
    place.put(place.label.with_suffix(ending), content)
    refused(place, capsys, told, f"labels/train/a{ending}")


READ_LABELS = {
    "capital letters": (".PNG", encoded(Image.fromarray(LABEL), "PNG")),
    "palette of colours": (".png", of_colors((0, 0, 0), (128, 0, 0), (0, 128, 0))),
    "palette of greys to look at": (".png", of_colors((0, 0, 0), (128, 128, 128), (255, 255, 255))),
    "palette of the ids": (".png", of_colors((0, 0, 0), (1, 1, 1), (2, 2, 2))),
    "transparent palette": (
        ".png",
        encoded(of_colors((0, 0, 0), (128, 0, 0), (0, 128, 0)), "PNG", transparency=b"\0\xff\xff"),
    ),
    "BMP": (".bmp", Image.fromarray(LABEL)),
    "TIFF": (".tif", Image.fromarray(LABEL)),
    "GIF": (".gif", of_colors((0, 0, 0), (128, 0, 0), (0, 128, 0))),
}


@pytest.mark.parametrize("case", READ_LABELS)
def test_a_label_is_read_as_what_it_is(place, capsys, case):
    ending, content = READ_LABELS[case]
    place.put(place.label.with_suffix(ending), content)
    assert np.array_equal(place.read()[1], LABEL)
    accepted(place, capsys)


def test_a_picture_beside_a_label_is_no_label(place, capsys):
    trees.save(RGB, place.label.with_suffix(".jpg"))
    assert np.array_equal(place.read()[1], LABEL)
    accepted(place, capsys)


# --- what is no file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["image", "label"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to nothing", "link to itself"])
def test_what_is_no_file_is_never_waited_for(place, capsys, what, kind):
    path = getattr(place, what)
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link to nothing": "nowhere"}.get(kind, path.name))
    with pytest.raises(DatasetError):
        dataset.main(["--config", str(place.config)])
    with pytest.raises(DatasetError, match=f"{what}s/train/a.png"):
        place.train()
    assert f"fault: {path}: " in capsys.readouterr().out


def test_a_list_that_is_a_pipe_is_never_waited_for(place):
    place.classes.unlink()
    os.mkfifo(place.classes)
    with pytest.raises(DatasetError, match=r"classes\.txt"):
        place.train()


def test_a_file_that_vanished_is_named(place):
    data = build_dataset(load_config(place.config), "train")
    place.image.unlink()
    with pytest.raises(DatasetError, match=r"a\.png: this image is missing"):
        data.read(0)


# --- names and folders -------------------------------------------------------------------------------------------


def test_two_images_of_one_name_are_refused(place, capsys):
    trees.save(RGB, place.image.with_suffix(".bmp"))
    trees.save(RGB, place.image.with_suffix(".webp"))
    refused(place, capsys, "a.bmp and a.png and a.webp are two files of one name", "images/train")


def test_two_labels_of_one_name_are_refused(place, capsys):
    trees.save(LABEL, place.label.with_suffix(".PNG"))
    refused(place, capsys, "a.PNG and a.png are two files of one name", "labels/train")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_pictures_in_a_folder_inside_are_refused(place, capsys, kind):
    trees.save(LABEL, place.root / kind / "train" / "city" / "deep" / "c.png")
    refused(place, capsys, "there are pictures in this folder, where nobody looks", f"{kind}/train/city")


def test_only_pictures_in_folders_inside_is_a_missing_split_that_says_so(place):
    for kind in ("images", "labels"):
        for name in ("a", "b"):
            path = place.root / kind / "train" / f"{name}.png"
            trees.save(LABEL, path.parent / "city" / path.name)
            path.unlink()
    with pytest.raises(DatasetError, match=r"no images of the split 'train'; .*train/city: there are pictures"):
        place.train()


def test_a_hidden_picture_is_refused(place, capsys):
    trees.save(RGB, place.image.with_name(".c.png"))
    refused(place, capsys, "hidden files are not looked at", "images/train/.c.png")


def test_what_computers_leave_beside_pictures_is_nothing(place, capsys):
    for path in (place.image, place.label):
        path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(60))
        for name in (".DS_Store", "Thumbs.db", "a.json", "notes.txt"):
            path.with_name(name).write_bytes(b"x")
        trees.save(RGB, path.parent / ".ipynb_checkpoints" / "a-checkpoint.png")
        (path.parent / "notes").mkdir()
    assert "train: 2 images, 0 faults" in accepted(place, capsys)


def test_what_macs_leave_is_nothing_in_cityscapes_either(tmp_path):
    trees.cityscapes(tmp_path)
    data = DATASETS["cityscapes"](DatasetConfig(name="cityscapes", root=str(tmp_path)), "train")
    for image, label in [data.paths(i) for i in range(3)]:
        for path in (image, label):
            path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07")
    assert len(DATASETS["cityscapes"](DatasetConfig(name="cityscapes", root=str(tmp_path)), "train")) == 3


def test_a_cityscapes_label_without_an_image_is_a_missing_image(tmp_path):
    trees.cityscapes(tmp_path)
    config = DatasetConfig(name="cityscapes", root=str(tmp_path))
    gone = open_dataset(config, "train").paths(1)[0]
    gone.unlink()
    assert dataset.missing_files(open_dataset(config, "train")) == [gone]


def test_an_accent_is_one_however_it_was_stored(place, capsys):
    place.image.rename(place.image.with_name("e\u0301.png"))
    place.label.rename(place.label.with_name("\u00e9.png"))
    assert "train: 2 images, 0 faults" in accepted(place, capsys)


# --- lists -------------------------------------------------------------------------------------------------------


def voc_list(root, lines, encoding="utf-8"):
    """A VOC tree with these train lines, and images of hard names."""
    trees.voc(root)
    home = root / "VOCdevkit" / "VOC2012"
    for name in ("a.b", "my image", "x.png", "é"):
        trees.save(RGB, home / "JPEGImages" / f"{name}.jpg")
        trees.save(LABEL, home / "SegmentationClass" / f"{name}.png", trees.voc_colors())
    (home / "ImageSets" / "Segmentation" / "train.txt").write_bytes(lines.encode(encoding))
    return open_dataset(DatasetConfig(name="pascal", root=str(root)), "train")


def names(data):
    return [data.paths(i)[0].name for i in range(len(data))]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("a.b", "a.b.jpg"),
        ("a.b.jpg", "a.b.jpg"),
        ("JPEGImages/a.b.jpg SegmentationClass/a.b.png", "a.b.jpg"),
        ("my image", "my image.jpg"),
        ("/JPEGImages/my image.jpg /SegmentationClass/my image.png", "my image.jpg"),
        ("my image.JPG", "my image.jpg"),
        ("VOC2012\\JPEGImages\\a.b.jpg", "a.b.jpg"),
        ("JPEGImages\\my image.jpg\tSegmentationClass\\my image.png", "my image.jpg"),
        ("x.png", "x.png.jpg"),
        ("2007_000032  1", "2007_000032.jpg"),
        ("é", "é.jpg"),
        ("nowhere", "nowhere.jpg"),
        ("nowhere.with.dots", "nowhere.with.dots.jpg"),
    ],
)
def test_a_line_of_a_list_means_its_image(tmp_path, line, name):
    data = voc_list(tmp_path, f"{line}\n")
    assert names(data) == [name] and data.paths(0)[1].name == f"{name.removesuffix('.jpg')}.png"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n"])
def test_a_list_may_have_any_unicode_encoding_and_line_ends(tmp_path, encoding, end):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    assert names(voc_list(tmp_path, mark + f"é{end}2007_000032{end}", encoding)) == ["é.jpg", "2007_000032.jpg"]


@pytest.mark.parametrize(("encoding", "told"), [("latin-1", "line 2 is not UTF-8"), ("utf-16-le", "zero bytes")])
def test_a_list_of_another_encoding_is_refused(tmp_path, encoding, told):
    with pytest.raises(DatasetError, match=rf"train\.txt: cannot read this list \(.*{told}"):
        voc_list(tmp_path, "a.b\n" + ("é\n" if encoding == "latin-1" else ""), encoding)


def test_an_image_that_is_listed_twice_is_refused_by_training_too(tmp_path):
    voc_list(tmp_path, "a.b\n\nJPEGImages/a.b.jpg\n")
    config = load_config("config.yaml", ["dataset.name=pascal", f"dataset.root={tmp_path}", "model.num_classes=21",
                                         "model.prototype_shape=[21,8,1,1]"])  # fmt: skip
    with pytest.raises(DatasetError, match=r"a\.b\.jpg: listed 2 times"):
        build_dataset(config, "train")


# --- the list of classes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("__ignore__\n_background_\nsand\n", "classes.txt:1: '__ignore__' is a marker of a labelling tool"),
        ("_background_\nsea\nsand\n", "classes.txt:1: '_background_' is a marker"),
        ("sea\nsand\nsea\n", "'sea' more than once"),
        ("sea\nsand\nsea \u200b\n", "'sea' more than once"),
        ("palm tree\nsand\npalm\u00a0\u00a0tree\n", "'palm tree' more than once"),
        ("sea\n\nsand\npalm\n", "classes.txt:2: no name in this line"),
        ("sea\n\u200b\nsand\n", "classes.txt:2: no name in this line"),
        ("# classes\nsea\nsand\n", "classes.txt:1: '# classes' is a comment"),
        ("1 sea\n0 sand\n2 palm\n", "classes.txt:1: '1 sea' is in the line of id 0, and the list names other ids"),
        ("1: sea\n2: sand\n", "classes.txt:1: '1: sea' is in the line of id 0"),
        ("id,name\n0,sea\n1,sand\n", "classes.txt:1: 'id,name' is in the line of id 0"),
        ("sea:0,0,255::\nsand:200,200,0::\nb:1,2,3::\n", "is a comment, or of another format"),
        (
            "sea\nsand\nmüll\n".encode("latin-1"),
            "classes.txt: cannot read this list (line 3 is not UTF-8 text); save it as UTF-8",
        ),
    ],
)
def test_a_list_of_classes_that_may_mean_something_else_is_refused(place, text, told):
    place.classes.write_bytes(text if isinstance(text, bytes) else text.encode())
    for use in (place.train, lambda: dataset.main(["--config", str(place.config)])):
        with pytest.raises(DatasetError) as caught:
            use()
        assert told in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_classes_is_read_in_any_unicode_encoding(place, encoding):
    place.classes.write_bytes("sea\r\nsänd\r\npalm tree\r\n\r\n".encode(encoding))
    assert open_dataset(load_config(place.config).dataset, "val").mapping.names == ("sea", "sänd", "palm tree")


# --- what is no fault, but hardly meant --------------------------------------------------------------------------


def warnings_of(place, capsys):
    """What the check warns of; training has to warn of the same."""
    told = [line for line in accepted(place, capsys).splitlines() if line.startswith("warning: ")]
    assert [f"warning: {w}" for w in look_for_classes(open_dataset(load_config(place.config).dataset, "train"))] == told
    return "\n".join(told)


def relabel(place, *labels, split="train"):
    for name, label in zip("ab", labels, strict=True):
        trees.save(np.asarray(label, np.uint8), place.root / "labels" / split / f"{name}.png")


def test_a_good_data_set_is_worth_no_warning(place, capsys):
    assert warnings_of(place, capsys) == ""


def test_a_class_that_never_occurs_is_worth_a_warning(place, capsys):
    relabel(place, LABEL.clip(max=1), LABEL.clip(max=1))
    assert "no pixel in the split 'train' has the class 'palm tree'" in warnings_of(place, capsys)


def test_a_class_that_no_cell_looks_at_is_worth_a_warning(place, capsys):
    small = np.where(np.arange(20) % 8 == 3, 2, LABEL.clip(max=1))
    relabel(place, small, small)
    told = warnings_of(place, capsys)
    assert "no cell in the split 'train' looks at a pixel of the class 'palm tree'" in told and "no pixel" not in told


def test_masks_of_0_and_255_are_worth_a_warning(place, capsys):
    mask = np.where(LABEL > 1, 255, 0)
    relabel(place, mask, mask)
    assert "2 labels hold 0 and 255 alone. Masks of 0 and 255?" in warnings_of(place, capsys)
    relabel(place, mask, LABEL)  # some masks of each kind
    assert "1 labels hold 0 and 255 alone" in warnings_of(place, capsys)


def class_warnings_of(place):
    data = open_dataset(load_config(place.config).dataset, "train")
    return "\n".join(class_warnings(data, check_split(data).counts))


def test_ignored_borders_are_no_masks_of_0_and_255(place, capsys):
    relabel(place, np.where(np.arange(20) == 5, 255, LABEL), np.where(np.arange(20) > 3, 255, 0))
    assert "255" not in class_warnings_of(place)


def test_training_says_what_the_check_warns_of(place, capsys, workdir):
    relabel(place, LABEL.clip(max=1), LABEL.clip(max=1))
    overrides = ["dataset.name=folder", f"dataset.root={place.root}", "model.num_classes=3"]
    options = [word for override in overrides for word in ("--set", override)]
    train.main(["--config", "tiny.yaml", "--phase", "0", *options])
    assert "warning: no pixel in the split 'train' has the class 'palm tree'" in capsys.readouterr().out


def test_only_as_many_labels_as_needed_are_looked_at(place, monkeypatch):
    data = open_dataset(load_config(place.config).dataset, "train")
    read, seen = data.read, []
    monkeypatch.setattr(data, "read", lambda index: (seen.append(index), read(index))[1])
    assert look_for_classes(data, least=1) == [] and len(seen) == 1
    assert look_for_classes(data) == [] and len(seen) == 3
    relabel(place, LABEL.clip(max=1), LABEL.clip(max=1))
    assert "no pixel in any of the 1 labels of 2 that were read has the class" in look_for_classes(data, most=1)[0]


# --- the classes of a checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("sand", "sea", "palm tree"), "with 'sand' as class 0, .* it is 'sea': the same classes in another order"),
        (("sea", "sand", "oak"), "with 'oak' as class 2, .* it is 'palm tree': other classes"),
        (("sea", "sand"), "on 2 classes, .* have 3"),
    ],
)
def test_other_classes_than_a_checkpoint_knows_are_refused(place, names, told):
    data = open_dataset(load_config(place.config).dataset, "val")
    with pytest.raises(ConfigError, match=rf"^a\.pth: it was trained {told}") as caught:
        check_classes(data, names, "a.pth")
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_the_classes_that_a_checkpoint_knows_and_none_at_all_pass(place):
    data = open_dataset(load_config(place.config).dataset, "val")
    for names in (data.mapping.names, list(data.mapping.names), ()):
        check_classes(data, names, "a.pth")


# --- a data set of one's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "colors", "ids"),
    [(2, 2, {300: 0}), (2, 2, {-2: 0}), (2, 2, {0: 2}), (2, 2, {0: -1}), (2, 1, {0: 0, 1: 1})],
)
def test_a_mapping_that_cannot_be_is_refused(place, monkeypatch, names, colors, ids):
    mapping = ClassMapping(("a", "b")[:names], ((0, 0, 0),) * colors, ids)
    monkeypatch.setattr(DATASETS["folder"], "_setup_class_mappings", lambda self: mapping)
    with pytest.raises(DatasetError, match="want a colour for each name, ids of -1 to 255"):
        open_dataset(load_config(place.config).dataset, "train")


def test_a_data_set_keeps_its_server_format_and_part_labels_under_another_name(tmp_path, monkeypatch):
    class Small(DATASETS["cityscapes"]):
        pass

    monkeypatch.setitem(DATASETS, "cityscapes_small", Small)
    trees.cityscapes(tmp_path)
    data = open_dataset(DatasetConfig(name="cityscapes_small", root=str(tmp_path)), "val")
    part = tmp_path / "gtFinePanopticParts/val/lindau/lindau_000001_000019_gtFinePanopticParts.tif"
    trees.save(np.zeros((40, 48), np.int32), part)
    assert [data.part_label(i) for i in range(2)] == [None, part]
    submission = Submission(data, tmp_path / "out")
    for i in range(2):
        submission.write(i, np.full((40, 48), 13))
    assert submission.finish().name == "cityscapes_val.zip"
    with Image.open(tmp_path / "out" / "lindau_000000_000019.png") as label:
        assert np.unique(np.asarray(label)).tolist() == [26]
