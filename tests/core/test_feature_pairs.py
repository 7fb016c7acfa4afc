"""Every feature, and every pair that can go together, computes what one process computes; run by `nox -s nightly`."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.training import ComputeConfig, RecomputeConfig
from core.test_layout_equality import HEADER, TOLERANCE, differences, one_process
from core.training_cases import join_stages, train
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

Feature = tuple[Mapping[str, Any], Mapping[str, Any]]
"""What a feature sets of `Layout`, and of `train`."""


REFUSED = tuple(
    (f"pp2 {schedule}", "recompute selective") for schedule in ("virtual, zero bubble", "zbv", "dualpipev")
)
"""See test_recompute.py: selective recompute keeps its results for one backward pass, these schedules take two."""


def recompute(policy: str, **more: Any) -> Feature:
    return {}, {"recompute": RecomputeConfig(checkpoint_activations=True, checkpoint_policy=policy, **more)}


FEATURES: dict[str, Feature] = {
    "tp2": ({"tp": 2}, {}),
    "tp2 sp": ({"tp": 2, "sequence_parallel": True}, {}),
    "dp2": ({"dp": 2}, {}),
    "dp2 sharded": ({"dp": 2, "sharded_optimizer": True}, {}),
    "pp2 1f1b": ({"pp": 2}, {}),
    "pp2 virtual": ({"pp": 2, "schedule": "interleaved", "layers_per_stage": 1}, {}),
    "pp2 virtual, zero bubble": ({"pp": 2, "schedule": "interleaved-zb", "layers_per_stage": 1}, {}),
    "pp2 zbv": ({"pp": 2, "schedule": "zbv"}, {}),
    "pp2 dualpipev": ({"pp": 2, "schedule": "dualpipev"}, {}),
    "pp2 dp2 fold": (
        {"pp": 2, "dp": 2, "schedule": "looped-bfs", "layers_per_stage": 1, "early_reduction": True},
        {},
    ),
    "sizes 1, 3, 2, 2": ({}, {"sizes": (1, 3, 2, 2)}),
    "recompute full": recompute("full"),
    "recompute selective": recompute("selective"),
    "recompute attention": recompute("attention"),
    "triangle": ({}, {"compute": ComputeConfig(triangle_attn=True)}),
    "reference attention": ({}, {"compute": ComputeConfig(attention="reference")}),
    "merged FFN": ({}, {"joined": True}),
}


def combined(names: tuple[str, ...]) -> tuple[Layout, dict[str, Any]] | None:
    """The layout and the options of features together; `None` if they contradict or are refused."""
    layout: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name in names:
        for own, all_ in zip(FEATURES[name], (layout, options), strict=True):
            if any(all_.get(key, value) != value for key, value in own.items()):
                return None
            all_ |= own
    if names in REFUSED:
        return None
    return Layout(**layout), options


def is_more_than(names: tuple[str, ...], part: str) -> bool:
    """Whether features together set something that one of them alone does not."""
    return combined(names) != combined((part,))


SINGLES = [(name,) for name in FEATURES]
PAIRS = [
    pair
    for pair in itertools.combinations(FEATURES, 2)
    if combined(pair) and all(is_more_than(pair, name) for name in pair)
]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("names", "dtype"),
    [(names, "float64") for names in SINGLES + PAIRS]
    + [(names, dtype) for names in SINGLES for dtype in ("float32", "bfloat16", "float16")],
    ids=str,
)
def test_feature(workers: WorkerPool, report: ReportTables, names: tuple[str, ...], dtype: str) -> None:
    chosen = combined(names)
    assert chosen
    layout, options = chosen
    sizes = options.pop("sizes", None)
    samples = 16 // layout.dp
    micro_batch_size = [size * samples // 8 for size in sizes] if sizes else samples // 4
    ranks = workers.run(
        train, layout.world_size, tiny_config(), layout, dtype, micro_batch_size=micro_batch_size, **options
    )
    found = differences(join_stages(ranks, layout), one_process(dtype, False, 128))
    title = "Features and pairs of features, ten steps against one process: largest relative difference"
    report.add(title, ("features", *HEADER[1:]), " + ".join(names), dtype, *found)
    limits = (1e-9,) * 4 if dtype == "float64" else TOLERANCE["bfloat16" if dtype == "float16" else dtype]
    assert all(value <= limit for value, limit in zip(found, limits, strict=True)), found
