"""The confusion matrix against hand-made tables and torchmetrics."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassJaccardIndex

from metrics import ConfusionMatrix

IGNORE = 255


def random_pixels(seed, classes=4, size=(3, 7, 9)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes + 1, size, generator=generator)
    return torch.randint(0, classes, size, generator=generator), labels.masked_fill(labels == classes, IGNORE)


def filled(predictions, labels, classes=4):
    matrix = ConfusionMatrix(classes)
    matrix.update(predictions, labels)
    return matrix


def test_a_table_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2, IGNORE])
    predictions = torch.tensor([0, 0, 1, 1, 0, 2, 2])
    matrix = filled(predictions, labels, 3)
    assert matrix.counts.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert matrix.iou().tolist() == pytest.approx([2 / 4, 1 / 3, 1.0])
    assert matrix.accuracy().tolist() == pytest.approx([2 / 3, 1 / 2, 1.0])
    assert matrix.summary() == pytest.approx(
        {"miou": (1 / 2 + 1 / 3 + 1) / 3, "mean_accuracy": (2 / 3 + 1 / 2 + 1) / 3, "pixel_accuracy": 4 / 6}
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchmetrics(seed):
    predictions, labels = random_pixels(seed)
    matrix, summary = filled(predictions, labels), filled(predictions, labels).summary()
    how = {"num_classes": 4, "ignore_index": IGNORE}
    assert torch.equal(matrix.counts, MulticlassConfusionMatrix(**how)(predictions, labels))
    torch.testing.assert_close(matrix.iou().float(), MulticlassJaccardIndex(average="none", **how)(predictions, labels))
    assert summary["pixel_accuracy"] == pytest.approx(
        MulticlassAccuracy(average="micro", **how)(predictions, labels).item()
    )
    assert summary["mean_accuracy"] == pytest.approx(
        MulticlassAccuracy(average="macro", **how)(predictions, labels).item()
    )


def test_ignored_pixels_count_nowhere():
    predictions, labels = random_pixels(0)
    changed = torch.where(labels == IGNORE, (predictions + 1) % 4, predictions)
    assert torch.equal(filled(predictions, labels).counts, filled(changed, labels).counts)
    assert filled(predictions, labels).counts.sum() == (labels != IGNORE).sum()


def test_a_class_in_neither_truth_nor_prediction_is_nan_and_left_out():
    matrix = filled(torch.tensor([0, 1]), torch.tensor([0, 0]), 3)
    assert matrix.iou().isnan().tolist() == [False, False, True]
    assert matrix.accuracy().isnan().tolist() == [False, True, True]
    assert matrix.summary()["miou"] == pytest.approx((0.5 + 0.0) / 2)


def test_matrices_of_parts_add_up_to_that_of_the_whole():
    predictions, labels = random_pixels(1)
    parts = ConfusionMatrix(4)
    for b in (2, 0, 1):
        parts.update(predictions[b], labels[b])
    assert torch.equal(parts.counts, filled(predictions, labels).counts)


def test_nothing_labelled_scores_zero():
    matrix = filled(torch.zeros(5, dtype=torch.int64), torch.full((5,), IGNORE))
    assert matrix.summary() == {"miou": 0.0, "mean_accuracy": 0.0, "pixel_accuracy": 0.0}


def test_labels_of_8_bits_count_like_those_of_64():
    predictions, labels = random_pixels(2, classes=20)
    assert torch.equal(filled(predictions, labels.byte(), 20).counts, filled(predictions, labels, 20).counts)
