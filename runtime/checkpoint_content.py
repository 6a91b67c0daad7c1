"""What a checkpoint may say: types, ranges, shapes, and whether its parts agree, checked once when a file is read.

Everything may come from a stranger. A tensor is dense, finite, of a plain type and no larger than what the file holds
of it; a number is in its range; a name is text. P prototypes, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor

KINDS = {
    "config": dict, "stage": str, "phase": int, "step": int, "model": dict, "prototypes": list, "metrics": dict,
    "class_names": list, "palette": list, "file_ids": list, "provenance": dict,
}  # fmt: skip
NEEDED = ("config", "model", "phase", "step")
MIDWAY = {"optimizer": dict, "gradients": dict, "sums": Tensor, "batches": int, "progress": dict, "processes": int}
PROGRESS = {
    "reported": int, "stale": int, "val_miou": float, "best_miou": float, "phase_best": float, "best_weights": dict,
}  # fmt: skip
PLACE = ("image_index", "split", "cell", "pixel", "distance")  # of a record: what only a patch that was found has
FLOATS = {torch.float32, torch.float64, torch.float16, torch.bfloat16}
DTYPES = FLOATS | {torch.int64, torch.int32, torch.uint8, torch.bool}
MOST = 10**9  # of anything that is counted


class WrongContent(Exception):
    """What a file says cannot be: why, in a line."""


def check_content(content: dict) -> None:
    """Raise WrongContent unless `content`, the flat dict of a file, is a checkpoint with parts that agree."""
    missing = sorted(key for key in NEEDED if key not in content)
    _need(not missing, f"incomplete, without {', '.join(missing)}")
    _check_kinds(content, KINDS, "")
    _need(_is_plain(content["config"]), "config holds more than plain data")
    stage = content.get("stage", "")
    _need(_is_text(stage) and len(stage.splitlines()) <= 1, "stage is not a line of text")
    for key in ("phase", "step"):
        _need(_is_count(content[key]), f"{key} is {_shown(content[key])}, want 0 to {MOST:,}")
    model = content["model"]
    _check_tensors(model, "model")
    for name, value in model.items():
        counts_or_variances = name.endswith(("running_var", "num_batches_tracked"))
        _need(not counts_or_variances or bool((value >= 0).all()), f"model: {name} is negative")
    _check_classes(content, _check_prototypes(model))
    if records := content.get("prototypes"):
        _check_records(records, model.get("prototype_class"), content.get("class_names"))
    for key, value in content.get("metrics", {}).items():
        _need(type(key) is str and _is_number(value, nan=True), f"metrics: {_shown(key)} is {_shown(value)}")
        _need(key != "val_miou" or not value < 0 and not value > 1, f"metrics: val_miou is {value}, want 0 to 1")
    for key, value in content.get("provenance", {}).items():
        _need(type(key) is str and type(value) is str, "provenance is not text")
    if "optimizer" in content:
        _check_midway(content)


# --- the model -------------------------------------------------------------------------------------------------


def _check_tensors(tensors: dict, what: str, like: dict | None = None) -> None:
    """like: tensors of the same names, which these have to resemble."""
    for name, value in tensors.items():
        is_name = type(name) is str and name.isprintable() and len(name) <= 300
        _need(is_name, f"{what}: it is no mapping of names: its weights do not fit any model")
        _check_tensor(value, f"{what}: {name}")
        if like is not None:
            _need(name in like, f"{what}: {name} is unknown")
            fits = value.shape == like[name].shape and value.dtype == like[name].dtype
            _need(fits, f"{what}: {name} has another shape or type than in the model")


def _check_tensor(value: Any, name: str) -> None:
    _need(type(value) is Tensor, f"{name} is a {type(value).__name__}, want a tensor")
    is_dense = value.layout == torch.strided and value.device.type == "cpu"
    is_plain = is_dense and value.dtype in DTYPES and not (value.is_quantized or value.is_nested or value.requires_grad)
    _need(is_plain, f"{name} is no dense tensor of plain numbers")
    held = value.untyped_storage().nbytes()  # a stride of 0 makes terabytes out of a number
    _need(value.numel() * value.element_size() <= held, f"{name} claims to be larger than what the file holds of it")
    _need(bool(torch.isfinite(value).all()), f"{name} is not finite")


def _check_prototypes(model: dict[str, Tensor]) -> int | None:
    """The number of classes, if the model has prototypes."""
    names = ("prototype_vectors", "prototype_class", "last_layer.weight")
    if not any(name in model for name in names):
        return None
    missing = [name for name in names if name not in model]
    _need(not missing, f"model: {', '.join(missing)} is missing")
    vectors, classes, last = (model[name] for name in names)
    is_cells = vectors.dim() == 4 and vectors.shape[2:] == (1, 1) and vectors.dtype in FLOATS
    _need(is_cells, f"model: prototype_vectors has shape {list(vectors.shape)}, want [P, D, 1, 1] of floats")
    _need(classes.dim() == 1 and classes.dtype == torch.int64, "model: prototype_class is no list of whole numbers")
    _need(last.dim() == 2 and last.dtype in FLOATS, "model: last_layer.weight has another shape than [C, P] of floats")
    counts = len(vectors), len(classes), last.shape[1]
    agree = counts[0] >= 1 and len(set(counts)) == 1
    _need(agree, "model: {} have the shapes of {}, {} and {} prototypes".format(", ".join(names), *counts))
    in_range = 0 <= int(classes.min()) and int(classes.max()) < len(last)
    _need(in_range, f"model: prototype_class is outside 0..{len(last) - 1}")
    return len(last)


def _check_classes(content: dict, classes: int | None) -> None:
    names, palette, ids = (content.get(key, []) for key in ("class_names", "palette", "file_ids"))
    _need(all(map(_is_text, names)), "class_names: a name is not text")
    is_palette = all(_is_list(color, 3) and all(_is_count(part, 255) for part in color) for color in palette)
    _need(is_palette, "palette: a color is not three numbers of 0..255")
    is_ids = all(_is_count(number, 255) for number in ids) and len(set(ids)) == len(ids)
    _need(is_ids, "file_ids: an id is no number of 0..255, or there twice")
    for key, found in (("class_names", len(names)), ("palette", len(palette)), ("file_ids", len(ids))):
        _need(found in (0, classes or found), f"{key} has {found} entries for {classes} classes")
        classes = found or classes


def _check_records(records: list, prototype_class: Tensor | None, names: list | None) -> None:
    classes = [] if prototype_class is None else prototype_class.tolist()
    _need(len(records) == len(classes), f"prototypes: {len(records)} records for {len(classes)} prototypes")
    for index, (record, class_index) in enumerate(zip(records, classes, strict=True)):
        _need(isinstance(record, dict) and _is_plain(record), f"prototypes: record {index} is no plain data")
        agrees = record.get("prototype") == index and record.get("class") == class_index
        agrees &= _is_count(record["prototype"]) and _is_count(record["class"]) if agrees else False
        _need(agrees, f"prototypes: record {index} is of another prototype or class")
        name = record.get("class_name")
        _need(_is_text(name) and (not names or name == names[class_index]), f"prototypes: class_name of record {index}")
        merged = record.get("merged")
        _need(_is_list(merged) and all(map(_is_count, merged)), f"prototypes: merged of record {index}")
        for key in _wrong_places(record):
            raise WrongContent(f"prototypes: {key} of record {index} is {_shown(record.get(key))}")


def _wrong_places(record: dict) -> Iterable[str]:
    """Which keys of a record cannot say where its patch is; a prototype whose class never occurs has no place."""
    box, picture = record.get("box"), record.get("picture")
    if record.get("image") is None:
        yield from (key for key in (*PLACE, "box", "picture") if record.get(key) is not None)
        return
    pixel: Any = record.get("pixel")
    size, distance = record.get("image_size"), record.get("distance")
    checks = {
        "image": type(record["image"]) is str,
        "image_index": _is_count(record.get("image_index")),
        "image_size": size is None or (_is_list(size, 2) and all(map(_is_count, size))),  # files of version 1 have none
        "split": _is_text(record.get("split")),
        "cell": _is_list(record.get("cell"), 2) and all(map(_is_count, record["cell"])),
        "pixel": _is_list(pixel, 2) and all(map(_is_count, pixel)),
        "distance": _is_number(distance) and distance >= 0,
        "box": box is None or (_is_list(box, 4) and all(map(_is_count, box))),
        "picture": picture is None or (_is_text(picture) and "/" not in picture),
    }
    yield from (key for key, is_right in checks.items() if not is_right)
    if all(checks.values()):
        (width, height), (x, y) = size or (MOST, MOST), pixel
        x0, y0, x1, y1 = box or (0, 0, width, height)
        if not (x < width and y < height):
            yield "pixel"
        if not (x0 < x1 <= width and y0 < y1 <= height):
            yield "box"


# --- midway ----------------------------------------------------------------------------------------------------


def _check_midway(content: dict) -> None:
    missing = [key for key in MIDWAY if key not in content and key != "processes"]
    _need(not missing, f"this checkpoint cannot be resumed exactly: without {', '.join(missing)}")
    _check_kinds(content, MIDWAY, "")
    step, model, gradients = content["step"], content["model"], content["gradients"]
    _check_tensors(gradients, "gradients", model)
    _check_adam(content["optimizer"], step)
    _need(step == 0 or gradients or content["optimizer"]["state"], "optimizer: neither moments nor gradients are there")
    sums = content["sums"]
    _check_tensor(sums, "sums")
    _need(sums.dim() == 1 and sums.dtype == torch.float64, "sums is no row of numbers of float64")
    _need(_is_count(content["batches"], step), f"batches is {content['batches']}, want 0 to {step}")
    processes = content.get("processes", 1)
    _need(_is_count(processes) and processes > 0, f"processes is {_shown(processes)}, want at least 1")
    _check_progress(content["progress"], step, model)


def _check_adam(optimizer: dict, step: int) -> None:
    """Refuse all but the state dict of a plain Adam with whatever moments it has at a step of its phase."""
    groups: Any = optimizer.get("param_groups")
    state: Any = optimizer.get("state")
    is_state = _is_list(groups) and isinstance(state, dict) and all(isinstance(group, dict) for group in groups)
    _need(bool(is_state) and len(optimizer) == 2, "optimizer is not the state of an optimizer")
    numbers = [number for group in groups for number in _listed(group.get("params"))]
    is_numbered = all(map(_is_count, numbers)) and numbers == list(range(len(numbers))) and numbers
    _need(bool(is_numbered), "optimizer: its parameters are not numbered")
    for group in groups:
        for key in _wrong_settings(group):
            raise WrongContent(f"optimizer: {key} is {_shown(group.get(key))}, not that of a plain Adam")
    for number, moments in state.items():
        _need(type(number) is int and number in range(len(numbers)), "optimizer: moments of an unknown parameter")
        is_adam = isinstance(moments, dict) and moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
        _need(is_adam, f"optimizer: parameter {number} has not the moments of a plain Adam")
        for key, value in moments.items():
            _check_tensor(value, f"optimizer: {key} of parameter {number}")
            _need(value.dtype in FLOATS, f"optimizer: {key} of parameter {number} is no floating-point number")
        updates, mean, square = moments["step"], moments["exp_avg"], moments["exp_avg_sq"]
        is_counted = updates.dim() == 0 and float(updates) % 1 == 0 and 1 <= float(updates) <= step
        _need(is_counted, f"optimizer: parameter {number} has another number of updates than 1 to {step}")
        fits = mean.shape == square.shape and bool((square >= 0).all())
        _need(fits, f"optimizer: the moments of parameter {number} have other shapes, or are negative")


def _wrong_settings(group: dict) -> Iterable[str]:
    betas = group.get("betas")
    checks = {
        "name": _is_text(group.get("name")),
        "lr": _is_number(group.get("lr")) and group["lr"] >= 0,  # of no meaning: a resume takes the configuration's
        "base_lr": _is_number(group.get("base_lr")) and group["base_lr"] >= 0,
        "weight_decay": _is_number(group.get("weight_decay")) and group["weight_decay"] >= 0,
        "eps": _is_number(group.get("eps")) and group["eps"] >= 0,
        "betas": (_is_list(betas, 2) or type(betas) is tuple and len(betas) == 2)
        and all(_is_number(beta) and 0 <= beta < 1 for beta in betas),
    }
    plain = ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay")
    checks |= {key: group.get(key) is False for key in plain if key in group}
    checks |= {key: group[key] in (None, True, False) for key in ("foreach", "fused") if key in group}
    yield from (key for key, is_right in checks.items() if not is_right)
    if not _is_plain({key: value for key, value in group.items() if key not in ("params", "betas")}):
        yield "a setting"


def _check_progress(progress: dict, step: int, model: dict[str, Tensor]) -> None:
    _check_kinds(progress, PROGRESS, "progress: ")
    for key, value in progress.items():
        kind = PROGRESS.get(key)
        if kind is dict:
            _check_tensors(value, f"progress: {key}", model)
        else:
            _need(type(key) is str and (_is_number(value, nan=key == "val_miou") or type(value) in (int, bool)),
                  f"progress: {_shown(key)} is {_shown(value)}")  # fmt: skip
        if kind is float:
            _need(not value < -1 and not value > 1, f"progress: {key} is {value}, want -1 to 1")
        if kind is int:
            _need(-1 <= value <= max(step, 0), f"progress: {key} is {_shown(value)}, want -1 to {step}")


# --- values ----------------------------------------------------------------------------------------------------


def _need(is_right: bool, reason: str) -> None:
    if not is_right:
        raise WrongContent(reason)


def _check_kinds(content: dict, kinds: dict[str, type], where: str) -> None:
    for key, kind in kinds.items():
        if key in content:
            value = content[key]
            is_kind = isinstance(value, kind) and not isinstance(value, bool)
            _need(is_kind, f"{where}{key} is a {type(value).__name__}, want {kind.__name__}")


def _is_plain(value: object) -> bool:
    """Whether it is a number, a text, or lists and mappings of such: what YAML and JSON hold."""
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, bool, float) or (type(value) is int and abs(value) < 2**63)


def _is_text(value: object) -> bool:
    """Whether it is text that can be written."""
    try:
        return type(value) is str and len(value.encode()) <= 10_000
    except UnicodeEncodeError:
        return False


def _is_count(value: object, most: int = MOST) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_number(value: object, nan: bool = False) -> TypeGuard[float]:
    return type(value) is float and (math.isfinite(value) or (nan and value != value))


def _is_list(value: object, length: int | None = None) -> TypeGuard[list]:
    return type(value) is list and length in (None, len(value))


def _listed(value: object) -> list:
    return value if type(value) is list else [None]


def _shown(value: object) -> str:
    """A value for a message, or only its type."""
    text = repr(value) if type(value) in (bool, float, str) or _is_count(value) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
