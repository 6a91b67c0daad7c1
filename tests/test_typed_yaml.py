"""The YAML dialect, and the builder that walks the types: on a little section of its own."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import ConfigError
from runtime.typed_yaml import (
    at_least,
    between,
    build,
    dump_yaml,
    field_type,
    matching,
    parse_argument,
    parse_yaml,
)


@dataclass(frozen=True, kw_only=True)
class Wheel:
    spokes: Annotated[int, at_least(3)] = 36
    rim: Literal["steel", "wood"] = "steel"

    def problems(self):
        if self.rim == "wood" and self.spokes > 40:
            yield "spokes", "wood does not hold so many"


@dataclass(frozen=True, kw_only=True)
class Cart:
    name: Annotated[str, matching("[a-z]+", "small letters")]
    wheels: tuple[Wheel, ...] = ()
    spare: Wheel | None = None
    load: Annotated[float, between(0, 100)] | None = None
    size: tuple[float, float] = (1.0, 2.0)
    lamp: bool | Literal["auto"] = "auto"
    front: Wheel = field(default_factory=Wheel)


def problems(text: str) -> list[str]:
    return [f"{key}: {message}" for key, message in build(Cart, parse_yaml(text)[0])[1]]


# --- the builder -----------------------------------------------------------------------------------------------


def test_builds_sections_lists_and_unions():
    text = "{name: a, wheels: [{spokes: 3}, {}], spare: {rim: wood}, load: 7, lamp: true, size: [3, 4]}"
    cart, found = build(Cart, parse_yaml(text)[0])
    assert found == []
    assert cart == Cart(
        name="a", wheels=(Wheel(spokes=3), Wheel()), spare=Wheel(rim="wood"), load=7.0, lamp=True, size=(3.0, 4.0)
    )
    assert type(cart.load) is float and type(cart.size[0]) is float


PROBLEMS = {
    "{name: a, wheels: [{spokes: 2}]}": "wheels.0.spokes: want at least 3, got 2",
    "{name: a, front: {spokes: 2000000000}}": "front.spokes: want at most 1,000,000,000, got 2000000000",
    "{name: A}": "name: want small letters, got 'A'",
    "{}": ": 'name' is missing (text)",
    "{name: a, load: 101}": "load: want at most 100, got 101.0",
    "{name: a, load: heavy}": "load: want a finite number or null, got 'heavy'",
    "{name: a, lamp: on the left}": "lamp: want true or false or auto, got 'on the left'",
    "{name: a, size: [1, x]}": "size.1: want a finite number, got 'x'",
    "{name: a, size: [1]}": "size: want a list of 2 (a finite number), got a list",
    # In a section that may be left out, the key is named, not the section.
    "{name: a, spare: {spoke: 4}}": "spare.spoke: unknown key; did you mean 'spokes'?",
    "{name: a, spare: {spokes: 1}}": "spare.spokes: want at least 3, got 1",
    "{name: a, spare: 4}": "spare: want a section with keys or null, got 4",
    # Text that YAML reads as something else
    "{name: 2024-05-01}": "name: want text, got 2024-05-01; in quotes it is text",
    "{name: 12}": "name: want text, got 12; in quotes it is text",
    "{name: no}": "name: want text, got False; in quotes it is text",
    "{name: [a]}": "name: want text, got a list",
    '{name: "a\\nb"}': "name: want a line of UTF-8 text, got 'a\\nb'",
    "{name: ''}": "name: want a line of UTF-8 text, got ''",
    "{name: a, front: {rim: wood, spokes: 50}}": "front.spokes: wood does not hold so many",
}


@pytest.mark.parametrize("text", PROBLEMS)
def test_names_the_problem(text):
    assert problems(text) == [PROBLEMS[text]]


def test_names_all_problems_of_types_rules_and_sections_at_once():
    text = "{name: 3, wheels: [{spokes: 1}, {rim: gold}, {rim: wood, spokes: 41}], lode: 1}"
    assert [line.split(":")[0] for line in problems(text)] == [
        "lode", "name", "wheels.0.spokes", "wheels.1.rim", "wheels.2.spokes",
    ]  # fmt: skip


def test_finds_the_type_of_a_field():
    for keys, kind in (("name", str), ("wheels.3.spokes", int), ("front.rim", Literal["steel", "wood"])):
        assert field_type(Cart, keys.split(".")) == kind
    for keys in ("nothing", "name.deeper", "wheels.0.spokes.deeper", "nothing.at.all"):
        assert field_type(Cart, keys.split(".")) is None


# --- the dialect -----------------------------------------------------------------------------------------------

SCALARS = {
    "12": 12, "-3": -3, "1_000": 1000, "0": 0, "0x1F": 31, "0b11": 3, "1e3": 1000.0, "-.5": -0.5, "1.": 1.0,
    "010": "010", "1:30": "1:30", "1:30.5": "1:30.5", "1e": "1e", ".": ".", "٣": "٣", "yes": True, "~": None,
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_reads_a_scalar_as_who_types_it_means_it(text):
    value, _ = parse_yaml(text)
    assert (value, type(value)) == (SCALARS[text], type(SCALARS[text]))


@pytest.mark.parametrize(
    "text", ["a#b", "a #b", "# a", "2024-05-01", "123", "1e3", "no", "a: b", "[a", "*a", "", " a "]
)
def test_a_text_field_takes_what_was_typed(text):
    assert parse_argument(text, str, "--set key") == text


@pytest.mark.parametrize("text", ["'a #b'", '"a #b"'])
def test_a_text_field_may_be_in_quotes(text):
    assert parse_argument(text, str, "--set key") == "a #b"


@pytest.mark.parametrize("text", ["4 # a comment", "#4", "[1, 2] # a", "[1, # a\n 2]"])
def test_nothing_on_the_command_line_is_a_comment(text):
    with pytest.raises(ConfigError, match="--set key: not valid YAML: '#' begins no comment here") as caught:
        parse_argument(text, int, "--set key")
    assert "\n" not in str(caught.value)


def test_a_number_sign_inside_of_a_word_or_of_quotes_is_none():
    assert parse_argument("[a#b, 'c #d']", tuple[str, ...], "--set key") == ["a#b", "c #d"]


TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.from_regex(r"[-+.0-9e:_xb]{1,8}", fullmatch=True)
PLAIN = st.recursive(
    TEXT | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.from_regex("[a-z]{2,5}[.]?", fullmatch=True), inner),
)


@given(PLAIN)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(dump_yaml({"the": value}))[0] == {"the": value}
