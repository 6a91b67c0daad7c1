"""One thread for torch: the tests' tensors are too small for more, and sums are then the same on every machine."""

import pytest
import torch

import deeplab_features
from tests.tiny import CONFIG, TinyResNet

torch.set_num_threads(1)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty folder to work in, with tiny.yaml in it, and a tiny network under the name resnet18."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(deeplab_features.BACKBONES, "resnet18", (TinyResNet, None))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path
