"""The fault battery: `pytest tests/reliability`, its long counts with `-m nightly`, other random cases with
`--replay SEED` (a failure names its seed)."""

import random
import sys

import pytest
import torch

import train
from tests.reliability.faults import Place

DEFAULT_SEED = 6


def pytest_addoption(parser):
    parser.addoption("--replay", type=int, default=DEFAULT_SEED, metavar="SEED", help="seed of the random faults")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():  # a process that uses CUDA cannot be forked
        for item in (i for i in items if "place" in getattr(i, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason="forks: run it with CUDA_VISIBLE_DEVICES="))


@pytest.fixture
def seed(request):
    """The seed of all random faults; it is shown when a test fails."""
    seed = request.config.getoption("--replay", DEFAULT_SEED)
    print(f"to see this again: pytest {request.node.nodeid.split('[')[0]} --replay {seed}")
    return seed


@pytest.fixture
def rng(seed):
    return random.Random(seed)


@pytest.fixture
def place(workdir, monkeypatch):
    """A folder in which runs are trained, killed and compared; without pictures, which take most of a tiny run."""
    monkeypatch.setattr(train, "draw_prototypes", lambda inference, data, records, folder: records)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    return Place(workdir)
