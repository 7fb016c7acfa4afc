"""Sequences cut over devices: everything is what one process computes on whole ones."""

from functools import cache
from typing import Any

import pytest
import torch

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.training import ComputeConfig, RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.fused_attention import causal_attention
from ascendspeed_core.kernels.reference import reference_attention
from ascendspeed_core.parallel.collectives import swap_cut
from ascendspeed_core.parallel.context import attend_with_some_heads
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import ConfigError
from core.test_layout_equality import FAMILIES, HEADER, TITLE, TOLERANCE, differences, without_key_bias
from core.training_cases import LENGTH, Trained, join_stages, train
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

MODELS: dict[str, dict[str, Any]] = {
    "LLaMA": {"tie_word_embeddings": True, "vocab_size": 127},
    "one key-value head": {"num_key_value_heads": 1},
    "sliding window": {"sliding_window": 5},
    **FAMILIES,
}
SHARDED = {"sharded_optimizer": True}
CASES: list[Any] = [
    ("LLaMA", Layout(cp=2), {}),
    ("LLaMA", Layout(cp=2, tp=2), {}),
    ("LLaMA", Layout(cp=2, pp=2), {}),
    ("LLaMA", Layout(cp=2, dp=2, **SHARDED), {"joined": True}),
    ("LLaMA", Layout(cp=2, tp=2, pp=2, sequence_parallel=True, **SHARDED), {"recompute": "full"}),
    ("one key-value head", Layout(cp=4), {"attention": "triangle"}),
    ("sliding window", Layout(cp=2), {}),
    ("Bloom", Layout(cp=2, tp=2, sequence_parallel=True), {}),
]
MORE_CASES: list[Any] = [
    ("LLaMA", Layout(cp=4), {}),
    ("LLaMA", Layout(cp=8), {}),
    ("LLaMA", Layout(cp=2, dp=2), {}),
    ("LLaMA", Layout(cp=2, **SHARDED), {}),
    ("LLaMA", Layout(cp=2, tp=2, dp=2, sequence_parallel=True, **SHARDED), {}),
    ("LLaMA", Layout(cp=2, pp=2, schedule="interleaved", layers_per_stage=1), {"recompute": "selective"}),
    ("LLaMA", Layout(cp=2, pp=2, dp=2, schedule="looped-bfs", layers_per_stage=1, early_reduction=True), {}),
    ("LLaMA", Layout(cp=2, pp=2, schedule="zbv"), {}),
    ("one key-value head", Layout(cp=4, tp=2), {"attention": "triangle"}),
    ("one key-value head", Layout(cp=8), {"recompute": "attention"}),
    ("sliding window", Layout(cp=2), {"attention": "triangle"}),
    ("Bloom", Layout(cp=4), {"attention": "triangle"}),
    ("Qwen 3", Layout(cp=4, tp=2), {}),
    ("Qwen 2", Layout(cp=2, pp=2), {}),
    ("Baichuan 2 13B", Layout(cp=2, tp=2, pp=2, sequence_parallel=True), {}),
]
"""Model, layout, and how it is computed."""


@cache
def one_process(name: str) -> Trained:
    torch.set_num_threads(1)
    return train(tiny_config(**MODELS[name]), Layout(), "float64")


@pytest.mark.parametrize(
    ("name", "layout", "options"),
    CASES + [pytest.param(*case, marks=pytest.mark.nightly) for case in MORE_CASES],
    ids=str,
)
def test_training_equals_one_process(
    workers: WorkerPool, report: ReportTables, name: str, layout: Layout, options: dict[str, Any]
) -> None:
    given = dict(options)
    if "recompute" in given:
        given["recompute"] = RecomputeConfig(
            checkpoint_activations=True, checkpoint_policy=given["recompute"]
        )
    if "attention" in given:
        given["compute"] = ComputeConfig(attention=given.pop("attention"))
    ranks = workers.run(train, layout.world_size, tiny_config(**MODELS[name]), layout, "float64", **given)
    got, want = join_stages(ranks, layout), one_process(name)
    assert all(rank.losses == ranks[0].losses and rank.norms == ranks[0].norms for rank in ranks)
    if name == "Bloom":
        got, want = without_key_bias(got), without_key_bias(want)
    found = differences(got, want)
    how = "".join(f", {value if key != 'joined' else key}" for key, value in options.items())
    report.add(TITLE, HEADER, f"{name}, {layout}{how}", "float64", *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found
    assert min(want.norms) > 0.1


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_narrow_formats_stay_close(workers: WorkerPool, report: ReportTables, dtype: str) -> None:
    config, layout = tiny_config(**MODELS["LLaMA"]), Layout(cp=2, dp=2, sharded_optimizer=True)
    got = join_stages(workers.run(train, 4, config, layout, dtype), layout)
    found = differences(got, train(config, Layout(), dtype))
    report.add(TITLE, HEADER, f"LLaMA, {layout}", dtype, *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE[dtype], strict=True)), found


def attention_in_parts(query_heads: int, key_heads: int) -> list[torch.Tensor]:
    """This device's result and gradients of q, k and v, and the same cut out of one computation on whole sequences."""
    mesh = ParallelMesh.create(Device("cpu"), Layout(cp=torch.distributed.get_world_size()))
    group, cp, mine = mesh.group("cp"), mesh.layout.cp, mesh.cp_rank
    assert group is not None
    generator = torch.Generator().manual_seed(2)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, LENGTH, 4, generator=generator, dtype=torch.float64)

    inputs, of_result = [random(query_heads), random(key_heads), random(key_heads)], random(query_heads)
    whole = [x.clone().requires_grad_() for x in inputs]
    reference = reference_attention(*whole, None)
    reference.backward(of_result)
    parts = [x.chunk(cp, 2)[mine].clone().requires_grad_() for x in inputs]
    result = attend_with_some_heads(causal_attention, *parts, None, group)
    result.backward(of_result.chunk(cp, 2)[mine])
    got = [result.detach(), *(x.grad for x in parts)]
    want = [x.chunk(cp, 2)[mine] for x in (reference.detach(), *(x.grad for x in whole))]
    return [x for pair in zip(got, want, strict=True) for x in pair if x is not None]


@pytest.mark.parametrize(("query_heads", "key_heads"), [(4, 4), (8, 8), (8, 2), (12, 4), (4, 1)])
def test_attention_and_its_gradients(workers: WorkerPool, query_heads: int, key_heads: int) -> None:
    """Key-value heads as many as devices, more, and fewer."""
    for ranks in workers.run(attention_in_parts, 4, query_heads, key_heads):
        assert len(ranks) == 8
        for got, want in zip(ranks[::2], ranks[1::2], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def swapped_twice() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mesh = ParallelMesh.create(Device("cpu"), Layout(cp=torch.distributed.get_world_size()))
    group = mesh.group("cp")
    assert group is not None
    whole = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)
    part = whole.chunk(2, 1)[mesh.cp_rank]
    there = swap_cut(part, 0, 1, group)
    return there, swap_cut(there, 1, 0, group), part


def test_swapping_twice_gives_the_part_back(workers: WorkerPool) -> None:
    whole = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)
    for rank, (there, back, part) in enumerate(workers.run(swapped_twice, 2)):
        assert torch.equal(there, whole.chunk(2, 0)[rank])
        assert torch.equal(back, part)


REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"context_parallel_size": 3},
        {},
        "num_attention_heads=8 and num_key_value_heads=4: it shares out 8 query",
    ),
    ({"context_parallel_size": 16}, {}, "choose 1, 2, 4, 8"),
    (
        {"context_parallel_size": 4},
        {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4},
        "6 key-value heads, of which it must be a divisor or a multiple; choose 1, 2, 3, 6, 12",
    ),
    (
        {"context_parallel_size": 8, "tensor_model_parallel_size": 2},
        {},
        "/ tensor_model_parallel_size=2: it shares out 4 query heads",
    ),
]


@pytest.mark.parametrize(("parallel", "model", "message"), REFUSALS)
def test_heads_that_cannot_be_shared_out_are_refused(
    parallel: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**parallel).check_model(tiny_config(**model))


def test_sequences_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cuts seq_length=30 into equal parts.*choose 28"):
        ParallelConfig(context_parallel_size=4).check_sequence(30)
    both = ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=4, sequence_parallel=True)
    with pytest.raises(ConfigError, match=r"each of them into tensor_model_parallel_size=4.*choose 8"):
        both.check_sequence(12)
    both.check_sequence(16)


def test_processes_that_are_no_multiple_are_refused() -> None:
    parallel = ParallelConfig(context_parallel_size=2, tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match="tensor_model_parallel_size=2 times context_parallel_size=2 times"):
        parallel.layout(6)
    assert parallel.layout(8) == Layout(tp=2, cp=2, dp=2)
