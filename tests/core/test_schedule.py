"""The length of a run and its learning rate in samples, as Megatron-LM counts them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.training import TrainingConfig
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.optim.schedule import samples_of_run, with_iterations
from ascendspeed_data.errors import ConfigError
from support.commands import call


def iterations_of_megatron_lm(train_samples: int, rampup: tuple[int, ...], size: int, dp: int) -> int:
    """`update_train_iters` of Megatron-LM's training.py, on megatron-core's own calculator."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.core import package_info

    if not rampup:
        return train_samples // size
    if not hasattr(calculator, "RampupBatchsizeNumMicroBatchesCalculator"):
        pytest.skip(
            f"megatron-core {package_info.__version__} has no ramp-up any more; install 0.17 or older"
        )
    running = calculator.RampupBatchsizeNumMicroBatchesCalculator(size, 1, dp, False, -1, *rampup)
    iterations = consumed = 0
    while consumed <= rampup[2]:
        running.update(consumed, consistency_check=False)
        consumed += running.get_current_running_global_batch_size()
        iterations += 1
    if train_samples > consumed:
        iterations += (train_samples - consumed) // size
    return iterations


@pytest.mark.parametrize("train_samples", [100, 333, 1000])
@pytest.mark.parametrize("rampup", [(), (4, 4, 30), (8, 4, 57)])
@pytest.mark.parametrize("dp", [1, 2])
def test_steps_are_those_of_megatron_lm(train_samples: int, rampup: tuple[int, ...], dp: int) -> None:
    batch = BatchConfig(global_batch_size=16, rampup_batch_size=rampup)
    made = with_iterations(TrainingConfig(train_samples=train_samples), batch, dp)
    assert made.train_iters == iterations_of_megatron_lm(train_samples, rampup, 16, dp)
    assert train_samples - 16 < samples_of_run(made, batch, dp) <= train_samples


def test_a_run_that_ends_within_the_ramp_up_takes_no_more_than_it_was_given() -> None:
    """Megatron-LM goes on to the end of the ramp-up."""
    batch = BatchConfig(global_batch_size=16, rampup_batch_size=(4, 4, 300))
    made = with_iterations(TrainingConfig(train_samples=20), batch, 1)
    assert (made.train_iters, samples_of_run(made, batch, 1)) == (5, 20)


def test_a_ramp_up_over_no_samples_is_none() -> None:
    batch = BatchConfig(global_batch_size=16, rampup_batch_size=(4, 4, 0))
    made = with_iterations(TrainingConfig(train_samples=32), batch, 1)
    assert (made.train_iters, samples_of_run(made, batch, 1)) == (2, 32)


@pytest.mark.parametrize("rampup", [(0, 4, 30), (4, 0, 30), (4, 5, 30), (20, 4, 30)])
def test_a_ramp_up_that_does_not_lead_to_the_batch_is_refused(rampup: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="lead in whole increments to global_batch_size=16"):
        BatchConfig(global_batch_size=16, rampup_batch_size=rampup).resolve_global_batch_size(1)


def test_less_than_a_step_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="train_samples=3 does not fill the first step of 16 samples; give 16"
    ):
        with_iterations(TrainingConfig(train_samples=3), BatchConfig(global_batch_size=16), 1)


@pytest.fixture
def arguments(tmp_path: Path, dataset: Path) -> list[object]:
    import json

    from ascendspeed_core.models.families import find_family
    from support.models import tiny_config

    config = find_family("llama").write_config(tiny_config(vocab_size=400, num_layers=1))
    (tmp_path / "model.json").write_text(json.dumps(config))
    return [
        "asd-core", "pretrain", "--model-config", tmp_path / "model.json", "--data-path", dataset, "--seq-length", 16,
        "--global-batch-size", 4, "--device", "cpu", "--split", "100,0,0",
    ]  # fmt: skip


def test_a_run_in_samples_is_the_run_in_steps(arguments: list[object], tmp_path: Path) -> None:
    """27 samples fill six steps of four; the schedule is the same in either unit."""
    in_samples = ["--train-samples", 27, "--lr-decay-samples", 24, "--lr-warmup-samples", 8]
    in_steps = ["--train-iters", 6, "--lr-decay-iters", 6, "--lr-warmup-iters", 2]
    for name, flags in (("samples", in_samples), ("steps", in_steps)):
        done = call(*arguments, *flags, "--save", tmp_path / name)
        assert done.status == 0, done.stderr
    assert "iterations 0 to 6" in call(*arguments, *in_samples, "--dry-run").stderr
    keys = ("iteration", "lm_loss", "learning_rate", "consumed_samples")
    samples, steps = (
        [[record[key] for key in keys] for record in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("samples", "steps")
    )
    assert samples == steps
    assert len(samples) == 6


def test_the_rate_under_ramp_up_goes_by_samples(arguments: list[object], tmp_path: Path) -> None:
    """Against megatron-core's own scheduler, stepped by the samples of each step."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    flags = ["--train-samples", 40, "--rampup-batch-size", 1, 1, 12, "--lr-warmup-samples", 10, "--lr", 1e-3]
    assert call(*arguments, *flags, "--save", tmp_path / "run").status == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[0]["global_batch_size"] == 1
    assert records[-1]["global_batch_size"] == 4
    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    theirs = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=10, lr_decay_steps=40,
        lr_decay_style="linear", start_wd=0.01, end_wd=0.01, wd_incr_steps=40, wd_incr_style="constant",
    )  # fmt: skip
    for record in records:
        assert record["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        theirs.step(record["global_batch_size"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-samples", 8, "--train-iters", 2], "train_iters=2 and train_samples=8 were both given"),
        ([], "give --train-iters, --train-samples or --num-train-epochs"),
        (
            ["--train-samples", 8, "--lr-warmup-iters", 1],
            "lr_warmup_iters was given with train_samples; give",
        ),
        (["--train-iters", 8, "--lr-decay-samples", 9], "with train_iters; give --lr-decay-iters"),
        (["--train-samples", 8, "--lr-warmup-samples", 1, "--lr-warmup-fraction", 0.1], "were both given"),
    ],
)
def test_units_are_not_mixed(arguments: list[object], flags: list[object], message: str) -> None:
    done = call(*arguments, *flags)
    assert done.status == 2
    assert message in done.complaint
