"""The configuration: one YAML file as frozen, checked dataclasses.

Every default lives in this file and nowhere else; `config.yaml` repeats them with their meaning, and a test
holds the two together. `load_config(path, overrides)` reads a file, applies `--set section.key=value`, and
either returns a `Config` that is complete and consistent or raises one `ConfigError` that lists every problem.

Length units: `steps` are batches, `*_every` are steps, sizes are pixels, learning rates are Adam's.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from grid import IGNORE, OUTPUT_STRIDE
from runtime.errors import ConfigError

MAX_CROP = 4097  # pixels
MOST = {"system.num_workers": 1024, "dataset.shapes.image_size": MAX_CROP, "model.num_classes": IGNORE}
GROUPS = ("backbone", "add_on", "prototypes", "last_layer")


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    train_images: int = 240
    val_images: int = 40
    image_size: int = 129


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    name: str = "cityscapes"  # one of dataset.DATASETS
    root: str = "data/cityscapes"
    train_split: str = "train"
    val_split: str = "val"
    crop_size: int = 513
    scale_range: tuple[float, float] = (0.5, 1.5)
    flip: bool = True
    cache: Literal["none", "disk"] = "none"
    shapes: ShapesConfig = field(default_factory=ShapesConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    num_classes: int = 19
    backbone: str = "resnet101"  # one of deeplab_features.BACKBONES
    pretrained: str = "imagenet"
    freeze_bn: bool | Literal["auto"] = "auto"
    head: Literal["prototype", "linear"] = "prototype"
    prototype_shape: tuple[int, int, int, int] = (190, 64, 1, 1)
    prototype_activation_function: Literal["log", "linear"] = "log"
    add_on_layers_type: Literal["deeplab_simple", "bottleneck"] = "deeplab_simple"
    distance_scale: float = 1.0
    msc_scales: tuple[float, ...] = ()

    @property
    def bn_is_frozen(self) -> bool:
        """Whether batch norm keeps statistics and affine: `auto` means where they are pretrained."""
        return self.pretrained != "none" if self.freeze_bn == "auto" else self.freeze_bn


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    cross_entropy: float = 1.0
    l1: float = 1e-4
    diversity: float = 0.25
    purity: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """A learning rate for each parameter group; a group without one is frozen."""

    backbone: float | None = None
    add_on: float | None = None
    prototypes: float | None = None
    last_layer: float | None = None

    @property
    def trained(self) -> dict[str, float]:
        """The groups that have a learning rate, in the order of `GROUPS`."""
        return {group: getattr(self, group) for group in GROUPS if getattr(self, group) is not None}


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    name: str
    steps: int
    lr: LearningRates
    schedule: Literal["constant", "poly"] = "constant"
    push: bool = False
    early_stopping: int = 0
    sparse: bool = False


def _published_phases() -> tuple[PhaseConfig, ...]:
    warmup = LearningRates(add_on=2.5e-4, prototypes=2.5e-4, last_layer=2.5e-4)
    joint = LearningRates(backbone=2.5e-5, add_on=2.5e-4, prototypes=2.5e-4, last_layer=2.5e-4)
    return (
        PhaseConfig(name="warmup", steps=15_000, lr=warmup),
        PhaseConfig(name="joint", steps=150_000, lr=joint, schedule="poly", push=True),
        PhaseConfig(name="finetune", steps=10_000, lr=LearningRates(last_layer=1e-5), early_stopping=5),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    seed: int = 0
    batch_size: int = 2
    iter_size: int = 5
    weight_decay: float = 5e-4
    poly_power: float = 0.9
    loss_weights: LossWeights = field(default_factory=LossWeights)
    class_weights: tuple[float, ...] = ()
    log_every: int = 50
    val_every: int = 2_000
    checkpoint_every: int = 1_000
    phases: tuple[PhaseConfig, ...] = field(default_factory=_published_phases)


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    device: str = "auto"
    num_workers: int = 4
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    timeout: float = 300.0


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    model_dir: str = "models"
    results_dir: str = "results"


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


def load_config(path: str | Path = "config.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides applied.

    Values of overrides are YAML; list items go by index (`training.phases.0.steps=12`).
    Raises ConfigError, with every problem found and where it stands.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        known = ", ".join(["config.yaml", *sorted(str(p) for p in Path("configs").glob("*.yaml"))])
        raise ConfigError(f"{path}: cannot read this configuration ({reason}); there are: {known}") from None
    raw, lines = parse_yaml(text, str(path))
    config = config_from_dict(raw, lambda key: f"{path}:{lines.get(key, 1)}")
    return override_config(config, overrides) if overrides else config


def override_config(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A configuration with `section.key=value` overrides applied, as in `load_config`. Raises ConfigError."""
    raw = config_to_dict(config)
    for override in overrides:
        _apply(raw, override)
    return config_from_dict(raw, lambda key: "--set")


def config_from_dict(raw: object, where=lambda key: "config") -> Config:
    """A checked `Config` from plain mappings, lists and scalars (what YAML and checkpoints hold).

    where: names the place of a dotted key for messages, e.g. `config.yaml:12`. Raises ConfigError.
    """
    problems: list[tuple[str, str]] = []
    config = _build(Config, {} if raw is None else raw, "", problems)
    if not problems:
        problems = list(_inconsistencies(config))
    if problems:
        raise ConfigError("\n".join(f"{where(key)}: {key or 'the file'}: {message}" for key, message in problems))
    return config


def config_to_dict(config: Config) -> dict:
    """The configuration as plain mappings, lists and scalars: what goes into YAML files and checkpoints."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


# --- YAML ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases: a few hundred bytes of them expand to gigabytes, and no config needs any."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


# YAML 1.1 reads `1e-4` as a string; everybody who types it means a number.
_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, name: str = "config") -> tuple[object, dict[str, int]]:
    """Plain values of a YAML text and the line of each dotted key. Raises ConfigError."""
    lines: dict[str, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else _plain(loader, node, "", lines)), lines
    # A scalar with a wrong tag raises whatever its constructor happens to meet.
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{name}{line}: not valid YAML: {reason}") from None


def _plain(loader: _Loader, node: yaml.Node, path: str, lines: dict[str, int]):
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, _join(path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    values: dict = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in values:
            raise yaml.composer.ComposerError(None, None, f"'{key}' stands here twice", key_node.start_mark)
        values[key] = _plain(loader, value_node, _join(path, key), lines)
        lines[_join(path, key)] = key_node.start_mark.line + 1
    return values


def _apply(raw: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {override}: want section.key=value, for example training.batch_size=4")
    value, _ = parse_yaml(text, f"--set {key}")
    target: object = raw
    *parents, last = key.split(".")
    try:
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target[part]
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    except (KeyError, ValueError, IndexError, TypeError):
        raise ConfigError(f"--set {override}: there is no '{key}' in the configuration") from None


# --- types -----------------------------------------------------------------------------------------------------


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _build(kind, raw, path: str, problems: list[tuple[str, str]]):
    """`raw` as `kind`; what does not fit is appended to `problems`, and None comes back."""
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, raw, path, problems)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        open_ended = arguments[-1] is Ellipsis
        if isinstance(raw, (list, tuple)) and (open_ended or len(raw) == len(arguments)):
            kinds = arguments[:1] * len(raw) if open_ended else arguments
            return tuple(
                _build(k, v, _join(path, i), problems) for i, (k, v) in enumerate(zip(kinds, raw, strict=True))
            )
    elif origin in (typing.Union, types.UnionType):
        for candidate in arguments:
            attempt: list = []
            value = _build(candidate, raw, path, attempt)
            if not attempt:
                return value
    elif origin is Literal:
        if isinstance(raw, str) and raw in arguments:
            return raw
    elif kind is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        if abs(raw) <= 1e300:  # false for nan and infinity, too
            return float(raw)
    elif type(raw) is kind:
        return raw
    elif kind is type(None) and raw is None:
        return None
    problems.append((path, f"want {_describe(kind)}, got {_shorten(raw)}"))
    return None


def _build_dataclass(kind, raw, path: str, problems: list[tuple[str, str]]):
    if not isinstance(raw, dict):
        problems.append((path, f"want a section with keys, got {_shorten(raw)}"))
        return None
    hints = typing.get_type_hints(kind)
    for key in raw.keys() - hints.keys():
        near = difflib.get_close_matches(str(key), hints, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known are {', '.join(hints)}"
        problems.append((_join(path, key), f"unknown key; {hint}"))
    for f in dataclasses.fields(kind):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in raw:
            problems.append((path, f"'{f.name}' is missing ({_describe(hints[f.name])})"))
    before = len(problems)
    values = {k: _build(hints[k], v, _join(path, k), problems) for k, v in raw.items() if k in hints}
    if before != len(problems) or any(p.startswith(path) for p, _ in problems):
        return None
    return kind(**values)


def _describe(kind) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is tuple:
        count = "any number" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"a list of {count} ({_describe(arguments[0])})"
    names = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a section with keys")


def _shorten(raw: object) -> str:
    if isinstance(raw, int) and abs(raw) > 1e300:  # Python refuses to write out the largest
        return "a number of hundreds of digits"
    text = repr(raw) if not isinstance(raw, (dict, list)) else f"a {'section' if isinstance(raw, dict) else 'list'}"
    return text if len(text) <= 60 else text[:57] + "..."


# --- values ----------------------------------------------------------------------------------------------------


def _inconsistencies(config: Config) -> typing.Iterator[tuple[str, str]]:
    """Every value that no run can use, as (dotted key, message)."""
    data, model, training, system = config.dataset, config.model, config.training, config.system
    for key, value, least in (
        ("dataset.shapes.train_images", data.shapes.train_images, 1),
        ("dataset.shapes.val_images", data.shapes.val_images, 1),
        ("dataset.shapes.image_size", data.shapes.image_size, 33),
        ("model.num_classes", model.num_classes, 2),
        ("training.seed", training.seed, 0),
        ("training.batch_size", training.batch_size, 1),
        ("training.iter_size", training.iter_size, 1),
        ("training.log_every", training.log_every, 1),
        ("training.val_every", training.val_every, 1),
        ("training.checkpoint_every", training.checkpoint_every, 1),
        ("training.weight_decay", training.weight_decay, 0),
        ("training.poly_power", training.poly_power, 0),
        ("training.loss_weights.cross_entropy", training.loss_weights.cross_entropy, 0),
        ("training.loss_weights.l1", training.loss_weights.l1, 0),
        ("training.loss_weights.diversity", training.loss_weights.diversity, 0),
        ("training.loss_weights.purity", training.loss_weights.purity, 0),
        ("system.num_workers", system.num_workers, 0),
        ("system.timeout", system.timeout, 1),
    ):
        if not least <= value <= MOST.get(key, 10**9):
            most = f" and at most {MOST.get(key, 10**9):,}" if value > least else ""
            yield key, f"want at least {least}{most}, got {_shorten(value)}"
    if model.num_classes > IGNORE:
        yield "model.num_classes", f"labels are 8 bit and {IGNORE} means ignore: want at most {IGNORE}"
    yield from _size_problems(data, model)
    yield from _prototype_problems(model)
    weights = training.class_weights
    if weights and (len(weights) != model.num_classes or min(weights) < 0 or max(weights) <= 0):
        yield "training.class_weights", f"want {model.num_classes} weights of at least 0, or none, got {list(weights)}"
    yield from _phase_problems(training)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", system.device):
        yield "system.device", f"want auto, cpu, mps, cuda or cuda:N, got {system.device!r}"
    for key, value in (("model_dir", config.paths.model_dir), ("results_dir", config.paths.results_dir)):
        if not value or "\0" in value:
            yield f"paths.{key}", "want the path of a folder"


def _size_problems(data: DatasetConfig, model: ModelConfig) -> typing.Iterator[tuple[str, str]]:
    if data.crop_size % OUTPUT_STRIDE != 1 or data.crop_size < 33:
        near = max(33, round((data.crop_size - 1) / OUTPUT_STRIDE) * OUTPUT_STRIDE + 1)
        reason = f"so that every {OUTPUT_STRIDE}th pixel is the centre of a feature cell"
        yield "dataset.crop_size", f"want a multiple of {OUTPUT_STRIDE} plus 1 and at least 33, {reason}: {near}"
    elif data.crop_size > MAX_CROP:
        yield "dataset.crop_size", f"want at most {MAX_CROP}, got {_shorten(data.crop_size)}"
    low, high = data.scale_range
    if not 0.05 <= low <= high <= 20:
        yield "dataset.scale_range", f"want 0.05 <= low <= high <= 20, got {list(data.scale_range)}"
    if not all(0.1 <= scale <= 4 for scale in model.msc_scales):
        yield "model.msc_scales", f"want scales between 0.1 and 4, got {list(model.msc_scales)}"


def _prototype_problems(model: ModelConfig) -> typing.Iterator[tuple[str, str]]:
    count, depth, *patch = model.prototype_shape
    if patch != [1, 1]:
        yield "model.prototype_shape", f"prototypes are single feature cells: want [P, D, 1, 1], got {patch} at the end"
    if not 1 <= count <= 10**6 or not 1 <= depth <= 10**4:
        reason = "want 1 to a million prototypes of depth 1 to 10,000"
        yield "model.prototype_shape", f"{reason}, got {_shorten(count)}, {_shorten(depth)}"
    elif count % model.num_classes:
        per_class = max(1, round(count / model.num_classes))
        yield (
            "model.prototype_shape",
            f"{count} prototypes cannot be shared evenly by {model.num_classes} classes:"
            f" want a multiple, for example {per_class * model.num_classes}",
        )
    if model.distance_scale <= 0:
        yield "model.distance_scale", f"want more than 0, got {model.distance_scale}"


def _phase_problems(training: TrainingConfig) -> typing.Iterator[tuple[str, str]]:
    if not training.phases:
        yield "training.phases", "want at least one phase"
    taken = {"push", "pruned", "final", "last", "best"}
    for i, phase in enumerate(training.phases):
        key = f"training.phases.{i}"
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", phase.name) or phase.name in taken:
            yield f"{key}.name", f"want a new name in small letters, not {', '.join(sorted(taken))}: {phase.name!r}"
        taken.add(phase.name)
        if not 1 <= phase.steps <= 10**9:
            yield f"{key}.steps", f"want at least 1 and at most {10**9:,}, got {_shorten(phase.steps)}"
        if phase.early_stopping < 0:
            yield f"{key}.early_stopping", "want 0 (never) or a number of validations without a better mIoU"
        if phase.sparse and (phase.lr.last_layer is None or phase.early_stopping):
            reason = "early stopping would bring the denser weights back"
            yield f"{key}.sparse", f"wants a learning rate for last_layer and early_stopping: 0; {reason}"
        if not phase.lr.trained:
            yield f"{key}.lr", f"nothing is trained: give at least one of {', '.join(GROUPS)} a learning rate"
        for group, rate in phase.lr.trained.items():
            if not 0 < rate <= 1:
                yield f"{key}.lr.{group}", f"want a learning rate in (0, 1], or null to freeze, got {rate}"
