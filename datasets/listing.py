"""Which files belong together: lists as people write them, and images and labels of one name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterator
from pathlib import Path

from datasets.base import IMAGE_TYPES, DatasetError, check_regular

# Pictures of no usual type are looked at, too: read if that takes no guess, else refused by name.
OTHER_TYPES = (".jfif", ".gif", ".ppm", ".pgm", ".jp2", ".avif", ".heic", ".tga", ".exr", ".npy", ".dcm")

Pairs = list[tuple[Path, Path | None]]


def lines(path: Path) -> list[str]:
    """The lines of a list, stripped, blank ones too, in UTF-8 or UTF-16, whatever their line ends."""
    check_regular(path, "list")
    try:
        data = path.read_bytes()
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path}: cannot read this list ({error})") from None
    except UnicodeDecodeError as error:
        where = data[: error.start].count(b"\n") + 1
        raise DatasetError(
            f"{path}: cannot read this list (line {where} is not UTF-8 text); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DatasetError(f"{path}: cannot read this list (it has zero bytes); save it as UTF-8 text")
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text)]


def pairs(images: Path, labels: Path, listed: list[str] | None = None, usual: str = ".png") -> tuple[Pairs, list[str]]:
    """(image, label) of each name, and what is wrong with the two folders, a line each.

    listed: the lines of a list; without one there is a pair for each picture in either folder. usual: the ending of an
    image that is not there.
    """
    image_files, label_files = pictures(images, IMAGE_TYPES), pictures(labels, (".png",))
    if listed is None:
        stems = sorted(image_files.keys() | label_files.keys())
        faults = [fault for folder in (images, labels) for fault in _passed_over(folder)]
    else:
        stems, faults = [listed_stem(line, image_files) for line in listed if line], []
    for files in (files.get(stem, ()) for stem in dict.fromkeys(stems) for files in (image_files, label_files)):
        if len(files) > 1:
            names = " and ".join(path.name for path in files)
            faults.append(f"{files[0].parent}: {names} are two files of one name; rename or remove one, as its partner")
    return [
        (image_files.get(stem, [images / f"{stem}{usual}"])[0], label_files.get(stem, [labels / f"{stem}.png"])[0])
        for stem in stems
    ], faults


def pictures(folder: Path, types: tuple[str, ...]) -> dict[str, list[Path]]:
    """The picture files of a folder by stem: those of the types, or, where a stem has none of them, any others."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in (*IMAGE_TYPES, *OTHER_TYPES) and not path.name.startswith("."):
            found.setdefault(_composed(path.stem), []).append(path)
    return {stem: [p for p in paths if p.suffix.lower() in types] or paths for stem, paths in found.items()}


def _composed(name: str) -> str:
    """A name as most computers write it: macOS stores an accent as a character of its own, behind its letter."""
    return unicodedata.normalize("NFC", name)


def _passed_over(folder: Path) -> Iterator[str]:
    """A line for each thing in a folder that may hide pictures; what macOS leaves beside files (._NAME) is none."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in IMAGE_TYPES:
            if path.name.startswith(".") and not path.name.startswith("._"):
                yield f"{path}: hidden files are not looked at; rename or remove it"
        elif (
            path.is_dir()
            and not path.name.startswith(".")
            and any(p.suffix.lower() in IMAGE_TYPES for p in path.rglob("[!.]*"))
        ):
            yield f"{path}: there are pictures in this folder, where nobody looks; move them to '{folder}', or away"


def listed_stem(line: str, known: Container[str]) -> str:
    """The name without ending that a line of a list means, which may be a name, a path, or those of image and label.

    known: the names that there are. They decide what is an ending, and what a blank or a backslash belongs to.
    """
    line = _composed(line)
    path = re.match(r".*?\.(?:png|jpe?g|bmp|webp|tiff?)(?=\s|$)", line, re.IGNORECASE)  # a blank may be part of it
    candidates = [re.split(r"[/\\]", text)[-1] for text in (line, path[0] if path else line.split()[0])]
    candidates += [name[: name.rindex(".")] for name in candidates[1:] if name.lower().endswith(IMAGE_TYPES)]
    return next((name for name in candidates if name in known), candidates[-1])
