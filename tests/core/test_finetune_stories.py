"""A trained model, fine-tuned on Alpaca records, has one loss curve and one adapter under every layout."""

import json
from pathlib import Path

import pytest

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from core.finetune_cases import data_config, tune
from core.test_sft_dataset import distances
from core.training_cases import Trained, join_stages
from support.commands import call
from support.processes import WorkerPool
from support.shared_data import SHARED_DATA, STORIES, TOKENIZERS, needs_shared_data
from support.tables import ReportTables

pytestmark = needs_shared_data
LENGTH, STEPS = 512, 3
TITLE = "stories260K on Alpaca records against one process: largest relative differences"
HEADER = ("tuned", "layout", "dtype", "losses and norms", "gradients", "weights")
# Only the order of sums differs. AdamW turns noise in near-zero gradients into whole steps of the learning rate, so
# fp32 weights differ by more than fp32 rounds.
TOLERANCE = {"float64": (1e-9, 1e-9, 1e-9), "float32": (1e-5, 1e-3, 5e-2)}
LAYOUTS = {
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "tp2 pp2": Layout(tp=2, pp=2),
    "tp2 dp2": Layout(tp=2, dp=2),
    "dp2 sharded": Layout(dp=2, sharded_optimizer=True),
}
LORA = LoraConfig(
    lora_target_modules=("query_key_value", "dense", "gate_proj", "up_proj", "down_proj"),
    lora_r=8,
    lora_alpha=16,
)
ALL_CASES = [(kind, dtype, name) for kind in ("LoRA", "full") for dtype in TOLERANCE for name in LAYOUTS]
CASES = [
    pytest.param(
        *case,
        marks=() if case == ("LoRA", "float64", "tp2") else pytest.mark.nightly,
    )
    for case in ALL_CASES
]


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first records as samples of the tokenizer of stories260K."""
    folder = tmp_path_factory.mktemp("alpaca")
    records = json.loads((SHARED_DATA / "instruction/alpaca/alpaca_data.json").read_text())[:150]
    (folder / "records.json").write_text(json.dumps(records))
    done = call(
        "asd-data", "preprocess", "--input", folder / "records.json", "--output-prefix", folder / "alpaca",
        "--tokenizer-name-or-path", TOKENIZERS / "tok512", "--handler-name", "GeneralInstructionHandler",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return folder / "alpaca"


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], Trained]:
    """What one process computed, by kind and format."""
    return {}


@pytest.mark.parametrize(("kind", "dtype", "name"), CASES)
def test_layouts(
    workers: WorkerPool,
    report: ReportTables,
    alpaca: Path,
    alone: dict[tuple[str, str], Trained],
    kind: str,
    dtype: str,
    name: str,
) -> None:
    data, lora, layout = data_config(alpaca, LENGTH), LORA if kind == "LoRA" else None, LAYOUTS[name]
    if (kind, dtype) not in alone:
        alone[kind, dtype] = workers.run(tune, 1, STORIES, Layout(), data, dtype, STEPS, lora=lora)[0]
    ranks = workers.run(tune, layout.world_size, STORIES, layout, data, dtype, STEPS, lora=lora)
    found = distances(join_stages(ranks, layout), alone[kind, dtype])
    report.add(TITLE, HEADER, kind, name, dtype, *found)
    assert all(value < limit for value, limit in zip(found, TOLERANCE[dtype], strict=True)), found
