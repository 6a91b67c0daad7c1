"""The log of a run: metrics.csv, a row per logged step, and the same as TensorBoard events where it is installed.

A run that goes on continues its rows and events; a run that starts anew begins with empty ones. Events of the run
before are kept, in the folder where they are: `tensorboard`, then `tensorboard_2`, ...
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import ConfigError
from runtime.files import replacing

PLACE = ["phase", "step"]  # the first two columns, by which a file of ours is known


class MetricsLog:
    """The log at `path`; columns: those of its rows, "phase" and "step" first. `rewind` comes before the first row."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, list(columns)
        self._events: Any = None  # and what makes them: Any, as TensorBoard may not be installed
        self._is_new = True
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._make_events: Any = None
        else:
            self._make_events = SummaryWriter

    def rewind(self, phases: Sequence[str], phase: str, step: int) -> None:
        """Keep the rows of the phases before `phase`, and its own up to `step`: the run goes on there, and writes anew.

        phases: all of the run, in order; [phase] alone with step -1 for a run that has nothing to do with the rows
        that are there. Raises ConfigError, and changes nothing, if a file of somebody else stands there.
        """
        earlier = phases[: phases.index(phase)]
        self._is_new = not earlier and step < 0
        kept = [r for r in self._rows() if r["phase"] in earlier or (r["phase"] == phase and int(r["step"]) <= step)]
        with replacing(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)

    def _rows(self) -> list[dict[str, str]]:
        """The rows that are there, but for those that a crash cut off."""
        if not os.path.lexists(self.path):
            return []
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            text = file.read().replace("\0", "")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
        try:
            if text and (reader.fieldnames or [])[:2] != PLACE:
                raise csv.Error
            return [row for row in reader if None not in row.values() and row["step"].isdecimal()]
        except csv.Error:
            raise ConfigError(
                f"{self.path}: this is no table of a run; it is not replaced. Move it away, or use"
                " --set paths.results_dir=FOLDER"
            ) from None

    def write(self, row: dict, total_step: int) -> None:
        """Add a row (keys are columns, missing ones stay empty); total_step counts over all phases. Raises OSError."""
        try:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns).writerow(
                    {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
                )
            if self._make_events is not None:
                self._write_events(row, total_step)
        except OSError as error:
            raise OSError(error.errno, f"cannot log this step ({error.strerror or error})", str(self.path)) from error

    def _write_events(self, row: dict, total_step: int) -> None:
        if self._events is None:  # of a resumed run, TensorBoard drops what it was told of this step and later ones
            self._events = self._make_events(self._events_folder(), purge_step=total_step)
        for key, value in row.items():
            if key not in PLACE:
                self._events.add_scalar(key, value, total_step)
        self._events.flush()

    def _events_folder(self) -> Path:
        """The next free folder for a new run, the last one that is there for a run that goes on."""
        folder, number = self.path.with_name("tensorboard"), 2
        while os.path.lexists(further := self.path.with_name(f"tensorboard_{number}")):
            folder, number = further, number + 1
        return further if self._is_new and os.path.lexists(folder) else folder
