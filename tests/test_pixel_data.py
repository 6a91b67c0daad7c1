"""What a page is given of every pixel: the model's own numbers, the strongest prototypes, and not too many bytes."""

import numpy as np
import pytest
import torch
from torch import nn

from explanation import pixel_data
from explanation.pixel_data import choose_tiles, pack
from grid import Grid
from inference import Inference
from model import PPNet
from tests.explained import Patches, unpack
from tests.tiny import tiny_ppnet


def packed(model, images, **how):
    """The data of one image (1, 3, H, W), unpacked; the model's output, its prediction and some truth."""
    output = model(Grid().pad(images, 0.0))
    prediction = model.predict(images)[0].argmax(0).to(torch.uint8).numpy()
    truth = (prediction + 1) % 3
    return unpack(pack(model, output, prediction, truth, **how)), output, prediction, truth


class Smooth(nn.Module):
    """Features of an image of any size that look like a network's: large regions with edges, and some noise."""

    def __init__(self, depth=64, seed=0):
        super().__init__()
        self.depth, self.seed = depth, seed

    def forward(self, images):
        height, width = ((length - 1) // 8 + 1 for length in images.shape[2:])
        generator = torch.Generator().manual_seed(self.seed)
        regions = torch.randn(1, 24, height // 8 + 2, width // 8 + 2, generator=generator)
        share = (8 * Grid().upsample(regions, (height, width))).softmax(1)
        centres = torch.randn(24, self.depth, generator=generator)
        noise = torch.randn(1, self.depth, height // 2 + 1, width // 2 + 1, generator=generator)
        return torch.einsum("brhw,rd->bdhw", share, centres) + 0.15 * Grid().upsample(noise, (height, width))


def smooth_model(count=190, classes=19, **how):
    """A network on those features, its prototypes taken from them as after a push, its last layer as if trained."""
    torch.manual_seed(1)
    model = PPNet(Smooth(), (count, 64, 1, 1), classes, **how).eval()
    features = model.conv_features(torch.zeros(1, 3, 513, 513))[0].flatten(1).T
    model.project_prototypes(features[torch.randperm(len(features))[:count]])
    with torch.no_grad():
        model.last_layer.weight.mul_(1 + 0.1 * torch.randn(classes, count))
    return model


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (5, 30), (33, 33), (44, 61)])
@pytest.mark.parametrize("activation", ["log", "linear"])
def test_scores_and_activations_are_the_models(size, activation):
    model = tiny_ppnet(prototype_activation_function=activation)
    (scores, tiles, prediction, truth), output, expected, expected_truth = packed(model, torch.randn(1, 3, *size))
    np.testing.assert_allclose(scores, output.logits[0], atol=4.1e-4, rtol=1e-6)
    np.testing.assert_array_equal(prediction, expected)
    np.testing.assert_array_equal(truth, expected_truth)
    ((rows, columns, kept),) = tiles
    weight = model.last_layer.weight
    for p, activations in kept.items():
        exact = model.activations(output.distances)[0, p, rows, columns]
        error = np.abs(activations - exact.numpy()).max()
        assert error * max(1, float(weight[:, p].abs().max())) < 4.1e-4 + 1e-6 * float(exact.abs().max())


@torch.no_grad()
def test_a_network_without_prototypes_has_scores_alone():
    model = tiny_ppnet()
    output = model(torch.randn(1, 3, 33, 33))._replace(distances=None)
    labels = np.zeros((33, 33), np.uint8)
    scores, tiles, _, _ = unpack(pack(model, output, labels, labels))
    np.testing.assert_allclose(scores, output.logits[0], atol=4.1e-4)
    assert tiles == []


@torch.no_grad()
def test_where_not_all_fit_the_strongest_prototype_is_kept_at_every_pixel():
    model = smooth_model(60, 6, distance_scale=0.25)
    images = torch.zeros(1, 3, 305, 401)
    output = model(images)
    side, tiles = choose_tiles(model, output.distances[0], values=3 * 39 * 51)
    assert side == pixel_data.TILE and len(tiles) == 3 * 4
    assert sum(len(tile.prototypes) for tile in tiles) / len(tiles) < 30  # some were left out
    prediction = Grid().upsample(output.logits, images.shape[2:])[0].argmax(0)
    contributions = model.contributions(output.distances)[0]  # (C, P, h, w)
    strongest = torch.stack([Grid().upsample(c[None], images.shape[2:])[0].argmax(0) for c in contributions])
    strongest = strongest.gather(0, prediction[None])[0]  # (H, W)
    for tile in tiles:
        top, left = tile.rows.start * 8, tile.columns.start * 8
        found = strongest[top : top + 8 * side + 1, left : left + 8 * side + 1].unique().tolist()
        assert set(found) <= set(tile.prototypes)


@torch.no_grad()
def test_tiles_of_patch_features_keep_the_strongest_prototype_of_every_pixel():
    model = PPNet(Patches("", 5, ""), (40, 5, 1, 1), 4).eval()
    torch.nn.init.normal_(model.last_layer.weight)
    images = torch.randn(1, 3, 270, 301)
    inference = Inference(model, torch.device("cpu"))
    output = inference.output(images)
    side, tiles = choose_tiles(model, output.distances[0], values=0)
    contributions = inference.upsample(model.contributions(output.distances)[0], (270, 301))  # (C, P, H, W)
    strongest = contributions.argmax(1).gather(0, inference.label(images))[0]
    places = torch.arange(301).sub(3.5).div(8)  # of a pixel among the cells
    for tile in tiles:
        rows, columns = ((places >= part.start - (part.start == 0)) & (places <= part.stop) for part in tile[:2])
        found = strongest[rows[:270]][:, columns].unique().tolist()
        assert set(found) <= set(tile.prototypes) and len(tile.prototypes) < 40


@torch.no_grad()
def test_tiles_carry_the_right_cells():
    model = smooth_model(60, 6)
    (_, tiles, _, _), output, _, _ = packed(model, torch.zeros(1, 3, 300, 400), limit=20_000)
    exact = model.activations(output.distances)[0].numpy()
    assert len(tiles) == 12 and {(t[0].stop, t[1].stop) for t in tiles} >= {(17, 17), (39, 51)}
    for rows, columns, kept in tiles:
        for p, activations in kept.items():
            np.testing.assert_allclose(activations, exact[p, rows, columns], atol=4.1e-4)


@torch.no_grad()
def test_cityscapes_at_full_size_stays_below_its_limit():
    model = smooth_model()
    images = torch.zeros(1, 3, 1025, 2049)
    output = model(images)
    prediction = Grid().upsample(output.logits, images.shape[2:])[0, :, :1024, :2048].argmax(0).to(torch.uint8).numpy()
    data = pack(model, output, prediction, prediction)
    assert len(set(prediction.ravel().tolist())) > 10
    assert min(len(kept) for kept in data["tiles"]) >= 8
    assert len(data["scores"]) + len(data["activations"]) < 2_500_000  # the rest is left for the photograph
