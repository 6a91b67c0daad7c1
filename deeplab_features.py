"""DeepLab-v2 features: a backbone with dense cells and atrous spatial pyramid pooling (ASPP).

    image (B, 3, H, W) -> backbone, output stride 8 where it can (B, C, h, w) -> ASPP (B, D, h, w)

Backbones are torchvision's ResNets and, as `timm/NAME`, timm's models.
Source: Chen et al., "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully
Connected CRFs" (TPAMI 2018), sections 3.1 and 3.2.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

from grid import Grid
from pretrained import load_pretrained
from runtime.errors import ConfigError, UserError

BACKBONES = {
    "resnet18": (resnet.resnet18, resnet.ResNet18_Weights.IMAGENET1K_V1),
    "resnet34": (resnet.resnet34, resnet.ResNet34_Weights.IMAGENET1K_V1),
    "resnet50": (resnet.resnet50, resnet.ResNet50_Weights.IMAGENET1K_V1),
    "resnet101": (resnet.resnet101, resnet.ResNet101_Weights.IMAGENET1K_V1),
    "resnet152": (resnet.resnet152, resnet.ResNet152_Weights.IMAGENET1K_V1),
}
ASPP_REACH = (48, 96, 144, 192)  # pixels from a cell to the outer taps; at stride 8 dilations of 6, 12, 18 and 24
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's: how images reach every backbone


class DeepLabFeatures(nn.Module):
    """Image to feature map: `backbone`, then `aspp`. `grid` says which pixel a cell looks at.

    (B, 3, H, W), normalized with ImageNet's mean and standard deviation -> (B, out_channels, h, w). Raises ConfigError
    for a backbone that is not known or whose cells look at no regular grid.
    """

    backbone: nn.Module
    grid: Grid

    def __init__(self, backbone: str = "resnet101", out_channels: int = 64, pretrained: str = "none"):
        super().__init__()
        if backbone.startswith("timm/"):
            self.backbone, published = TimmBackbone(backbone.removeprefix("timm/")), None
            channels, self.grid = self.backbone.channels, self.backbone.grid
        elif backbone in BACKBONES:
            build, published = BACKBONES[backbone]
            self.backbone, channels = _dilated_resnet(build)
            self.grid = Grid(8)
        else:
            known = ", ".join([*BACKBONES, "timm/NAME"])
            raise ConfigError(f"model.backbone: there is no backbone '{backbone}'; known are {known}")
        self.aspp = ASPP(channels, out_channels, [self.grid.steps(pixels) for pixels in ASPP_REACH])
        if pretrained != "none":
            load_pretrained(self.backbone, backbone, pretrained, published)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D, h, w)."""
        return self.aspp(self.backbone(images))

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The pretrained part, and the new one, which is trained from the warmup on."""
        members = list(self.named_parameters())
        return {
            "backbone": [(name, p) for name, p in members if name.startswith("backbone.")],
            "add_on": [(name, p) for name, p in members if name.startswith("aspp.")],
        }


class ASPP(nn.Module):
    """DeepLab-v2's ASPP: the sum of 3x3 convolutions of the same input with different dilations (cells); with bias."""

    def __init__(self, in_channels: int, out_channels: int, dilations: list[int]):
        super().__init__()
        branches = [nn.Conv2d(in_channels, out_channels, 3, padding=rate, dilation=rate) for rate in dilations]
        for branch in branches:
            nn.init.normal_(branch.weight, std=0.01)
            branch.bias = nn.Parameter(torch.zeros(out_channels))
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, D, h, w), C and D the channels in and out."""
        return sum(branch(x) for branch in self.branches)


def _dilated_resnet(build: Callable[..., resnet.ResNet]) -> tuple[nn.Sequential, int]:
    """torchvision's ResNet without its head, at output stride 8, and its number of channels."""
    network = build(weights=None)
    channels = network.fc.in_features
    layers = OrderedDict((n, m) for n, m in network.named_children() if n not in ("avgpool", "fc"))
    _stride_to_dilation(layers["layer3"], before=1, after=2)
    _stride_to_dilation(layers["layer4"], before=2, after=4)
    return nn.Sequential(layers), channels


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


# --- timm ------------------------------------------------------------------------------------------------------

# How models of timm's families are asked for dense cells at any image size; the first that a model takes is used.
TIMM_WAYS: tuple[dict, ...] = ({"output_stride": 8}, {"dynamic_img_size": True}, {"strict_img_size": False}, {})
CELLS = 9  # a side of the image on which a grid is measured
OFF_CENTRE = 0.125  # cells by which a measured centre may be off: position embeddings are not quite symmetric


class TimmBackbone(nn.Module):
    """The last feature map of a timm model: images (B, 3, H, W), normalized as ImageNet's, -> (B, channels, h, w).

    The model is dilated to stride 8 where its cells then lie on a grid, and keeps its own stride where not. Raises
    UserError where timm is not installed, ConfigError for a model that is unknown or has no regular grid.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, name: str):
        super().__init__()
        way, self.grid = _timm_grid(name)
        self.network = _timm_network(name, way)
        self.channels: int = _timm_info(self.network).channels()[-1]
        _speed_up_depthwise(self.network)
        mean, std = (torch.tensor(v) for v in _timm_normalization(name))
        shift, scale = (torch.tensor(MEAN) - mean) / std, torch.tensor(STD) / std
        self.is_imagenet = [*map(tuple, _timm_normalization(name))] == [MEAN, STD]
        self.register_buffer("shift", shift[:, None, None], persistent=False)
        self.register_buffer("scale", scale[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, channels, h, w)."""
        if not self.is_imagenet:
            images = images * self.scale + self.shift
        return _channels_first(self.network(images)[-1], self.channels)


def _timm_network(name: str, way: dict) -> nn.Module:
    return _timm().create_model(name, pretrained=False, features_only=True, out_indices=(-1,), **way)


def _timm_info(network: nn.Module) -> Any:
    """What a feature extractor says of its maps."""
    return network.feature_info


def _timm():
    try:
        import timm
    except ImportError:
        raise UserError("backbones of timm need the package timm: pip install timm") from None
    return timm


def _timm_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of RGB in 0..1, with which a model was pretrained; ImageNet's if it never was."""
    trained = _timm().get_pretrained_cfg(name, allow_unregistered=True)
    return (trained.mean, trained.std) if trained is not None else (MEAN, STD)


@cache
def _timm_grid(name: str) -> tuple[dict, Grid]:
    """How to ask for a model so that its cells lie on a grid, and that grid. Raises ConfigError, naming the model."""
    timm = _timm()
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), 3))
        raise ConfigError(f"model.backbone: timm has no model '{name}'{f'; near are {near}' if near else ''}")
    tried = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        for way in TIMM_WAYS:
            try:
                network = _timm_network(name, way)
            except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
                tried.append(str(error).strip().split("\n")[0][:100])
                continue
            grid = measured_grid(network)
            if grid is not None:
                return way, grid
            tried.append(f"{way or 'as it is'}: no cell of a regular grid looks at the middle of an image")
    raise ConfigError(f"model.backbone: timm/{name} cannot be used ({'; '.join(dict.fromkeys(tried))})")


def measured_grid(network: nn.Module) -> Grid | None:
    """The grid of a timm feature extractor, None if its cells look at none. The network's weights are lost.

    The middle cell of an odd number looks at the middle of the image where all padding is symmetric, and only there:
    so the centre of its receptive field tells whether an offset of 0, or that of patches, is right. With kernels that
    are the same everywhere, averages for maxima and an image of one colour, that centre is exact for convolutions.
    """
    info = _timm_info(network)
    stride, channels = info.reduction()[-1], info.channels()[-1]
    _make_even(network)
    for grid in (Grid(stride), Grid(stride, (stride - 1) / 2)):
        side = grid.length(CELLS)
        image = torch.randn(1, 3, 1, 1).expand(1, 3, side, side).clone().requires_grad_()
        try:
            cells = _channels_first(network.eval()(image)[-1], channels)
        except (AssertionError, RuntimeError, ValueError):  # the model takes no image of this size
            continue
        if cells.shape[-2:] != (CELLS, CELLS):
            continue
        middle = (cells[0, :, CELLS // 2, CELLS // 2] * torch.randn(channels)).sum()
        energy = torch.autograd.grad(middle, image)[0].square().sum((0, 1))
        places = torch.arange(side, dtype=energy.dtype)
        found = [float((energy.sum(dim) * places).sum() / energy.sum()) for dim in (0, 1)]
        if max(abs(grid.cell(place) - CELLS // 2) for place in found) <= OFF_CENTRE:
            return grid
    return None


@torch.no_grad()
def _make_even(network: nn.Module) -> None:
    """Replace what makes a receptive field lopsided without moving it: uneven kernels, and ties of a maximum."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Conv2d):
            layer.weight.copy_(layer.weight[:, :, :1, :1].expand_as(layer.weight))
        elif isinstance(layer, nn.MaxPool2d):
            average = nn.AvgPool2d(layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
            _replace(network, name, average)


def _replace(network: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer)


def _channels_first(values: Tensor, channels: int) -> Tensor:
    """(B, channels, h, w) of what some models return as (B, h, w, channels)."""
    return values if values.shape[1] == channels else values.permute(0, 3, 1, 2)


class InterleavedDepthwise(nn.Conv2d):
    """A dilated depthwise convolution that is fast on a CPU: the same sums in another order of the pixels.

    Cells that are `dilation` apart meet each other alone, so the image falls into dilation x dilation interleaved ones
    that are convolved without dilation. torch's own backward pass of the dilated form is many times slower there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        if x.is_cuda:
            return super().forward(x)
        d, (batch, channels, height, width) = self.dilation[0], x.shape
        x = F.pad(x, (0, -width % d, 0, -height % d))
        rows, columns = x.shape[2] // d, x.shape[3] // d
        x = x.view(batch, channels, rows, d, columns, d).permute(3, 5, 0, 1, 2, 4).flatten(0, 2)
        x = F.conv2d(x, self.weight, self.bias, padding=self.kernel_size[0] // 2, groups=self.groups)
        x = x.view(d, d, batch, channels, rows, columns).permute(2, 3, 4, 0, 5, 1)
        return x.reshape(batch, channels, rows * d, columns * d)[..., :height, :width]


def _speed_up_depthwise(network: nn.Module) -> None:
    """Give every dilated depthwise convolution that keeps its size the faster form; names and weights stay."""
    for name, conv in list(network.named_modules()):
        if type(conv) is not nn.Conv2d or conv.dilation[0] == 1 or conv.stride != (1, 1):
            continue
        kernel, dilation = conv.kernel_size[0], conv.dilation[0]
        square = conv.kernel_size == (kernel, kernel) and conv.dilation == (dilation, dilation) and kernel % 2
        padding = (dilation * (kernel // 2),) * 2
        keeps = conv.padding == padding and conv.padding_mode == "zeros"
        if square and keeps and conv.groups == conv.in_channels == conv.out_channels:
            faster = InterleavedDepthwise(
                conv.in_channels, conv.out_channels, kernel, padding=padding, dilation=dilation,
                groups=conv.groups, bias=conv.bias is not None,
            )  # fmt: skip
            faster.weight, faster.bias = conv.weight, conv.bias
            _replace(network, name, faster)
