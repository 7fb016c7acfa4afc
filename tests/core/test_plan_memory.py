"""`asd-core plan`: memory by formula is what steps take, over layouts, schedules, formats, sizes and recompute."""

from typing import Any

import pytest

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.planner.part_work import Tuning
from core.plan_cases import formula_and_measured, tuned_formula_and_measured, zero_formula_and_measured
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

PLAIN = tiny_config(
    num_layers=4, hidden_size=96, ffn_hidden_size=256, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
    vocab_size=400, max_position_embeddings=256,
)  # fmt: skip
WIDE = PLAIN.model_copy(
    update={
        "hidden_size": 192,
        "ffn_hidden_size": 512,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 1000,
    }
)
NORMED = PLAIN.model_copy(update={"qk_norm": True})
TIED = PLAIN.model_copy(update={"tie_word_embeddings": True})
EXPERTS = PLAIN.model_copy(
    update={
        "vocab_size": 1200,
        "experts": Experts(count=4, per_token=2, ffn_hidden_size=256, dense_layers=(0,)),
    }
)
TOLERANCE = 0.03
"""Of peaks by formula: what a layer holds for a moment is taken at its largest product, and what a pipeline holds while
one message follows another is not modelled."""

OF_EXPERTS = 0.05
"""Of peaks with experts, whose rows are padded and sorted by kernels that the formula does not follow."""

OF_DEEPSPEED = 0.1
"""Of peaks under DeepSpeed: its buckets and the copies that it makes of shares come and go unseen by the formula."""

Case = tuple[ModelConfig, Layout, str, int, int, int]


def name_of(case: Case) -> str:
    config, layout, dtype, rows, count, length = case
    return f"{config.hidden_size} wide, {layout}, {dtype}, {rows} x {count} x {length}"


QUICK: list[Case] = [
    (PLAIN, Layout(), "float32", 2, 1, 128),
    (WIDE, Layout(), "bfloat16", 4, 1, 128),
    (PLAIN, Layout(tp=2, sequence_parallel=True), "bfloat16", 2, 2, 128),
    (PLAIN, Layout(pp=2), "float32", 2, 4, 128),
    (PLAIN, Layout(dp=2, sharded_optimizer=True), "bfloat16", 2, 2, 128),
]
MORE: list[Case] = [
    (PLAIN, Layout(), "bfloat16", 2, 2, 128),
    (WIDE, Layout(), "float32", 1, 2, 256),
    (NORMED, Layout(), "float32", 2, 2, 128),
    (NORMED, Layout(), "bfloat16", 2, 2, 128),
    (TIED, Layout(), "float32", 2, 2, 128),
    (PLAIN, Layout(tp=2), "float32", 2, 2, 128),
    (PLAIN, Layout(tp=2, sequence_parallel=True), "float32", 2, 2, 128),
    (WIDE, Layout(tp=2), "bfloat16", 2, 2, 128),
    (PLAIN, Layout(pp=2), "bfloat16", 2, 4, 128),
    (WIDE, Layout(pp=2), "float32", 1, 8, 128),
    (PLAIN, Layout(pp=2, schedule="interleaved", layers_per_stage=1), "float32", 2, 4, 128),
    (PLAIN, Layout(pp=2, schedule="gpipe"), "float32", 2, 4, 128),
    (PLAIN, Layout(pp=2, schedule="looped-bfs", layers_per_stage=1), "float32", 2, 4, 128),
    (PLAIN, Layout(cp=2), "float32", 2, 2, 128),
    (PLAIN, Layout(cp=2), "bfloat16", 2, 2, 128),
    (PLAIN, Layout(dp=2), "float32", 2, 2, 128),
    (PLAIN, Layout(dp=2), "bfloat16", 2, 2, 128),
    (PLAIN, Layout(dp=2, sharded_optimizer=True), "float32", 2, 2, 128),
    (
        PLAIN,
        Layout(dp=2, sharded_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
        "bfloat16",
        2,
        2,
        128,
    ),
    (WIDE, Layout(pp=2, dp=2, sharded_optimizer=True), "float32", 1, 4, 128),
    (WIDE, Layout(tp=2, pp=2, sequence_parallel=True), "bfloat16", 1, 4, 128),
]


@pytest.mark.parametrize("case", QUICK, ids=name_of)
def test_formula_is_measured(workers: WorkerPool, report: ReportTables, case: Case) -> None:
    check(workers, report, case, TOLERANCE)


@pytest.mark.parametrize(
    ("layout", "growth"),
    [(Layout(pp=2), 0), (Layout(pp=2, schedule="interleaved", layers_per_stage=1), 3)],
    ids=str,
)
def test_what_a_pipeline_keeps_of_every_micro_batch(workers: WorkerPool, layout: Layout, growth: int) -> None:
    """What 1F1B receives is there while it is due, where torch makes buffers for all micro-batches of a step.

    With several stages on a rank torch keeps what it sent: here two hidden states and a gradient, or the reverse.
    """
    few, many = (
        workers.run(formula_and_measured, 2, PLAIN, layout, "float32", 2, count, 128) for count in (4, 12)
    )
    hidden = 2 * 128 * PLAIN.hidden_size * 4
    for rank in range(2):
        for (mode, planned, less), (_, planned_of_more, more) in zip(few[rank], many[rank], strict=True):
            assert round((more - less) / 8 / hidden, 1) == growth, (rank, mode)
            assert round((planned_of_more - planned) / 8 / hidden, 1) == growth, (rank, mode)


@pytest.mark.nightly
@pytest.mark.parametrize("case", MORE, ids=name_of)
def test_formula_is_measured_everywhere(workers: WorkerPool, report: ReportTables, case: Case) -> None:
    check(workers, report, case, TOLERANCE)


ADAPTERS, DROPPING, OF_ATTENTION, PAIRS, PAIRS_OF_ADAPTERS = (
    Tuning(adapter_rank=8), Tuning(adapter_rank=8, adapter_dropout=True),
    Tuning(adapter_rank=8, adapts_mlp=False), Tuning(pairs=True), Tuning(adapter_rank=8, pairs=True),
)  # fmt: skip
TUNED: list[tuple[ModelConfig, Layout, str, int, int, Tuning]] = [
    (PLAIN, Layout(), "float32", 2, 2, ADAPTERS),
    (WIDE, Layout(pp=2), "bfloat16", 1, 4, PAIRS),
]
MORE_TUNED: list[tuple[ModelConfig, Layout, str, int, int, Tuning]] = [
    *((WIDE, Layout(), dtype, 2, 2, tuning) for dtype in ("float32", "bfloat16") for tuning in (
        ADAPTERS, DROPPING, OF_ATTENTION, PAIRS, PAIRS_OF_ADAPTERS)),
    (WIDE, Layout(tp=2), "float32", 2, 2, ADAPTERS),
    (WIDE, Layout(tp=2, sequence_parallel=True), "bfloat16", 2, 2, ADAPTERS),
    (WIDE, Layout(tp=2, sequence_parallel=True), "bfloat16", 1, 2, PAIRS),
    (WIDE, Layout(pp=2), "float32", 1, 4, ADAPTERS),
    (WIDE, Layout(dp=2, sharded_optimizer=True), "bfloat16", 2, 2, ADAPTERS),
    (WIDE, Layout(dp=2, sharded_optimizer=True), "bfloat16", 1, 2, PAIRS),
]  # fmt: skip
OF_ADAPTERS = 0.07
"""Of peaks beside frozen weights: what the first layer need not keep, as nothing before it is trained, is counted
(2 %), and sums of results that selective recompute makes again are not (7 % too low, with a cut layer or stage)."""


@pytest.mark.parametrize("case", TUNED, ids=lambda case: f"{case[1]}, {case[2]}, {case[-1]}")
def test_formula_of_tuning_is_measured(workers: WorkerPool, report: ReportTables, case: Any) -> None:
    check_tuned(workers, report, *case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", MORE_TUNED, ids=lambda case: f"{case[1]}, {case[2]}, {case[-1]}")
def test_formula_of_tuning_is_measured_everywhere(
    workers: WorkerPool, report: ReportTables, case: Any
) -> None:
    check_tuned(workers, report, *case)


def check_tuned(
    workers: WorkerPool, report: ReportTables, config: ModelConfig, layout: Layout, dtype: str, rows: int, count: int,
    tuning: Tuning,
) -> None:  # fmt: skip
    found = workers.run(
        tuned_formula_and_measured, layout.world_size, config, layout, dtype, rows, count, 128, tuning
    )
    ratios = {
        (rank, mode): planned / measured for rank, own in enumerate(found) for mode, planned, measured in own
    }
    kind = " of ".join(["pairs"] * tuning.pairs + ["adapters"] * (tuning.adapter_rank is not None))
    report.add(
        "Peak of a step of adapters and of pairs by formula over what tensors really held",
        ("what", "attention only", "dropout", "layout", "format", "rows x micro-batches", "plans", "least ratio",
         "largest ratio"),
        kind, not tuning.adapts_mlp, tuning.adapter_dropout, str(layout), dtype, f"{rows} x {count}", len(ratios),
        f"{min(ratios.values()):.4f}", f"{max(ratios.values()):.4f}",
    )  # fmt: skip
    tolerance = TOLERANCE if tuning.adapter_rank is None else OF_ADAPTERS
    assert min(ratios.values()) > 1 - tolerance, ratios
    assert max(ratios.values()) < 1 + tolerance, ratios


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, ep=2)], ids=str)
def test_formula_of_experts_is_measured(workers: WorkerPool, report: ReportTables, layout: Layout) -> None:
    check(workers, report, (EXPERTS, layout, "float32", 2, 2, 128), OF_EXPERTS)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2, schedule="zbv"),
        Layout(pp=2, schedule="dualpipev"),
        Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1),
    ],
    ids=str,
)
def test_formula_of_split_backwards_is_enough(workers: WorkerPool, layout: Layout) -> None:
    """What waits for the gradients of weights is a share of activations: rather too much than less."""
    found = workers.run(formula_and_measured, 2, PLAIN, layout, "float32", 2, 4, 128)
    ratios = [planned / measured for own in found for mode, planned, measured in own if mode == "none"]
    assert min(ratios) > 0.93, ratios
    assert max(ratios) < 1.25, ratios


def check(workers: WorkerPool, report: ReportTables, case: Case, tolerance: float) -> None:
    config, layout, dtype, rows, count, length = case
    found = workers.run(formula_and_measured, layout.world_size, config, layout, dtype, rows, count, length)
    ratios = {
        (rank, mode): planned / measured for rank, own in enumerate(found) for mode, planned, measured in own
    }
    report.add(
        "Peak of a step by formula over what tensors really held, over ranks and none, selective and full recompute",
        ("layout", "format", "rows x micro-batches x length", "width", "plans", "least ratio", "largest ratio"),
        str(layout), dtype, f"{rows} x {count} x {length}", config.hidden_size, len(ratios),
        f"{min(ratios.values()):.4f}", f"{max(ratios.values()):.4f}",
    )  # fmt: skip
    assert min(ratios.values()) > 1 - tolerance, ratios
    assert max(ratios.values()) < 1 + tolerance, ratios


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_formula_under_deepspeed_is_measured(
    workers: WorkerPool, report: ReportTables, stage: int, dtype: str
) -> None:
    layout = Layout(dp=2, zero_stage=stage)
    (found, _) = workers.run(zero_formula_and_measured, 2, WIDE, layout, dtype, 4, 2, 128)
    for mode, planned, measured in found:
        report.add(
            "Peak of a step under DeepSpeed by formula over what tensors really held",
            ("stage", "format", "recompute", "planned MB", "measured MB", "ratio"),
            stage, dtype, mode, f"{planned / 1e6:.2f}", f"{measured / 1e6:.2f}", f"{planned / measured:.4f}",
        )  # fmt: skip
        assert planned == pytest.approx(measured, rel=OF_DEEPSPEED)
