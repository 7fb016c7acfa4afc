"""Ten steps under megatron-core against one process of ours."""

from typing import Any

import pytest

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from core.megatron_cases import train_megatron
from core.training_cases import Trained, train
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables
from support.versions import skip_before

EPSILON = 1e-3
"""Of AdamW: a gradient of nothing but rounding would otherwise become a step of full length."""

LARGEST = {"float64": 2e-7, "float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}
"""float64: megatron-core sums the gradient's norm in fp32, by which gradients are clipped; others: a few roundings."""

OVERLAP: dict[str, Any] = {
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_elements": 2000,
}
"""Gradients are reduced beside the backward and weights gathered beside the forward, in several buckets."""


def far(found: Trained, expected: Trained, config: ModelConfig) -> tuple[float, float, float]:
    """Largest relative deviations of losses, gradient norms and weights.

    Without rotary positions the bias of keys has no effect, and only rounding for a gradient.
    """

    def numbers(ours: list[Any], theirs: list[Any]) -> float:
        return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))

    assert found.weights.keys() == expected.weights.keys()
    weights = max(
        float((found.weights[name].double() - weight.double()).abs().max() / weight.abs().max())
        for name, weight in expected.weights.items()
        if config.position == "rotary" or not name.endswith("k_proj.bias")
    )
    return numbers(found.losses, expected.losses), numbers(found.norms, expected.norms), weights


SHARDS_WITH_TRANSFORMER_ENGINE = "has no sharded optimizer without Transformer Engine"


def compare(
    layout: Layout,
    workers: WorkerPool,
    megatron_workers: WorkerPool,
    report: ReportTables,
    what: str,
    config: ModelConfig | None = None,
    dtype: str = "float64",
    more: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Train ten steps with one process of ours and under megatron-core, and compare."""
    if layout.sharded_optimizer:
        skip_before("megatron-core", "0.13", SHARDS_WITH_TRANSFORMER_ENGINE)
    config, largest = config or tiny_config(), LARGEST[dtype]
    options = {"adam_eps": EPSILON} | options
    if options.get("optimizer") == "sgd":
        del options["adam_eps"]
    (one,) = workers.run(train, 1, config, Layout(), dtype, **options)
    ranks = megatron_workers.run(
        train_megatron, layout.world_size, config, layout, dtype, **options, **(more or {})
    )
    differences = far(ranks[0], one, config)
    report.add(
        "Ten steps under megatron-core: largest relative difference to one process of ours",
        ("what", "layout", "dtype", "losses", "gradient norms", "weights after"),
        what,
        str(layout),
        dtype,
        *differences,
    )
    assert max(differences) < largest
    for of_step, ours in zip(ranks[0].auxiliary_losses, one.auxiliary_losses, strict=True):
        assert of_step == pytest.approx(ours, rel=largest)
    assert all(rank.losses == ranks[0].losses for rank in ranks)
