"""Every layout computes what one process computes."""

from functools import cache
from typing import Any

import pytest
import torch

from ascendspeed_core.config.layout import Layout
from core.training_cases import Trained, join_stages, train, vocabulary_cross_entropy
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Ten steps against one process: largest relative difference"
HEADER = ("layout", "dtype", "losses", "grad norm", "first gradients", "weights after")

# Only the order of sums differs. Relative to each tensor's largest entry: float64 rounds at 1e-16, and ten steps of
# AdamW magnify that; fp32 rounds at 6e-8, bf16 arithmetic at 4e-3. AdamW turns noise in near-zero gradients into
# whole steps of the learning rate (1e-3 here, weights of about 0.1), which is what the last column shows for bf16.
TOLERANCE = {
    "float64": (1e-12, 1e-12, 1e-11, 1e-9),
    "float32": (1e-5, 1e-4, 1e-4, 1e-2),
    "bfloat16": (1e-2, 1e-1, 1e-1, 5e-1),
}


@cache
def one_process(dtype: str, tied: bool, vocab_size: int) -> Trained:
    torch.set_num_threads(1)
    return train(tiny_config(tie_word_embeddings=tied, vocab_size=vocab_size), Layout(), dtype)


def differences(got: Trained, want: Trained) -> tuple[float, float, float, float]:
    def of_lists(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    def of_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        assert a.keys() == b.keys()
        return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)

    return (
        of_lists(got.losses, want.losses),
        of_lists(got.norms, want.norms),
        of_tensors(got.gradients, want.gradients),
        of_tensors(got.weights, want.weights),
    )


CASES = [
    (Layout(tp=2), True, 127),
    (Layout(pp=2), False, 128),
    (Layout(dp=2), False, 128),
    (Layout(dp=2, sharded_optimizer=True), False, 128),
    (Layout(tp=2, sequence_parallel=True), True, 127),
    (Layout(tp=2, pp=2), True, 127),
    (Layout(tp=2, dp=2), True, 127),
    (Layout(pp=2, dp=2), True, 128),
    (Layout(tp=2, pp=2, dp=2), True, 127),
    (Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True), True, 127),
]
"""Layout, whether the head is tied, vocabulary."""

FURTHER_CASES = [
    (Layout(tp=2), False, 128),
    (Layout(tp=4), True, 125),
    (Layout(pp=4), True, 128),
    (Layout(pp=3), True, 127),
    (Layout(dp=4, sharded_optimizer=True), True, 127),
]
"""Vocabularies of which a device has nothing, heads on two devices, uneven stages, rows that do not divide."""


@pytest.mark.parametrize(
    ("layout", "tied", "vocab_size", "dtype"),
    [(*case, dtype) for dtype in TOLERANCE for case in CASES]
    + [(*case, "float64") for case in FURTHER_CASES]
    + [
        pytest.param(
            Layout(tp=8, sequence_parallel=sequence), False, 128, "float64", marks=pytest.mark.nightly
        )
        for sequence in (False, True)
    ],
    ids=str,
)
def test_training_equals_one_process(
    workers: WorkerPool, report: ReportTables, layout: Layout, tied: bool, vocab_size: int, dtype: str
) -> None:
    config = tiny_config(tie_word_embeddings=tied, vocab_size=vocab_size)
    ranks = workers.run(train, layout.world_size, config, layout, dtype)
    want = one_process(dtype, tied, vocab_size)
    found = differences(join_stages(ranks, layout), want)
    name = f"{layout}{', tied' if tied else ''}, vocabulary {vocab_size}"
    report.add(TITLE, HEADER, name, dtype, *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE[dtype], strict=True)), found
    per_stage = layout.tp * layout.replicas
    for number, other in enumerate(ranks):
        assert other.losses == ranks[0].losses
        first = ranks[number // per_stage * per_stage]
        assert all(torch.equal(other.weights[n], first.weights[n]) for n in other.weights)
    assert min(want.norms) > 0.1


BLOOM = {
    "norm": "layernorm", "position": "alibi", "mlp": "gelu", "qkv_bias": True, "output_bias": True, "mlp_bias": True,
    "embedding_norm": True, "tie_word_embeddings": True, "num_key_value_heads": 8, "vocab_size": 127,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Bloom": BLOOM,
    "Qwen 3": {"qk_norm": True, "vocab_size": 127},
    "Qwen 2": {"qkv_bias": True, "tie_word_embeddings": True},
    "Baichuan 2 13B": {"position": "alibi", "normalised_head": True, "num_key_value_heads": 8},
}
EVERYTHING = Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True)
FAMILY_CASES: list[Any] = [
    ("Bloom", Layout(tp=2, sequence_parallel=True), False),
    pytest.param("Bloom", EVERYTHING, False, marks=pytest.mark.nightly),
    ("Bloom", EVERYTHING, True),
    ("Qwen 3", Layout(tp=2), False),
    pytest.param("Qwen 3", Layout(tp=8, sequence_parallel=True), False, marks=pytest.mark.nightly),
    ("Qwen 3", EVERYTHING, True),
    ("Qwen 2", Layout(), True),
    ("Qwen 2", Layout(tp=2, dp=2, sharded_optimizer=True), True),
    ("Baichuan 2 13B", EVERYTHING, False),
]
"""Family, layout, whether projections are joined."""


@cache
def family_on_one_process(name: str) -> Trained:
    torch.set_num_threads(1)
    return train(tiny_config(**FAMILIES[name]), Layout(), "float64")


def without_key_bias(trained: Trained) -> Trained:
    noise = [name for name in trained.gradients if name.endswith("k_proj.bias")]
    assert noise
    assert all(float(trained.gradients[name].abs().max()) < 1e-15 for name in noise)
    kept = (
        {n: t for n, t in tensors.items() if n not in noise}
        for tensors in (trained.gradients, trained.weights)
    )
    return Trained(trained.losses, trained.norms, *kept)


@pytest.mark.parametrize(("name", "layout", "joined"), FAMILY_CASES, ids=str)
def test_training_of_families_equals_one_process(
    workers: WorkerPool, report: ReportTables, name: str, layout: Layout, joined: bool
) -> None:
    ranks = workers.run(
        train, layout.world_size, tiny_config(**FAMILIES[name]), layout, "float64", joined=joined
    )
    got, want = join_stages(ranks, layout), family_on_one_process(name)
    if name == "Bloom":
        # Without rotary positions a bias of the keys adds the same to all scores of a query, which softmax takes out:
        # its gradient is rounding noise, which AdamW turns into steps. Nothing that is computed depends on it.
        got, want = without_key_bias(got), without_key_bias(want)
    found = differences(got, want)
    report.add(TITLE, HEADER, f"{name}, {layout}{', joined' if joined else ''}", "float64", *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found
    assert min(want.norms) > 0.1


def test_joined_projections_add_up_16_bit_gradients_as_separate_ones_do() -> None:
    """fp32 sums of bf16 gradients over micro-batches, and master weights, see no difference but rounding."""
    got = train(tiny_config(tie_word_embeddings=True, vocab_size=127), Layout(), "bfloat16", joined=True)
    found = differences(got, one_process("bfloat16", True, 127))
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["bfloat16"], strict=True)), found


@pytest.mark.parametrize("micro_batch_size", [1, 2, 16])
def test_micro_batch_size_does_not_matter(micro_batch_size: int) -> None:
    config = tiny_config()
    got = train(config, Layout(), "float64", micro_batch_size=micro_batch_size)
    assert max(differences(got, one_process("float64", False, 128))) < 1e-11


@pytest.mark.parametrize("micro_batch_size", [2, 8, 16])
def test_fewer_micro_batches_than_stages(workers: WorkerPool, micro_batch_size: int) -> None:
    config, layout = tiny_config(tie_word_embeddings=True), Layout(pp=4)
    ranks = workers.run(train, 4, config, layout, "float64", micro_batch_size=micro_batch_size)
    assert max(differences(join_stages(ranks, layout), one_process("float64", True, 128))) < 1e-11


def test_cross_entropy_equals_megatron_core(workers: WorkerPool) -> None:
    for (loss, gradient), (their_loss, their_gradient) in workers.run(vocabulary_cross_entropy, 2, 96):
        # fp32 on both sides, the same sums in another order.
        torch.testing.assert_close(loss, their_loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, their_gradient, rtol=1e-5, atol=1e-7)
