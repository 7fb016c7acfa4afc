"""A trained model gives its recorded greedy ids under every layout, alone and in a batch with others."""

import json
from pathlib import Path

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.generation import generate_batch, generate_ids
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    pytest.param(Layout(tp=4), marks=pytest.mark.nightly),
    Layout(pp=2),
    Layout(tp=2, pp=2),
]
Ids = list[int]


def alone_and_together(
    folder: str, layout: Layout, prompts: list[Ids], new: int
) -> tuple[list[Ids], list[Ids]]:
    """Prompt and greedy ids of each prompt by itself, and of all in one batch."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32).eval()
    engine, settings = LLMEngine(model, mesh), GenerationSettings(new)
    alone = [generate_ids(engine, ids, settings) for ids in prompts]
    together = generate_batch(engine, prompts, [settings] * len(prompts))
    first, second = (
        [[*ids, *one.token_ids] for ids, one in zip(prompts, texts, strict=True)]
        for texts in (alone, together)
    )
    return first, second


@needs_shared_data
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_recorded_greedy_ids(workers: WorkerPool, layout: Layout) -> None:
    cases = json.loads((STORIES / "expected.json").read_text(encoding="utf-8"))["cases"]
    prompts = [case["prompt_ids"] for case in cases]
    want = [case["greedy_ids"] for case in cases]
    new = {len(ids) - len(prompt) for ids, prompt in zip(want, prompts, strict=True)}
    assert len(new) == 1
    assert len({len(ids) for ids in prompts}) > 1
    for alone, together in workers.run(
        alone_and_together, layout.world_size, str(STORIES), layout, prompts, new.pop()
    ):
        assert alone == want
        assert together == want
