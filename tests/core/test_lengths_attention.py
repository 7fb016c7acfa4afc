"""Attention of several texts in one call gives what a call for each gives, in passes and in recorded ones."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.lengths import attend_text_by_text, lengths_attention
from ascendspeed_core.models.cache import CacheSlot, KeyValueCache, SequenceChunk
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from ascendspeed_infer.engine.decode_graph import SIZES, DecodeGraphs, decode_graphs_for
from support.models import tiny_config
from support.tables import ReportTables

CPU = ParallelMesh(Device("cpu"), Layout())
CONFIGS = {
    "llama": tiny_config(max_position_embeddings=256),
    "window": tiny_config(max_position_embeddings=256, family="mistral", sliding_window=7),
    "as many key heads": tiny_config(max_position_embeddings=256, num_key_value_heads=8),
}


def model_of(name: str) -> Transformer:
    return load_model(InitialWeights(CONFIGS[name], 1), CPU, torch.float64).eval()


def cache_for(model: Transformer, is_one_call: bool) -> KeyValueCache:
    attention = attend_text_by_text if is_one_call else None
    return KeyValueCache(model.layer_caches(1), 2048, torch.float64, CPU.device.torch, attention)


@torch.no_grad()
def logits_of(
    model: Transformer, cache: KeyValueCache, chunks: list[SequenceChunk], ids: list[int]
) -> torch.Tensor:
    cached = CachedPass(cache, chunks)
    assert (cached.lengths is not None) == (cache.lengths_attention is not None)
    return model(ModelInput(torch.tensor([ids]), cache=cached)).logits[0]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_passes_of_chunks_of_any_sizes(report: ReportTables, name: str) -> None:
    model, draw = model_of(name), random.Random(name)
    both = [cache_for(model, is_one_call) for is_one_call in (False, True)]
    slots = [[cache.reserve(160) for _ in range(5)] for cache in both]
    ends, largest, passes = [0] * 5, 0.0, 0
    while min(ends) < 100:
        chosen = sorted(draw.sample(range(5), draw.randint(1, 5)))
        counts = [draw.choice((1, 1, draw.randint(2, 30))) for _ in chosen]
        ids = draw.choices(range(128), k=sum(counts))
        found = []
        for cache, own in zip(both, slots, strict=True):
            chunks = [
                SequenceChunk(own[text], min(ends[text], 130), count)
                for text, count in zip(chosen, counts, strict=True)
            ]
            found.append(logits_of(model, cache, chunks, ids))
        for text, count in zip(chosen, counts, strict=True):
            ends[text] = min(ends[text], 130) + count
        largest = max(largest, float((found[0] - found[1]).abs().max() / found[0].abs().max()))
        passes += 1
    report.add(
        "One call for all texts against a call for each, float64",
        ("model", "passes", "largest difference"),
        name,
        passes,
        largest,
    )
    # Sums in another order: round-off of 1e-16 times the terms of four layers.
    assert largest < 1e-12


@dataclass(frozen=True)
class ReplayingDevice(Device):
    """A CPU that computes again what an accelerator would replay."""

    @property
    def can_record(self) -> bool:
        return True

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = work()
        return lambda: result.copy_(work()), result


@pytest.mark.parametrize("name", list(CONFIGS))
def test_recorded_passes_of_single_tokens(name: str) -> None:
    """Batches shrink and grow over the sizes, slots change, and what others have in the cache stays as it was."""
    model, draw = model_of(name), random.Random(name)
    mesh = ParallelMesh(ReplayingDevice("cpu"), Layout())
    plain, recorded = cache_for(model, False), cache_for(model, True)
    graphs = DecodeGraphs(model, mesh, recorded)
    texts = [draw.choices(range(128), k=draw.randint(1, 40)) for _ in range(11)]
    slots = [[cache.reserve(80) for _ in texts] for cache in (plain, recorded)]
    for text, ids in enumerate(texts):
        for cache, own in zip((plain, recorded), slots, strict=True):
            logits_of(model, cache, [SequenceChunk(own[text], 0, len(ids))], ids)
    for size in (11, 3, 1, 7, 11, 2, 10):
        chosen = draw.sample(range(len(texts)), size)
        tokens = draw.choices(range(128), k=size)
        chunks = [[SequenceChunk(own[text], len(texts[text]), 1) for text in chosen] for own in slots]
        want = logits_of(model, plain, chunks[0], tokens)
        with torch.no_grad():
            got = graphs.run(tokens, chunks[1])
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
        for text, token in zip(chosen, tokens, strict=True):
            texts[text].append(token)
    assert sorted(SIZES) == list(SIZES)


def test_a_cpu_has_a_call_for_each_text() -> None:
    device = Device("cpu")
    assert lengths_attention(device, torch.bfloat16, 64, False) is None
    model = model_of("llama")
    assert decode_graphs_for(model, CPU, cache_for(model, True)) is None
    assert (
        decode_graphs_for(model, ParallelMesh(ReplayingDevice("cpu"), Layout()), cache_for(model, False))
        is None
    )


@pytest.mark.parametrize(
    ("dtype", "head_dim", "is_added", "is_taken"),
    [
        (torch.bfloat16, 128, False, True),
        (torch.float16, 80, False, True),
        (torch.float32, 128, False, False),
        (torch.bfloat16, 128, True, False),
        (torch.bfloat16, 260, False, False),
        (torch.bfloat16, 12, False, False),
    ],
)
def test_what_the_kernel_takes(dtype: torch.dtype, head_dim: int, is_added: bool, is_taken: bool) -> None:
    found = lengths_attention(Device("cuda"), dtype, head_dim, is_added)
    assert (found is not None) == is_taken


def test_chunks_of_one_slot_and_passes_of_fixed_length_have_a_call_each() -> None:
    model = model_of("llama")
    cache = cache_for(model, True)
    slot: CacheSlot = cache.reserve(40)
    chunk = SequenceChunk(slot, 0, 4)
    assert CachedPass(cache, [chunk]).lengths is not None
    assert CachedPass(cache, [chunk, chunk]).lengths is None
    assert CachedPass(cache, [chunk], 16).lengths is None
