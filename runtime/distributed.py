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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from runtime.command import stop_flag


def start(timeout: float) -> None:
    """Join the other processes that torchrun started, if it did."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _reported():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    atexit.register(dist.destroy_process_group)  # else Python may abort at its end, with a thread of gloo still running


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


def progress_bar(*arguments, **settings) -> tqdm:
    """A tqdm bar: of process 0, on a terminal; elsewhere it counts silently."""
    return tqdm(*arguments, **settings, leave=False, disable=None if rank() == 0 else True)


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
            f"process {os.environ.get('RANK', '?')}: another process of this run died or hangs"
            f" ({str(error).strip().splitlines()[0][:160]}). When it is mended: the same command again, or, if it was"
            " training, with --resume auto"
        ) from None
