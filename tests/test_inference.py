"""Labelling through one object: which model, scales and precision everybody asks, and what a file of weights may hold.

The maximum over scales (`model.msc_fusion`) is held to an oracle that knows the definition alone: loops over pixels and
cells, in float64, of code of its own.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from config import config_to_dict
from dataset import build_dataset
from grid import IGNORE, Grid
from inference import Inference, inference_of, load_weights, open_model
from losses import cross_entropy, diversity_loss
from model import LinearNet, PPNet, construct_PPNet, outputs_at_scales
from module import TrainingModule
from push import find_neighbours, push_prototypes
from runtime.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from runtime.errors import ConfigError, UserError
from tests.tiny import EveryEighthPixel, RandomImages, tiny_config, tiny_ppnet

CPU = torch.device("cpu")
SCALES = (0.5, 2.0)


# --- the oracle ------------------------------------------------------------------------------------------------


def resized(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C, H, W) at another size by the definition: the corners stay corners, and between is linear."""
    result = np.zeros((len(values), height, width))
    ratios = [(old - 1) / max(1, new - 1) for old, new in zip(values.shape[1:], (height, width), strict=True)]
    for y, x in np.ndindex(height, width):
        (i, a), (j, b) = divmod(y * ratios[0], 1), divmod(x * ratios[1], 1)
        rows = (int(i), 1 - a), (min(int(i) + 1, values.shape[1] - 1), a)
        columns = (int(j), 1 - b), (min(int(j) + 1, values.shape[2] - 1), b)
        for (row, u), (column, v) in ((r, c) for r in rows for c in columns):
            result[:, y, x] += u * v * values[:, row, column]
    return result


def padded(image: np.ndarray) -> np.ndarray:
    height, width = (8 * -(-(n - 1) // 8) + 1 for n in image.shape[1:])
    return np.pad(image, ((0, 0), (0, height - image.shape[1]), (0, width - image.shape[2])))


def features_of(model, image: np.ndarray) -> np.ndarray:
    """What the pixels (8 i, 8 j) are mapped to: (3, H, W) -> (D, h, w), before the sigmoid."""
    weight, bias = (p.detach().double().numpy() for p in model.features.project.parameters())
    cells = image[:, ::8, ::8]
    return np.einsum("dc,chw->dhw", weight[:, :, 0, 0], cells) + bias[:, None, None]


def every_scale(model, image: np.ndarray, scales=SCALES) -> list[np.ndarray]:
    """The features of a padded image at its own scale, at each of the others, and the maximum of all of them."""
    found = [features_of(model, image)]
    for scale in scales:
        height, width = (8 * round((n - 1) * scale / 8) + 1 for n in image.shape[1:])
        found.append(features_of(model, resized(image, height, width)))
    size = found[0].shape[1:]
    return [*found, np.stack([resized(values, *size) for values in found]).max(0)]


def classified(model, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sigmoid features, squared distances and logits of features (D, h, w), cell by cell and prototype by prototype."""
    prototypes = model.prototype_vectors.detach().double().numpy()[:, :, 0, 0]
    weight = model.last_layer.weight.detach().double().numpy()
    vectors = 1 / (1 + np.exp(-features))
    distances = np.zeros((len(prototypes), *features.shape[1:]))
    for p, i, j in np.ndindex(*distances.shape):
        distances[p, i, j] = ((vectors[:, i, j] - prototypes[p]) ** 2).sum()
    activations = np.log((distances + 1) / (distances + 1e-4))
    return vectors, distances, np.einsum("cp,phw->chw", weight, activations)


def nearest_cells(model, data, k, own_class):
    """(distance, image, row, column, class, vector) of each prototype's k nearest cells, at most one an image."""
    best = [[] for _ in model.prototype_class]
    for index, (image, label) in enumerate(data.items):
        vectors, distances, _ = classified(model, every_scale(model, padded(image.double().numpy()))[-1])
        for p, own in enumerate(model.prototype_class.tolist()):
            cells = [
                (distances[p, i, j], index, i, j, int(label[8 * i, 8 * j]), vectors[:, i, j])
                for i, j in np.ndindex(*distances.shape[1:])
                if 8 * i < label.shape[0] and 8 * j < label.shape[1] and label[8 * i, 8 * j] != IGNORE
                if not own_class or label[8 * i, 8 * j] == own
            ]
            best[p] += sorted(cells, key=lambda cell: cell[0])[:1]
    return [sorted(cells, key=lambda cell: cell[0])[:k] for cells in best]


def images_of(height=33, width=49, count=2):
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-4)


# --- the maximum of the features, as published -----------------------------------------------------------------


def test_features_fusion_gives_training_every_scale_and_the_maximum():
    model, images = tiny_ppnet(), images_of()
    outputs = outputs_at_scales(model, images, SCALES, "features")
    assert [tuple(o.logits.shape[2:]) for o in outputs] == [(5, 7), (3, 4), (9, 13), (5, 7)]
    for b, image in enumerate(images.double().numpy()):
        for output, features in zip(outputs, every_scale(model, image), strict=True):
            _, distances, logits = classified(model, features)
            close(output.distances[b], distances)
            close(output.logits[b], logits)


def test_the_maximum_is_of_the_features_and_not_of_the_logits():
    model, images = tiny_ppnet(), images_of()
    by_features, by_logits = (outputs_at_scales(model, images, SCALES, how)[-1] for how in ("features", "logits"))
    assert not torch.allclose(by_features.logits, by_logits.logits, atol=0.1) and by_logits.distances is None


def test_features_fusion_labels_every_pixel():
    model, images = tiny_ppnet(), images_of(30, 44)
    found = Inference(model, CPU, scales=SCALES, fusion="features").logits(images)
    assert found.shape == (2, 3, 30, 44)
    for b, image in enumerate(images.double().numpy()):
        _, _, logits = classified(model, every_scale(model, padded(image))[-1])
        close(found[b], resized(logits, 33, 49)[:, :30, :44])


def test_the_twin_has_the_same_maximum_either_way():
    model, images = LinearNet(EveryEighthPixel(), 5).eval(), images_of(30, 44)
    expected = [every_scale(model, padded(image))[-1] for image in images.double().numpy()]
    for fusion in ("features", "logits"):
        inference = Inference(model, CPU, scales=SCALES, fusion=fusion)
        for b in range(2):
            close(inference.output(images).logits[b], expected[b])


def trained(fusion, **weights):
    config = tiny_config("model.msc_scales=[0.5, 2.0]", f"model.msc_fusion={fusion}", "model.num_classes=3")
    losses = dataclasses.replace(config.training.loss_weights, **weights)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, loss_weights=losses))
    model = tiny_ppnet()
    module = TrainingModule(config, model, CPU)
    module.begin_phase(1)
    return module


@pytest.mark.parametrize("fusion", ["features", "logits"])
def test_losses_are_means_over_every_scale_and_the_maximum(workdir, fusion):
    """cross-entropy over all, the diversity loss over those that have distances: with features the maximum, too."""
    module, images = trained(fusion), images_of()
    labels = torch.randint(0, 3, (2, 33, 49), generator=torch.Generator().manual_seed(2))
    model = module.model
    outputs = outputs_at_scales(model, images, SCALES, fusion)
    cells = [Grid().labels(labels, output.logits.shape[2:]) for output in outputs]
    pairs = list(zip(outputs, cells, strict=True))
    entropies = [cross_entropy(output.logits, at) for output, at in pairs]
    diversities = [
        diversity_loss(output.distances, at, model.prototype_class)
        for output, at in pairs
        if fusion == "features" or output is not outputs[-1]
    ]
    module.training_step(images, labels)
    found = module.take_averages()
    assert found["cross_entropy"] == pytest.approx(float(sum(map(quotient, entropies)).detach()) / 4, rel=1e-5)
    assert found["diversity"] == pytest.approx(
        float(sum(map(quotient, diversities)).detach()) / len(diversities), rel=1e-5
    )
    assert len(diversities) == (4 if fusion == "features" else 3)


def quotient(loss):
    return getattr(loss, "value", loss)


def test_gradients_flow_through_the_maximum_alone():
    model, images = tiny_ppnet().double(), images_of().double()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    weight = model.features.project.weight

    def loss():
        return outputs_at_scales(model, images, SCALES, "features")[-1].logits.square().mean()

    loss().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        for index in ((0, 0, 0, 0), (3, 2, 0, 0)):
            before, values = float(weight[index]), []
            for step in (1e-6, -1e-6):
                weight[index] = before + step
                values.append(float(loss()))
            weight[index] = before
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(weight.grad[index]), rel=1e-4)


def test_push_and_neighbours_are_those_of_the_maximum():
    model, data = tiny_ppnet(), RandomImages(5)
    inference = Inference(model, CPU, scales=SCALES, fusion="features")
    found = find_neighbours(inference, data, 3)
    for p, expected in enumerate(nearest_cells(model, data, 3, own_class=False)):
        distances, images, rows, columns, labels, vectors = zip(*expected, strict=True)
        close(found.distance[p], distances)
        assert found.image[p].tolist() == list(images) and found.label[p].tolist() == list(labels)
        assert found.cell[p].tolist() == [list(cell) for cell in zip(rows, columns, strict=True)]
        close(found.vector[p], np.stack(vectors))
    own = nearest_cells(model, data, 1, own_class=True)
    for record in push_prototypes(inference, data).records:
        [(distance, image, row, column, _, vector)] = own[record["merged"][0]]
        assert {own[p][0][1:4] for p in record["merged"]} == {(image, row, column)}
        assert (record["image_index"], record["cell"]) == (image, [row, column])
        assert record["distance"] == pytest.approx(distance, rel=1e-4)
        close(model.prototype_vectors[record["prototype"], :, 0, 0], vector)
        at_the_patch = inference.features(data.items[image][0][None])[0, :, row, column]
        assert torch.equal(model.prototype_vectors[record["prototype"], :, 0, 0], at_the_patch)


def test_with_logits_fusion_push_looks_at_the_images_own_scale():
    data = RandomImages(4)
    pushed = [tiny_ppnet() for _ in range(2)]
    for model, scales in zip(pushed, ((), SCALES), strict=True):
        push_prototypes(Inference(model, CPU, scales=scales), data)
    assert torch.equal(pushed[0].prototype_vectors, pushed[1].prototype_vectors)


@pytest.mark.parametrize("fusion", ["features", "logits"])
def test_what_is_explained_adds_up(fusion):
    inference = Inference(tiny_ppnet(), CPU, scales=SCALES, fusion=fusion).explainable()
    output = inference.output(images_of())
    torch.testing.assert_close(inference.ppnet.contributions(output.distances).sum(2), output.logits)
    assert torch.equal(output.distances, inference.distances(images_of()))


# --- precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["log", "linear"])
def test_a_network_in_float64_stays_there(activation):
    model, images = tiny_ppnet(prototype_activation_function=activation), images_of()
    single = model(images)
    assert (single.logits.dtype, single.distances.dtype) == (torch.float32, torch.float32)
    double = model.double()(images.double())
    assert (double.logits.dtype, double.distances.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(double.logits.float(), single.logits, rtol=1e-4, atol=1e-4)
    for b, image in enumerate(images.double().numpy()):
        np.testing.assert_allclose(
            double.distances[b].detach(), classified(model, features_of(model, image))[1], atol=1e-12
        )
    assert model.contributions(double.distances).dtype == torch.float64
    assert model.predict(images.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_network_of_fewer_bits_has_its_prototype_layer_in_float32(kind):
    model = tiny_ppnet().to(kind)
    output = model(images_of().to(kind))
    assert (output.logits.dtype, output.distances.dtype) == (torch.float32, torch.float32)


def test_the_twin_keeps_float64_and_never_less_than_float32():
    model, images = LinearNet(EveryEighthPixel(), 5), images_of()
    assert model(images).logits.dtype == torch.float32
    assert model.to(torch.bfloat16)(images.bfloat16()).logits.dtype == torch.float32
    assert model.double()(images.double()).logits.dtype == torch.float64


def test_bfloat16_is_for_the_features_alone():
    inference = Inference(tiny_ppnet(), CPU, precision="bfloat16")
    assert inference.is_bfloat16 and not Inference(tiny_ppnet(), CPU).is_bfloat16
    images = images_of()
    output = inference.output(images)
    assert inference.features(images).dtype == output.distances.dtype == output.logits.dtype == torch.float32
    assert torch.equal(output.distances, inference.distances(images))
    exact = Inference(inference.model, CPU).output(images)
    assert not torch.equal(output.distances, exact.distances)
    torch.testing.assert_close(output.distances, exact.distances, atol=0.1, rtol=0.1)


# --- one object for everybody ----------------------------------------------------------------------------------


def test_all_ways_to_ask_agree():
    inference, images = Inference(tiny_ppnet(), CPU), images_of(30, 44)
    logits = inference.logits(images)
    torch.testing.assert_close(logits, inference.model.predict(images))
    assert torch.equal(inference.label(images), logits.argmax(1))
    output = inference.output(images)
    assert torch.equal(inference.upsample(output.logits, (30, 44)), logits)
    assert torch.equal(output.distances, inference.distances(images))


def test_asking_leaves_a_model_in_evaluation_mode_and_differentiates_nothing():
    model = tiny_ppnet()
    inference = Inference(model.train(), CPU)
    assert not inference.logits(images_of()).requires_grad and not model.training


def test_validation_counts_what_is_labelled():
    inference, data = Inference(tiny_ppnet(), CPU), RandomImages(3)
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for image, label in data.items:
        for true, found in zip(label.flatten().tolist(), inference.label(image[None]).flatten().tolist(), strict=True):
            if true != IGNORE:
                expected[true, found] += 1
    assert torch.equal(inference.validate(data).counts, expected)


def test_the_twin_says_that_it_has_no_distances():
    inference = Inference(LinearNet(EveryEighthPixel(), 5), CPU)
    assert inference.output(images_of()).distances is None
    for ask in (inference.distances, inference.features):
        with pytest.raises(TypeError, match="LinearNet has no prototypes"):
            ask(images_of())
    with pytest.raises(TypeError, match="LinearNet has no prototypes"):
        find_neighbours(inference, RandomImages(2))


# --- a checkpoint's model --------------------------------------------------------------------------------------


def saved(path, *overrides):
    config = tiny_config(*overrides)
    model = construct_PPNet(config.model)
    save_checkpoint(path, Checkpoint(config_to_dict(config), "joint", 1, 5, dict(model.state_dict())))
    return model


def test_a_checkpoint_opens_with_its_scales_and_what_the_user_changed(workdir):
    model = saved("a.pth", "model.msc_scales=[0.5]", "model.msc_fusion=features")
    opened = open_model("a.pth")
    assert (opened.inference.scales, opened.inference.fusion) == ((0.5,), "features")
    assert not opened.model.training and all(
        torch.equal(value, model.state_dict()[name]) for name, value in opened.model.state_dict().items()
    )
    changed = open_model("a.pth", ["model.msc_scales=[]", "model.msc_fusion=logits", "system.precision=bfloat16"])
    assert (changed.inference.scales, changed.inference.fusion, changed.inference.precision) == (
        (),
        "logits",
        "bfloat16",
    )
    assert changed.config.model.msc_scales == () and changed.checkpoint.stage == "joint"
    with pytest.raises(ConfigError, match="only msc_scales and msc_fusion"):
        open_model("a.pth", ["model.distance_scale=0.5"])


def test_training_and_a_file_label_alike(workdir):
    model = saved("a.pth", "model.msc_scales=[0.5]")
    config = tiny_config("model.msc_scales=[0.5]")
    data = build_dataset(config, "val")
    ours = inference_of(config, model, CPU).validate(data)
    assert torch.equal(ours.counts, open_model("a.pth").inference.validate(data).counts)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: s["prototype_class"].fill_(3), r"prototype_class is not within 0\.\.2"),
        (lambda s: s["prototype_class"].fill_(-1), r"prototype_class is not within 0\.\.2"),
        (lambda s: s.update(prototype_class=torch.tensor(6)), r"prototype_class has shape \[\], want \[6\]"),
        (lambda s: s.update(prototype_class=torch.zeros(2, 3).long()), r"prototype_class has shape \[2, 3\]"),
        (lambda s: s.update(prototype_class=torch.arange(9) // 3), r"prototype_class has shape \[9\], want \[6\]"),
        (lambda s: s.update(prototype_class=torch.arange(3)), r"last_layer.weight has shape \[3, 6\], want \[3, 3\]"),
        (lambda s: s["prototype_vectors"].fill_(torch.inf), "prototype_vectors is not finite float32"),
        (
            lambda s: s.update(prototype_vectors=s["prototype_vectors"].double()),
            "prototype_vectors is not finite float32",
        ),
        (lambda s: s.pop("prototype_class"), "prototype_class is missing"),
        (
            lambda s: [s.update({f"x{i}": torch.zeros(1)}) for i in range(5)],
            "x0 is unknown; x1 is unknown; x2 is unknown and 2 more",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(harm, message):
    model = tiny_ppnet(seed=1)
    state, before = ({name: v.clone() for name, v in tiny_ppnet(seed=n).state_dict().items()} for n in (2, 1))
    harm(state)
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_fewer_prototypes_are_taken_over():
    pruned, model = tiny_ppnet(seed=2), tiny_ppnet(seed=1)
    pruned.keep_prototypes(torch.tensor([5, 0, 2]))
    load_weights(model, pruned.state_dict())
    assert model.prototype_class.tolist() == [2, 0, 1] and model.last_layer.weight.shape == (3, 3)
    assert torch.equal(model.predict(images_of()), pruned.predict(images_of()))


# --- parameter groups ------------------------------------------------------------------------------------------


class WithMore(EveryEighthPixel):
    """Features with a parameter that nobody has heard of."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(5, 1, 1))

    def forward(self, images):
        return super().forward(images) * self.gate


class WithHead(PPNet):
    """A network with a parameter that it gives to no group."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.temperature = nn.Parameter(torch.ones(()))


def test_parameters_of_features_are_backbone_unless_they_say_otherwise():
    model = PPNet(WithMore(), (6, 5, 1, 1), 3)
    names = {group: [name for name, _ in members] for group, members in model.parameter_groups().items()}
    assert names == {
        "backbone": ["features.gate", "features.project.weight", "features.project.bias"],
        "add_on": [], "prototypes": ["prototype_vectors"], "last_layer": ["last_layer.weight"],
    }  # fmt: skip


def test_a_parameter_that_is_in_no_group_ends_the_phase_before_it_begins(workdir):
    config = tiny_config("model.num_classes=3")
    model = WithHead(WithMore(), (6, 5, 1, 1), 3)
    with pytest.raises(UserError, match="the parameter temperature is in no group"):
        TrainingModule(config, model, CPU).begin_phase(0)
    assert TrainingModule(config, PPNet(WithMore(), (6, 5, 1, 1), 3), CPU).begin_phase(1) is not None
