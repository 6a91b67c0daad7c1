"""Any images with labels, in folders."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets.base import UNKNOWN, ClassMapping, DatasetError, SegmentationDataset, voc_palette
from datasets.listing import lines, pairs


class FolderDataset(SegmentationDataset):
    """Any images: images/SPLIT/*, labels/SPLIT/*.png with ids 0..C-1 (255 = ignore), and the names in classes.txt."""

    layout = "images/{train,val}/*, labels/{train,val}/*.png and classes.txt (one class name a line)"
    fetch = "put your own files there"

    def _setup_class_mappings(self) -> ClassMapping:
        listed = self.root / "classes.txt"
        if not listed.is_file():
            raise self.missing("no classes.txt")
        names = read_names(listed)
        return ClassMapping(names, voc_palette(len(names) + 1)[1:], {i: i for i in range(len(names))})

    def _get_data_paths(self) -> list[tuple[Path, Path | None]]:
        found, faults = pairs(self.root / "images" / self.split, self.root / "labels" / self.split)
        self.faults += faults
        return found


def read_names(path: Path) -> tuple[str, ...]:
    """The names of the classes in a list: the id of a class is the number of its line, from 0.

    Raises DatasetError, with all of its faults, where a line may not be what its author takes it for.
    """
    names = lines(path)
    while names and not names[-1]:
        names.pop()
    problems = [f"{path}:{number}: {problem}" for number, name in enumerate(names, 1) for problem in _problems(name)]
    problems += [f"{path}:{problem}" for problem in _other_ids(names)]
    same = [name for name, count in Counter(map(_seen, names)).items() if count > 1 and name]
    if not 2 <= len(names) < UNKNOWN or same:
        twice = "".join(f", '{name}' more than once" for name in same)
        problems.append(f"{path}: want 2 to {UNKNOWN - 1} different names, one a line; found {len(names)}{twice}")
    if problems:
        raise DatasetError("\n".join(problems))
    return tuple(names)


def _other_ids(names: list[str]) -> Iterator[str]:
    """Where a list that names ids (`1: car`), with a heading or without, has other ones than those of its lines."""
    written = [re.match(r"(\d+)(?=\W+\w)", name) for name in names]
    if len(written) > 1 and all(written[1:]):
        wrong = (i for i, id_ in enumerate(written) if id_ is None or int(id_[0]) != i)
        for i in list(wrong)[:1]:
            yield (
                f"{i + 1}: '{names[i]}' is in the line of id {i}, and the list names other ids; put the names in the"
                " order of the ids, from 0, one in each line, without ids and heading"
            )


def _seen(name: str) -> str:
    """What a reader sees of a name: without invisible characters, its blanks alike."""
    visible = (c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c)[0] != "C" or c == "\t")
    return " ".join("".join(visible).split())


def _problems(name: str) -> Iterator[str]:
    """Why a line is no name of a class."""
    if not _seen(name):
        yield "no name in this line; an id is the number of its line, so name its class, or remove the line"
    elif re.fullmatch(r"_+\w+_+", name):
        yield (
            f"'{name}' is a marker of a labelling tool, not a class: remove it if no pixel has its id (ignored pixels"
            " have 255), or give it a name without underscores"
        )
    elif name.startswith("#") or re.search(r":\d+,\d+,\d+:", name):
        yield f"'{name}' is a comment, or of another format: want the name of a class, nothing else"
