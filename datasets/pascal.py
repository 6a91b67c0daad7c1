"""PASCAL VOC 2012, with or without the annotations of SBD."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from datasets.base import ClassMapping, SegmentationDataset, ServerFormat, voc_palette
from datasets.listing import lines, pairs


class PascalVOCDataset(SegmentationDataset):
    """PASCAL VOC 2012, also with the SBD annotations (`train_aug`); VOCdevkit/VOC2012 wherever it was unpacked."""

    layout = "VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation} (train_aug: SegmentationClassAug)"
    fetch = "python download_voc.py, for train_aug: python download_voc.py --with-sbd"
    labels_carry_palette = True
    submission = ServerFormat("results/VOC2012/Segmentation/comp6_test_cls", "voc2012_{split}.tar.gz", has_palette=True)

    def _setup_class_mappings(self) -> ClassMapping:
        names = (
            "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
            "dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv",
        )  # fmt: skip
        return ClassMapping(names, voc_palette(len(names)), {i: i for i in range(len(names))})

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        folders = ("", "VOC2012", "VOCdevkit/VOC2012", "*/VOC2012", "*/VOCdevkit/VOC2012")
        roots = (f for name in folders for f in sorted(self.root.glob(name) if name else [self.root]))
        voc = next((f for f in roots if (f / "JPEGImages").is_dir()), None)
        if voc is None:
            raise self.missing("no VOCdevkit/VOC2012")
        lists = (voc / "ImageSets" / folder / f"{self.split}.txt" for folder in ("Segmentation", "SegmentationAug"))
        listed = next((path for path in lists if path.is_file()), None)
        if listed is None:
            raise self.missing(f"no list ImageSets/Segmentation/{self.split}.txt")
        labels = voc / ("SegmentationClassAug" if self.split.endswith("aug") else "SegmentationClass")
        found, faults = pairs(voc / "JPEGImages", labels, lines(listed), ".jpg")
        self.faults += faults
        return [(image, None) for image, _ in found] if self.split == "test" else found

    @cached_property
    def _part_labels(self) -> dict[str, Path]:
        folders = (
            f"pascal_panoptic_parts*/{below}{s}" for below in ("", "labels/") for s in ("training", "validation")
        )
        return {path.stem: path for folder in folders for path in self.root.glob(f"{folder}/*.tif")}

    def part_label(self, index: int) -> Path | None:
        """Of PASCAL Panoptic Parts: pascal_panoptic_parts*/{training,validation}/*.tif, also below a folder labels/."""
        return self._part_labels.get(self.stem(index))
