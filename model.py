"""The networks: `PPNet`, which labels every cell by its similarity to prototypes, and `LinearNet`, its black-box twin.

    image (B, 3, H, W) -> features -> add-on layers -> (B, D, h, w) -> squared distance to every prototype (B, P, h, w)
    -> activation -> last layer, no bias -> logits (B, C, h, w)

B images, C classes, P prototypes, D prototype depth, (h, w) feature grid, (H, W) image.
Source: Sacha et al., "ProtoSeg: Interpretable Semantic Segmentation with Prototypical Parts" (WACV 2023).

Geometry: which pixel a cell looks at is said by the features' grid (grid.py); for DeepLab-v2 cell (i, j) looks at pixel
(8i, 8j). Images are padded at the bottom and right so that the grid ends on the last pixel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from config import ModelConfig
from deeplab_features import DeepLabFeatures
from grid import Grid, grid_of
from runtime.errors import ConfigError

EPSILON = 1e-4  # of the log activation; the largest possible activation is log(1 / EPSILON) = 9.2


class PPNetOutput(NamedTuple):
    """What `forward` returns, at feature resolution: logits (B, C, h, w); squared distances (B, P, h, w) or None."""

    logits: Tensor
    distances: Tensor | None


class SegmentationNet(nn.Module):
    """What the two networks share: from logits on the feature grid to logits of every pixel, and batch norm's state.

    features: any module that maps (B, 3, H, W) to (B, D, h, w). Its attribute `grid` says which pixels its cells look
    at; without one, cell (i, j) is at pixel (s i, s j), with s its `output_stride`, 8 if it has none.
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features
        self.grid = grid_of(features)

    def train(self, mode: bool = True):
        """Training mode, except for batch norms whose affine is frozen: those keep their statistics, too."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, _BatchNorm) and layer.weight is not None and not layer.weight.requires_grad:
                layer.eval()
        return self

    def head(self, features: Tensor) -> PPNetOutput:
        """What follows the features (B, ., h, w): logits, and distances where there are prototypes."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> PPNetOutput:
        """(B, 3, H, W) -> logits (B, C, h, w) and squared distances (B, P, h, w) or None; see `at_least_float32`."""
        return self.head(self.features(images))

    def predict(self, images: Tensor) -> Tensor:
        """Logits of every pixel: (B, 3, H, W) of any size -> (B, C, H, W)."""
        height, width = images.shape[-2:]
        padded = self.grid.pad(images, 0.0)
        return self.grid.upsample(self(padded).logits, padded.shape[-2:])[..., :height, :width]

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """The parameters of each group that a phase can train, with their names in this model.

        Features may declare groups of their own in the same way; all parameters of others are `backbone`.
        """
        declared = getattr(self.features, "parameter_groups", None)
        groups = declared() if declared else {"backbone": list(self.features.named_parameters())}
        return {group: [(f"features.{name}", p) for name, p in members] for group, members in groups.items()}


class PPNet(SegmentationNet):
    """The prototype network.

    prototype_shape: (P, D, 1, 1), with P a multiple of num_classes; prototype p belongs to class p // (P / C).
    prototype_activation_function: "log" = log((d + 1) / (d + 1e-4)), in (0, 9.2]; "linear" = -d, in (-inf, 0].
    add_on_layers_type: "deeplab_simple" = sigmoid; "bottleneck" = 1x1 convolution, ReLU, 1x1 convolution, sigmoid.
    distance_scale: multiplies the squared distance before the activation.
    """

    prototype_class: Tensor

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

    def head(self, features: Tensor) -> PPNetOutput:
        """The add-on layers and the prototype layer: (B, ., h, w) -> logits (B, C, h, w), distances (B, P, h, w)."""
        return self.classify(self.add_on_layers(features))

    def classify(self, features: Tensor) -> PPNetOutput:
        """The prototype layer: features (B, D, h, w) -> logits and distances, in float32 also under autocast.

        Squared distances come from a cancellation that bfloat16's 8 bits of mantissa would not survive.
        """
        distances = self.distances(features)
        with torch.autocast(features.device.type, enabled=False):
            logits = self.class_logits(self.evidence(self.activations(distances)))
        return PPNetOutput(logits, distances)

    def distances(self, features: Tensor) -> Tensor:
        """Squared distance of every cell to every prototype: (B, D, h, w) -> (B, P, h, w), see `at_least_float32`."""
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            return squared_distances(features, self.prototype_vectors.to(features.dtype))

    def activations(self, distances: Tensor) -> Tensor:
        """Similarity to the prototypes from squared distances (any shape): the larger, the more alike."""
        distances = distances * self.distance_scale
        if self.prototype_activation_function == "linear":
            return -distances
        return torch.log((distances + 1) / (distances + EPSILON))

    def evidence(self, activations: Tensor) -> Tensor:
        """What the last layer sees, (B, U, h, w), of activations (B, P, h, w): the activations themselves."""
        return activations

    @property
    def unit_class(self) -> Tensor:
        """The class of each unit that the last layer sees, (U,) int64."""
        return self.prototype_class

    def class_logits(self, evidence: Tensor) -> Tensor:
        """The last layer: evidence (B, U, h, w) -> logits (B, C, h, w)."""
        return (self.last_layer.weight.to(evidence.dtype) @ evidence.flatten(2)).unflatten(2, evidence.shape[2:])

    def contributions(self, distances: Tensor) -> Tensor:
        """What each prototype adds to each class's logit: (B, P, h, w) -> (B, C, P, h, w).

        Their sum over P is `forward`'s logit at every cell; upsampling is linear, so that what `Grid.upsample` makes
        of them sums to `predict`'s logit at every pixel.
        """
        return self.last_layer.weight[..., None, None] * self.activations(distances)[:, None]

    def contributions_to(self, distances: Tensor, classes: Tensor) -> Tensor:
        """What each prototype adds to the logit of one class a cell: (B, P, h, w), (B, h, w) -> (B, P, h, w)."""
        return self.last_layer.weight[classes].movedim(-1, 1) * self.activations(distances)

    def contributions_of(self, distances: Tensor, prototypes: Tensor) -> Tensor:
        """What one prototype a cell adds to each class's logit: (B, P, h, w), (B, h, w) -> (B, C, h, w)."""
        activations = self.activations(distances.gather(1, prototypes[:, None]))
        return self.last_layer.weight.T[prototypes].movedim(-1, 1) * activations

    def parameter_groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Those of the features, the add-on layers with the features' own, the prototypes, and the last layer."""
        groups = super().parameter_groups()
        members = {name: parameter for name, parameter in self.named_parameters() if not name.startswith("features.")}
        add_on = [(name, parameter) for name, parameter in members.items() if name.startswith("add_on_layers.")]
        groups["add_on"] = groups.get("add_on", []) + add_on
        groups["prototypes"] = [("prototype_vectors", members["prototype_vectors"])]
        groups["last_layer"] = [("last_layer.weight", members["last_layer.weight"])]
        return groups

    @torch.no_grad()
    def project_prototypes(self, vectors: Tensor) -> None:
        """Replace every prototype: vectors (P, D) or (P, D, 1, 1)."""
        self.prototype_vectors.copy_(vectors.reshape_as(self.prototype_vectors))

    @torch.no_grad()
    def merge_prototypes(self, groups: list[list[int]]) -> None:
        """Keep the first prototype of each group, for all of its group: their weights are added, so no logit changes.

        groups: equal prototypes of one class each; every prototype is in one group.
        """
        weight = self.last_layer.weight
        for kept, *others in groups:
            weight[:, kept] += weight[:, others].sum(1)
        self.keep_prototypes(torch.tensor([group[0] for group in groups]))

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

    def head(self, features: Tensor) -> PPNetOutput:
        """Features (B, C, h, w) are the logits, in float32; None instead of distances."""
        return PPNetOutput(at_least_float32(features), None)


def construct_PPNet(config: ModelConfig, load_pretrained: bool = True) -> PPNet | LinearNet:
    """The network that a configuration asks for. load_pretrained: False where a checkpoint is loaded over it."""
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


def outputs_at_scales(
    model: SegmentationNet, images: Tensor, scales: tuple[float, ...], fusion: str = "logits"
) -> list[PPNetOutput]:
    """The outputs at the images' own scale, at each of `scales`, and last what is made of all of them.

    images (B, 3, H, W), padded to the grid. Without scales there is one output. Each scale has its own grid; the last
    output is on the first one. fusion: "logits" = the maximum of all logits, without distances; "features" = the
    network's output for the maximum of all features before the add-on layers, as in the published code.
    """
    features = features_at_scales(model, images, scales)
    outputs = [model.head(values) for values in features]
    if not scales:
        return outputs
    if fusion == "features":
        return [*outputs, model.head(highest(model.grid, features))]
    return [*outputs, PPNetOutput(highest(model.grid, [output.logits for output in outputs]), None)]


def features_at_scales(model: SegmentationNet, images: Tensor, scales: tuple[float, ...]) -> list[Tensor]:
    """The features of padded images (B, 3, H, W) at their own scale and at each of `scales`, each on its own grid."""
    sizes = [[model.grid.scaled(length, scale) for length in images.shape[-2:]] for scale in scales]
    return [model.features(images), *(model.features(model.grid.upsample(images, size)) for size in sizes)]


def highest(grid: Grid, values: list[Tensor]) -> Tensor:
    """The maximum of what several scales have at a place, on the grid of the first: (B, ., h, w) each."""
    if len(values) == 1:
        return values[0]
    return torch.stack([grid.upsample(value, values[0].shape[-2:]) for value in values]).amax(0)


def at_least_float32(values: Tensor) -> Tensor:
    """Values in float32, in which everything from the prototype layer on is computed; float64 stays float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _add_on_layers(kind: str, depth: int) -> nn.Sequential:
    if kind == "deeplab_simple":
        return nn.Sequential(nn.Sigmoid())
    return nn.Sequential(nn.Conv2d(depth, depth, 1), nn.ReLU(), nn.Conv2d(depth, depth, 1), nn.Sigmoid())


def _sliced(parameter: Tensor, indices: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.index_select(dim, indices), requires_grad=parameter.requires_grad)
