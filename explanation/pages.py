"""HTML pages out of `templates/`, in which whatever comes from outside (names of classes and files) is data.

jinja2 escapes every value, data for a script are JSON without `<`, `>` and `&`, and a content security policy lets a
page run its own script and style, known by their hashes, show pictures of its own folder, and do nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from runtime.files import replacing

TEMPLATES = Path(__file__).parent / "templates"
POLICY = (
    "default-src 'none'; img-src {pictures}; style-src '{style}'; script-src '{script}';"
    " base-uri 'none'; form-action 'none'"
)


def render(
    template: str,
    palette: Iterable[tuple[int, int, int]] = (),
    styles: tuple[str, ...] = ("style.css",),
    data: object = None,
    ratio: float = 1.0,
    inline: bool = False,
    filters: Mapping[str, Callable] | None = None,
    **values,
) -> str:
    """A page: a template filled with values.

    palette: makes a CSS class `.cN` in the colour of each class N. data: what the page's script `image.js` gets; a
    page without data runs none. ratio: width over height of its picture. inline: the page holds its pictures as
    data: addresses, and elements have styles of their own; neither is allowed otherwise.
    """
    style = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in styles)
    style += "".join(f".c{i}{{--class:rgb({r:d} {g:d} {b:d})}}" for i, (r, g, b) in enumerate(palette))
    style += f":root{{--ratio:{ratio:.6f}}}"
    script = "" if data is None else (TEMPLATES / "image.js").read_text(encoding="utf-8")
    policy = POLICY.format(
        pictures="data:" if inline else "'self' file:",
        style="unsafe-inline" if inline else _hash(style),
        script=_hash(script),
    )
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(filters or {}, minus=lambda text: text.replace("-", "\u2212"))
    return environment.get_template(template).render(
        policy=policy, style=Markup(style), script=Markup(script), data=script_json(data), **values
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    with replacing(path, "w", encoding="utf-8", errors="replace") as file:  # names may hold bytes of no encoding
        file.write(page)


def script_json(value: object) -> Markup:
    """JSON that is safe inside a <script>: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
