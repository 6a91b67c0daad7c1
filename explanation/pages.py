"""HTML pages out of `templates/`, in which whatever comes from outside (names of classes and files) is data.

jinja2 escapes every value, data for a script are JSON without `<`, `>` and `&`, and a content security policy lets a
page run its own script and style, known by their hashes, show pictures of its own folder, and do nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
GENERATOR = "prototype segmentation: explain.py"
POLICY = (
    "default-src 'none'; img-src 'self' file:; style-src '{style}'; script-src '{script}';"
    " base-uri 'none'; form-action 'none'"
)


def write_page(path: Path, template: str, palette, **values) -> None:
    """Render a template into a file, with a CSS class `.cN` in the colour of each class N.

    A value `data` reaches the page's script; a value `ratio`, width over height of its picture, its style.
    """
    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    style += "".join(f".c{i}{{--class:rgb({r} {g} {b})}}" for i, (r, g, b) in enumerate(palette))
    style += f":root{{--ratio:{float(values.get('ratio', 1)):.6f}}}"
    script = (TEMPLATES / "image.js").read_text(encoding="utf-8") if "data" in values else ""
    if "data" in values:
        values["data"] = script_json(values["data"])
    page = (
        _environment()
        .get_template(template)
        .render(
            policy=POLICY.format(style=_hash(style), script=_hash(script)),
            style=Markup(style),
            script=Markup(script),
            generator=GENERATOR,
            **values,
        )
    )
    path.write_text(page, encoding="utf-8", errors="replace")  # names may hold bytes that no encoding has


def script_json(value: object) -> Markup:
    """JSON that is safe inside a <script>: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def is_ours(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(1000)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["minus"] = lambda text: text.replace("-", "\u2212")
    return environment


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
