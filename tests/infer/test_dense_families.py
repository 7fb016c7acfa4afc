"""The dense families of today decode what their references decode, with all options of attention."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import apply_inference_kernels, load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings, SamplingRequest
from ascendspeed_infer.generation import generate_batch
from core.attention_options import OPTIONS
from support.dense_families import DENSE_REFERENCES
from support.families import logits_of
from support.models import tiny_config
from support.processes import WorkerPool

PROMPT_LENGTHS, NEW = (3, 19, 11), 9
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2)]
WITH_EVERYTHING = ("Gemma 2", "Gemma 3", "OLMo 3", "Command R7B")
"""Together they have all options that reach the cache: windows and bases by layer, caps, norms over ranks."""


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 125, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def greedy_ids(folder: str, layout: Layout) -> list[list[int]]:
    """Of all prompts together; a pass reads at most 8 tokens of them."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32).eval()
    apply_inference_kernels(model, mesh)
    engine = LLMEngine(model, mesh, cache_tokens=160, max_num_seqs=2, prefill_tokens_per_step=8)
    return [list(one.token_ids) for one in generate_batch(engine, prompts(), [GenerationSettings(NEW)] * 3)]


@torch.no_grad()
def their_greedy_ids(model: Any) -> list[list[int]]:
    found = []
    for prompt in prompts():
        ids = list(prompt)
        for _ in range(NEW):
            ids.append(int(logits_of(model, torch.tensor([ids]))[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize("name", DENSE_REFERENCES)
def test_greedy_ids_are_the_references(workers: WorkerPool, tmp_path: Path, name: str) -> None:
    want = their_greedy_ids(DENSE_REFERENCES[name].save(tmp_path))
    for layout in LAYOUTS if name in WITH_EVERYTHING else LAYOUTS[:1]:
        for found in workers.run(greedy_ids, layout.world_size, str(tmp_path), layout):
            assert found == want, layout
    assert len({tuple(ids) for ids in want}) == len(want)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
@pytest.mark.parametrize("name", [name for name in DENSE_REFERENCES if name not in WITH_EVERYTHING])
def test_greedy_ids_under_layouts(workers: WorkerPool, tmp_path: Path, name: str, layout: Layout) -> None:
    want = their_greedy_ids(DENSE_REFERENCES[name].save(tmp_path))
    for found in workers.run(greedy_ids, 2, str(tmp_path), layout):
        assert found == want


def options_in_the_engine(
    name: str, layout: Layout
) -> tuple[list[CompletionOutput], list[CompletionOutput], list[float]]:
    """Completions together and alone, batch-invariant; and how far log-probabilities are from those of one pass."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(tiny_config(**OPTIONS[name]), 3), mesh, torch.float32).eval()
    apply_inference_kernels(model, mesh)
    engine = LLMEngine(model, mesh, cache_tokens=400, max_num_seqs=4, prefill_tokens_per_step=24)
    engine.check_batch_invariance()
    settings = GenerationSettings(NEW, return_log_probs=True)

    def run(ids: list[list[int]]) -> list[CompletionOutput]:
        requests = [SamplingRequest(prompt, settings) for prompt in ids]
        for number, request in enumerate(requests):
            engine.add_request(str(number), request, True)
        engine.run()
        return [request.outputs()[0] for request in requests]

    together = run(prompts())
    alone = [one for prompt in prompts() for one in run([prompt])]
    far = []
    if layout.world_size == 1:
        for prompt, one in zip(prompts(), together, strict=True):
            ids = torch.tensor([[*prompt, *one.token_ids]])
            with torch.no_grad():
                rows = model(ModelInput(ids)).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            want = rows.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0].tolist()
            assert one.log_probs is not None
            far += [abs(a - b) for a, b in zip(one.log_probs, want, strict=True)]
    return together, alone, far


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, Layout()) for name in OPTIONS] + [("norms over all heads", Layout(tp=2))],
    ids=str,
)
def test_options_are_batch_invariant(workers: WorkerPool, name: str, layout: Layout) -> None:
    for together, alone, far in workers.run(options_in_the_engine, layout.world_size, name, layout):
        assert together == alone
        # fp32 on log-probabilities of about 5, the same sums in other shapes.
        assert all(value < 2e-5 for value in far)
        assert len(far) == (NEW * 3 if layout == Layout() else 0)
