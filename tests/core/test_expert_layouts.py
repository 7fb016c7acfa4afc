"""Models with experts compute under every layout what one process computes, the losses of their routers included."""

from functools import cache
from typing import Any

import pytest
import torch

from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.training import DropoutConfig, RecomputeConfig
from core.expert_cases import train_experts
from core.test_layout_equality import differences
from core.training_cases import Trained, join_stages
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Models with experts, ten steps against one process: largest relative difference"
HEADER = ("layout", "options", "losses", "grad norm", "first gradients", "weights after", "balance")
# float64 rounds at 1e-16; steps of AdamW magnify that. A choice of experts that noise could turn is not among them.
TOLERANCE = 1e-9

LORA = LoraConfig(lora_target_modules=("q_proj", "gate_proj", "down_proj"), lora_r=3)
BIASED = tuple(
    {
        "biases": True, "clamp": 0.5, "score_after_choice": True, "shared_ffn_hidden_size": None, "shared_gate": False,
    }.items()
)  # fmt: skip
"""Experts as gpt-oss has them."""
GROUPED = tuple(
    {
        "count": 8, "score": "sigmoid", "score_bias": True, "groups": 4, "groups_per_token": 2, "scaling": 2.5,
        "shared_gate": False,
    }.items()
)  # fmt: skip
"""Experts as DeepSeek-V3 has them."""
FULL, SELECTIVE, ATTENTION = (
    RecomputeConfig(checkpoint_activations=True, checkpoint_policy=policy)  # type: ignore[arg-type]
    for policy in ("full", "selective", "attention")
)
INTERLEAVED = {"schedule": "interleaved", "layers_per_stage": 1}
ZERO_BUBBLE = {"schedule": "interleaved-zb", "layers_per_stage": 1}
FOLDED = {"schedule": "looped-bfs", "layers_per_stage": 1, "early_reduction": True}


@cache
def one_process(**options: Any) -> Trained:
    torch.set_num_threads(1)
    return train_experts(Layout(), **options)


def balancing(kind: str) -> ExpertsConfig:
    return ExpertsConfig(
        moe_aux_loss_coeff=0.05,
        moe_z_loss_coeff=0.02,
        moe_router_load_balancing_type=kind,  # type: ignore[arg-type]
    )


def check(
    workers: WorkerPool, layout: Layout, options: dict[str, Any], wanted: dict[str, Any] | None = None
) -> tuple[float, ...]:
    """The differences; the balancing loss is the same number in every layout. `wanted` are options of one process."""
    spread = {"micro_batch_size": 16 // (4 * layout.dp)} | options
    got = join_stages(workers.run(train_experts, layout.world_size, layout, **spread), layout)
    same = ("recompute", "micro_batch_size")
    want = one_process(**{key: value for key, value in (wanted or options).items() if key not in same})
    balance = 0.0
    for ours, theirs in zip(got.auxiliary_losses, want.auxiliary_losses, strict=True):
        assert tuple(ours) == tuple(theirs) == ("balance", "router_z")
        balance = max(balance, *(abs(ours[name] / theirs[name] - 1) for name in ours))
    found = (*differences(got, want), balance)
    assert max(found) < TOLERANCE, found
    return found


CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(tp=2), {}),
    (Layout(tp=2, ep=2, etp=1, sequence_parallel=True), {"recompute": FULL}),
    (Layout(dp=2, ep=2, sharded_optimizer=True), {}),
    (Layout(cp=2, ep=2), {}),
    (Layout(pp=2, schedule="zbv"), {}),
    (Layout(dp=2, ep=2), {"lora": LORA}),
    (Layout(tp=2), {"changes": BIASED}),
]


@pytest.mark.parametrize(("layout", "options"), CASES, ids=str)
def test_layouts(workers: WorkerPool, layout: Layout, options: dict[str, Any]) -> None:
    check(workers, layout, options)


def test_a_batch_in_parts_is_balanced_as_a_whole() -> None:
    """Four micro-batches with the load of all of them give what one micro-batch of all samples gives by itself."""
    whole = train_experts(Layout(), micro_batch_size=16, experts=balancing("aux_loss"))
    for size in (4, 16):
        parts = train_experts(Layout(), micro_batch_size=size, experts=balancing("global_aux_loss"))
        assert max(differences(parts, whole)) < TOLERANCE
        for ours, theirs in zip(parts.auxiliary_losses, whole.auxiliary_losses, strict=True):
            assert ours["balance"] == pytest.approx(theirs["balance"], rel=1e-13)
    apart = train_experts(Layout(), micro_batch_size=4, experts=balancing("aux_loss"))
    assert apart.auxiliary_losses[0]["balance"] > 1.001 * whole.auxiliary_losses[0]["balance"]


SPREADS: list[dict[str, Any]] = [
    {"tp": 2},
    {"tp": 2, "ep": 2, "etp": 1},
    {"tp": 2, "sequence_parallel": True},
    {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    {"dp": 2, "ep": 2},
    {"dp": 2, "etp": 2},
    {"cp": 2, "ep": 2},
    {"cp": 2},
    {"tp": 2, "dp": 2, "ep": 2},
    {"tp": 2, "dp": 2, "ep": 4, "etp": 1},
    {"tp": 2, "dp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    {"tp": 2, "dp": 2, "etp": 4},
    {"tp": 2, "cp": 2, "ep": 2, "sequence_parallel": True},
    {"cp": 2, "dp": 2, "ep": 4},
    {"tp": 4, "ep": 2, "etp": 2},
]
MORE_CASES: list[tuple[Layout, dict[str, Any]]] = [
    *((Layout(**spread), {}) for spread in SPREADS),
    *(
        (Layout(**spread, sharded_optimizer=True), {"recompute": FULL})
        for spread in SPREADS
        if "dp" in spread
    ),
    *((Layout(**spread), {"lora": LORA}) for spread in SPREADS[1:13:3]),
    *(
        (Layout(pp=2, **schedule, **spread), {"recompute": recompute} if recompute else {})
        for schedule, recompute in (
            ({}, SELECTIVE),
            ({"schedule": "gpipe"}, FULL),
            (INTERLEAVED, ATTENTION),
            (ZERO_BUBBLE, FULL),
            (FOLDED, None),
            ({"schedule": "zbv"}, None),
            ({"schedule": "dualpipev"}, None),
        )
        for spread in ({}, SPREADS[3], SPREADS[4], SPREADS[6])
    ),
    (Layout(pp=2, tp=2, dp=2, ep=2, sequence_parallel=True, sharded_optimizer=True), {"recompute": FULL}),
    (Layout(pp=2, tp=2, dp=2, ep=4, etp=1, **INTERLEAVED), {}),
    (Layout(pp=2, dp=2, ep=2, sharded_optimizer=True, **FOLDED), {"lora": LORA}),
    (Layout(pp=4, tp=2, ep=2, etp=1), {}),
    (Layout(tp=2, ep=2, etp=1), {"dropout": DropoutConfig(hidden_dropout=0.1), "recompute": FULL}),
    (Layout(pp=2, dp=2, ep=2), {"dropout": DropoutConfig(hidden_dropout=0.1)}),
    (Layout(dp=2, ep=2), {"micro_batch_size": 8}),
    (Layout(pp=2, ep=2, dp=2, **INTERLEAVED), {"micro_batch_size": (1, 3, 1, 3)}),
    (Layout(tp=2, ep=2, etp=1, sequence_parallel=True), {"experts": balancing("seq_aux_loss")}),
    (Layout(cp=2, ep=2), {"experts": balancing("seq_aux_loss")}),
    (Layout(tp=2, dp=2, etp=4), {"changes": BIASED, "recompute": FULL}),
    (Layout(tp=2, dp=2, ep=2, sequence_parallel=True, sharded_optimizer=True), {"changes": BIASED}),
    (Layout(pp=2, dp=2, etp=2), {"changes": BIASED, "lora": LORA}),
    (Layout(dp=2, ep=2), {"changes": GROUPED}),
    (Layout(tp=2, pp=2, ep=2, etp=1), {"changes": GROUPED}),
    (Layout(pp=2, dp=2, ep=2), {"experts": balancing("seq_aux_loss")}),
]
"""Sums of many ranks, all schedules, pieces of axes, losses of sequences."""


def described(key: str, value: Any) -> str:
    """What an option of a case is, for the table."""
    if key == "recompute":
        return f"recompute {value.checkpoint_policy}"
    if key == "experts":
        return str(value.moe_router_load_balancing_type)
    if key == "changes":
        return "as gpt-oss" if value == BIASED else "as DeepSeek-V3"
    return f"micro-batches of {value}" if key == "micro_batch_size" else key


@pytest.mark.nightly
@pytest.mark.parametrize(("layout", "options"), MORE_CASES, ids=str)
def test_more_layouts(
    workers: WorkerPool, report: ReportTables, layout: Layout, options: dict[str, Any]
) -> None:
    found = check(workers, layout, {"steps": 10} | options)
    said = ", ".join(described(key, value) for key, value in options.items())
    report.add(TITLE, HEADER, str(layout), said, *found)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_formats(workers: WorkerPool, report: ReportTables, dtype: str) -> None:
    """First gradients: fp32 rounds at 6e-8, bf16 at 4e-3, and a token between two experts may choose the other."""
    layout = Layout(tp=2, dp=2, ep=2, sequence_parallel=True)
    got = join_stages(workers.run(train_experts, 4, layout, dtype, micro_batch_size=2), layout)
    want = train_experts(Layout(), dtype)
    losses, norms, gradients, weights = differences(got, want)
    balance = max(
        abs(a["balance"] / b["balance"] - 1)
        for a, b in zip(got.auxiliary_losses, want.auxiliary_losses, strict=True)
    )
    report.add(TITLE, HEADER, str(layout), dtype, losses, norms, gradients, weights, balance)
    limits = (1e-5, 1e-4, 1e-3) if dtype == "float32" else (1e-2, 1e-1, 5e-1)
    assert all(found < limit for found, limit in zip((losses, norms, gradients), limits, strict=True))
    assert balance < limits[0]


CAPPED = ExpertsConfig(moe_aux_loss_coeff=0.05, moe_z_loss_coeff=0.02, moe_expert_capacity_factor=0.8)
PADDED = CAPPED.model_copy(update={"moe_pad_expert_input_to_capacity": True})


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, ep=2, etp=1),
        pytest.param(Layout(cp=2, ep=2), marks=pytest.mark.nightly),
        pytest.param(Layout(tp=2, dp=2, ep=2, sequence_parallel=True), marks=pytest.mark.nightly),
        pytest.param(Layout(tp=2, cp=2, ep=2, sequence_parallel=True), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_capacity(workers: WorkerPool, layout: Layout) -> None:
    """Of each sequence, whatever ranks have it: the same tokens are dropped."""
    check(workers, layout, {"experts": CAPPED})
    with pytest.raises(AssertionError):
        assert one_process(experts=CAPPED).losses == pytest.approx(one_process().losses, rel=1e-6)


@pytest.mark.parametrize(
    "layout",
    [Layout(dp=2, ep=2), pytest.param(Layout(cp=2, tp=2, ep=4, etp=1), marks=pytest.mark.nightly)],
    ids=str,
)
def test_padding_changes_nothing(workers: WorkerPool, layout: Layout) -> None:
    """Experts filled up to their capacity, against one process without."""
    check(workers, layout, {"experts": PADDED}, {"experts": CAPPED})
