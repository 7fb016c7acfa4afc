"""Decoding with the cache gives the logits of one pass over the whole text, however the text is cut."""

from pathlib import Path

import pytest
import torch

from ascendspeed_core.config.parallel import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.build import load_model
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import open_weights
from ascendspeed_infer.generation import GenerationSettings, generate_ids, generate_together, make_cache
from support.families import REFERENCES
from support.processes import WorkerPool

LENGTH = 24


def decoded_and_whole(
    folder: str, layout: Layout, parts: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the text in parts, each after those before, and of the text in one pass."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float64).eval()
    tokens = torch.randint(0, 125, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    cache = make_cache(model, mesh, 1, LENGTH)
    pieces = [forward_through_stages(model, mesh, part, cache) for part in tokens.split(parts, dim=1)]
    whole = forward_through_stages(model, mesh, tokens)
    group = mesh.group("tp")
    return gather_logits(torch.cat(pieces, dim=1), 125, group), gather_logits(whole, 125, group)


def together_and_alone(folder: str, layout: Layout) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Greedy ids of prompts of several lengths, decoded together and one after the other."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float64).eval()
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 125, (length,), generator=draw).tolist() for length in (3, 14, 9, 1)]
    settings = [GenerationSettings(max_new_tokens) for max_new_tokens in (9, 4, 9, 7)]
    never = [lambda _: False] * len(prompts)
    together = generate_together(model, mesh, prompts, settings, never)
    alone = [generate_ids(model, mesh, ids, own) for ids, own in zip(prompts, settings, strict=True)]
    return [one.token_ids for one in together], [one.token_ids for one in alone]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("name", ["Llama 3.2", "Mistral", "Baichuan 2 13B", "Bloom"])
def test_texts_of_a_batch_are_those_alone(
    workers: WorkerPool, tmp_path: Path, name: str, layout: Layout
) -> None:
    REFERENCES[name].save(tmp_path)
    for together, alone in workers.run(together_and_alone, layout.world_size, str(tmp_path), layout):
        assert together == alone
        assert len({ids[-1] for ids in alone}) > 1


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("name", ["Llama 3.2", "Mistral", "Qwen 3", "Baichuan 2 13B", "Bloom"])
def test_decoding_equals_one_pass(workers: WorkerPool, tmp_path: Path, name: str, layout: Layout) -> None:
    """Rotary, a window of 7 keys, query-key norms, ALiBi; a prompt, a longer continuation, then token by token."""
    REFERENCES[name].save(tmp_path)
    parts = (9, 6, *[1] * 9)
    assert sum(parts) == LENGTH
    for decoded, whole in workers.run(decoded_and_whole, layout.world_size, str(tmp_path), layout, parts):
        # float64, the same sums in other shapes.
        torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-11)
        assert float(whole.abs().max()) > 0.5
