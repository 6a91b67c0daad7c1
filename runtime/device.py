"""On what a run computes."""

from __future__ import annotations

import torch

from runtime import distributed
from runtime.errors import ConfigError


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's GPU, then the CPU; under torchrun each process takes its own GPU.

    Raises ConfigError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{distributed.local_rank()}"
    device = torch.device(name)
    count = {"cpu": 1, "mps": int(torch.backends.mps.is_available())}.get(device.type, torch.cuda.device_count())
    if (device.index or 0) >= count:
        raise ConfigError(f"system.device: there is no {name} here; use auto or cpu")
    return device
