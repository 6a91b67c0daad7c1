"""Several processes as one run: the few lines that make everything work under `torchrun`.

    torchrun --nproc_per_node 4 train.py                                          one machine, four GPUs
    torchrun --nproc_per_node 4 evaluate.py --checkpoint FILE                     the same for an evaluation
    torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py      two machines

Without torchrun there is one process, and every function here returns at once. Every wait has a bound: a process
that died or hangs ends the others within `system.timeout` seconds, with exit code 4 (NCCL, which was not tried, may
abort them instead) and checkpoints that are whole.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from runtime.command import stop_flag
from runtime.errors import ConfigError


def start(timeout: float, asked: Mapping[str, object] | None = None) -> None:
    """Join the other processes that torchrun started, if it did, and see that all were asked for the same.

    timeout: seconds. asked: plain data by name, the resolved configuration and the arguments for example.
    Raises ConfigError, in all of them, if it differs; and if the environment says that there are others but not how
    they are found. A cluster that says WORLD_SIZE=1, whatever else it says, has one process.
    """
    if dist.is_initialized() or (size := _number("WORLD_SIZE", 1, 10**6, default=1)) == 1:
        return
    _check_environment(size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _reported():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    atexit.register(dist.destroy_process_group)  # else Python may abort at its end, with a thread of gloo still running
    check_same(asked or {})


def _number(name: str, least: int, most: int, default: int | None = None) -> int:
    """The whole number that a variable of the environment holds. Raises ConfigError."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,7}", text) or not least <= int(text) <= most:
        raise _no_start(name, f"want a number of {least} to {most}")
    return int(text)


def _no_start(name: str, want: str) -> ConfigError:
    found = repr(os.environ[name][:40]) if name in os.environ else "none"
    return ConfigError(
        f"{name} in the environment: {want}, got {found}. Several processes are started with"
        " torchrun --nproc_per_node N SCRIPT; for one process: unset WORLD_SIZE"
    )


def _check_environment(size: int) -> None:
    """See that torch can find the other processes before it waits for them. Raises ConfigError."""
    _number("RANK", 0, size - 1)
    _number("LOCAL_RANK", 0, size - 1, default=0)
    _number("MASTER_PORT", 1, 65535)
    if not os.environ.get("MASTER_ADDR"):
        raise _no_start("MASTER_ADDR", "want the name of the first process's machine")


def check_same(asked: Mapping[str, object]) -> None:
    """Raise ConfigError, in all processes, if they were asked for different things: plain data by name."""
    flat = [dict(_leaves(one)) for one in all_gather_objects(asked)]
    differing = []
    for key in dict.fromkeys(key for leaves in flat for key in leaves):
        values = [repr(leaves[key]) if key in leaves else "not given" for leaves in flat]
        other = next((r for r, value in enumerate(values) if value != values[0]), 0)
        if other:
            differing.append(f"{key} is {values[0][:80]} in process 0 and {values[other][:80]} in process {other}")
    if differing:
        raise ConfigError(f"the processes of this run were asked for different things: {'; '.join(differing[:5])}")


def _leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Nested plain data as (dotted key, scalar)."""
    if not value or not isinstance(value, (Mapping, list, tuple)):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def rank() -> int:
    """The number of this process, 0 for the one that writes files and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world_size() > 1:
        with _reported():
            dist.all_reduce(values)
    return values


def all_reduce_max(value: int) -> int:
    """The largest value of any process; decided on the CPU, so that no GPU is waited for."""
    if world_size() == 1:
        return value
    with _reported():
        dist.all_reduce(values := torch.tensor(value), op=dist.ReduceOp.MAX)
    return int(values)


def all_gather(values: Tensor) -> Tensor:
    """The tensors of all processes, stacked in the order of their ranks: (...) -> (size, ...)."""
    if world_size() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(world_size())]
    with _reported():
        dist.all_gather(parts, values.contiguous())
    return torch.stack(parts)


def all_gather_objects(value: object) -> list:
    """The values of all processes in the order of their ranks: anything that can be pickled."""
    values = [value] * world_size()
    if world_size() > 1:
        with _reported():
            dist.all_gather_object(values, value)
    return values


def agree_on_stop() -> int:
    """The signal that any process of the run was sent, or 0; afterwards all of them know of it.

    Never set back: a signal may have come while the others were asked.
    """
    agreed = all_reduce_max(stop_flag.signum or 0)
    if agreed:
        stop_flag.signum = agreed
    return agreed


def barrier() -> None:
    """Go on when every process has come here."""
    all_reduce_max(0)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes: one message, once an update."""
    if world_size() == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = all_reduce(torch.cat([g.flatten() for g in gradients])) / world_size()
    for parameter, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = part.view_as(parameter)


def progress_bar(total: int, desc: str, unit: str, initial: int = 0) -> tqdm:
    """A tqdm bar to update by hand: of process 0, on a terminal; elsewhere it counts silently."""
    disable = None if rank() == 0 else True
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, leave=False, disable=disable)


def print_once(text: str) -> None:
    """Print a line, in process 0."""
    if rank() == 0:
        print(text, flush=True)


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OSError(
            f"process {os.environ.get('RANK', '?')}: another process of this run cannot be reached, died or hangs"
            f" ({str(error).strip().splitlines()[0][:160]}). When it is mended: the same command again, or, if it was"
            " training, with --resume auto"
        ) from None
