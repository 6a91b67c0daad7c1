"""DeepLab-v2 features: a dilated ResNet and atrous spatial pyramid pooling (ASPP).

    image (B, 3, H, W) -> ResNet, output stride 8 (B, 512 or 2048, h, w) -> ASPP (B, D, h, w)

Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and
Fully Connected CRFs" (TPAMI 2018), section 3.1 and 3.2. A new backbone is one more entry in `BACKBONES`.
"""

from __future__ import annotations

import urllib.error
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, resnet, segmentation

from runtime.checkpoint import CheckpointError, load_tensors

BACKBONES = {
    "resnet18": (resnet.resnet18, resnet.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": (resnet.resnet34, resnet.ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": (resnet.resnet50, resnet.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": (resnet.resnet101, resnet.ResNet101_Weights.IMAGENET1K_V1),
    "resnet152": (resnet.resnet152, resnet.ResNet152_Weights.IMAGENET1K_V1),
}
COCO_WEIGHTS = segmentation.DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
ASPP_DILATIONS = (6, 12, 18, 24)


class DeepLabFeatures(nn.Module):
    """Image to feature map: `backbone` (ResNet, output stride 8), then `aspp`.

    (B, 3, H, W), normalized with ImageNet's mean and standard deviation -> (B, out_channels, h, w) with
    h = (H - 1) // 8 + 1. Cell (i, j) is centred on pixel (8i, 8j).
    """

    output_stride = 8

    def __init__(self, backbone: str = "resnet101", out_channels: int = 64, pretrained: str = "none"):
        super().__init__()
        build, _ = BACKBONES[backbone]
        network = build(weights=None)
        channels = network.fc.in_features
        layers = OrderedDict((n, m) for n, m in network.named_children() if n not in ("avgpool", "fc"))
        _stride_to_dilation(layers["layer3"], before=1, after=2)
        _stride_to_dilation(layers["layer4"], before=2, after=4)
        self.backbone = nn.Sequential(layers)
        self.aspp = ASPP(channels, out_channels)
        if pretrained != "none":
            load_pretrained(self.backbone, backbone, pretrained)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w), cell (i, j) at pixel (8i, 8j)."""
        return self.aspp(self.backbone(images))


class ASPP(nn.Module):
    """DeepLab-v2's ASPP: the sum of four 3x3 convolutions of the same input, dilated 6, 12, 18, 24; with bias."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate) for rate in ASPP_DILATIONS
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, D, h, w), C and D the channels in and out."""
        return sum(branch(x) for branch in self.branches)


def _stride_to_dilation(stage: nn.Module, before: int, after: int) -> None:
    """Make a ResNet stage keep its resolution: the stride goes, and what follows it is dilated instead.

    The strided convolution itself still sees the finer grid, so it keeps the dilation `before`; with that, every
    `after`-th cell of the result is exactly what the strided stage computes.
    """
    rate = before
    for conv in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
        if conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (rate, rate)
            if conv.stride == (2, 2):
                rate = after
        conv.stride = (1, 1)


def load_pretrained(backbone: nn.Module, name: str, pretrained: str) -> None:
    """Load weights into a dilated ResNet: `imagenet`, `coco` (ResNet-101 only) or the path of a state dict.

    A path may hold torchvision's ResNet, the same inside a segmentation model (`backbone.` names), or a checkpoint
    of this project (its backbone alone is taken). Raises CheckpointError if it does not fit, OSError if a download
    fails.
    """
    if pretrained == "imagenet":
        state = _download(BACKBONES[name][1])
    elif pretrained == "coco":
        if name != "resnet101":
            raise CheckpointError(f"model.pretrained: coco is there for resnet101 only, not for {name}; use imagenet")
        state = _download(COCO_WEIGHTS)
    else:
        state = load_tensors(Path(pretrained))
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{pretrained}: want a state dict (names to tensors) for {name}")
    state = _strip(state)
    wanted = backbone.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or wrong:
        problem = f"{missing[0]} is missing" if missing else f"{wrong[0]} has another shape"
        raise CheckpointError(
            f"model.pretrained: {pretrained}: these weights are not {name}'s"
            f" ({problem}, and {len(missing) + len(wrong) - 1} more)"
        )
    backbone.load_state_dict({k: state.get(k, wanted[k]) for k in wanted})


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of a state dict, named as torchvision's ResNet names it."""
    for prefix in ("features.backbone.", "backbone."):
        if any(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _download(weights: WeightsEnum) -> dict[str, Tensor]:
    """torchvision's published weights, from its cache or the internet. Raises OSError with what to do instead."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = getattr(error, "reason", None) or error
        raise OSError(
            f"cannot get the pretrained weights from {weights.url} ({reason}). Put that file into {folder} by hand,"
            " or name a state dict in model.pretrained, or start from random weights: --set model.pretrained=none"
        ) from None
