"""The dilated ResNets against torchvision's own, and the ways to start from pretrained weights."""

import urllib.error

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet

from deeplab_features import ASPP, BACKBONES, DeepLabFeatures, _download
from runtime.checkpoint import CheckpointError

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
        _download(Unreachable())
    for part in (Unreachable.url, "no route to host", str(tmp_path / "checkpoints"), "model.pretrained=none"):
        assert part in str(caught.value)


def test_aspp_is_the_sum_of_four_dilated_convolutions():
    torch.manual_seed(0)
    aspp, x = ASPP(3, 2), torch.randn(1, 3, 60, 60)
    nn.init.normal_(aspp.branches[1].bias)
    expected = sum(
        F.conv2d(x, branch.weight, branch.bias, padding=rate, dilation=rate)
        for branch, rate in zip(aspp.branches, (6, 12, 18, 24), strict=True)
    )
    torch.testing.assert_close(aspp(x), expected)
    assert all(branch.weight.shape == (2, 3, 3, 3) for branch in aspp.branches)
