"""`python download_voc.py` against a local server, with small archives in the published layouts."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import download_voc
from download import sources
from download.fetch import DownloadError
from runtime.errors import UserError
from tests import archive_server as make
from tests.archive_server import TRAIN_AUG, label, publish_voc, serving, tree


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        publish_voc(server, monkeypatch)
        yield server


def pixels(body):
    return np.array(Image.open(io.BytesIO(body)))


def test_voc_arrives_in_its_layout(server, tmp_path, capsys):
    download_voc.main(["--root", str(tmp_path)])
    assert tree(tmp_path) == make.voc_files()
    out = capsys.readouterr().out
    assert "complete and verified" in out and "VOC2012" in out
    options = f"--set dataset.root={tmp_path} --set dataset.train_split=train"
    assert f"next:\n  python dataset.py --config configs/pascal.yaml {options}\n" in out
    assert f"  python train.py --config configs/pascal.yaml {options}\n" in out


def test_the_default_root_needs_no_option(server, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    download_voc.main([])
    assert tree(tmp_path / "data") == make.voc_files()
    assert "python train.py --config configs/pascal.yaml --set dataset.train_split=train\n" in capsys.readouterr().out


def test_sbd_adds_labels_and_the_list(server, tmp_path, capsys):
    download_voc.main(["--root", str(tmp_path), "--with-sbd"])
    files = tree(tmp_path / "VOCdevkit" / "VOC2012")
    assert files["ImageSets/Segmentation/train_aug.txt"].decode().split() == TRAIN_AUG
    labels = {name for name in files if name.startswith("SegmentationClassAug/")}
    assert labels == {f"SegmentationClassAug/{name}.png" for name in [*TRAIN_AUG, *make.VOC_VAL]}
    assert all(Image.open(io.BytesIO(files[name])).mode == "L" for name in labels)
    # VOC's own label where there is one, with its border; SBD's elsewhere
    for name in make.VOC_TRAIN + make.VOC_VAL:
        own = pixels(files[f"SegmentationClassAug/{name}.png"])
        assert np.array_equal(own, pixels(files[f"SegmentationClass/{name}.png"])) and (own[0] == 255).all()
    added = pixels(files["SegmentationClassAug/2009_a.png"])
    assert np.array_equal(added, np.minimum(label(100), 20))
    assert set(tree(tmp_path)) == {f"VOCdevkit/VOC2012/{name}" for name in files}
    assert "dataset.train_split" not in capsys.readouterr().out
    make.items_read("pascal", tmp_path, {"train": 3, "val": 2, "train_aug": 6})


def test_nothing_is_done_twice(server, tmp_path):
    download_voc.main(["--root", str(tmp_path)])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
    download_voc.main(["--root", str(tmp_path), "--with-sbd"])
    download_voc.main(["--root", str(tmp_path), "--with-sbd"])
    assert [request[0] for request in server.requests] == ["voc.tar", "sbd.tgz"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")} == before


def test_archives_are_kept_on_request_and_can_be_brought_by_hand(server, tmp_path):
    download_voc.main(["--root", str(tmp_path / "a"), "--with-sbd", "--keep-archive"])
    archives = {name: body for name, body in tree(tmp_path / "a").items() if "/" not in name}
    assert archives == {sources.VOC_ARCHIVE: server.files["voc.tar"], sources.SBD_ARCHIVE: server.files["sbd.tgz"]}
    server.requests.clear()
    (tmp_path / "b").mkdir()
    for name, body in archives.items():
        (tmp_path / "b" / name).write_bytes(body)
    download_voc.main(["--root", str(tmp_path / "b"), "--with-sbd", "--keep-archive"])
    assert tree(tmp_path / "b") == tree(tmp_path / "a") and not server.requests


def test_a_mirror_goes_first_and_is_not_trusted_more(server, tmp_path):
    server.files["good"] = server.files["voc.tar"]
    server.files["bad"] = make.make_tar({"VOCdevkit/VOC2012/x": b"evil"})
    download_voc.main(["--root", str(tmp_path / "a"), "--mirror", server.url("good")])
    download_voc.main(["--root", str(tmp_path / "b"), "--mirror", server.url("bad")])
    assert [request[0] for request in server.requests] == ["good", "bad", "voc.tar"]
    assert tree(tmp_path / "a") == tree(tmp_path / "b") == make.voc_files()
    with pytest.raises(DownloadError, match="only https"):
        download_voc.main(["--root", str(tmp_path / "c"), "--mirror", "http://example.org/voc.tar"])


@pytest.mark.parametrize("lost", ["JPEGImages/2007_a.jpg", "SegmentationClass/2008_b.png"])
def test_an_archive_that_lacks_a_file_never_becomes_the_data_set(server, tmp_path, monkeypatch, lost):
    files = {name: body for name, body in make.voc_files().items() if not name.endswith(lost)}
    urls, checksum = server.publish("voc.tar", make.make_tar(files))
    monkeypatch.setattr(sources, "VOC_CHECKSUM", checksum)
    with pytest.raises(DownloadError, match=f"1 files are missing, first {lost.split('/')[1]}"):
        download_voc.main(["--root", str(tmp_path)])
    assert list(tree(tmp_path)) == [sources.VOC_ARCHIVE]


def test_wrong_counts_are_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "VOC_COUNTS", {"train": 4, "val": 2})
    with pytest.raises(DownloadError, match=r"train\.txt: 3 found, 4 are published"):
        download_voc.main(["--root", str(tmp_path)])
    assert list(tree(tmp_path)) == [sources.VOC_ARCHIVE]
    monkeypatch.setattr(sources, "VOC_COUNTS", {"train": 3, "val": 2})
    monkeypatch.setattr(sources, "TRAIN_AUG_COUNT", 7)
    with pytest.raises(DownloadError, match="6 found, 7 are published"):
        download_voc.main(["--root", str(tmp_path), "--with-sbd"])
    assert not (tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClassAug").exists()


def test_a_broken_data_set_that_is_there_is_named_and_left_alone(server, tmp_path):
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    with pytest.raises(DownloadError, match=r"not a complete VOC2012 .*move it"):
        lists.mkdir(parents=True)
        download_voc.main(["--root", str(tmp_path)])
    assert lists.is_dir() and not server.requests


def test_sbd_without_scipy_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy") as caught:
        download_voc.main(["--root", str(tmp_path), "--with-sbd"])
    assert caught.value.exit_code == 2 and not server.requests
    download_voc.main(["--root", str(tmp_path)])


def test_importing_loads_neither_torch_nor_scipy_and_writes_nothing(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {sys.path[0]!r}); sys.path[:0] = {[p for p in sys.path if p]!r}\n"
        "import download_voc, download_datasets\n"
        "assert not {'torch', 'torchvision', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_published_sources():
    assert sources.VOC_COUNTS == {"train": 1464, "val": 1449} and sources.TRAIN_AUG_COUNT == 10582
    assert sources.VOC_CHECKSUM == "md5:6cd6e144f989b92b3379bac3b3de84fd"
    assert sources.SBD_CHECKSUM == "md5:82b4d87ceb2ed10f6038a1cba92111cb"
    for url in (*sources.VOC_URLS, *sources.SBD_URLS, *sources.CAMVID_URLS):
        assert url.startswith("https://")
