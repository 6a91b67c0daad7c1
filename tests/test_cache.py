"""The cache gives back what the files hold, and notices when they change or when it is damaged itself."""

import os

import numpy as np
import pytest
from PIL import Image

from config import DatasetConfig
from datasets.base import ClassMapping, DatasetError
from datasets.cache import PixelCache, fingerprint
from datasets.folder import FolderDataset
from runtime.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    for i, (width, height) in enumerate([(20, 12), (9, 15)]):
        for kind, shape in (("images", (height, width, 3)), ("labels", (height, width))):
            (tmp_path / kind / "train").mkdir(parents=True, exist_ok=True)
            high = 256 if kind == "images" else 2
            pixels = rng.integers(0, high, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / "train" / f"{i}.png")
    return tmp_path


def open_folder(folder):
    return FolderDataset(DatasetConfig(name="folder", root=str(folder)), "train")


def test_items_equal_the_files(folder):
    plain, cached = open_folder(folder), open_folder(folder)
    cached.keep_decoded()
    for index in range(2):
        for a, b in zip(plain.read(index), cached.read(index), strict=True):
            assert a.mode == b.mode
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_it_is_built_once(folder, monkeypatch):
    open_folder(folder).keep_decoded()
    again = open_folder(folder)
    monkeypatch.setattr(again, "_decode", lambda index: pytest.fail("decoded a second time"))
    again.keep_decoded()
    assert again.read(1)[0].size == (9, 15)


def test_a_changed_source_is_read_anew(folder):
    open_folder(folder).keep_decoded()
    changed = folder / "images" / "train" / "1.png"
    Image.new("RGB", (9, 15), (1, 2, 3)).save(changed)
    os.utime(changed, ns=(1, 1))
    dataset = open_folder(folder)
    dataset.keep_decoded()
    assert dataset.read(1)[0].getpixel((0, 0)) == (1, 2, 3)
    assert len(list((folder / ".cache").iterdir())) == 2


def test_a_damaged_cache_is_refused_and_then_rebuilt(folder):
    open_folder(folder).keep_decoded()
    pixels = next((folder / ".cache").glob("*.pixels"))
    pixels.write_bytes(pixels.read_bytes()[:-1])
    with pytest.raises(OSError, match="damaged"):
        open_folder(folder).keep_decoded()
    open_folder(folder).keep_decoded()


def test_an_interrupted_build_leaves_nothing_that_counts(folder):
    def fail(index):
        if index:
            raise OSError("no space left")
        return open_folder(folder).read(0)

    files = [(folder / "classes.txt", None)] * 2
    with pytest.raises(OSError, match="no space"):
        PixelCache(folder / "c", "train", files, "", fail)
    assert not list((folder / "c").iterdir())


@pytest.mark.parametrize("names", ["b\na\n", "a\nb\nc\n"])
def test_another_list_of_classes_is_another_cache(folder, names):
    open_folder(folder).keep_decoded()
    before = {path.name for path in (folder / ".cache").iterdir()}
    (folder / "classes.txt").write_text(names)
    open_folder(folder).keep_decoded()
    after = {path.name for path in (folder / ".cache").iterdir()}
    assert len(after) == 2 and not before & after


def test_a_changed_mapping_is_not_served_with_old_classes(folder, monkeypatch):
    swapped = ClassMapping(("a", "b"), ((0, 0, 0), (1, 1, 1)), {0: 1, 1: 0})
    wrong = open_folder(folder)
    wrong.keep_decoded()
    before = np.asarray(wrong.read(0)[1]).copy()
    monkeypatch.setattr(FolderDataset, "_setup_class_mappings", lambda self: swapped)
    mended = open_folder(folder)
    mended.keep_decoded()
    np.testing.assert_array_equal(np.asarray(mended.read(0)[1]), 1 - before)


def test_a_class_that_was_taken_out_is_told_with_a_cache_as_without(folder):
    (folder / "classes.txt").write_text("a\nb\nc\n")
    Image.new("L", (20, 12), 2).save(folder / "labels" / "train" / "0.png")
    open_folder(folder).keep_decoded()
    (folder / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DatasetError, match=r"0\.png: label ids 2 are not ids"):
        open_folder(folder).keep_decoded()


def test_only_what_a_cache_wrote_is_removed(folder):
    place = folder / ".cache"
    open_folder(folder).keep_decoded()
    kept = ["train-notes.txt", "train-0123456789abcdef.pixels.bak", "train-0123456789abcdeg.pixels"]
    kept += ["train-x.sizes.npy", "train_aug-0123456789abcdef.pixels", "val-0123456789abcdef.sizes.npy"]
    for name in kept:
        (place / name).write_text("mine")
    (place / "train-0123456789abcdee.pixels").mkdir()
    (place / "train-0123456789abcdef.pixels").write_text("of an older state")
    (folder / "classes.txt").write_text("c\nd\n")
    open_folder(folder).keep_decoded()
    there = {path.name for path in place.iterdir()}
    assert {*kept, "train-0123456789abcdee.pixels"} <= there and "train-0123456789abcdef.pixels" not in there
    assert len(there) == len(kept) + 3


@pytest.mark.parametrize("split", ["../images/train", "a/b", "..\\x", "", "/etc/x"])
def test_a_split_that_leads_out_of_the_cache_is_refused(folder, split):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=r"dataset\.cache: no file can have the name of the split"):
        PixelCache(folder / ".cache", split, [(folder / "classes.txt", None)], "", lambda index: None)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x93NUMPY\x01\x00"])
def test_sizes_that_are_damaged_are_refused_and_then_rebuilt(folder, content):
    open_folder(folder).keep_decoded()
    next((folder / ".cache").glob("*.sizes.npy")).write_bytes(content)
    with pytest.raises(OSError, match="damaged"):
        open_folder(folder).keep_decoded()
    open_folder(folder).keep_decoded()


def test_a_lost_file_of_pixels_is_rebuilt(folder):
    open_folder(folder).keep_decoded()
    next((folder / ".cache").glob("*.pixels")).unlink()
    with pytest.raises(OSError, match="damaged"):
        open_folder(folder).keep_decoded()
    open_folder(folder).keep_decoded()


def test_a_data_set_may_be_moved_with_its_cache(folder, monkeypatch):
    open_folder(folder).keep_decoded()
    monkeypatch.chdir(folder)
    again = open_folder(".")
    monkeypatch.setattr(again, "_decode", lambda index: pytest.fail("decoded a second time"))
    again.keep_decoded()


def test_labels_that_were_exchanged_are_read_anew(folder):
    """The same files by name, size and time, of other images."""
    paths = [folder / "labels" / "train" / f"{i}.png" for i in range(2)]
    one = fingerprint(folder, [(paths[0], paths[1]), (paths[1], None)], "")
    assert one != fingerprint(folder, [(paths[0], None), (paths[1], paths[1])], "")
