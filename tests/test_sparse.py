"""The sparse last layer: the proximal step of the L1 term under Adam."""

import pytest
import torch
from torch import nn

import train
from evaluation.interpretability import zero_connections
from module import soft_threshold
from runtime.checkpoint import load_checkpoint
from runtime.errors import ConfigError
from tests.tiny import tiny_config

CLASS_OF = torch.tensor([0, 1])
LR, STRENGTH = 1e-2, 0.1
SPARSE = "training.phases.2.sparse=true"
PATIENT = "training.phases.2.early_stopping=0"


def minimize(slopes, steps=2000, start=-0.5):
    """The weights that minimize the sum of (w - s)^2 / 2 + STRENGTH |w| over all w, one slope s for each, (2, 2)."""
    weight = nn.Parameter(torch.full((2, 2), start))
    adam = torch.optim.Adam([weight], lr=LR)
    for _ in range(steps):
        weight.grad = weight.detach() - slopes
        adam.step()
        soft_threshold(weight, CLASS_OF, adam, STRENGTH)
    return weight.detach()


def test_it_finds_the_minimum_and_zero_means_zero():
    slopes = torch.tensor([[0.7, 0.05], [-0.3, -0.04]])
    weight = minimize(slopes)
    assert weight[0, 1] == 0  # |slope| below the strength: exactly zero
    assert float(weight[1, 0]) == pytest.approx(-0.3 + STRENGTH, abs=1e-3)  # the soft threshold of the slope
    assert weight.diagonal().tolist() == pytest.approx([0.7, -0.04], abs=1e-3)  # a prototype's own class is left alone


def test_without_strength_nothing_moves():
    weight = nn.Parameter(torch.randn(2, 2))
    adam = torch.optim.Adam([weight], lr=LR)
    weight.grad = torch.randn(2, 2)
    adam.step()
    before = weight.detach().clone()
    soft_threshold(weight, CLASS_OF, adam, 0.0)
    assert torch.equal(weight, before)


def finetuned(*overrides):
    train.main(["--config", "tiny.yaml", *(part for o in overrides for part in ("--set", o))])
    model = load_checkpoint("models/final_checkpoint.pth").model
    return zero_connections(model["last_layer.weight"], model["prototype_class"]), model


def test_a_sparse_phase_leaves_exact_zeros(workdir):
    share, model = finetuned(SPARSE, PATIENT, "training.loss_weights.l1=5.0", "training.phases.2.steps=30")
    assert share > 0.5
    own = model["last_layer.weight"][model["prototype_class"], torch.arange(len(model["prototype_class"]))]
    assert (own != 0).all()


def test_as_published_it_stays_dense(workdir):
    assert finetuned(PATIENT, "training.loss_weights.l1=5.0", "training.phases.2.steps=30")[0] == 0


def test_the_twin_does_not_mind(workdir):
    train.main(["--config", "tiny.yaml", "--set", SPARSE, "--set", PATIENT, "--set", "model.head=linear"])


@pytest.mark.parametrize("override", ["training.phases.2.early_stopping=3", "training.phases.2.lr={prototypes: 0.1}"])
def test_what_cannot_be_sparse_is_refused(workdir, override):
    with pytest.raises(ConfigError, match=r"phases\.2\.sparse"):
        tiny_config(SPARSE, override)


def test_resumed_is_uninterrupted(workdir):
    overrides = [SPARSE, PATIENT, "training.loss_weights.l1=0.5", "training.checkpoint_every=3"]
    whole = finetuned(*overrides)[1]
    command = ["--config", "tiny.yaml", *(part for o in overrides for part in ("--set", o))]
    (workdir / "models/final_checkpoint.pth").unlink()  # last_checkpoint.pth stands at step 3 of 4
    train.main([*command, "--resume", "auto"])
    again = load_checkpoint("models/final_checkpoint.pth").model
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
