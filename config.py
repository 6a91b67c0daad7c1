"""The configuration: one YAML file as frozen, checked dataclasses.

Every default lives in this file and nowhere else; `config.yaml` repeats them with their meaning, and a test
holds the two together. `load_config(path, overrides)` reads a file, applies `--set section.key=value`, and
either returns a `Config` that is complete and consistent or raises one `ConfigError` that lists every problem.

Length units: `steps` are batches, `*_every` are steps, sizes are pixels, learning rates are Adam's.
"""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from grid import IGNORE, Grid
from runtime.checkpoint import Checkpoint, CheckpointError
from runtime.errors import ConfigError
from runtime.typed_yaml import at_least, between, build, field_type, matching, parse_argument, parse_yaml

MAX_CROP = 4097  # pixels
GRID = Grid()  # of DeepLab-v2; other grids pad what this one takes whole
MAX_FILE = 10**6  # bytes of a configuration
NOT_A_PHASE = ("best", "final", "last", "pruned", "push")  # their files are called otherwise

# --- rules of single settings ----------------------------------------------------------------------------------


def path_name(value: str) -> str:
    """The rule of a path: `~` at its start is a home folder."""
    if not value.startswith("~"):
        return value
    user = value.partition("/")[0]
    whole = os.path.expanduser(value)
    if whole.startswith("~") or (user == "~" and not os.environ.get("HOME")):
        raise ValueError(f"want a path; there is no home folder for {user} here, give the whole path")
    return whole


def split_name(value: str) -> str:
    """The rule of a split: it is put into paths, and must not lead out of the data set's folder."""
    if set("/\\") & set(value) or ".." in value or value == ".":
        raise ValueError("want the name of a split, without a path separator or '..'")
    return value


def _crop_size(value: int) -> int:
    if value < 33 or not GRID.fits(value):
        near = max(33, GRID.scaled(value, 1.0))
        reason = f"so that every {GRID.stride}th pixel is the centre of a feature cell"
        raise ValueError(f"want a multiple of {GRID.stride} plus 1 and at least 33, {reason}: for example {near}")
    return between(33, MAX_CROP)(value)


def _scale_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0.05 <= value[0] <= value[1] <= 20:
        raise ValueError("want 0.05 <= low <= high <= 20")
    return value


def _prototype_shape(value: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    count, depth, *patch = value
    if patch != [1, 1]:
        raise ValueError(f"prototypes are single feature cells: want [P, D, 1, 1], got {patch} at the end")
    if not 1 <= count <= 10**6 or not 1 <= depth <= 10**4:
        raise ValueError("want 1 to a million prototypes of depth 1 to 10,000")
    return value


def _phase_name(value: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", value) or value in NOT_A_PHASE:
        raise ValueError(f"want a new name in small letters, not {', '.join(NOT_A_PHASE)}")
    return value


def _rate(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError("want a learning rate in (0, 1], or null to freeze")
    return value


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError("want more than 0")
    return value


Count = Annotated[int, at_least(1)]
Weight = Annotated[float, at_least(0)]
Rate = Annotated[float, _rate]
PathName = Annotated[str, path_name]
SplitName = Annotated[str, split_name]

# --- the settings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    train_images: Count = 240
    val_images: Count = 40
    image_size: Annotated[int, between(33, MAX_CROP)] = 129


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    name: str = "cityscapes"  # one of dataset.DATASETS
    root: PathName = "data/cityscapes"
    train_split: SplitName = "train"
    val_split: SplitName = "val"
    crop_size: Annotated[int, _crop_size] = 513
    scale_range: Annotated[tuple[float, float], _scale_range] = (0.5, 1.5)
    flip: bool = True
    cache: Literal["none", "disk"] = "none"
    shapes: ShapesConfig = field(default_factory=ShapesConfig)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    num_classes: Annotated[int, between(2, IGNORE)] = 19  # labels are 8 bit
    backbone: str = "resnet101"  # one of deeplab_features.BACKBONES
    pretrained: PathName = "imagenet"
    freeze_bn: bool | Literal["auto"] = "auto"
    head: Literal["prototype", "linear"] = "prototype"
    prototype_shape: Annotated[tuple[int, int, int, int], _prototype_shape] = (190, 64, 1, 1)
    prototype_activation_function: Literal["log", "linear"] = "log"
    add_on_layers_type: Literal["deeplab_simple", "bottleneck"] = "deeplab_simple"
    distance_scale: Annotated[float, _positive] = 1.0
    msc_scales: tuple[Annotated[float, between(0.1, 4)], ...] = ()
    msc_fusion: Literal["logits", "features"] = "logits"

    @property
    def bn_is_frozen(self) -> bool:
        """Whether batch norm keeps statistics and affine: `auto` means where they are pretrained."""
        return self.pretrained != "none" if self.freeze_bn == "auto" else self.freeze_bn

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        count, classes = self.prototype_shape[0], self.num_classes
        if count % classes:
            example = max(1, round(count / classes)) * classes
            reason = f"{count} prototypes cannot be shared evenly by {classes} classes"
            yield "prototype_shape", f"{reason}: want a multiple, for example {example}"


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    cross_entropy: Weight = 1.0
    l1: Weight = 1e-4
    diversity: Weight = 0.25
    purity: Weight = 0.0


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """A learning rate for each parameter group; a group without one is frozen."""

    backbone: Rate | None = None
    add_on: Rate | None = None
    prototypes: Rate | None = None
    last_layer: Rate | None = None

    @property
    def trained(self) -> dict[str, float]:
        """The groups that have a learning rate, in the order of `GROUPS`."""
        return {group: getattr(self, group) for group in GROUPS if getattr(self, group) is not None}

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        if not self.trained:
            yield "", f"nothing is trained: give at least one of {', '.join(GROUPS)} a learning rate"


GROUPS = tuple(f.name for f in dataclasses.fields(LearningRates))  # of parameters, as the model declares them


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    name: Annotated[str, _phase_name]
    steps: Count
    lr: LearningRates
    schedule: Literal["constant", "poly"] = "constant"
    push: bool = False
    early_stopping: Annotated[int, at_least(0)] = 0
    sparse: bool = False

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        if self.sparse and (self.lr.last_layer is None or self.early_stopping):
            reason = "early stopping would bring the denser weights back"
            yield "sparse", f"wants a learning rate for last_layer and early_stopping: 0; {reason}"


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
    seed: Annotated[int, at_least(0)] = 0
    batch_size: Count = 2
    iter_size: Count = 5
    weight_decay: Weight = 5e-4
    poly_power: Weight = 0.9
    loss_weights: LossWeights = field(default_factory=LossWeights)
    class_weights: tuple[float, ...] = ()
    log_every: Count = 50
    val_every: Count = 2_000
    checkpoint_every: Count = 1_000
    phases: tuple[PhaseConfig, ...] = field(default_factory=_published_phases)

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        names = [phase.name for phase in self.phases]
        if not names:
            yield "phases", "want at least one phase"
        for i, name in enumerate(names):
            if name in names[:i]:
                yield f"phases.{i}.name", f"want a new name, {name!r} is phase {names.index(name)}"


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    device: Annotated[str, matching("auto|cpu|mps|cuda(:[0-9]{1,2})?", "auto, cpu, mps, cuda or cuda:N")] = "auto"
    num_workers: Annotated[int, between(0, 1024)] = 4
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False
    timeout: Annotated[float, at_least(1)] = 300.0


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    model_dir: PathName = "models"
    results_dir: PathName = "results"


@dataclass(frozen=True, kw_only=True)
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    system: SystemConfig = field(default_factory=SystemConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def problems(self) -> Iterator[tuple[str, str]]:
        """What does not fit together."""
        weights, classes = self.training.class_weights, self.model.num_classes
        if weights and (len(weights) != classes or min(weights) < 0 or max(weights) <= 0):
            want = f"want {classes} weights of at least 0, or none"
            yield "training.class_weights", f"{want}, got {list(weights)}"


# --- reading and changing --------------------------------------------------------------------------------------


def load_config(path: str | Path = "config.yaml", overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides applied.

    Values of overrides are YAML, but a text field takes what stands after `=` as it is; list items go by index
    (`training.phases.0.steps=12`). Raises ConfigError, with every problem found and where it stands.
    """
    raw, lines = parse_yaml(_read(Path(path)), str(path))

    def where(key: str) -> str:
        while key and key not in lines:  # a default, or a key that is missing: its section
            key = key.rpartition(".")[0]
        return f"{path}:{lines.get(key, 1)}"

    config = config_from_dict(raw, where)
    return override_config(config, overrides) if overrides else config


def _read(path: Path) -> str:
    """The text of a configuration; whatever is no file, and could be waited for, is not opened."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            reason = "it is a directory" if stat.S_ISDIR(about.st_mode) else "it is no file"
        elif about.st_size > MAX_FILE:
            reason = f"{about.st_size:,} bytes are more than a configuration has"
        else:
            return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        reason = "it is not UTF-8 text"
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
    known = ", ".join(["config.yaml", *sorted(str(p) for p in Path("configs").glob("*.yaml"))])
    raise ConfigError(f"{path}: cannot read this configuration ({reason}); there are: {known}")


def override_config(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """A configuration with `section.key=value` overrides applied, as in `load_config`. Raises ConfigError."""
    raw = config_to_dict(config)
    for override in overrides:
        _apply(raw, override)
    return config_from_dict(raw, lambda key: "--set")


def _apply(raw: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"--set {override}: want section.key=value, for example training.batch_size=4")
    keys = key.split(".")
    value = parse_argument(text, field_type(Config, keys), f"--set {key}")
    target: Any = raw
    try:
        for part in keys[:-1]:
            target = target[int(part) if isinstance(target, list) else part]
        target[int(keys[-1]) if isinstance(target, list) else keys[-1]] = value
    except (KeyError, ValueError, IndexError, TypeError):
        raise ConfigError(f"--set {override}: there is no '{key}' in the configuration") from None


def config_from_dict(raw: object, where: Callable[[str], str] = lambda key: "config") -> Config:
    """A checked `Config` from plain mappings, lists and scalars (what YAML and checkpoints hold).

    where: names the place of a dotted key for messages, e.g. `config.yaml:12`. Raises ConfigError.
    """
    config, problems = build(Config, {} if raw is None else raw)
    if problems:
        raise ConfigError("\n".join(f"{where(key)}: {key or 'the file'}: {message}" for key, message in problems))
    return config


def config_of(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was made with, but for where things are written: those are the defaults.

    A file may come from a stranger: it may say which data are read, never what is written, emptied or cached where.
    Raises CheckpointError if it cannot be used, or if the checkpoint is not one of such a run.
    """
    raw = {section: values for section, values in checkpoint.config.items() if section != "paths"}
    if isinstance(raw.get("dataset"), dict):
        raw["dataset"] = {key: value for key, value in raw["dataset"].items() if key != "cache"}
    try:
        config = config_from_dict(raw)
    except ConfigError as error:
        reasons = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{checkpoint.origin}: its configuration cannot be used: {reasons}") from None
    for problem in _disagreements(config, checkpoint):
        raise CheckpointError(f"{checkpoint.origin}: {problem}")
    return config


def _disagreements(config: Config, checkpoint: Checkpoint) -> Iterator[str]:
    """In what a checkpoint is not one of a run with its configuration."""
    classes, phases = config.model.num_classes, config.training.phases
    if len(checkpoint.class_names) not in (0, classes):
        yield f"it names {len(checkpoint.class_names)} classes, its model has {classes}"
    if checkpoint.phase >= len(phases) or checkpoint.step > phases[checkpoint.phase].steps:
        yield f"phase {checkpoint.phase}, step {checkpoint.step} is not in its configuration"
    updates = checkpoint.step // config.training.iter_size
    if checkpoint.midway and updates and not checkpoint.midway.optimizer["state"]:
        yield f"its optimizer has no moments, after {updates} updates"


def config_to_dict(config: Config) -> dict:
    """The configuration as plain mappings, lists and scalars: what goes into YAML files and checkpoints."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def config_arguments(config: Config, path: str | None, overrides: list[str]) -> list[str]:
    """The options that give this configuration in whatever folder: `path` and `overrides`, every path made absolute."""
    absolute = {
        "dataset.root": config.dataset.root,
        "paths.model_dir": config.paths.model_dir,
        "paths.results_dir": config.paths.results_dir,
    }
    if config.model.pretrained not in ("imagenet", "coco", "none"):
        absolute["model.pretrained"] = config.model.pretrained
    kept = [override for override in overrides if override.partition("=")[0].strip() not in absolute]
    settings = kept + [f"{key}={os.path.abspath(value)}" for key, value in absolute.items()]
    config_option = [] if path is None else ["--config", os.path.abspath(path)]
    return config_option + [word for setting in settings for word in ("--set", setting)]
