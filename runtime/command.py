"""What every script shares: its two options, errors as one line with an exit code, and a stop that can be resumed.

Exit codes: 0 done, 2 bad input, 3 bad or untrusted checkpoint, 4 disk or download, 5 run directory in use,
6 loss not finite, 130 / 138 / 143 stopped by SIGINT / SIGUSR1 / SIGTERM.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Callable

from runtime.errors import UserError

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
    for stream in (sys.stdout, sys.stderr):  # a name that a terminal cannot show is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main(None)
        return
    except UserError as error:
        message, code = str(error), error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        trouble = machine_trouble(error)
        if trouble is None and not isinstance(error, OSError):
            raise
        message, code = str(trouble or error), STORAGE_ERROR  # disk full, no permission, download failed, ...
    # Only now, when no exception holds a loader of data any more: exit would wait forever for its workers.
    _leave(message, code)


def machine_trouble(error: OSError | MemoryError | RuntimeError) -> OSError | None:
    """What torch says when a machine lets it down, with the remedy; None for any other error.

    torch looks after the workers of a DataLoader by signal: that one was lost is raised wherever the script just is.
    """
    if isinstance(error, OSError) and error.errno != errno.EMFILE:
        return None
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if any(words in str(error) for words in ("DataLoader", "shared memory", "resize file", "Too many open files")):
        return OSError(
            f"a process that loads data was lost ({first_line}). Usual causes: too little memory or"
            " shared memory (docker: --shm-size=8g), or too few open files (ulimit -n 4096)."
            " Without such processes: --set system.num_workers=0. What was saved is whole: --resume auto"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return OSError(
            f"torch.compile failed ({first_line[:200]}). It needs a C++ compiler, and Triton for a GPU;"
            " without it: --set system.compile=false"
        )
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return OSError(
            f"not enough memory ({first_line[:200]}). Smaller: --set training.batch_size=1, or a smaller"
            " dataset.crop_size. What was saved is whole: --resume auto"
        )
    return None


def all_at_once(*checks: Callable[[], object]) -> list:
    """What each of the checks returns; or one error with all that they have to say, and the first one's exit code."""
    results: list = []
    errors: list[UserError | OSError] = []
    for check in checks:
        try:
            results.append(check())
        except Interrupted:
            raise
        except (UserError, OSError) as error:
            errors.append(error)
    if len(errors) > 1:
        raise type(errors[0])("\n".join(dict.fromkeys(map(str, errors))))  # each once
    if errors:
        raise errors[0]
    return results


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    for line in message.splitlines() or ["unknown error"]:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(code)
