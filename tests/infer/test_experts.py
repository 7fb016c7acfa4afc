"""Models with experts decode as transformers does, under every layout, and alike in any company."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.cache import SequenceChunk
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import ConfigError
from ascendspeed_infer.config import inference_layout
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.model_runner import (
    ModelRunner,
    ScheduledChunk,
    check_batch_invariance,
)
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.generation import generate_batch
from support.families import EXPERT_REFERENCES
from support.processes import WorkerPool

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, ep=2, etp=1),
    Layout(tp=2, pp=2, ep=2, etp=1),
]
PROMPTS = [[5, 17, 99, 4], [7, 3], [60, 61, 62, 63, 64, 65, 66]]
NEW_TOKENS = 12


def greedy(folder: str, layout: Layout) -> list[list[int]]:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32).eval()
    settings = [GenerationSettings(NEW_TOKENS)] * len(PROMPTS)
    return [list(one.token_ids) for one in generate_batch(LLMEngine(model, mesh), PROMPTS, settings)]


GREEDY: list[Any] = [(name, LAYOUTS[:2]) for name in EXPERT_REFERENCES]
GREEDY += [pytest.param(name, LAYOUTS[2:], marks=pytest.mark.nightly) for name in EXPERT_REFERENCES]


@pytest.mark.parametrize(("name", "layouts"), GREEDY)
def test_greedy_ids_are_those_of_transformers(
    workers: WorkerPool, tmp_path: Path, name: str, layouts: list[Layout]
) -> None:
    reference: Any = EXPERT_REFERENCES[name].save(tmp_path)
    want = []
    for prompt in PROMPTS:
        ids = reference.generate(
            torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        want.append(ids[0, len(prompt) :].tolist())
    assert len({token for ids in want for token in ids}) > 5
    for layout in layouts:
        for found in workers.run(greedy, layout.world_size, str(tmp_path), layout):
            assert found == want, layout


def in_company_and_alone(folder: str, layout: Layout) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of texts in batch-invariant passes with others and alone."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32).eval()
    check_batch_invariance(model, mesh)
    draw = torch.Generator().manual_seed(6)
    texts = [torch.randint(0, 125, (count,), generator=draw).tolist() for count in (11, 3, 30, 7, 1)]

    def run(chosen: list[list[int]]) -> list[torch.Tensor]:
        runner = ModelRunner(model, mesh, 256)
        chunks = [SequenceChunk(runner.cache.reserve(32), 0, len(ids)) for ids in chosen]
        return runner.run(
            [
                ScheduledChunk(chunk, ids, len(ids), batch_invariant=True)
                for chunk, ids in zip(chunks, chosen, strict=True)
            ]
        )

    return list(zip(run(texts), (run([ids])[0] for ids in texts), strict=True))


COMPANY: list[Any] = [(name, Layout()) for name in ("Qwen2-MoE", "DeepSeek-V3", "gpt-oss")]
COMPANY.append(("Qwen2-MoE", Layout(tp=2, ep=2, etp=1)))
COMPANY += [
    pytest.param(name, layout, marks=pytest.mark.nightly)
    for name in ("DeepSeek-V2", "DeepSeek-V3", "GLM-4.5", "gpt-oss")
    for layout in (Layout(tp=2), Layout(tp=2, ep=2, etp=1))
]


@pytest.mark.parametrize(("name", "layout"), COMPANY, ids=str)
def test_company_changes_no_bit(workers: WorkerPool, tmp_path: Path, name: str, layout: Layout) -> None:
    EXPERT_REFERENCES[name].save(tmp_path)
    for pairs in workers.run(in_company_and_alone, layout.world_size, str(tmp_path), layout):
        assert len(pairs) == 5
        for together, alone in pairs:
            assert torch.equal(together, alone)


def test_replicas_share_no_experts_in_inference() -> None:
    parallel = ParallelConfig(expert_model_parallel_size=2)
    with pytest.raises(ConfigError, match="must divide tensor_model_parallel_size=1 in inference"):
        inference_layout(parallel, 2)
