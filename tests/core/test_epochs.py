"""The length of a run in passes over its data: every sample is seen, and a resume changes nothing."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.training import DataConfig, TrainingConfig
from ascendspeed_core.data.gpt_dataset import samples_of_epochs
from ascendspeed_core.data.sample_index import build_datasets
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.optim.schedule import samples_of_run, with_epochs
from ascendspeed_data.indexed import IndexedDatasetWriter
from support.commands import call, run_command
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables


def test_steps_take_all_samples_and_no_more(report: ReportTables) -> None:
    draw, tried, wrong = random.Random(4), 400, 0
    for _ in range(tried):
        samples, dp, micro = draw.randint(1, 500), draw.choice((1, 2, 4)), draw.choice((1, 3))
        step = dp * micro
        size = step * draw.randint(1, 6)
        ramp: tuple[int, ...] = ()
        if draw.random() < 0.5 and size > step:
            ramp = (step, step, draw.randint(0, 300))
        batch = BatchConfig(micro_batch_size=micro, global_batch_size=size, rampup_batch_size=ramp)
        training, consumed = with_epochs(TrainingConfig(num_train_epochs=1.0), batch, dp, samples)
        one_less = training.model_copy(update={"train_iters": training.train_iters - 1})
        wrong += consumed != samples_of_run(training, batch, dp)
        wrong += not samples_of_run(one_less, batch, dp) < samples <= consumed
    report.add("Runs whose length is in epochs", ("drawn", "disagreements"), tried, wrong)
    assert not wrong


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.0, 3.5])
def test_samples_of_plain_text_are_those_of_megatron_cores_index(tmp_path: Path, epochs: float) -> None:
    """As many samples need so many passes over the documents and no more."""
    draw = np.random.default_rng(3)
    with IndexedDatasetWriter(tmp_path / "data", np.uint16) as writer:
        lengths = draw.integers(1, 30, 40)
        writer.add_documents(lengths, draw.integers(0, 90, lengths.sum()).astype(np.uint16))
        writer.finish()
    config = DataConfig(
        data_path=(str(tmp_path / "data"),), split="1,0,0", seq_length=16, data_cache_path=tmp_path / "cache"
    )
    samples = samples_of_epochs(config, epochs)
    assert samples == (int(epochs * lengths.sum()) - 1) // 16
    for count, passes in ((samples, int(np.ceil(epochs))), (samples + 1, int(np.floor(epochs)) + 1)):
        built = build_datasets(config, 5, (count, 0, 0), 97, None)[0]
        assert len(built.document_index) == 40 * passes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("epochs") / "hf"
    save_hugging_face(
        tiny_config(vocab_size=400, max_position_embeddings=256), folder, tokenizer=tokenizer_folder
    )
    return folder


def finetune(folder: Path, model: Path, data: Path, *flags: object, run: Any = run_command) -> Any:
    return run(
        "asd-core", "finetune", "--load", model, "--save", folder, "--device", "cpu", "--dtype", "float64",
        "--is-instruction-dataset", "--train-data-path", data, "--seq-length", 256, "--global-batch-size", 6,
        "--micro-batch-size", 3, "--lr", 1e-3, "--num-train-epochs", 1.5, *flags,
    )  # fmt: skip


def test_a_run_over_epochs_goes_on(sets: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    from ascendspeed_data.dataset import open_dataset

    count = len(open_dataset(sets[0]).ids)
    steps = -(-int(np.ceil(1.5 * count)) // 6)
    held_out = (
        "--valid-data-path",
        sets[1],
        "--test-data-path",
        sets[1],
        "--eval-iters",
        1,
        "--eval-interval",
        steps,
    )
    planned = finetune(tmp_path / "plan", base, sets[0], "--dry-run", run=call)
    assert f"num_train_epochs=1.5: {int(np.ceil(1.5 * count))} samples, {steps} iterations" in planned.stderr
    one = finetune(tmp_path / "one", base, sets[0], *held_out)
    assert one.status == 0, one.stderr
    cut = finetune(tmp_path / "two", base, sets[0], *held_out, "--exit-interval", steps - 2)
    assert cut.status == 0, cut.stderr
    on = finetune(tmp_path / "two", base, sets[0], *held_out, "--auto-resume")
    assert on.status == 0, on.stderr
    want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [record["lm_loss"] for record in got] == [record["lm_loss"] for record in want]
    assert len(want) == steps
    assert want[-1]["consumed_samples"] >= 1.5 * count
    # The same packs: one measure begins where the other does.
    assert want[-1]["test_loss"] == want[-1]["validation_loss"] == got[-1]["test_loss"]
    description = json.loads((tmp_path / "two" / f"iter_{steps:07d}" / "checkpoint.json").read_text())
    assert description["run"]["training"]["num_train_epochs"] == 1.5
