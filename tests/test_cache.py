"""The cache gives back what the files hold, and notices when they change or when it is damaged itself."""

import os

import numpy as np
import pytest
from PIL import Image

from config import DatasetConfig
from dataset import FolderDataset
from datasets.cache import PixelCache


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
        PixelCache(folder / "c", "train", files, fail)
    assert not list((folder / "c").iterdir())
