"""A trained model: what a published LLaMA answered under transformers, it answers here, under every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.sharding import tensor_slice
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.cross_entropy import cross_entropy
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import ConfigError
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data
from support.tables import ReportTables

pytestmark = needs_shared_data
TITLE = "stories260K in fp32 against transformers"
HEADER = ("layout", "logits, largest difference", "mean NLL, difference", "greedy ids equal")


def answers(folder: str, cases: list[dict[str, Any]], plain_ids: list[int], layout: Layout) -> dict[str, Any]:
    """Logits of every prompt with its greedy answer, the ids that are likeliest at each place, the NLL of a text."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32).eval()
    vocab_size, group = model.config.vocab_size, mesh.group("tp")
    with torch.no_grad():
        logits, greedy = [], []
        for case in cases:
            ids = torch.tensor([case["greedy_ids"]])
            logits.append(
                gather_logits(forward_through_stages(model, mesh, ModelInput(ids))[0], vocab_size, group)
            )
            before = len(case["prompt_ids"])
            greedy.append(case["prompt_ids"] + logits[-1].argmax(-1)[before - 1 : -1].tolist())
        text = torch.tensor([plain_ids])
        scores = forward_through_stages(model, mesh, ModelInput(text[:, :-1]))
        nll = cross_entropy(scores, text[:, 1:], vocab_size, group).mean()
    return {"logits": logits, "greedy": greedy, "nll": float(nll)}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((STORIES / "expected.json").read_text())
    return content


@pytest.fixture(scope="module")
def reference(expected: dict[str, Any]) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([c["greedy_ids"]])).logits[0] for c in expected["cases"]]


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(pp=5), Layout(tp=2, pp=2)],
    ids=str,
)
def test_answers_equal_the_published_ones(
    workers: WorkerPool,
    report: ReportTables,
    expected: dict[str, Any],
    reference: list[torch.Tensor],
    layout: Layout,
) -> None:
    for found in workers.run(
        answers, layout.world_size, str(STORIES), expected["cases"], expected["plain_text_ids"], layout
    ):
        difference = max(
            float((ours - theirs).abs().max())
            for ours, theirs in zip(found["logits"], reference, strict=True)
        )
        # fp32 logits of up to 20 round at 2e-6; the sums of five layers run in another order.
        assert difference < 1e-4
        assert found["greedy"] == [case["greedy_ids"] for case in expected["cases"]]
        nll_difference = abs(found["nll"] - expected["plain_text_mean_nll"])
        assert nll_difference < 1e-5
        for case, logits in zip(expected["cases"], found["logits"], strict=True):
            last = logits[len(case["prompt_ids"]) - 1]
            top = last[case["last_prompt_top5_ids"]]
            assert (top - torch.tensor(case["last_prompt_top5_logits"])).abs().max() < 1e-4
    report.add(TITLE, HEADER, str(layout), difference, nll_difference, "yes")


def test_eight_devices_are_refused_because_172_is_not_divisible() -> None:
    config = open_weights(STORIES).config
    with pytest.raises(ConfigError, match="172 rows or columns to cut, which 8 ranks do not divide"):
        tensor_slice("layers.0.mlp.gate_proj.weight", (172, 64), config, Layout(tp=8), 0)
