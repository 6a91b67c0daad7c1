"""YAML as frozen dataclasses: a strict dialect, and a builder that walks the types and tells every problem at once.

    @dataclass(frozen=True, kw_only=True)
    class Training:
        batch_size: Annotated[int, at_least(1)] = 2
        device: Annotated[str, matching("cpu|cuda", "cpu or cuda")] = "cpu"

A rule is a function beside a type that takes the value and returns it (or what it stands for), or raises ValueError
with what is wanted: `at_least`, `between`, `matching`, or one of your own. What concerns several fields of a section
is its method `problems()`, which yields (key, message) and is asked when each of the fields is right.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import yaml

from runtime.errors import ConfigError

Problems = list[tuple[str, str]]  # (dotted key, message)

# --- rules -----------------------------------------------------------------------------------------------------


def between(low: float, high: float) -> Callable[[Any], Any]:
    """The rule low <= value <= high."""

    def check(value):
        if value < low:
            raise ValueError(f"want at least {low}")
        if value > high:
            raise ValueError(f"want at most {high:,}")
        return value

    return check


def at_least(low: float) -> Callable[[Any], Any]:
    """The rule low <= value, up to a billion: nothing here is counted further."""
    return between(low, 10**9)


def matching(pattern: str, words: str) -> Callable[[str], str]:
    """The rule that a text is `pattern` from end to end; in words for the message."""

    def check(value):
        if not re.fullmatch(pattern, value):
            raise ValueError(f"want {words}")
        return value

    return check


# --- YAML ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses aliases: a few hundred bytes of them expand to gigabytes, and no config needs any."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed here", event.start_mark)
        return super().compose_node(parent, index)


class _ArgumentLoader(_Loader):
    """For a value on the command line, where `#` begins no comment: nobody writes one there, and paths have some."""

    def scan_to_next_token(self):
        while self.peek() == " ":
            self.forward()
        if self.peek() == "#":
            raise yaml.scanner.ScannerError(None, None, "'#' begins no comment here", self.get_mark())
        super().scan_to_next_token()


# YAML 1.1 reads `1e-4` as a text, `010` as 8 and `1:30` as 90; everybody who types them means something else.
_NUMBERS = {
    "float": r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "int": r"[-+]?(0|[1-9][\d_]*|0b[01_]+|0x[\da-fA-F_]+)",
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] not in _NUMBERS]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^({_pattern})$", re.ASCII), list("-+.0123456789")
    )


def parse_yaml(text: str, name: str = "config", comments: bool = True) -> tuple[Any, dict[str, int]]:
    """Plain values of a YAML text and the line of each dotted key. Raises ConfigError."""
    lines: dict[str, int] = {}
    try:
        loader = (_Loader if comments else _ArgumentLoader)(text)
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
        line = f":{mark.line + 1}" if mark and comments else ""  # what is typed on the command line is one line
        reason = getattr(error, "problem", None) or str(error).split("\n")[0]
        raise ConfigError(f"{name}{line}: not valid YAML: {reason}") from None


def _plain(loader: _Loader, node: yaml.Node, path: str, lines: dict[str, int]) -> Any:
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, join(path, i), lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return loader.construct_object(node)
    values: dict = {}
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in values:
            raise yaml.composer.ComposerError(None, None, f"'{key}' stands here twice", key_node.start_mark)
        values[key] = _plain(loader, value_node, join(path, key), lines)
        lines[join(path, key)] = key_node.start_mark.line + 1
    return values


class _Dumper(yaml.SafeDumper):
    """SafeDumper that puts in quotes what `_Loader` would not read as text, too, and writes no aliases."""

    def ignore_aliases(self, data):
        return True


_Dumper.yaml_implicit_resolvers = {
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + pairs
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def dump_yaml(value: Any) -> str:
    """Plain mappings, lists and scalars as YAML that `parse_yaml` reads back to the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def parse_argument(text: str, kind: Any, name: str) -> Any:
    """The value of a text from the command line for a field of type `kind`. Raises ConfigError.

    A text field takes what was typed, be it a date, a number or with a `#` (in quotes it is YAML); others take YAML.
    """
    if kind is str and text[:1] not in ("'", '"'):
        return text
    return parse_yaml(text, name, comments=False)[0]


# --- types -----------------------------------------------------------------------------------------------------


def join(path: str, key: object) -> str:
    """The dotted key of something inside of `path`."""
    return ".".join(part for part in (path, str(key)) if part)


def build(kind: Any, raw: Any, path: str = "") -> tuple[Any, Problems]:
    """`raw` (plain mappings, lists and scalars) as `kind`, with all that does not fit; then the value is None."""
    value, problems = _build(kind, raw, path)
    return (None if problems else value), problems


def field_type(kind: Any, keys: list[str]) -> Any:
    """The type, without its rules, of the field under the keys from a dataclass down; None where there is none."""
    for key in keys:
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(key)
        elif typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]  # all items of a list are alike here
        else:
            return None
    return kind


def _build(kind: Any, raw: Any, path: str) -> tuple[Any, Problems]:
    if typing.get_origin(kind) is Annotated:
        kind, *rules = typing.get_args(kind)
        value, problems = _build(kind, raw, path)
        return (value, problems) if problems else _checked(value, rules, path)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, raw, path)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _build_union(kind, raw, path)
    if typing.get_origin(kind) is tuple:
        kinds = _item_kinds(typing.get_args(kind), raw)
        if kinds is not None:
            built = [_build(k, v, join(path, i)) for i, (k, v) in enumerate(zip(kinds, raw, strict=True))]
            return tuple(value for value, _ in built), [problem for _, found in built for problem in found]
    elif _is_scalar(kind, raw):
        return (float(raw) if kind is float else raw), []
    return None, [(path, _mismatch(kind, raw))]


def _checked(value: Any, rules: list[Callable[[Any], Any]], path: str) -> tuple[Any, Problems]:
    for rule in rules:
        try:
            value = rule(value)
        except ValueError as error:
            return None, [(path, f"{error}, got {shorten(value)}")]
    return value, []


def _build_union(kind: Any, raw: Any, path: str) -> tuple[Any, Problems]:
    """As the first member that takes it; else the faults of the one whose type fits, though not all of it."""
    meant: Problems = []
    for candidate in typing.get_args(kind):
        value, problems = _build(candidate, raw, path)
        if not problems:
            return value, []
        if problems != [(path, _mismatch(candidate, raw))]:
            meant = meant or problems
    return None, meant or [(path, _mismatch(kind, raw))]


def _build_dataclass(kind: Any, raw: Any, path: str) -> tuple[Any, Problems]:
    if not isinstance(raw, dict):
        return None, [(path, _mismatch(kind, raw))]
    hints = typing.get_type_hints(kind, include_extras=True)
    problems = [(join(path, key), _unknown(str(key), hints)) for key in raw if key not in hints]
    for f in dataclasses.fields(kind):
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and f.name not in raw:
            problems.append((path, f"'{f.name}' is missing ({_describe(hints[f.name])})"))
    built = {key: _build(hints[key], value, join(path, key)) for key, value in raw.items() if key in hints}
    problems += [problem for _, found in built.values() for problem in found]
    if problems:
        return None, problems
    section = kind(**{key: value for key, (value, _) in built.items()})
    return section, [(join(path, key), message) for key, message in _problems_of(section)]


def _problems_of(section: Any) -> Iterator[tuple[str, str]]:
    return section.problems() if hasattr(section, "problems") else iter(())


def _unknown(key: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, 1)
    return "unknown key; " + (f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}")


def _item_kinds(arguments: tuple, raw: Any) -> tuple | None:
    """The type of each item of a list, None if it cannot be the list that is wanted."""
    if not isinstance(raw, (list, tuple)):
        return None
    kinds = arguments[:1] * len(raw) if arguments[-1] is Ellipsis else arguments
    return kinds if len(kinds) == len(raw) else None


def _is_scalar(kind: Any, raw: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return isinstance(raw, str) and raw in typing.get_args(kind)
    if kind is float and isinstance(raw, (int, float)) and not isinstance(raw, bool):
        return abs(raw) <= 1e300  # false for nan and infinity, too
    if kind is str and isinstance(raw, str):  # what cannot be shown in a line can be no name
        return raw != "" and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in raw)
    return type(raw) is kind


def _mismatch(kind: Any, raw: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return f"want a section with keys, got {shorten(raw)}"
    if kind is str and isinstance(raw, str):
        return f"want a line of UTF-8 text, got {shorten(raw)}"
    remedy = "; in quotes it is text" if kind is str and not isinstance(raw, (dict, list)) else ""
    return f"want {_describe(kind)}, got {shorten(raw)}{remedy}"


def _describe(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _describe(arguments[0])
    if origin is Literal:
        return " | ".join(arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in arguments)
    if origin is tuple:
        count = "any number" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"a list of {count} ({_describe(arguments[0])})"
    names = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(kind, "a section with keys")


def shorten(raw: Any) -> str:
    """A value as messages show it, at most 60 letters."""
    if isinstance(raw, int) and abs(raw) > 1e300:  # Python refuses to write out the largest
        return "a number of hundreds of digits"
    if isinstance(raw, dict):
        return "a section"
    if isinstance(raw, list):
        return "a list"
    raw = list(raw) if isinstance(raw, tuple) else raw
    text = str(raw) if isinstance(raw, datetime.date) else repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
