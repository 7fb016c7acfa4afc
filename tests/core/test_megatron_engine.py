"""`--engine megatron`: megatron-core's GPTModel, schedules and optimizer compute what one process of ours does.

megatron-core asks for a GPU; `support.megatron_on_cpu` answers with the CPU, here and nowhere else.
"""

import math
import os
from typing import Any

import pytest
import torch

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import RotaryScaling
from ascendspeed_core.config.training import RecomputeConfig
from ascendspeed_core.models.position import AttentionKind, Positions
from ascendspeed_core.optim.megatron.layers import MaskRules
from core.megatron_cases import (
    complaint_about_sharding,
    megatron_version,
    train_on_broken_weights,
    weights_around_waiting,
)
from core.megatron_comparison import OVERLAP, SHARDS_WITH_TRANSFORMER_ENGINE, compare
from core.test_megatron_experts import DEEPSEEK_V3
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables
from support.versions import skip_before

QUICK = (
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, schedule="interleaved", layers_per_stage=1, **OVERLAP),
    Layout(cp=2),
)
NIGHTLY = (
    Layout(),
    Layout(tp=2),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, pp=2, sequence_parallel=True, schedule="interleaved", layers_per_stage=1),
    Layout(dp=2),
    Layout(dp=2, pp=2),
    Layout(cp=2, tp=2, sequence_parallel=True),
    Layout(cp=2, pp=2),
)
LAYOUTS = (*QUICK, *(pytest.param(layout, marks=pytest.mark.nightly) for layout in NIGHTLY))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ten_steps_equal_one_process_of_ours(
    layout: Layout, workers: WorkerPool, megatron_workers: WorkerPool, report: ReportTables
) -> None:
    compare(layout, workers, megatron_workers, report, "LLaMA, grouped queries")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, sharded_optimizer=True, **OVERLAP),
        *(
            pytest.param(layout, marks=pytest.mark.nightly)
            for layout in (
                Layout(tp=2),
                Layout(pp=2),
                Layout(dp=2),
                Layout(tp=2, pp=2, sequence_parallel=True),
                Layout(dp=2, tp=2, sequence_parallel=True, sharded_optimizer=True),
                Layout(dp=2, pp=2, sharded_optimizer=True, schedule="interleaved", layers_per_stage=1),
                Layout(dp=2, **OVERLAP),
                Layout(cp=2, sharded_optimizer=True),
                Layout(dp=2, pp=2, sharded_optimizer=True, **OVERLAP),
                Layout(
                    dp=2, pp=2, sharded_optimizer=True, schedule="interleaved", layers_per_stage=1, **OVERLAP
                ),
            )
        ),
    ],
    ids=str,
)
def test_ten_steps_in_fp32(
    layout: Layout, workers: WorkerPool, megatron_workers: WorkerPool, report: ReportTables
) -> None:
    compare(layout, workers, megatron_workers, report, "LLaMA, grouped queries", dtype="float32")


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("dtype", "layout", "options"),
    [
        ("bfloat16", Layout(tp=2, sequence_parallel=True), {}),
        ("bfloat16", Layout(dp=2, pp=2, sharded_optimizer=True), {}),
        ("float16", Layout(dp=2, sharded_optimizer=True), {"scale": 256.0}),
        ("float16", Layout(tp=2), {"scale": 256.0}),
        ("float32", Layout(dp=2), {"optimizer": "sgd"}),
    ],
    ids=str,
)
def test_formats_and_rules(
    dtype: str,
    layout: Layout,
    options: dict[str, Any],
    workers: WorkerPool,
    megatron_workers: WorkerPool,
    report: ReportTables,
) -> None:
    """Both keep fp32 master weights, gradients and moments; fp16 with the run's own loss scale."""
    compare(layout, workers, megatron_workers, report, "formats", dtype=dtype, **options)


@pytest.mark.nightly
@pytest.mark.parametrize("policy", ["full", "block", "attention"])
def test_recomputed_layers(
    policy: str, workers: WorkerPool, megatron_workers: WorkerPool, report: ReportTables
) -> None:
    options = {"checkpoint_block_layer": 1} if policy == "block" else {}
    recompute = RecomputeConfig(checkpoint_activations=True, checkpoint_policy=policy, **options)
    compare(
        Layout(tp=2, sequence_parallel=True), workers, megatron_workers, report, f"recompute {policy}",
        more={"recompute": recompute},
    )  # fmt: skip


LLAMA_3 = RotaryScaling(kind="llama3", factor=8, original_max_position_embeddings=16)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("what", "layout", "changes"),
    [
        ("more ranks than key-value heads", Layout(tp=2), {"num_key_value_heads": 1}),
        ("tied head", Layout(tp=2, pp=2), {"tie_word_embeddings": True}),
        ("tied head", Layout(dp=2, pp=2, schedule="interleaved", layers_per_stage=1), {"tie_word_embeddings": True}),
        ("norms of queries and keys", Layout(tp=2, sequence_parallel=True), {"qk_norm": True, "head_dim": 6}),
        ("vocabulary that does not divide", Layout(tp=2), {"vocab_size": 127}),
        ("uneven stages", Layout(pp=2), {"num_layers": 3}),
        ("InternLM's biases", Layout(tp=2, sequence_parallel=True), {"qkv_bias": True, "output_bias": True}),
        ("window", Layout(tp=2), {"sliding_window": 6}),
        (
            "Nemotron", Layout(tp=2, sequence_parallel=True),
            {"norm": "layernorm", "norm_unit_offset": True, "mlp": "relu2", "head_dim": 8, "rotary_dim": 4},
        ),
        ("Llama 3's positions", Layout(tp=2), {"rotary_scaling": LLAMA_3}),
        (
            "Bloom", Layout(tp=2, sequence_parallel=True, pp=2),
            {
                "norm": "layernorm", "mlp": "gelu", "position": "alibi", "embedding_norm": True, "qkv_bias": True,
                "output_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 8,
            },
        ),
    ],
)  # fmt: skip
def test_models(
    what: str,
    layout: Layout,
    changes: dict[str, Any],
    workers: WorkerPool,
    megatron_workers: WorkerPool,
    report: ReportTables,
) -> None:
    compare(layout, workers, megatron_workers, report, what, config=tiny_config(**changes))


@pytest.mark.nightly
def test_micro_batches_of_several_sizes(
    workers: WorkerPool, megatron_workers: WorkerPool, report: ReportTables
) -> None:
    for layout in (Layout(pp=2), Layout(tp=2)):
        compare(layout, workers, megatron_workers, report, "sizes 1,4,5,6", micro_batch_size=(1, 4, 5, 6))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, **OVERLAP),
        pytest.param(Layout(tp=2, sequence_parallel=True, pp=2), marks=pytest.mark.nightly),
        pytest.param(Layout(cp=2, pp=2), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_documents(
    layout: Layout, workers: WorkerPool, megatron_workers: WorkerPool, report: ReportTables
) -> None:
    """Attention and positions stay inside a document; layers are recomputed after those of later micro-batches."""
    recompute = RecomputeConfig(checkpoint_activations=True, checkpoint_policy="full")
    compare(
        layout, workers, megatron_workers, report, "documents, recompute full", more={"recompute": recompute},
        documents=True,
    )  # fmt: skip


def test_late_gathers_can_be_waited_for(megatron_workers: WorkerPool) -> None:
    skip_before("megatron-core", "0.13", SHARDS_WITH_TRANSFORMER_ENGINE)
    layout = Layout(dp=2, sharded_optimizer=True, **OVERLAP)
    (before, after), (before_2, after_2) = megatron_workers.run(
        weights_around_waiting, 2, tiny_config(), layout
    )
    assert not all(map(torch.equal, before, before_2))
    assert all(map(torch.equal, after, after_2))
    # What either rank has updated stays so.
    updated = [
        [~w.eq(x) for w, x in zip(*pair, strict=True)] for pair in ((before, after), (before_2, after_2))
    ]
    assert any(map(torch.any, updated[0]))
    assert not any((a & b).any() for a, b in zip(*updated, strict=True))


def test_rules_belong_to_the_segments() -> None:
    """Layers of a micro-batch share one rule; another part of the same memory has its own."""
    positions = Positions(tiny_config(), [AttentionKind()])
    rules = MaskRules(lambda segments, q: positions.mask_rules(len(q), q.device, q.dtype, segments)[None])
    query, segments = torch.zeros(4, 2, 1, 1), torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    assert rules.rule(None, query) is None
    both = rules.rule(segments, query)
    assert both is not None
    assert both.lengths == ((2, 2), (1, 3))
    assert rules.rule(segments.detach(), query) is both
    first = rules.rule(segments[:1], query[:, :1])
    assert first is not None
    assert first.lengths == ((2, 2),)


def test_what_is_not_finite_updates_nothing(megatron_workers: WorkerPool) -> None:
    ranks = megatron_workers.run(train_on_broken_weights, 2, tiny_config(), Layout(dp=2))
    for norm, num_steps, said, unchanged in ranks:
        assert norm is not None
        assert math.isnan(norm)
        assert (num_steps, unchanged) == (0, True)
        assert "linear_fc2.weight holds nan before the step" in said


OTHER_VERSION = "ASCENDSPEED_MEGATRON_CORE"
"""Environment variable that names a folder with another version of megatron-core."""


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("layout", "dtype", "changes"),
    [
        (Layout(tp=2, sequence_parallel=True), "float64", {}),
        (Layout(pp=2, schedule="interleaved", layers_per_stage=1), "float64", {}),
        (Layout(dp=2), "bfloat16", {}),
        (Layout(tp=2, sequence_parallel=True), "float64", DEEPSEEK_V3),
    ],
    ids=str,
)
def test_another_version_of_megatron_core(
    layout: Layout,
    dtype: str,
    changes: dict[str, Any],
    workers: WorkerPool,
    report: ReportTables,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = os.environ.get(OTHER_VERSION)
    if folder is None:
        pytest.skip(
            f"no other version is there; pip install --no-deps --target DIR megatron-core==0.12.1, {OTHER_VERSION}=DIR"
        )
    monkeypatch.syspath_prepend(folder)
    pool = WorkerPool("spawn")
    try:
        (version,) = pool.run(megatron_version, 1)
        config = tiny_config(**changes)
        compare(layout, workers, pool, report, f"megatron-core {version}", config=config, dtype=dtype)
        (complaint,) = pool.run(complaint_about_sharding, 1)
        if version.startswith("0.12."):
            assert f"the one of megatron-core {version} wants Transformer Engine" in complaint
        else:
            assert complaint == ""
    finally:
        pool.close()
