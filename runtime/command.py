"""What every script shares: its two options, errors as one line with an exit code, and a stop that can be resumed.

Exit codes: 0 done, 2 bad input, 3 bad or untrusted checkpoint, 4 disk or download, 5 run directory in use,
6 loss not finite, 129 / 130 / 138 / 143 stopped by SIGHUP / SIGINT / SIGUSR1 / SIGTERM.

Standard output and error may be closed, full, or go away with their terminal or reader (`| head -1`): what is printed
then is lost, and nothing else. The work goes on to its end and its exit code.
"""

from __future__ import annotations

import argparse
import errno
import io
import multiprocessing
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from runtime.errors import UserError

STORAGE_ERROR = 4
NOTHING_LOST = "nothing was left half done; the same command starts again"
GO_ON = "What was saved is whole: training goes on with the same command and --resume auto"
T = TypeVar("T")


class Interrupted(UserError):
    """A signal asked the script to stop, and it did, at a place from where it can go on."""

    def __init__(self, signum: int, what_next: str):
        super().__init__(f"stopped by {signal.Signals(signum).name}: {what_next}")
        self.signum, self.exit_code = signum, 128 + signum


class StopFlag:
    """Remembers the first SIGTERM, SIGUSR1, SIGINT or SIGHUP; a second SIGINT leaves the program at once.

    The handlers set `signum` and nothing else, so no signal ever lands in the middle of a save. Work that takes
    long asks `stop_flag.raise_if_set()` between two of its units.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def install(self) -> None:
        """Start listening (main thread only); not to the SIGHUP that `nohup` has switched off."""
        for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame) -> None:
        if signum == signal.SIGINT and self.signum is not None:
            os._exit(128 + signum)
        if self.signum is None:
            self.signum = signum

    def raise_if_set(self, what_next: str = NOTHING_LOST) -> None:
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


def go_on_command(script: str, arguments: Iterable[str], processes: int = 1) -> str:
    """A command line that does the same in whatever folder it is pasted.

    script: a file at the top of the project (`train.py`). Paths among the arguments are absolute already
    (`config.config_arguments` makes them so). processes: of the run (`distributed.world_size()`).
    """
    words = ["python"]
    if processes > 1:
        here = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
        local = int(here) if here.isdecimal() and int(here) > 0 else processes
        words = ["torchrun", "--nproc_per_node", str(local)]
        if local < processes:
            place = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29500"
            nodes = str(-(-processes // local))
            words += ["--nnodes", nodes, "--rdzv_backend", "c10d", "--rdzv_endpoint", place]
    return shlex.join([*words, str(Path(__file__).resolve().parent.parent / script), *arguments])


def each(
    items: Iterable[T], desc: str, unit: str, total: int | None = None, what_next: str = NOTHING_LOST
) -> Iterator[T]:
    """The items one by one, behind a bar if there is a terminal; a signal stops between two of them (Interrupted).

    For one process: several have to agree on a stop (`distributed.agree_on_stop`).
    """
    with tqdm(items, desc=desc, unit=unit, total=total, leave=False, disable=None) as bar:
        for item in bar:
            stop_flag.raise_if_set(what_next)
            yield item


# --- the life of a script --------------------------------------------------------------------------------------


def run(main: Callable[[list[str] | None], None]) -> None:
    """Call a script's main and leave with its exit code: what the user can mend is told in a line, not a traceback."""
    stop_flag.install()
    sys.unraisablehook = _tell_unraisable
    _make_streams_last()
    try:
        _run(main)
    finally:
        _end_workers()


def _run(main: Callable[[list[str] | None], None]) -> None:
    try:
        _check_folder()
        main(None)
        return
    except UserError as error:
        message, code = str(error), error.exit_code
    except (OSError, MemoryError, RuntimeError) as error:
        trouble = machine_trouble(error)
        if trouble is None and not isinstance(error, OSError):
            raise
        message, code = str(trouble or error), STORAGE_ERROR  # disk full, no permission, download failed, ...
    # Only now, when no exception holds a loader of data any more, so that it can end its workers itself.
    _leave(message, code)


def _tell_unraisable(about) -> None:
    if "DataLoader" not in repr(about.object):  # torch's trips over itself where it could not start all its workers
        sys.__unraisablehook__(about)


def _end_workers() -> None:
    """End the processes that a loader of data left behind: Python would wait for them, and they wait for orders."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report that a worker was lost
        worker.kill()  # they do not mind SIGTERM, so that one to the whole group ends only the process that saves


class _LastingStream(io.FileIO):
    """Standard output or error of which writing never fails: what its other end does not take is lost."""

    lost = False

    def write(self, data) -> int:
        left = memoryview(data).cast("B")
        while left:
            try:
                written = super().write(left)
            except OSError as error:  # no reader, no terminal, no space
                if not self.lost and self.fileno() == 1:
                    reason = f"standard output cannot be written ({error.strerror})"
                    print(f"{reason}: the work goes on, what it prints is lost", file=sys.stderr)
                self.lost = True
                break
            if written is None:  # a pipe that whoever started us made non-blocking is full
                select.select([], [self], [])
            left = left[written or 0 :]
        return len(data)


def _make_streams_last() -> None:
    """Open what was closed (else a checkpoint would get number 1 and the next print), and never fail to print."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None or stream is getattr(sys, f"__{name}__"):
            encoding = getattr(stream, "encoding", "utf-8")
            buffer = io.BufferedWriter(_LastingStream(number, "w", closefd=False))
            # A name that a terminal cannot show is no reason to stop, either.
            lasting = io.TextIOWrapper(buffer, encoding=encoding, errors="backslashreplace", line_buffering=True)
            setattr(sys, name, lasting)


def _check_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the folder in which this was started does not exist any more: go to another one") from None


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
            f" Without such processes: --set system.num_workers=0. {GO_ON}"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return OSError(
            f"torch.compile failed ({first_line[:200]}). It needs a C++ compiler, and Triton for a GPU;"
            " without it: --set system.compile=false"
        )
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return OSError(
            f"not enough memory ({first_line[:200]}). Smaller: --set training.batch_size=1, or a smaller"
            f" dataset.crop_size. {GO_ON}"
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
