"""The benchmark's naive references are right, so that its ratios compare the same work; every command runs."""

import json

import numpy as np
import pytest
import torch

import benchmark
from losses import diversity_loss
from push import nearest_patches

SMALL = [
    "--config", "configs/demo.yaml", "--repeats", "1",
    "--set", "dataset.crop_size=33", "--set", "training.batch_size=1", "--set", "training.iter_size=2",
]  # fmt: skip


def test_naive_diversity_equals_the_loss():
    generator = torch.Generator().manual_seed(0)
    distances = torch.rand(2, 6, 5, 5, generator=generator, dtype=torch.float64) * 4
    labels = torch.randint(0, 4, (2, 5, 5), generator=generator)
    labels[labels == 3] = 255
    prototype_class = torch.arange(6) // 2
    naive = benchmark.naive_diversity(distances, labels, prototype_class)
    torch.testing.assert_close(naive, diversity_loss(distances, labels, prototype_class).value)


def test_naive_push_equals_the_search():
    rng = np.random.default_rng(0)
    distances = rng.random((6, 4, 5), dtype=np.float32)
    cells = rng.integers(0, 3, (4, 5))
    prototype_class = np.arange(6) // 2
    naive = benchmark.naive_push(distances, cells.repeat(8, 0).repeat(8, 1), prototype_class)
    found, _ = nearest_patches(*map(torch.from_numpy, (distances[None], cells[None], prototype_class)))
    np.testing.assert_array_equal(naive, found.numpy())


@pytest.mark.parametrize(
    "command", ["diversity", "step", "phases", "batches", "profile", "evaluate", "loader", "schedule"]
)
def test_every_command_prints_and_writes_a_table(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "WHOLE_IMAGE", (64, 128))
    benchmark.main([command, *SMALL, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in rows)
    assert all(row["ms"] > 0 for row in rows if "ms" in row)


def test_step_times_cover_what_each_phase_trains():
    rows = {
        row["what"]
        for row in benchmark.bench_phases(benchmark.load_config(SMALL[1], SMALL[5::2]), torch.device("cpu"), 1)
    }
    assert rows == {"warmup", "joint", "finetune"}


def test_operations_are_those_of_the_products():
    a, b = torch.rand(2, 64, 32), torch.rand(32, 16)
    row = benchmark._rate(lambda: a @ b, 2.0, torch.device("cpu"), 1, bfloat16=False)
    assert row["TFLOP/s"] == pytest.approx(2 * (2 * 64 * 32 * 16) / 2e-3 / 1e12)
    assert row["share of matmul"] > 0


def test_one_large_batch_is_not_compared_with_itself():
    with pytest.raises(benchmark.ConfigError, match="iter_size: 1 is one large batch already"):
        benchmark.main(["batches", *SMALL, "--set", "training.iter_size=1"])


def test_the_large_batch_has_the_images_of_one_update():
    config = benchmark.load_config(SMALL[1], ["dataset.crop_size=33", "training.batch_size=1", "training.iter_size=3"])
    small, large = benchmark.bench_batches(config, torch.device("cpu"), 1)
    assert (small["what"], large["what"]) == ("batch_size 1, iter_size 3", "batch_size 3, iter_size 1")
    assert small["images/s"] * small["ms"] == pytest.approx(large["images/s"] * large["ms"]) == 3000
