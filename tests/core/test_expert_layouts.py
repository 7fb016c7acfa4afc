"""Models with experts compute under every layout what one process computes, the losses of their routers included."""

from functools import cache
from typing import Any

import pytest
import torch

from ascendspeed_core.config.layout import Layout
from core.expert_cases import train_experts
from core.test_layout_equality import differences
from core.training_cases import Trained, join_stages
from support.processes import WorkerPool

TOLERANCE = 1e-10


@cache
def one_process(**options: Any) -> Trained:
    torch.set_num_threads(1)
    return train_experts(Layout(), **options)


def check(got: Trained, want: Trained) -> None:
    assert max(differences(got, want)) < TOLERANCE, differences(got, want)
    for ours, theirs in zip(got.auxiliary_losses, want.auxiliary_losses, strict=True):
        assert tuple(ours) == tuple(theirs) == ("balance", "router_z")
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-12)


CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(tp=2), {}),
    (Layout(tp=2, ep=2, etp=1), {}),
    (Layout(tp=2, ep=2, etp=1, sequence_parallel=True), {}),
    (Layout(dp=2, ep=2), {}),
    (Layout(dp=2, ep=2, sharded_optimizer=True), {"micro_batch_size": 8}),
    (Layout(cp=2, ep=2), {}),
    (Layout(dp=2, etp=2), {}),
    (Layout(pp=2), {}),
    (Layout(pp=2, schedule="zbv"), {}),
    (Layout(tp=2, dp=2, ep=2), {}),
    (Layout(tp=2, dp=2, ep=4, etp=1, sharded_optimizer=True), {}),
    (Layout(pp=2, dp=2, ep=2, schedule="interleaved-zb", layers_per_stage=1), {}),
]


@pytest.mark.parametrize(("layout", "options"), CASES, ids=str)
def test_layouts(workers: WorkerPool, layout: Layout, options: dict[str, Any]) -> None:
    options = {"micro_batch_size": 16 // (4 * layout.dp)} | options
    ranks = workers.run(train_experts, layout.world_size, layout, **options)
    check(join_stages(ranks, layout), one_process())
