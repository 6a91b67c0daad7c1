"""The networks: head, geometry, exact contributions, frozen batch norm, changes of the prototypes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from config import Config, ModelConfig
from deeplab_features import DeepLabFeatures
from grid import IGNORE, Grid
from inference import Inference
from model import (
    LinearNet,
    PPNet,
    construct_PPNet,
    outputs_at_scales,
    squared_distances,
)
from runtime.errors import ConfigError
from tests.tiny import EveryEighthPixel, tiny_ppnet

GOLDEN = dict(np.load(Path(__file__).parent / "data" / "golden.npz"))
SIZES = [(17, 25), (24, 33), (31, 18), (40, 41), (1, 9), (23, 8)]


def images_of(height, width, seed=0, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def interpolated(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels (C, height, width) between cells (C, h, w) that stand at every eighth pixel, by the definition."""
    result = np.zeros((len(cells), height, width))
    for y, x in np.ndindex(height, width):
        (i, a), (j, b) = divmod(y, 8), divmod(x, 8)
        for di, dj, share in ((0, 0, (8 - a) * (8 - b)), (1, 0, a * (8 - b)), (0, 1, (8 - a) * b), (1, 1, a * b)):
            if share:
                result[:, y, x] += share / 64 * cells[:, i + di, j + dj]
    return result


@pytest.fixture(scope="module")
def golden_model():
    """A PPNet with the golden file's weights whose features are its images."""
    classes, prototypes = GOLDEN["last_layer"].shape
    model = PPNet(nn.Identity(), (prototypes, GOLDEN["raw"].shape[1], 1, 1), classes)
    model.project_prototypes(torch.from_numpy(GOLDEN["prototypes"]))
    with torch.no_grad():
        model.last_layer.weight.copy_(torch.from_numpy(GOLDEN["last_layer"]))
    return model


# --- the head --------------------------------------------------------------------------------------------------


def test_golden_features_distances_activations_and_logits(golden_model):
    raw = torch.from_numpy(GOLDEN["raw"]).float()
    with torch.no_grad():
        logits, distances = golden_model(raw)
        found = {
            "features": golden_model.conv_features(raw),
            "distances": distances,
            "activations": golden_model.activations(distances),
            "logits": logits,
        }
    for name, values in found.items():
        least = 1e-6 * np.abs(GOLDEN[name]).max()  # a logit is a sum that may cancel to almost nothing
        np.testing.assert_allclose(values.numpy(), GOLDEN[name], rtol=1e-5, atol=least, err_msg=name)


def test_distances_at_full_depth_equal_cdist():
    generator = torch.Generator().manual_seed(0)
    features, prototypes = torch.rand(2, 64, 9, 7, generator=generator), torch.rand(30, 64, 1, 1, generator=generator)
    cells = features.double().flatten(2).transpose(1, 2)
    expected = torch.cdist(cells, prototypes.double().flatten(1)[None]).square().transpose(1, 2).reshape(2, 30, 9, 7)
    torch.testing.assert_close(squared_distances(features, prototypes).double(), expected, rtol=1e-5, atol=0)


def test_the_distance_of_a_prototype_to_itself_is_zero_and_its_activation_finite_and_highest():
    model = tiny_ppnet(depth=64)
    distances = squared_distances(model.prototype_vectors[None, 0], model.prototype_vectors)[0, :, 0, 0]
    activations = model.activations(distances)
    assert 0 <= distances[0] < 1e-5 and activations.isfinite().all() and activations.argmax() == 0
    assert model.activations(torch.zeros(1)).item() == pytest.approx(np.log(1e4), rel=1e-6)


@pytest.mark.parametrize("activation", ["log", "linear"])
def test_the_activation_falls_with_the_distance(activation):
    model = tiny_ppnet(prototype_activation_function=activation)
    assert (model.activations(torch.linspace(0, 64, 1000)).diff() < 0).all()


def test_the_linear_activation_is_minus_the_distance():
    model = tiny_ppnet(prototype_activation_function="linear", distance_scale=0.5)
    assert model.activations(torch.tensor([0.0, 3.0])).tolist() == [0.0, -1.5]


def test_the_distance_scale_changes_activations_and_not_distances():
    plain, scaled = tiny_ppnet(), tiny_ppnet(distance_scale=0.25)
    images = images_of(17, 17)
    assert torch.equal(plain(images).distances, scaled(images).distances)
    expected = plain.activations(plain(images).distances * 0.25)
    assert torch.equal(scaled.activations(scaled(images).distances), expected)


def test_prototypes_start_in_the_unit_cube_ten_to_a_class_and_vote_for_their_own():
    model = PPNet(EveryEighthPixel(64), (190, 64, 1, 1), 19)
    assert model.prototype_vectors.shape == (190, 64, 1, 1)
    assert 0 <= model.prototype_vectors.min() and model.prototype_vectors.max() <= 1
    assert model.prototype_class.tolist() == [p // 10 for p in range(190)]
    assert "prototype_class" in dict(model.named_buffers())
    for c, p in ((0, 0), (0, 10), (18, 189), (17, 189)):
        assert model.last_layer.weight[c, p] == (1.0 if p // 10 == c else -0.5)
    assert model.last_layer.bias is None


def test_the_bottleneck_is_two_convolutions_before_the_sigmoid():
    model = tiny_ppnet(add_on_layers_type="bottleneck")
    images = images_of(17, 17)
    first, _, second, _ = model.add_on_layers
    expected = second(first(model.features(images)).clamp(min=0)).sigmoid()
    torch.testing.assert_close(model.conv_features(images), expected)


def test_autocast_does_not_touch_the_prototype_layer():
    model = tiny_ppnet()
    features = torch.rand(1, 5, 4, 4)
    exact = model.classify(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.classify(features)
    assert inside.logits.dtype == torch.float32
    assert torch.equal(inside.logits, exact.logits) and torch.equal(inside.distances, exact.distances)


@pytest.mark.parametrize("shape", [(7, 5, 1, 1), (6, 5, 2, 2)])
def test_a_shape_that_cannot_be_is_refused(shape):
    with pytest.raises(ConfigError, match="prototype_shape"):
        PPNet(EveryEighthPixel(), shape, 3)


# --- geometry --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def averaging():
    """A real backbone in which every filter is a plain average, so that a response is centred on its cause."""
    backbone = DeepLabFeatures("resnet18", 1).backbone.eval()
    for parameter in backbone.parameters():
        nn.init.constant_(parameter, 1 / parameter[0].numel() if parameter.dim() == 4 else 0)
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)
    return backbone


@torch.no_grad()
@pytest.mark.parametrize("cell", [(20, 20), (18, 21)])
def test_an_impulse_at_pixel_8i_8j_has_its_peak_at_cell_i_j(averaging, cell):
    image = torch.zeros(1, 3, 321, 321)
    image[..., 8 * cell[0], 8 * cell[1]] = 1e3
    response = averaging(image)[0, 0]
    assert response.shape == (41, 41)
    assert (response > response.max() * (1 - 1e-5)).nonzero().tolist() == [list(cell)]
    around = response[cell[0] - 8 : cell[0] + 9, cell[1] - 8 : cell[1] + 9]
    torch.testing.assert_close(around, around.flip(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(around, around.T.flip(0), rtol=1e-4, atol=0)


@torch.no_grad()
def test_moving_the_image_by_eight_pixels_moves_the_features_by_a_cell(averaging):
    image = torch.zeros(1, 3, 321, 321)
    image[..., 155:165, 153:170] = torch.rand(3, 10, 17, generator=torch.Generator().manual_seed(0))
    before, after = averaging(image), averaging(image.roll((8, -16), (2, 3)))
    expected = before.roll((1, -2), (2, 3))
    torch.testing.assert_close(after[..., 14:27, 14:27], expected[..., 14:27, 14:27], rtol=1e-4, atol=0)


def test_predict_has_a_cells_logit_at_its_pixel():
    model, images = tiny_ppnet(), images_of(33, 41)
    torch.testing.assert_close(model.predict(images)[..., ::8, ::8], model(images).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_predict_is_exact_at_every_pixel_of_any_size(size):
    model, images = tiny_ppnet(), images_of(*size)
    padded = np.zeros((2, 3, *(8 * ((n + 6) // 8) + 1 for n in size)), dtype=np.float32)
    padded[:, :, : size[0], : size[1]] = images.numpy()
    with torch.no_grad():
        cells = model(torch.from_numpy(padded)).logits.double().numpy()
        found = model.predict(images)
    assert found.shape == (2, 3, *size)
    for b in range(2):
        np.testing.assert_allclose(found[b].numpy(), interpolated(cells[b], *size), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kept", [None, [0, 2, 3, 5]], ids=["all prototypes", "pruned"])
def test_contributions_sum_to_predicts_logits_at_every_pixel(size, kept):
    model, images = tiny_ppnet(), images_of(*size, count=1)
    if kept:
        model.keep_prototypes(torch.tensor(kept))
    with torch.no_grad():
        padded = Grid().pad(images, 0.0)
        parts = model.contributions(model(padded).distances)
        pixels = Grid().upsample(parts.flatten(1, 2), padded.shape[2:]).unflatten(1, parts.shape[1:3])
        torch.testing.assert_close(pixels.sum(2)[..., : size[0], : size[1]], model.predict(images))
    assert parts.shape[1:3] == (3, len(kept or range(6)))


def test_a_contribution_is_weight_times_activation():
    model, distances = tiny_ppnet(), torch.rand(1, 6, 2, 2)
    parts, activations = model.contributions(distances), model.activations(distances)
    for c, p in np.ndindex(3, 6):
        assert torch.equal(parts[:, c, p], model.last_layer.weight[c, p] * activations[:, p])
    of_class_2 = model.contributions_to(distances, torch.full((1, 2, 2), 2))
    assert torch.equal(of_class_2, parts[:, 2])


@pytest.mark.parametrize("size", SIZES)
def test_labels_are_read_at_every_eighth_pixel(size):
    labels = torch.randint(0, 200, (2, *size), generator=torch.Generator().manual_seed(0))
    grid = [(n + 6) // 8 + 1 for n in size]
    cells = Grid().labels(labels, grid)
    for b, i, j in np.ndindex(2, *grid):
        inside = 8 * i < size[0] and 8 * j < size[1]
        assert cells[b, i, j] == (labels[b, 8 * i, 8 * j] if inside else IGNORE)


def test_labels_of_a_resized_grid_are_read_at_the_same_place():
    labels = torch.arange(33)[None, None].expand(1, 33, 33)
    assert Grid().labels(labels, (5, 3))[0, 0].tolist() == [0, 16, 32]


def test_padding_ends_on_a_cell_and_adds_nothing_to_a_fitting_size():
    assert Grid().pad(torch.ones(1, 24, 25), 7.0).shape == (1, 25, 25)
    assert Grid().pad(torch.ones(1, 24, 25), 7.0)[0, 24].tolist() == [7.0] * 25
    image = torch.rand(1, 3, 17, 9)
    assert torch.equal(Grid().pad(image, 0.0), image)


# --- multi-scale -----------------------------------------------------------------------------------------------


def test_multi_scale_ends_with_the_maximum_over_the_scales():
    model, images = tiny_ppnet(), images_of(33, 49)
    with torch.no_grad():
        own, half, double, highest = outputs_at_scales(model, images, (0.5, 2.0))
        assert own.logits.shape[2:] == (5, 7) and half.logits.shape[2:] == (3, 4) and double.logits.shape[2:] == (9, 13)
        assert torch.equal(own.logits, model(images).logits)
        assert torch.equal(half.logits, model(Grid().upsample(images, (17, 25))).logits)
        each = torch.stack([Grid().upsample(o.logits, (5, 7)) for o in (own, half, double)])
        assert torch.equal(highest.logits, each.max(0).values) and highest.distances is None
        predicted = Inference(model, torch.device("cpu"), scales=(0.5, 2.0)).logits(images)
    torch.testing.assert_close(predicted[..., ::8, ::8], highest.logits)


def test_without_scales_multi_scale_is_predict():
    model, images = tiny_ppnet(), images_of(30, 20)
    torch.testing.assert_close(Inference(model, torch.device("cpu")).logits(images), model.predict(images))


# --- batch norm, changes of the prototypes, building -----------------------------------------------------------


class NormedPixels(EveryEighthPixel):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)

    def forward(self, images):
        return self.norm(super().forward(images))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_batch_norm_stays_frozen_through_train(frozen):
    model = PPNet(NormedPixels(), (6, 5, 1, 1), 3)
    model.features.norm.requires_grad_(not frozen)
    before = model.features.norm.running_mean.clone()
    model.train()
    model(images_of(33, 33))
    assert model.training and model.features.norm.training != frozen
    assert torch.equal(model.features.norm.running_mean, before) == frozen


def test_dropping_prototypes_of_weight_zero_leaves_the_logits():
    model, images = tiny_ppnet(), images_of(33, 33)
    with torch.no_grad():
        model.last_layer.weight[:, [1, 4]] = 0
        before = model(images).logits
        model.keep_prototypes(torch.tensor([0, 2, 3, 5]))
        torch.testing.assert_close(model(images).logits, before, rtol=1e-5, atol=1e-6)
    assert model.prototype_class.tolist() == [0, 1, 1, 2]
    assert model.prototype_vectors.shape == (4, 5, 1, 1) and model.last_layer.weight.shape == (3, 4)
    assert model.last_layer.in_features == 4


def test_dropping_prototypes_keeps_what_is_trained():
    model = tiny_ppnet()
    model.prototype_vectors.requires_grad_(False)
    model.keep_prototypes(torch.tensor([5, 0]))
    assert not model.prototype_vectors.requires_grad and model.last_layer.weight.requires_grad
    assert model.prototype_class.tolist() == [2, 0]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1)])
def test_projection_replaces_every_prototype(shape):
    model, vectors = tiny_ppnet(), torch.rand(shape)
    model.project_prototypes(vectors)
    assert torch.equal(model.prototype_vectors.flatten(), vectors.flatten())
    assert model.prototype_vectors.requires_grad


def test_the_published_network_has_47_million_parameters_and_190_prototypes():
    with torch.device("meta"):
        model = construct_PPNet(Config().model, load_pretrained=False)
    count = sum(p.numel() for p in model.parameters())
    assert round(count / 1e6, 1) == 47.2
    assert model.prototype_vectors.shape == (190, 64, 1, 1)
    with torch.device("meta"):
        assert model.conv_features(torch.zeros(1, 3, 513, 513)).shape == (1, 64, 65, 65)


def test_the_twin_maps_its_features_to_the_classes():
    config = ModelConfig(backbone="resnet18", pretrained="none", head="linear", num_classes=7)
    model = construct_PPNet(config).eval()
    images = images_of(33, 33, count=1)
    output = model(images)
    assert isinstance(model, LinearNet) and output.distances is None
    assert torch.equal(output.logits, model.features(images)) and model.predict(images).shape == (1, 7, 33, 33)


@pytest.mark.parametrize(
    "changes",
    [{"prototype_activation_function": "linear"}, {"add_on_layers_type": "bottleneck"}, {"distance_scale": 0.5}],
)
def test_the_configuration_reaches_the_network(changes):
    config = dataclasses.replace(
        ModelConfig(backbone="resnet18", pretrained="none", num_classes=2, prototype_shape=(4, 8, 1, 1)), **changes
    )
    model = construct_PPNet(config)
    assert model.prototype_activation_function == config.prototype_activation_function
    assert len(model.add_on_layers) == (4 if config.add_on_layers_type == "bottleneck" else 1)
    assert model.distance_scale == config.distance_scale
