"""What only a GPU can show: pytest -m cuda. Skipped where there is none."""

import pytest
import torch

import push
from dataset import build_dataset
from evaluation.labelling import View
from evaluation.measuring import evaluate as measure
from inference import open_model
from losses import diversity_loss
from model import squared_distances
from module import TrainingModule
from runtime.checkpoint import load_checkpoint
from tests.test_module import batch, copied, make
from tests.tiny import RandomImages

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions round to 10 bits by default; against the CPU they have to keep float32's 23."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(phase: int, *overrides: str) -> TrainingModule:
    """The model of `make` on the GPU; float32 unless said."""
    trainer = make(phase, "model.freeze_bn=true", *overrides)
    moved = TrainingModule(trainer.config, trainer.model, torch.device("cuda"))
    moved.begin_phase(phase)
    return moved


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_step_is_that_of_the_cpu(workdir, phase):
    how = ("system.precision=float32", "training.iter_size=1", "training.class_weights=[1, 2, 3, 1, 2, 3]")
    cpu, gpu = make(phase, "model.freeze_bn=true", *how), on_gpu(phase, *how)
    for trainer in (cpu, gpu):
        trainer.training_step(*batch())
    ours, theirs = cpu.take_averages(), gpu.take_averages()
    assert theirs.pop("train_accuracy") == pytest.approx(ours.pop("train_accuracy"), abs=0.05)  # ties may fall apart
    assert theirs == pytest.approx(ours, rel=1e-3)
    states = (trainer.phase.optimizer.state.values() for trainer in (cpu, gpu))
    for one, other in zip(*states, strict=True):
        largest = one["exp_avg"].abs().max().item()
        torch.testing.assert_close(other["exp_avg"].cpu(), one["exp_avg"], rtol=1e-2, atol=1e-3 * largest)


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_a_step_does_not_wait_for_the_gpu(workdir, phase):
    trainer = on_gpu(phase)
    pinned = [values.pin_memory() for values in batch()]
    trainer.training_step(*pinned)  # the first one makes tables and sets up libraries, and may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(*pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_is_the_default_and_distances_stay_float32(workdir):
    trainer = on_gpu(1)
    images = batch()[0].cuda()
    with torch.no_grad(), trainer.inference.autocast():
        assert torch.is_autocast_enabled("cuda")
        output = trainer.model(images)
        features = trainer.model.conv_features(images)
    assert output.distances.dtype == output.logits.dtype == torch.float32
    exact = squared_distances(features.double(), trainer.model.prototype_vectors.double())
    torch.testing.assert_close(output.distances.double(), exact, rtol=1e-3, atol=1e-3)


def test_the_diversity_loss_is_that_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(2, 12, 9, 9, generator=generator) * 4
    labels = torch.randint(0, 4, (2, 9, 9), generator=generator)
    labels[labels == 3] = 255
    results = []
    for device in ("cpu", "cuda"):
        values = distances.clone().to(device).requires_grad_()
        loss = diversity_loss(values, labels.to(device), torch.arange(12) // 4).value
        loss.backward()
        results.append((loss.detach().cpu(), values.grad.cpu()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)


def test_push_and_validation_are_those_of_the_cpu(workdir):
    how = ("system.precision=float32",)
    cpu, gpu = make(1, "model.freeze_bn=true", *how), on_gpu(1, *how)
    data = RandomImages(3, classes=6)
    counts, others = cpu.inference.validate(data).counts, gpu.inference.validate(data).counts.cpu()
    assert counts.sum() == others.sum() and (counts - others).abs().sum() <= 0.01 * counts.sum()
    ours, theirs = (push.find_neighbours(t.inference, data, 1, own_class=True) for t in (cpu, gpu))
    torch.testing.assert_close(theirs.distance.cpu(), ours.distance, rtol=1e-3, atol=1e-4)
    assert (ours.image == theirs.image.cpu()).float().mean() > 0.8  # of near ties the other may win


def test_the_metrics_of_explanations_are_those_of_the_cpu(workdir):
    how = ("system.precision=float32",)
    cpu, gpu = make(1, "model.freeze_bn=true", *how), on_gpu(1, *how)
    dataset = build_dataset(cpu.config, "val")
    ours, theirs = (measure(t.inference, dataset, View()) for t in (cpu, gpu))
    assert theirs.matrix.summary() == pytest.approx(ours.matrix.summary(), abs=0.02)
    for name in ("used", "purity", "similarity", "explaining", "stability", "faithfulness"):
        assert theirs.explanations[name] == pytest.approx(ours.explanations[name], rel=0.05, abs=0.1), name


def test_a_run_on_the_gpu_leaves_files_that_a_cpu_reads(workdir):
    import train

    train.main(["--config", "tiny.yaml", "--set", "system.device=cuda"])
    state = load_checkpoint("models/final_checkpoint.pth")
    assert all(value.device.type == "cpu" for value in state.model.values())
    model = open_model("models/final_checkpoint.pth", ["system.device=cpu"]).model
    assert copied(model).keys() == state.model.keys()
