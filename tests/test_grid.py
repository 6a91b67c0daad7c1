"""The grid against planted impulses: whatever asks it agrees with where a cell really looks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evaluation.labelling import View, label_image
from explanation.pixel_data import pack
from explanation.prototype_pictures import patch_box
from grid import IGNORE, Grid
from inference import Inference
from model import LinearNet, PPNet
from push import push_prototypes
from tests.tiny import RandomImages

CPU = torch.device("cpu")


class Patches(nn.Module):
    """A patch embedding: cell i is the mean of pixels s i .. s i + s - 1, so it looks at s i + (s - 1) / 2."""

    def __init__(self, stride=8, depth=3):
        super().__init__()
        self.grid = Grid(stride, (stride - 1) / 2)
        self.embed = nn.Conv2d(3, depth, stride, stride=stride, bias=False)
        nn.init.zeros_(self.embed.weight)
        with torch.no_grad():
            for channel in range(depth):
                self.embed.weight[channel, channel] = 1.0 / stride**2

    def forward(self, images):
        return self.embed(images)


class Pixels(nn.Module):
    """Cell i is pixel s i itself; says its stride by `output_stride` alone."""

    def __init__(self, stride=16, depth=3):
        super().__init__()
        self.output_stride, self.depth = stride, depth

    def forward(self, images):
        return images[:, : self.depth, :: self.output_stride, :: self.output_stride]


FEATURES = {"stride 16": lambda: Pixels(16), "stride 4": lambda: Pixels(4), "8i + 3.5": lambda: Patches(8)}
FEATURES |= {"14i + 6.5": lambda: Patches(14), "7i + 3": lambda: Patches(7)}


def net(features, **how):
    torch.manual_seed(0)
    return PPNet(features, (6, 3, 1, 1), 3, **how).eval()


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("size", [(113, 129), (100, 61), (64, 64), (37, 90)])
def test_impulse_label_pixel_and_upsampling_agree_with_where_a_cell_looks(kind, size):
    """A bright patch at the pixel that the grid names is seen by that cell more than by any other."""
    features = FEATURES[kind]()
    grid = net(features).grid
    cells = [grid.cells(length) for length in size]
    for row in (0, cells[0] // 2, grid.visible(size[0]) - 1):
        for column in (0, cells[1] // 2, grid.visible(size[1]) - 1):
            y, x = grid.pixel(row), grid.pixel(column)
            image = torch.zeros(1, 3, *size)
            image[:, :, y, x] = 1.0
            seen = features(grid.pad(image, 0.0))[0, 0]
            assert list(seen.shape) == cells
            assert divmod(int(seen.argmax()), cells[1]) == (row, column)
            label = torch.full((1, *size), IGNORE)
            label[:, y, x] = 2
            assert (grid.labels(label, cells)[0] == 2).nonzero().tolist() == [[row, column]]
            inside = grid.upsample(seen[None, None], [grid.length(n) for n in cells])[0, 0, : size[0], : size[1]]
            ys, xs = (inside == inside.max()).nonzero().double().mean(0).tolist()
            at_border = row in (0, cells[0] - 1) or column in (0, cells[1] - 1)
            between = grid.offset % 1  # an even patch is centred between two pixels, which are equally near
            assert at_border or max(abs(ys - y), abs(xs - x)) <= 0.5 + between
            assert grid.nearest(size[0], cells[0])[y] == row and grid.nearest(size[1], cells[1])[x] == column


@pytest.mark.parametrize("kind", FEATURES)
def test_upsampling_is_exact_for_a_ramp(kind):
    """Values that are linear in the pixel come back linear, from the first cell's centre to the last one's."""
    grid = net(FEATURES[kind]()).grid
    cells = (5, 7)
    places = [grid.stride * torch.arange(n).double() + grid.offset for n in cells]
    ramp = 2 * places[0][:, None] - 3 * places[1]
    size = [grid.length(n) for n in cells]
    full = grid.upsample(ramp[None, None], size)[0, 0]
    expected = 2 * torch.arange(size[0]).double()[:, None] - 3 * torch.arange(size[1]).double()
    first, last = int(np.ceil(grid.offset)), [int(p[-1]) for p in places]
    inner = (slice(first, last[0] + 1), slice(first, last[1] + 1))
    torch.testing.assert_close(full[inner], expected[inner])


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("fusion", ["logits", "features"])
def test_input_scales_keep_their_place(kind, fusion):
    """A bright square stays in the same place when it is looked at in other sizes: no scale shifts it."""
    model = net(FEATURES[kind]())
    stride = model.grid.stride
    image = torch.zeros(1, 3, 12 * stride + 3, 12 * stride + 3)
    image[:, 0, 4 * stride : 8 * stride + 1, 4 * stride : 8 * stride + 1] = 4.0
    maps = [
        Inference(model, CPU, scales=scales, fusion=fusion).logits(image)[0].softmax(0)[0].double()
        for scales in ((), (0.5, 0.75, 2.0))
    ]
    rows, columns = (torch.arange(n).double() for n in image.shape[-2:])
    centres = []
    for values in maps:
        weight = (values - values.flatten().median()).abs()
        centres.append(
            (float((weight.sum(1) * rows).sum() / weight.sum()), float((weight.sum(0) * columns).sum() / weight.sum()))
        )
    assert np.allclose(centres[0], centres[1], atol=0.35 * stride)
    for scale in (0.5, 0.75, 2.0):
        for length in (model.grid.length(9), model.grid.length(14)):
            assert model.grid.fits(model.grid.scaled(length, scale))


VIEWS = {"plain": View(), "tta": View(tta=True), "windows": View(window=5), "windows and tta": View(True, 5)}


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("scales", [(), (0.5, 0.75, 2.0)])
@pytest.mark.parametrize("fusion", ["logits", "features"])
def test_an_edge_lies_at_its_pixel_in_every_view_and_at_every_scale(kind, view, scales, fusion):
    """Two classes of which one grows with the row or column change places at the pixel where they are equal.

    Features of a ramp are linear, so whatever is resized, padded, cut into windows and put together again has to give
    the ramp back: an error of half a pixel anywhere moves the edge.
    """
    features = FEATURES[kind]()
    inference = Inference(LinearNet(features, 3), CPU, scales=scales, fusion=fusion)
    grid = inference.grid
    view = VIEWS[view]._replace(window=VIEWS[view].window and grid.length(VIEWS[view].window))
    stride = grid.length(2) - grid.length(1)
    size = (11 * stride + 3, 9 * stride - 2)
    slack = stride // 2 if scales and view.window and grid.offset else 0
    for axis, length in enumerate(size):
        for edge in (3 * stride + 0.5, length // 2 + 1.5):
            image = torch.full((1, 3, *size), -100.0)
            ramp = 2e-3 * (torch.arange(length, dtype=torch.float32) - edge)
            image[0, axis] = ramp[:, None] if axis == 0 else ramp
            image[0, 2] = 0.0
            labels, _ = label_image(inference, image, view)
            beyond = (torch.arange(length) > edge)[:, None] if axis == 0 else torch.arange(length) > edge
            wrong = (labels[0] != torch.where(beyond, axis, 2)).movedim(axis, 0)
            # Patches of a coarse scale end before a window does, and its border is taken to be like the last of them.
            wrong[int(edge) + 1 - slack : int(edge) + 1 + slack] = False
            inner = wrong[: -4 * stride, : -4 * stride]  # beyond, cells of a coarse scale see the padding, too
            assert not inner.any(), (axis, edge, inner.any(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.5, 2.0])
def test_labels_of_a_scaled_grid_are_of_the_same_place(kind, scale):
    """What the cells of a resized image look at, in pixels of the image, by the geometry of the resizing."""
    grid = net(FEATURES[kind]()).grid
    length = grid.length(9)
    cells = grid.cells(grid.scaled(length, scale))
    rows = grid.labels(torch.arange(length)[None, :, None].expand(1, length, length), (cells, cells))[0, :, 0]
    place = torch.arange(cells).double()
    place = place * (length - 1) / (cells - 1) if grid.offset == 0 else (place + 0.5) * length / cells - 0.5
    assert (rows - place).abs().max() <= 0.5


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize("scales", [(), (0.5, 2.0)])
def test_push_records_and_boxes_lie_where_the_cells_look(kind, scales):
    model, data = net(FEATURES[kind]()), RandomImages(6)
    inference = Inference(model, CPU, scales=scales, fusion="features")
    report = push_prototypes(inference, data)
    for record in report.records:
        image, label = data.items[record["image_index"]]
        x, y = record["pixel"]
        assert label[y, x] == record["class"] and record["image_size"] == [image.shape[2], image.shape[1]]
        row, column = record["cell"]
        features = inference.features(image[None])[0]
        torch.testing.assert_close(model.prototype_vectors[record["prototype"]].flatten(), features[:, row, column])
        activation = model.activations(inference.output(image[None]).distances)[0, record["prototype"]]
        assert activation[row, column] == activation.max()
        x0, y0, x1, y1 = patch_box(activation, record["cell"], (image.shape[2], image.shape[1]), model.grid)
        assert x0 <= x < x1 and y0 <= y < y1


def test_a_page_gets_the_numbers_of_the_grid():
    model = net(Patches(8))
    output = Inference(model, CPU).output(torch.randn(1, 3, 40, 33))
    labels = np.zeros((40, 33), np.uint8)
    data = pack(model, output, labels, labels)
    assert (data["stride"], data["offset"], data["grid"]) == (8, 3.5, [5, 5])


@given(st.sampled_from([(8, 0), (16, 0), (4, 0), (8, 3.5), (14, 6.5), (7, 3.0), (1, 0)]), st.integers(1, 400))
def test_sides_hold_their_cells(kind, length):
    grid = Grid(*kind)
    cells = grid.cells(length)
    padded = grid.length(cells)
    assert length <= padded < length + max(grid.stride, 2 * grid.stride * (length < grid.length(1))) and grid.fits(
        padded
    )
    assert grid.cells(padded) == cells
    assert grid.visible(length) == sum(grid.pixel(cell) < length for cell in range(cells))
    assert grid.pixel(cells - 1) < padded
    nearest = grid.nearest(length, cells).tolist()
    centres = [grid.stride * cell + grid.offset for cell in range(cells)]
    assert all(abs(centres[c] - x) == min(abs(centre - x) for centre in centres) for x, c in enumerate(nearest))


def test_other_offsets_are_refused():
    for stride, offset in ((8, 1.0), (8, 4.0), (0, 0.0), (16, 3.5)):
        with pytest.raises(ValueError, match="offset"):
            Grid(stride, offset)
