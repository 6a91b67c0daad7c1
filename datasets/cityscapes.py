"""Cityscapes, in its official folders."""

from __future__ import annotations

from pathlib import Path

from datasets.base import ClassMapping, SegmentationDataset, ServerFormat
from grid import IGNORE


class CityscapesDataset(SegmentationDataset):
    """Cityscapes: the official folders and label ids (github.com/mcordts/cityscapesScripts, helpers/labels.py)."""

    layout = "leftImg8bit/{train,val,test}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelIds.png"
    fetch = "python download_datasets.py cityscapes"
    submission = ServerFormat("", "cityscapes_{split}.zip", has_palette=False)

    def _setup_class_mappings(self) -> ClassMapping:
        classes = (
            ("road", 7, (128, 64, 128)), ("sidewalk", 8, (244, 35, 232)), ("building", 11, (70, 70, 70)),
            ("wall", 12, (102, 102, 156)), ("fence", 13, (190, 153, 153)), ("pole", 17, (153, 153, 153)),
            ("traffic light", 19, (250, 170, 30)), ("traffic sign", 20, (220, 220, 0)),
            ("vegetation", 21, (107, 142, 35)), ("terrain", 22, (152, 251, 152)), ("sky", 23, (70, 130, 180)),
            ("person", 24, (220, 20, 60)), ("rider", 25, (255, 0, 0)), ("car", 26, (0, 0, 142)),
            ("truck", 27, (0, 0, 70)), ("bus", 28, (0, 60, 100)), ("train", 31, (0, 80, 100)),
            ("motorcycle", 32, (0, 0, 230)), ("bicycle", 33, (119, 11, 32)),
        )  # fmt: skip
        ids = dict.fromkeys(range(-1, 34), IGNORE)
        ids.update({file_id: i for i, (_, file_id, _) in enumerate(classes)})
        return ClassMapping(tuple(c[0] for c in classes), tuple(c[2] for c in classes), ids)

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        images, labels = (self.root / folder / self.split for folder in ("leftImg8bit", "gtFine"))
        names = {self._name(path, "_leftImg8bit.png") for path in images.glob("*/[!.]*_leftImg8bit.png")}
        if self.split != "test":  # nothing to label is as wrong as nothing to learn from
            names |= {self._name(path, "_gtFine_labelIds.png") for path in labels.glob("*/[!.]*_gtFine_labelIds.png")}
        found = [(images / f"{name}_leftImg8bit.png", labels / f"{name}_gtFine_labelIds.png") for name in sorted(names)]
        return [(image, None if self.split == "test" and not label.exists() else label) for image, label in found]

    @staticmethod
    def _name(path: Path, ending: str) -> str:
        return f"{path.parent.name}/{path.name.removesuffix(ending)}"

    def stem(self, index: int) -> str:
        """CITY_SEQUENCE_FRAME."""
        return super().stem(index).removesuffix("_leftImg8bit")

    def part_label(self, index: int) -> Path | None:
        """Of Cityscapes Panoptic Parts: gtFinePanopticParts/{train,val}/CITY/*_gtFinePanopticParts.tif."""
        city = self.paths(index)[0].parent.name
        path = self.root / "gtFinePanopticParts" / self.split / city / f"{self.stem(index)}_gtFinePanopticParts.tif"
        return path if path.is_file() else None
