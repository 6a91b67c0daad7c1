"""What every script shares: its two options, errors as one line with an exit code, and a stop that can be resumed.

Exit codes: 0 done, 2 bad input, 3 bad or untrusted checkpoint, 4 disk or download, 5 run directory in use,
6 loss not finite, 130 / 138 / 143 stopped by SIGINT / SIGUSR1 / SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable

from config import UserError

STORAGE_ERROR = 4


class Interrupted(UserError):
    """A signal asked the script to stop, and it did, at a place from where it can go on."""

    def __init__(self, signum: int, what_next: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {what_next}")
        self.signum, self.exit_code = signum, 128 + signum


class StopFlag:
    """Remembers the first SIGTERM, SIGUSR1 or SIGINT; a second SIGINT leaves the program at once.

    The handlers set `signum` and nothing else, so no signal ever lands in the middle of a save. Work that takes
    long asks `stop_flag.raise_if_set()` between two of its units.
    """

    def __init__(self):
        self.signum: int | None = None

    def install(self) -> None:
        """Start listening (main thread only)."""
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            os._exit(128 + signum)
        if self.signum is None:
            self.signum = signum

    def raise_if_set(self, what_next: str = "nothing was left half done; the same command starts again") -> None:
        """Raise Interrupted if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum, what_next)


stop_flag = StopFlag()


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options `--config FILE` and `--set section.key=value`, the same in every script."""
    parser.add_argument("--config", default="config.yaml", metavar="FILE", help="configuration (default: %(default)s)")
    add_set_argument(parser)


def add_set_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--set section.key=value` alone, for scripts whose configuration comes out of a checkpoint."""
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change one value of the configuration, e.g. training.batch_size=4; may be repeated",
    )  # fmt: skip


def run(main: Callable[[list[str] | None], None]) -> None:
    """Call a script's main and leave with its exit code: what the user can mend is told in a line, not a traceback."""
    stop_flag.install()
    try:
        main(None)
    except UserError as error:
        _leave(str(error), error.exit_code)
    except OSError as error:  # disk full, no permission, download failed: the machine, not the program
        _leave(str(error), STORAGE_ERROR)


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    for line in message.splitlines() or ["unknown error"]:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
