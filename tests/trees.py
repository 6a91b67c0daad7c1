"""Data sets in their published layouts, with tiny images, written to a folder."""

import numpy as np
from PIL import Image

VOC_NAMES = {"train": ("2007_000032", "2007_000039", "2007_000063"), "val": ("2007_000033", "2007_000042")}
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def picture(rng, size=(48, 40)) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def blocks(rng, ids, size=(48, 40)) -> np.ndarray:
    """Labels in blocks of 8 pixels, every one of the ids somewhere as long as there is room."""
    rows, columns = -(-size[1] // 8), -(-size[0] // 8)
    cells = np.resize(rng.permutation(np.array(ids)), rows * columns).reshape(rows, columns)
    return np.kron(cells, np.ones((8, 8), dtype=int))[: size[1], : size[0]].astype(np.uint8)


def save(image, path, palette=None, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if palette is not None:
        image = image.convert("P") if image.mode != "L" else image
        image.putpalette(palette)
    image.save(path, **how)


def voc_colors() -> list[int]:
    """The 256 colours of PASCAL VOC's label files, by their published bit pattern, flat."""
    colors = np.zeros((256, 3), dtype=int)
    for i in range(256):
        rest = i
        for bit in range(7, -1, -1):
            for channel in range(3):
                colors[i, channel] |= (rest & 1) << bit
                rest >>= 1
    return colors.flatten().tolist()


def cityscapes(root, seed=0):
    """leftImg8bit and gtFine with all 34 ids, and the other files that the official archives have."""
    rng = np.random.default_rng(seed)
    for split, city, count in (
        ("train", "aachen", 2),
        ("train", "bochum", 1),
        ("val", "lindau", 2),
        ("test", "bonn", 1),
    ):
        for i in range(count):
            stem = f"{city}_{i:06d}_000019"
            save(picture(rng), root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
            label = blocks(rng, range(34) if i else CITYSCAPES_IDS)
            save(label, root / "gtFine" / split / city / f"{stem}_gtFine_labelIds.png")
            save(picture(rng), root / "gtFine" / split / city / f"{stem}_gtFine_color.png")
            (root / "gtFine" / split / city / f"{stem}_gtFine_polygons.json").write_text("{}")


def voc(root, seed=0):
    """VOCdevkit/VOC2012 with palette labels, SBD's grey ones, and both lists; images without labels among them."""
    rng = np.random.default_rng(seed)
    home = root / "VOCdevkit" / "VOC2012"
    for split, names in VOC_NAMES.items():
        for name in names:
            save(picture(rng), home / "JPEGImages" / f"{name}.jpg")
            label = blocks(rng, range(21))
            label[0, :] = 255
            save(label, home / "SegmentationClass" / f"{name}.png", voc_colors())
            save(label, home / "SegmentationClassAug" / f"{name}.png")
        lists = home / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(names) + "\n")
    save(picture(rng), home / "JPEGImages" / "2012_004331.jpg")
    lines = [f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in VOC_NAMES["train"]]
    (lists / "train_aug.txt").write_text("".join(lines))


def camvid(root, suffix=".png", lists="segnet", seed=0):
    """train, trainannot, ...; lists: as in the SegNet tutorial, names alone (with CRLF and blank lines), or none."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", 3), ("val", 2)):
        stems = [f"0001TP_{i:06d}" for i in range(6690, 6690 + 30 * count, 30)]
        for stem in stems:
            save(picture(rng), root / split / f"{stem}{suffix}")
            save(blocks(rng, range(12)), root / f"{split}annot" / f"{stem}.png")
        lines = {
            "segnet": [f"/SegNet/CamVid/{split}/{s}.png /SegNet/CamVid/{split}annot/{s}.png\n" for s in stems],
            "names": [f"{s}\r\n\r\n" for s in stems],
        }
        if lists != "none":
            (root / f"{split}.txt").write_text("".join(lines[lists]), newline="")


def folder(root, names=("sea", "sand", "palm tree"), seed=0):
    """images, labels and classes.txt, with images of several types and sizes."""
    rng = np.random.default_rng(seed)
    for split, files in (("train", ("a.png", "b.jpg", "c.JPEG")), ("val", ("d.bmp", "e.webp"))):
        for i, name in enumerate(files):
            size = (40 + 8 * i, 33 + i)
            save(picture(rng, size), root / "images" / split / name)
            save(blocks(rng, [*range(len(names)), 255], size), root / "labels" / split / f"{name[0]}.png")
    (root / "classes.txt").write_text("\r\n".join(names) + "\r\n\r\n", newline="")
