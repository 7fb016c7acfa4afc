"""Gradients of several micro-batches make one step: micro-batch x dp x N is the global batch, while it grows too."""

import json
from pathlib import Path

import pytest

from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from support.commands import Finished, call, run_command
from support.models import tiny_config


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> list[object]:
    folder = tmp_path_factory.mktemp("accumulation")
    model = folder / "model.json"
    model.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return [
        "asd-core", "pretrain", "--model-config", model, "--data-path", dataset, "--seq-length", 32, "--device", "cpu",
        "--train-iters", 6, "--lr", 3e-3, "--dtype", "float64", "--split", "100,0,0", "--data-cache-path",
        folder / "cache", "--global-batch-size", 12, "--rampup-batch-size", 4, 4, 16,
    ]  # fmt: skip


# From 4 by 4 to 12 over 16 samples: two increments of 8 samples each.
SIZES = [4, 4, 8, 12, 12, 12]


def columns(done: Finished, folder: Path) -> dict[str, list[float]]:
    assert done.status == 0, done.stderr
    records = read_metrics(folder / "metrics.jsonl")
    names = ("lm_loss", "grad_norm", "learning_rate", "global_batch_size", "consumed_samples")
    return {name: [record[name] for record in records] for name in names}


def test_micro_batches_of_any_size_and_devices_make_the_same_steps(
    command: list[object], tmp_path: Path
) -> None:
    whole = columns(call(*command, "--micro-batch-size", 4, "--save", tmp_path / "4"), tmp_path / "4")
    assert whole["global_batch_size"] == SIZES
    assert whole["consumed_samples"] == [sum(SIZES[: step + 1]) for step in range(6)]
    one = columns(call(*command, "--micro-batch-size", 1, "--save", tmp_path / "1"), tmp_path / "1")
    two = columns(
        run_command(*command, "--micro-batch-size", 1, "--nproc-per-node", 2, "--save", tmp_path / "dp2"),
        tmp_path / "dp2",
    )
    for name, values in whole.items():
        # float64: only the order of sums differs.
        assert one[name] == pytest.approx(values, rel=1e-12), name
        assert two[name] == pytest.approx(values, rel=1e-12), name


def test_a_growing_batch_goes_on(command: list[object], tmp_path: Path) -> None:
    command = [*command, "--micro-batch-size", 2]
    whole = columns(call(*command, "--save", tmp_path / "whole"), tmp_path / "whole")
    halves = [*command, "--save", tmp_path / "half"]
    assert call(*halves, "--exit-interval", 2).status == 0
    assert columns(call(*halves, "--auto-resume"), tmp_path / "half") == whole


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--micro-batch-size", 5], "is not a multiple of micro_batch_size x dp = 5 x 1 = 5"),
        (["--micro-batch-size", 3], "both must be multiples of micro_batch_size x dp = 3"),
    ],
)
def test_sizes_that_do_not_fit(
    command: list[object], tmp_path: Path, flags: list[object], complaint: str
) -> None:
    done = call(*command, *flags, "--save", tmp_path / "run")
    assert done.status == 2
    assert complaint in done.complaint
