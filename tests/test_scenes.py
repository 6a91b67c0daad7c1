"""The generated scenes: the same at every call, different from each other, labelled as they are drawn."""

import numpy as np
import pytest

from datasets.scenes import CLASS_NAMES, GRASS, PALETTE, SKY, draw_scene


def scene(*key):
    return tuple(np.asarray(part) for part in draw_scene(*key))


def test_a_scene_is_a_function_of_size_stream_and_index():
    first, again = scene(65, 0, 3), scene(65, 0, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (65, 65, 3) and first[1].shape == (65, 65)
    assert first[0].dtype == first[1].dtype == np.uint8


def test_no_two_indices_and_no_two_streams_share_a_scene():
    images = {scene(33, stream, index)[0].tobytes() for stream in range(3) for index in range(10)}
    assert len(images) == 30


def test_every_class_occurs_and_no_other_label():
    found = set(np.unique([scene(65, 0, index)[1] for index in range(12)]).tolist())
    assert found == set(range(len(CLASS_NAMES)))


def test_there_are_at_least_five_classes_each_with_a_colour_of_its_own():
    assert len(CLASS_NAMES) >= 5 and len(set(PALETTE)) == len(PALETTE) == len(CLASS_NAMES)


def test_labels_stand_where_the_things_are_drawn():
    """Sky is bluer than grass, up to the very row where the label changes."""
    above, below = [], []
    for index in range(6):
        image, label = scene(129, 0, index)
        rows, columns = ((label[:-1] == SKY) & (label[1:] == GRASS)).nonzero()
        above += image[rows - 1, columns, 2].tolist()
        below += image[rows + 2, columns, 2].tolist()
    assert len(above) > 200 and np.quantile(above, 0.05) > np.quantile(below, 0.95) + 30


@pytest.mark.parametrize("size", [33, 64, 129])
def test_any_size_can_be_drawn(size):
    image, label = draw_scene(size, 1, 0)
    assert image.size == label.size == (size, size) and image.mode == "RGB" and label.mode == "L"


def test_the_surfaces_have_texture():
    image, label = scene(129, 0, 0)
    assert all(image[label == c].std(0).min() > 4 for c in np.unique(label))
