"""The networks: `PPNet`, which labels every cell by its similarity to prototypes, and `LinearNet`, its black-box twin.

    image (B, 3, H, W) -> features -> add-on layers -> (B, D, h, w) -> squared distance to every prototype (B, P, h, w)
    -> activation -> last layer, no bias -> logits (B, C, h, w)

B images, C classes, P prototypes, D prototype depth, (h, w) feature grid, (H, W) image.
Source: Sacha et al., "ProtoSeg: Interpretable Semantic Segmentation with Prototypical Parts" (WACV 2023).

Geometry: cell (i, j) looks at pixel (8i, 8j). Images are padded at the bottom and right to 8k + 1 pixels, where the
grid ends exactly on the last pixel; labels are read at every 8th pixel; logits are upsampled with corners aligned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import ModelConfig
from deeplab_features import BACKBONES, DeepLabFeatures
from grid import IGNORE, OUTPUT_STRIDE
from runtime.errors import ConfigError

EPSILON = 1e-4  # of the log activation; the largest possible activation is log(1 / EPSILON) = 9.2


class PPNetOutput(NamedTuple):
    """What `forward` returns, at feature resolution: logits (B, C, h, w); squared distances (B, P, h, w) or None."""

    logits: Tensor
    distances: Tensor | None


class SegmentationNet(nn.Module):
    """What the two networks share: from logits on the feature grid to logits of every pixel, and batch norm's state.

    features: any module that maps (B, 3, H, W) to (B, D, h, w), with cell (i, j) at pixel (s i, s j); its attribute
    `output_stride` is s, 8 if it has none.
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features
        self.output_stride = getattr(features, "output_stride", OUTPUT_STRIDE)

    def train(self, mode: bool = True):
        """Training mode, except for batch norms whose affine is frozen: those keep their statistics, too."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm) and layer.weight is not None and not layer.weight.requires_grad:
                layer.eval()
        return self

    def predict(self, images: Tensor) -> Tensor:
        """Logits of every pixel: (B, 3, H, W) of any size -> (B, C, H, W)."""
        height, width = images.shape[-2:]
        padded = pad_to_grid(images, 0.0, self.output_stride)
        return upsample(self(padded).logits, padded.shape[-2:])[..., :height, :width]

    def predict_multi_scale(self, images: Tensor, scales: tuple[float, ...]) -> Tensor:
        """Like `predict`, with the pixel-wise maximum over the image's own scale and `scales`."""
        height, width = images.shape[-2:]
        padded = pad_to_grid(images, 0.0, self.output_stride)
        logits = multi_scale_outputs(self, padded, scales)[-1].logits
        return upsample(logits, padded.shape[-2:])[..., :height, :width]


class PPNet(SegmentationNet):
    """The prototype network.

    prototype_shape: (P, D, 1, 1), with P a multiple of num_classes; prototype p belongs to class p // (P / C).
    prototype_activation_function: "log" = log((d + 1) / (d + 1e-4)), in (0, 9.2]; "linear" = -d, in (-inf, 0].
    add_on_layers_type: "deeplab_simple" = sigmoid; "bottleneck" = 1x1 convolution, ReLU, 1x1 convolution, sigmoid.
    distance_scale: multiplies the squared distance before the activation.
    """

    def __init__(
        self,
        features: nn.Module,
        prototype_shape: tuple[int, int, int, int],
        num_classes: int,
        prototype_activation_function: str = "log",
        add_on_layers_type: str = "deeplab_simple",
        distance_scale: float = 1.0,
    ):
        super().__init__(features)
        count, depth = prototype_shape[:2]
        if count % num_classes or tuple(prototype_shape[2:]) != (1, 1):
            raise ConfigError(
                f"model.prototype_shape: want [P, D, 1, 1] with P a multiple of {num_classes} classes,"
                f" got {list(prototype_shape)}"
            )
        self.num_classes = num_classes
        self.prototype_activation_function = prototype_activation_function
        self.distance_scale = distance_scale
        self.add_on_layers = _add_on_layers(add_on_layers_type, depth)
        self.prototype_vectors = nn.Parameter(torch.rand(count, depth, 1, 1))
        self.last_layer = nn.Linear(count, num_classes, bias=False)
        self.register_buffer("prototype_class", torch.arange(count) // (count // num_classes))
        is_own = torch.arange(num_classes)[:, None] == self.prototype_class
        with torch.no_grad():
            self.last_layer.weight.copy_(torch.where(is_own, 1.0, -0.5))

    def conv_features(self, images: Tensor) -> Tensor:
        """What the prototypes are compared with: (B, 3, H, W) -> (B, D, h, w), in (0, 1)."""
        return self.add_on_layers(self.features(images))

    def forward(self, images: Tensor) -> PPNetOutput:
        """(B, 3, H, W) -> logits (B, C, h, w) and squared distances (B, P, h, w), both float32."""
        return self.classify(self.conv_features(images))

    def classify(self, features: Tensor) -> PPNetOutput:
        """The prototype layer: features (B, D, h, w) -> logits and distances, in float32 also under autocast.

        Squared distances come from a cancellation that bfloat16's 8 bits of mantissa would not survive.
        """
        with torch.autocast(features.device.type, enabled=False):
            distances = squared_distances(features.float(), self.prototype_vectors)
            activations = self.activations(distances)
            logits = (self.last_layer.weight @ activations.flatten(2)).unflatten(2, distances.shape[2:])
        return PPNetOutput(logits, distances)

    def activations(self, distances: Tensor) -> Tensor:
        """Similarity to the prototypes from squared distances (any shape): the larger, the more alike."""
        distances = distances * self.distance_scale
        if self.prototype_activation_function == "linear":
            return -distances
        return torch.log((distances + 1) / (distances + EPSILON))

    def contributions(self, distances: Tensor, classes: Tensor | None = None) -> Tensor:
        """What each prototype adds to each class's logit: (B, P, h, w) -> (B, C, P, h, w).

        classes (B, h, w): of one class at each cell, -> (B, P, h, w).

        Their sum over P is `forward`'s logit at every cell; upsampling is linear, so that what `upsample` makes of
        them sums to `predict`'s logit at every pixel.
        """
        if classes is not None:
            return self.last_layer.weight[classes].movedim(-1, 1) * self.activations(distances)
        return self.last_layer.weight[..., None, None] * self.activations(distances)[:, None]

    @torch.no_grad()
    def project_prototypes(self, vectors: Tensor) -> None:
        """Replace every prototype: vectors (P, D) or (P, D, 1, 1)."""
        self.prototype_vectors.copy_(vectors.reshape_as(self.prototype_vectors))

    @torch.no_grad()
    def keep_prototypes(self, indices: Tensor) -> None:
        """Drop all prototypes but `indices` (K,), and their columns of the last layer. Optimizers must be made anew."""
        indices = indices.to(self.prototype_class.device)
        self.prototype_vectors = _sliced(self.prototype_vectors, indices, 0)
        self.last_layer.weight = _sliced(self.last_layer.weight, indices, 1)
        self.last_layer.in_features = len(indices)
        self.prototype_class = self.prototype_class[indices]


class LinearNet(SegmentationNet):
    """The black-box twin: `features` maps straight to C channels, which are the logits. It has no prototypes."""

    def __init__(self, features: nn.Module, num_classes: int):
        super().__init__(features)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> PPNetOutput:
        """(B, 3, H, W) -> logits (B, C, h, w) float32, and None instead of distances."""
        return PPNetOutput(self.features(images).float(), None)


def construct_PPNet(config: ModelConfig, load_pretrained: bool = True) -> PPNet | LinearNet:
    """The network that a configuration asks for. load_pretrained: False where a checkpoint is loaded over it."""
    if config.backbone not in BACKBONES:
        known = ", ".join(BACKBONES)
        raise ConfigError(f"model.backbone: there is no backbone '{config.backbone}'; known are {known}")
    is_linear = config.head == "linear"
    features = DeepLabFeatures(
        config.backbone,
        out_channels=config.num_classes if is_linear else config.prototype_shape[1],
        pretrained=config.pretrained if load_pretrained else "none",
    )
    if is_linear:
        return LinearNet(features, config.num_classes)
    return PPNet(
        features,
        config.prototype_shape,
        config.num_classes,
        config.prototype_activation_function,
        config.add_on_layers_type,
        config.distance_scale,
    )


def squared_distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Squared L2 distance of every cell to every prototype: (B, D, h, w), (P, D, 1, 1) -> (B, P, h, w), at least 0.

    |z|^2 - 2 z.p + |p|^2, with both measured from 0.5: features lie in (0, 1), and the shorter the vectors, the
    fewer digits the cancellation costs.
    """
    cells = features.flatten(2) - 0.5  # (B, D, N)
    vectors = prototypes.flatten(1) - 0.5  # (P, D)
    products = vectors @ cells
    distances = cells.square().sum(1, keepdim=True) - 2 * products + vectors.square().sum(1)[:, None]
    return distances.clamp(min=0).unflatten(2, features.shape[2:])


def multi_scale_outputs(model: SegmentationNet, images: Tensor, scales: tuple[float, ...]) -> list[PPNetOutput]:
    """The outputs at the images' own scale, at each of `scales`, and last the maximum of all logits.

    images (B, 3, 8k+1, 8l+1). Each scale has its own grid; the maximum is on the first one and has no distances.
    """
    outputs = [model(images)]
    for scale in scales:
        size = [max(1, round((n - 1) * scale / OUTPUT_STRIDE)) * OUTPUT_STRIDE + 1 for n in images.shape[-2:]]
        outputs.append(model(upsample(images, size)))
    grid = outputs[0].logits.shape[-2:]
    logits = torch.stack([upsample(output.logits, grid) for output in outputs]).amax(0)
    return [*outputs, PPNetOutput(logits, None)]


def upsample(values: Tensor, size: tuple[int, int] | list[int] | torch.Size) -> Tensor:
    """Bilinear, first cell on the first pixel and last on the last: the geometry of stride-8 convolutions."""
    return F.interpolate(values, size=tuple(size), mode="bilinear", align_corners=True)


def pad_to_grid(values: Tensor, fill: float, stride: int = OUTPUT_STRIDE) -> Tensor:
    """Pad (..., H, W) at the bottom and right to a multiple of the stride plus 1, so that a cell ends each side."""
    height, width = values.shape[-2:]
    return F.pad(values, (0, (1 - width) % stride, 0, (1 - height) % stride), value=fill)


def cell_labels(labels: Tensor, grid: tuple[int, int] | torch.Size, stride: int = OUTPUT_STRIDE) -> Tensor:
    """The label of every cell, read at the pixel that it looks at: (B, H, W) -> (B, h, w).

    grid: (h, w) of the features. Where the grid is that of the image (of any size), this is every 8th pixel; a grid
    of a resized image reads the nearest pixel of the same place.
    """
    padded = pad_to_grid(labels, IGNORE, stride)
    rows, columns = (
        torch.linspace(0, length - 1, cells, device=labels.device, dtype=torch.float64).round().long()
        for length, cells in zip(padded.shape[-2:], grid, strict=True)
    )
    return padded[:, rows[:, None], columns]


def _add_on_layers(kind: str, depth: int) -> nn.Sequential:
    if kind == "deeplab_simple":
        return nn.Sequential(nn.Sigmoid())
    return nn.Sequential(nn.Conv2d(depth, depth, 1), nn.ReLU(), nn.Conv2d(depth, depth, 1), nn.Sigmoid())


def _sliced(parameter: nn.Parameter, indices: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(dim, indices), requires_grad=parameter.requires_grad)
