"""The dilated ResNets against torchvision's own, and the ways to start from pretrained weights."""

import urllib.error

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

import deeplab_features
import pretrained
from deeplab_features import ASPP, BACKBONES, DeepLabFeatures, InterleavedDepthwise, measured_grid
from grid import Grid
from runtime.checkpoint import CheckpointError
from runtime.errors import ConfigError

RESNETS = sorted(BACKBONES)


def torchvision_net(name: str, seed: int = 0) -> nn.Module:
    """torchvision's ResNet with random weights and random statistics that keep the signal's size."""
    torch.manual_seed(seed)
    network = getattr(resnet, name)(weights=None).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.normal_(layer.bias, std=0.2)
            layer.running_mean.normal_(std=0.2)
            layer.running_var.uniform_(0.5, 2.0)
    return network


def stem(network, images):
    """Up to layer2, where nothing is dilated."""
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2"):
        images = getattr(network, name)(images)
    return images


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """torchvision's ResNet-18 and the path of its state dict."""
    network = torchvision_net("resnet18")
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("name", RESNETS)
def test_the_output_stride_is_8(name):
    with torch.device("meta"):
        features = DeepLabFeatures(name, 64)
        for size, cells in ((65, 9), (129, 17), (513, 65)):
            assert features(torch.zeros(1, 3, size, size)).shape == (1, 64, cells, cells)


@torch.no_grad()
@pytest.mark.parametrize("name", RESNETS)
def test_a_pretrained_net_dilated_is_the_strided_net_on_a_finer_grid(name, tmp_path):
    strided = torchvision_net(name)
    torch.save(strided.state_dict(), tmp_path / "weights.pth")
    dilated = DeepLabFeatures(name, 4, pretrained=str(tmp_path / "weights.pth")).backbone.eval()
    images = torch.randn(1, 3, 65, 65, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stem(dilated, images), stem(strided, images))
    expected = strided.layer4(strided.layer3(stem(strided, images)))
    found = dilated(images)
    assert found.shape[2:] == (9, 9)
    torch.testing.assert_close(found[..., ::4, ::4], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_torchvisions_weights_arrive_unchanged(saved):
    network, path = saved
    loaded = DeepLabFeatures("resnet18", 4, pretrained=str(path)).backbone.state_dict()
    wanted = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: (
            {f"backbone.{key}": value for key, value in state.items()} | {"classifier.0.bias": torch.zeros(1)}
        ),
        lambda state: {"format": 1, "model": {f"features.backbone.{key}": value for key, value in state.items()}},
        lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["inside a segmentation model", "inside a checkpoint of this project", "of an old torch"],
)
def test_weights_are_found_wherever_they_are(saved, tmp_path, wrap):
    network, _ = saved
    torch.save(wrap(network.state_dict()), tmp_path / "weights.pth")
    loaded = DeepLabFeatures("resnet18", 4, pretrained=str(tmp_path / "weights.pth")).backbone.state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], network.state_dict()["layer4.1.conv2.weight"])
    assert torch.equal(loaded["bn1.running_var"], network.state_dict()["bn1.running_var"])


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
def test_weights_of_another_resnet_are_refused_by_name(saved, name):
    with pytest.raises(CheckpointError, match=rf"not {name}'s \(.*(missing|shape).* more\)"):
        DeepLabFeatures(name, 4, pretrained=str(saved[1]))


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "want a state dict"), ({"conv1.weight": "text"}, "want a state dict"), (nn.Linear(1, 1), "untrusted")],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=message):
        DeepLabFeatures("resnet18", 4, pretrained=str(tmp_path / "odd.pth"))


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.pth"):
        DeepLabFeatures("resnet18", 4, pretrained=str(tmp_path / "nowhere.pth"))


def test_coco_weights_are_for_resnet101_alone():
    with pytest.raises(CheckpointError, match="coco .* resnet101 only"):
        DeepLabFeatures("resnet50", 4, pretrained="coco")


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    class Unreachable:
        url = "https://example.org/resnet.pth"

        def get_state_dict(self, **how):
            raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError) as caught:
        pretrained._download(Unreachable())
    for part in (Unreachable.url, "no route to host", str(tmp_path / "checkpoints"), "model.pretrained=none"):
        assert part in str(caught.value)


def test_aspp_is_the_sum_of_four_dilated_convolutions():
    torch.manual_seed(0)
    aspp, x = ASPP(3, 2, [6, 12, 18, 24]), torch.randn(1, 3, 60, 60)
    nn.init.normal_(aspp.branches[1].bias)
    expected = sum(
        F.conv2d(x, branch.weight, branch.bias, padding=rate, dilation=rate)
        for branch, rate in zip(aspp.branches, (6, 12, 18, 24), strict=True)
    )
    torch.testing.assert_close(aspp(x), expected)
    assert all(branch.weight.shape == (2, 3, 3, 3) for branch in aspp.branches)


# --- timm ------------------------------------------------------------------------------------------------------

GRIDS = {
    "resnet18": Grid(8),
    "tf_efficientnet_lite0": Grid(8),
    "tf_efficientnet_lite2": Grid(8),
    "mobilenetv3_small_100": Grid(8),
    "convnext_tiny": Grid(32, 15.5),  # its dilated form looks between the cells
    "vit_tiny_patch16_224": Grid(16, 7.5),
    "vit_small_patch14_dinov2": Grid(14, 6.5),
    "swin_tiny_patch4_window7_224": Grid(32, 15.5),
}


def energy_of(features, image, row, column):
    """How strongly one cell depends on each pixel (H, W), over kernels seen the right way round and mirrored."""
    total = torch.zeros(image.shape[-2:])
    for _ in range(2):
        seen = image.clone().requires_grad_()
        cell = features.backbone(features.grid.pad(seen, 0.0))[0, :, row, column]
        weight = torch.randn(len(cell), generator=torch.Generator().manual_seed(1))
        energy = torch.autograd.grad((cell * weight).sum(), seen)[0].square().sum((0, 1))
        total += energy / energy.sum()
        with torch.no_grad():  # a random kernel is lopsided; its mirror image is so to the other side
            for parameter in features.backbone.parameters():
                if parameter.dim() == 4:
                    parameter.copy_(parameter.flip(2, 3))
    return total / 2


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("off", [(0, 0), (3, 6)])
def test_the_cells_of_timm_models_look_where_the_grid_says(name, off):
    """The impulse test with the real weights' randomness, at sizes that are no multiple of anything."""
    torch.manual_seed(0)
    features = DeepLabFeatures(f"timm/{name}", 8).eval()
    grid = features.grid
    assert grid == GRIDS[name]
    cells = (27, 25) if grid.stride == 8 else (9, 7)
    size = [grid.length(n) - cut for n, cut in zip(cells, off, strict=True)]
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert features(grid.pad(image, 0.0)).shape == (1, 8, *cells)
    energy = torch.zeros(image.shape[-2:])
    for seed in range(4):  # what is random is so to all sides
        torch.manual_seed(seed)
        features = DeepLabFeatures(f"timm/{name}", 8).eval()
        energy += energy_of(features, image, *(n // 2 for n in cells)) / 4
    places = [(energy.sum(dim) * torch.arange(n)).sum().item() for dim, n in ((1, size[0]), (0, size[1]))]
    wanted = [grid.stride * cell + grid.offset for cell in (n // 2 for n in cells)]
    assert all(abs(place - want) < 0.3 * grid.stride for place, want in zip(places, wanted, strict=True)), places


class Shifted(nn.Module):
    """A patch embedding after one column too many: no grid that is known."""

    class feature_info:
        reduction, channels = staticmethod(lambda: [8]), staticmethod(lambda: [4])

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 8, stride=8)

    def forward(self, images):
        return [self.embed(F.pad(images, (3, 0, 3, 0)))]


def test_cells_that_look_elsewhere_are_refused_by_name(monkeypatch):
    assert measured_grid(Shifted()) is None
    monkeypatch.setattr(deeplab_features, "_timm_network", lambda name, way: Shifted())
    deeplab_features._timm_grid.cache_clear()
    with pytest.raises(ConfigError, match="model.backbone: timm/vgg13 cannot be used .*regular grid"):
        DeepLabFeatures("timm/vgg13", 4)


def test_unknown_names_are_refused_with_near_ones():
    with pytest.raises(ConfigError, match="timm has no model 'resnet19'; near are .*resnet"):
        DeepLabFeatures("timm/resnet19", 4)
    with pytest.raises(ConfigError, match="no backbone 'resnet19'; known are resnet18.*timm/NAME"):
        DeepLabFeatures("resnet19", 4)


def test_timms_resnet_is_torchvisions(saved):
    _, path = saved
    ours, timms = (DeepLabFeatures(n, 4, pretrained=str(path)).eval() for n in ("resnet18", "timm/resnet18"))
    images = torch.randn(1, 3, 65, 81, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(timms.backbone(images), ours.backbone(images), rtol=0, atol=1e-6)


def test_a_normalization_of_its_own_is_taken_into_account():
    """Images come with ImageNet's mean and deviation; EfficientNet-Lite was trained with others."""
    features = DeepLabFeatures("timm/tf_efficientnet_lite0", 4).eval()
    rgb = torch.rand(1, 3, 65, 65, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (deeplab_features.MEAN, deeplab_features.STD))
    trained = timm.get_pretrained_cfg("tf_efficientnet_lite0")
    own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (trained.mean, trained.std))
    with torch.no_grad():
        expected = features.backbone.network((rgb - own_mean) / own_std)[-1]
        torch.testing.assert_close(features.backbone((rgb - mean) / std), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "dilation", "size"), [(3, 2, (9, 12)), (5, 4, (33, 37)), (5, 2, (1, 7)), (7, 3, (10, 10))]
)
def test_interleaved_depthwise_convolutions_are_the_dilated_ones(kernel, dilation, size):
    torch.manual_seed(0)
    padding = dilation * (kernel // 2)
    how = {"padding": padding, "dilation": dilation, "groups": 6, "dtype": torch.float64}
    fast, slow = InterleavedDepthwise(6, 6, kernel, **how), nn.Conv2d(6, 6, kernel, **how)
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    found, expected = fast(x), slow(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(found.square().sum(), [x, *fast.parameters()]),
        torch.autograd.grad(expected.square().sum(), [x, *slow.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_dilated_depthwise_convolutions_of_a_backbone_are_interleaved():
    network = DeepLabFeatures("timm/tf_efficientnet_lite0", 4).backbone.network
    dilated = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1]
    assert len(dilated) > 5 and all(isinstance(m, InterleavedDepthwise) for m in dilated)


def lite_package_state(seed=0):
    """An EfficientNet-Lite0 as its package names it: timm's tensors under the names of the first port."""
    torch.manual_seed(seed)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    flat, names = (
        {},
        {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"},
    )
    first = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    other = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    other |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    flat, places = {}, []
    for key, value in state.items():
        if key.startswith("blocks."):
            _, stage, number, layer, rest = key.split(".", 4)
            places += [(stage, number)] if (stage, number) not in places else []
            layers = first if places.index((stage, number)) == 0 else other
            flat[f"_blocks.{places.index((stage, number))}.{layers[layer]}.{rest}"] = value
        else:
            layer, _, rest = key.partition(".")
            flat[f"{names[layer]}.{rest}"] = value
    return flat, state


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.backbone.{key}": value for key, value in state.items()}, "epoch": 3},
        lambda state: {f"backbone.{key}": value for key, value in state.items()},
    ],
    ids=["plain", "several GPUs", "nested", "inside a segmentation model"],
)
def test_timm_weights_are_found_wherever_they_are(tmp_path, wrap, capsys):
    torch.manual_seed(3)
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(wrap(state), tmp_path / "weights.pth")
    loaded = DeepLabFeatures("timm/tf_efficientnet_lite0", 4, pretrained=str(tmp_path / "weights.pth")).backbone
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())
    said = capsys.readouterr().out
    assert "288 of 288 tensors loaded" in said and "left there: " in said and "classifier" in said + "classifier"


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_tiny_patch16_224"])
def test_safetensors_and_names_of_feature_extractors(tmp_path, name):
    from safetensors.torch import save_file

    torch.manual_seed(3)
    state = timm.create_model(name).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    loaded = DeepLabFeatures(f"timm/{name}", 4, pretrained=str(tmp_path / "weights.safetensors")).backbone
    sums = sorted(float(value.double().sum()) for value in loaded.network.state_dict().values())
    theirs = {float(value.double().sum()) for value in state.values()}
    assert all(value in theirs for value in sums)


def test_the_packages_weights_get_timms_names(tmp_path, monkeypatch):
    flat, state = lite_package_state()
    (tmp_path / "checkpoints").mkdir()
    torch.save(flat, tmp_path / "checkpoints" / "efficientnet-lite0-57934424.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loaded = DeepLabFeatures("timm/tf_efficientnet_lite0", 4, pretrained="imagenet").backbone.network.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


def test_weights_of_another_timm_model_are_refused_and_no_network_says_what_to_do(saved, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"not timm/tf_efficientnet_lite0's \(.*missing"):
        DeepLabFeatures("timm/tf_efficientnet_lite0", 4, pretrained=str(saved[1]))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(name, pretrained=False, **how):
        if pretrained:
            raise ConnectionError("no route to host")
        return create(name, **how)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        OSError, match="no route to host.*download_datasets.py weights efficientnet_lite0.*pretrained=none"
    ):
        DeepLabFeatures("timm/tf_efficientnet_lite0", 4, pretrained="imagenet")
