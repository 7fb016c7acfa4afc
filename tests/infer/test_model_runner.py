"""Decoding with the cache gives the logits of one pass over the whole text, however the text is cut."""

from pathlib import Path

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.cache import BLOCK_TOKENS, KeyValueCache, LayerCache, SequenceChunk
from ascendspeed_core.models.packed_weight import pack_weights
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.model_runner import ModelRunner, ScheduledChunk, make_cache
from ascendspeed_infer.engine.sequence import GenerationSettings
from ascendspeed_infer.generation import generate_batch, generate_ids
from support.families import REFERENCES
from support.made_up_layers import made_up_layers
from support.models import tiny_config
from support.processes import WorkerPool

LENGTH = 24


def decoded_and_whole(
    folder: str, layout: Layout, parts: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the text in parts, each after those before, and of the text in one pass."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float64).eval()
    return both_logits(model, mesh, parts)


def made_up_decoded_and_whole(
    layout: Layout, parts: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, ...]]]:
    """The same of a model whose layers keep different things, and the shapes of what this rank keeps."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    config = tiny_config(qk_norm=True, initializer_range=0.4)
    with made_up_layers():
        model = load_model(InitialWeights(config, 5), mesh, torch.float64).eval()
    shapes = [tuple(tensor.shape) for tensor in kept(make_cache(model, mesh, BLOCK_TOKENS))]
    return *both_logits(model, mesh, parts), shapes


def both_logits(
    model: Transformer, mesh: ParallelMesh, parts: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    text, other = torch.randint(0, 125, (2, LENGTH), generator=draw).tolist()
    runner = ModelRunner(model, mesh, 3 * LENGTH)
    runner.cache.reserve(5)
    slot, others = runner.cache.reserve(LENGTH), runner.cache.reserve(LENGTH)
    pieces, start = [], 0
    for count in parts:
        # In company: the same pass reads as much of another text, before or behind.
        works = [
            ScheduledChunk(SequenceChunk(its, start, count), ids[start : start + count], count)
            for its, ids in ((slot, text), (others, other))
        ]
        place = start % 2
        pieces.append(runner.run(works[::-1] if place else works)[place])
        start += count
    whole = forward_through_stages(model, mesh, ModelInput(torch.tensor([text])))
    return torch.cat(pieces), gather_logits(whole[0], model.config.vocab_size, mesh.group("tp"))


def together_and_alone(folder: str, layout: Layout) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Greedy ids of prompts of several lengths, decoded together and one after the other."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float64).eval()
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 125, (length,), generator=draw).tolist() for length in (3, 14, 9, 1)]
    settings = [GenerationSettings(max_new_tokens) for max_new_tokens in (9, 4, 9, 7)]
    engine = LLMEngine(model, mesh)
    together = generate_batch(engine, prompts, settings)
    alone = [generate_ids(engine, ids, own) for ids, own in zip(prompts, settings, strict=True)]
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


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=4)], ids=str)
@pytest.mark.parametrize("name", ["Llama 3.2", "Mistral", "Qwen 3", "Baichuan 2 13B", "Bloom"])
def test_decoding_equals_one_pass(workers: WorkerPool, tmp_path: Path, name: str, layout: Layout) -> None:
    """Rotary, a window of 7 keys, query-key norms, ALiBi; more devices than key-value heads.

    A prompt, a longer continuation, then token by token.
    """
    REFERENCES[name].save(tmp_path)
    parts = (9, 6, *[1] * 9)
    assert sum(parts) == LENGTH
    for decoded, whole in workers.run(decoded_and_whole, layout.world_size, str(tmp_path), layout, parts):
        # float64, the same sums in other shapes.
        torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-11)
        assert float(whole.abs().max()) > 0.5


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
def test_layers_that_keep_different_things(workers: WorkerPool, layout: Layout) -> None:
    """A window, one latent of each token in place of key and value, half of each head turned: one cache for all."""
    parts = (9, 6, *[1] * 9)
    found = workers.run(made_up_decoded_and_whole, layout.world_size, layout, parts)
    for decoded, whole, _ in found:
        torch.testing.assert_close(decoded, whole, rtol=0, atol=1e-11)
        assert float(whole.abs().max()) > 0.5
    heads = 4 // layout.tp
    both = [(heads, BLOCK_TOKENS, 4)] * 2
    want = [both, [(BLOCK_TOKENS, heads * 4)], both, both]
    for rank, (_, _, shapes) in enumerate(found):
        layers = {1: (0, 1, 2, 3), 2: ((0, 1), (2, 3))[rank]}[layout.pp]
        assert shapes == [shape for layer in layers for shape in want[layer]]


def in_company_and_alone(
    folder: str, layout: Layout, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits of texts of unequal lengths, some that go on by a token and some that are read, in one pass and alone."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, dtype, joined_projections=True).eval()
    pack_weights(model)
    draw = torch.Generator().manual_seed(6)
    parts = [(17, 1), (3, 1), (0, 5), (9, 1), (4, 3), (0, 1), (2, 3)]
    texts = [torch.randint(0, 125, (start + count,), generator=draw).tolist() for start, count in parts]

    def works(runner: ModelRunner) -> list[ScheduledChunk]:
        slots = [runner.cache.reserve(LENGTH) for _ in parts]
        pieces = [
            SequenceChunk(slot, start, count) for slot, (start, count) in zip(slots, parts, strict=True)
        ]
        both = list(zip(pieces, texts, strict=True))
        runner.run(
            [
                ScheduledChunk(SequenceChunk(one.slot, 0, one.start), ids[: one.start])
                for one, ids in both
                if one.start
            ]
        )
        return [ScheduledChunk(one, ids[one.start :], one.count) for one, ids in both]

    capacity = 2 * LENGTH * len(parts)
    runner = ModelRunner(model, mesh, capacity)
    together = runner.run(works(runner))
    runner = ModelRunner(model, mesh, capacity)
    return [(found, runner.run([one])[0]) for found, one in zip(together, works(runner), strict=True)]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("name", ["Llama 3.2", "Mistral", "Qwen 3", "Baichuan 2 13B", "Bloom"])
def test_unequal_texts_in_one_pass(workers: WorkerPool, tmp_path: Path, name: str, layout: Layout) -> None:
    """Grouped heads, a window, ALiBi; places of 1 to 5 tokens after 0 to 17 others."""
    REFERENCES[name].save(tmp_path)
    # The same sums in other shapes; logits of up to 10.
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        for pairs in workers.run(in_company_and_alone, layout.world_size, str(tmp_path), layout, dtype):
            assert [len(found) for found, _ in pairs] == [1, 1, 5, 1, 3, 1, 3]
            for found, alone in pairs:
                torch.testing.assert_close(found, alone, rtol=0, atol=tolerance)
                assert float(alone.abs().max()) > 0.5


def kept(cache: KeyValueCache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in layer]


def small_cache(blocks: int) -> KeyValueCache:
    layers = [LayerCache(((3, 4), (3, 4))), LayerCache(((5,),)), LayerCache(((3, 4), (3, 4)))]
    cache = KeyValueCache(layers, blocks * BLOCK_TOKENS, torch.float32, torch.device("cpu"))
    for tensor in kept(cache):
        tensor.zero_()
    return cache


def test_slots_move_together_with_what_they_hold() -> None:
    """Free blocks that lie apart are enough for a slot of them all."""
    cache = small_cache(8)
    slots = [cache.reserve(BLOCK_TOKENS * blocks - 3) for blocks in (1, 2, 1, 2, 2)]
    assert cache.free_blocks == 0
    for number, slot in enumerate(slots):
        for sign, tensor in enumerate(kept(cache), start=1):
            mine = tensor[..., slot.start : slot.start + slot.tokens, :]
            mine[:] = sign * (torch.arange(slot.tokens).view(-1, 1) + 100.0 * number)
    for number in (0, 2, 4):
        cache.release(slots[number])
    assert cache.free_blocks == 4
    large = cache.reserve(4 * BLOCK_TOKENS)
    assert cache.free_blocks == 0
    assert [(slot.first_block, slot.num_blocks) for slot in (slots[1], slots[3], large)] == [
        (0, 2),
        (2, 2),
        (4, 4),
    ]
    for number in (1, 3):
        slot = slots[number]
        for sign, tensor in enumerate(kept(cache), start=1):
            mine = tensor[..., slot.start : slot.start + slot.tokens, :]
            want = sign * (torch.arange(slot.tokens).view(-1, 1) + 100.0 * number)
            assert torch.equal(mine, want.expand_as(mine))


def test_a_slot_that_does_not_fit() -> None:
    cache = small_cache(3)
    cache.reserve(2 * BLOCK_TOKENS)
    with pytest.raises(
        AscendSpeedError, match="17 tokens need 2 blocks of the key-value cache, of which 1 are free"
    ):
        cache.reserve(BLOCK_TOKENS + 1)
    with pytest.raises(ValueError, match="not in list"):
        cache.release(small_cache(1).reserve(1))
