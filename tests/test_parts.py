"""Consistency and stability on planted parts, and the label files of the two panoptic parts data sets."""

import numpy as np
import pytest
import torch
from PIL import Image

from config import DatasetConfig
from datasets.base import DatasetError
from datasets.cityscapes import CityscapesDataset
from datasets.pascal import PascalVOCDataset
from evaluation.parts import PartMetrics, part_centroids, part_hits, read_parts
from grid import Grid

STRIDE = 8


def scene():
    """Labels and parts of a 33x33 image: class 1 on the right half, with part 7 in its top and part 9 at its bottom."""
    labels, parts = torch.zeros(33, 33, dtype=torch.long), np.zeros((33, 33), dtype=np.int64)
    labels[:, 16:] = 1
    parts[1:8, 20:29] = 7
    parts[25:32, 20:29] = 9
    return labels, parts


def looking_at(row, column):
    """Activations (5, 5) that are high at the cells around a pixel."""
    rows, columns = torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij")
    return -((rows - row / STRIDE) ** 2 + (columns - column / STRIDE) ** 2).float()


def test_components_have_a_centroid_each():
    parts, mask = np.zeros((10, 10), dtype=int), np.ones((10, 10), dtype=bool)
    parts[0:3, 0:3] = 4
    parts[3, 3] = 4  # touches by a corner: the same component
    parts[7:10, 7:10] = 4
    parts[0, 9] = 5
    assert part_centroids(parts, mask) == [(4, 1, 1), (4, 8, 8), (5, 0, 9)]
    mask[7:] = False
    assert part_centroids(parts, mask) == [(4, 1, 1), (5, 0, 9)]


def test_a_part_is_hit_where_the_prototype_looks():
    labels, parts = scene()
    centroids = part_centroids(parts, (labels == 1).numpy())
    assert centroids == [(7, 4, 24), (9, 28, 24)]
    activations = torch.stack((looking_at(4, 24), looking_at(28, 24), looking_at(16, 24), looking_at(4, 4)))
    hits = part_hits(activations, labels == 1, centroids, Grid(STRIDE))
    assert [row.nonzero().flatten().tolist() for row in hits] == [[7], [9], [], []]


def test_consistency_and_stability_find_the_prototypes_that_were_planted():
    labels, parts = scene()
    metrics = PartMetrics(torch.tensor([0, 1, 1, 1]), Grid(STRIDE))  # prototype 0 is of a class without parts
    top, bottom, between = looking_at(4, 24), looking_at(28, 24), looking_at(16, 24)
    for image in range(5):
        wavering = top if image < 4 else bottom  # hits part 7 in 4 of 5 images: 0.8 is not more than 0.8
        clean = torch.stack((top, top, wavering, between))
        noisy = torch.stack((top, bottom if image == 0 else top, wavering, between))
        metrics.update(clean, noisy, labels, parts)
    found = metrics.summary()
    assert found["consistent"] == [1]
    assert found["consistency"] == pytest.approx(1 / 3)
    assert found["part_stability"] == pytest.approx(14 / 15)


def test_without_parts_there_is_nothing_to_say():
    metrics = PartMetrics(torch.tensor([0, 1]), Grid(STRIDE))
    metrics.update(torch.rand(2, 5, 5), torch.rand(2, 5, 5), scene()[0], np.zeros((33, 33), dtype=int))
    assert metrics.summary() is None


def write_parts(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(ids, dtype=np.int32)).save(path)


def test_part_ids_are_the_last_two_of_more_than_five_digits(tmp_path):
    write_parts(tmp_path / "a.tif", [[0, 7, 24], [26001, 2600102, 2400304]])
    assert read_parts(tmp_path / "a.tif", (3, 2)).tolist() == [[0, 0, 0], [0, 2, 4]]


def test_faults_of_part_labels_name_the_file(tmp_path):
    write_parts(tmp_path / "a.tif", [[1, 2]])
    with pytest.raises(DatasetError, match=r"a\.tif: want whole numbers, 5x5"):
        read_parts(tmp_path / "a.tif", (5, 5))
    (tmp_path / "b.tif").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match=r"b\.tif: cannot read"):
        read_parts(tmp_path / "b.tif", (5, 5))


def test_cityscapes_panoptic_parts_are_found(tmp_path):
    for name in ("aachen_000000_000019", "aachen_000001_000019"):
        image = tmp_path / "leftImg8bit/val/aachen" / f"{name}_leftImg8bit.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 2)).save(image)
    file = tmp_path / "gtFinePanopticParts/val/aachen/aachen_000001_000019_gtFinePanopticParts.tif"
    write_parts(file, [[1, 2]])
    dataset = CityscapesDataset(DatasetConfig(name="cityscapes", root=str(tmp_path)), "val")
    assert [dataset.part_label(i) for i in range(2)] == [None, file]


@pytest.mark.parametrize("folder", ["pascal_panoptic_parts_v2/validation", "pascal_panoptic_parts/labels/validation"])
def test_pascal_panoptic_parts_are_found(tmp_path, folder):
    voc = tmp_path / "VOCdevkit/VOC2012"
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("2008_000001\n2008_000003\n")
    write_parts(tmp_path / folder / "2008_000003.tif", [[1, 2]])
    dataset = PascalVOCDataset(DatasetConfig(name="pascal", root=str(tmp_path)), "val")
    assert [dataset.part_label(i) for i in range(2)] == [None, tmp_path / folder / "2008_000003.tif"]


def test_a_centroid_outside_the_class_is_no_hit():
    labels, parts = torch.zeros(33, 33, dtype=torch.long), np.zeros((33, 33), dtype=np.int64)
    labels[4:29, 4:29] = 1
    labels[8:25, 8:25] = 0  # a frame: its centroid lies in its hole
    parts[labels.numpy() == 1] = 3
    centroids = part_centroids(parts, (labels == 1).numpy())
    assert centroids == [(3, 16, 16)]
    assert not part_hits(looking_at(16, 16)[None], labels == 1, centroids, Grid(STRIDE)).any()
