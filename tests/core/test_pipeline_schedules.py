"""Every schedule, virtual stages and micro-batches of several sizes compute what one process computes."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ascendspeed_core.build import load_model
from ascendspeed_core.config.batch import MICRO_BATCH_EXAMPLES, BatchConfig
from ascendspeed_core.config.layout import SPLIT_BACKWARD_SCHEDULES, Layout, stages_of_ranks
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.objectives.next_token import masked_sum
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel import collectives
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import run_pipeline
from ascendspeed_core.parallel.timeline import Recorder
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import ConfigError
from core.test_layout_equality import HEADER, TITLE, TOLERANCE, differences, one_process
from core.training_cases import join_stages, micro_batches, train
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

SCHEDULES: tuple[dict[str, Any], ...] = (
    {"schedule": "gpipe"},
    {"schedule": "looped-bfs", "layers_per_stage": 1},
    {"schedule": "interleaved", "layers_per_stage": 1},
    {"schedule": "interleaved-zb", "layers_per_stage": 1},
    {"schedule": "zbv"},
    {"schedule": "dualpipev"},
)
LAYOUTS = [
    *(Layout(pp=2, **schedule) for schedule in SCHEDULES),
    Layout(tp=2, pp=2, sequence_parallel=True, schedule="interleaved", layers_per_stage=1),
    Layout(tp=2, pp=2, schedule="zbv"),
    Layout(pp=2, dp=2, sharded_optimizer=True, schedule="interleaved-zb", layers_per_stage=1),
    Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True, schedule="dualpipev"),
    Layout(pp=2, dp=2, schedule="looped-bfs", layers_per_stage=1, early_reduction=True),
    Layout(
        pp=2, dp=2, schedule="interleaved", layers_per_stage=1, early_reduction=True, sharded_optimizer=True
    ),
]


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_schedules(workers: WorkerPool, report: ReportTables, layout: Layout, tied: bool) -> None:
    size = 16 // (4 * layout.dp)
    ranks = workers.run(
        train,
        layout.world_size,
        tiny_config(tie_word_embeddings=tied),
        layout,
        "float64",
        micro_batch_size=size,
    )
    found = differences(join_stages(ranks, layout), one_process("float64", tied, 128))
    report.add(TITLE, HEADER, f"{layout}{', tied' if tied else ''}", "float64", *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found


@pytest.mark.parametrize(
    "layout", [layout for layout in LAYOUTS[:6] if layout.schedule in SPLIT_BACKWARD_SCHEDULES], ids=str
)
def test_weight_gradients_apart_are_added_up_in_fp32(workers: WorkerPool, layout: Layout) -> None:
    ranks = workers.run(train, 2, tiny_config(), layout, "bfloat16", micro_batch_size=4)
    losses, norms, gradients, weights = differences(
        join_stages(ranks, layout), one_process("bfloat16", False, 128)
    )
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        # The same sums in the same order. Those of the norm are taken stage by stage: the factor of clipping may differ
        # by a unit of fp32, which now and then makes a weight of bf16 its neighbour, 2**-8 away; others follow.
        assert gradients == 0
        assert max(losses, norms) < 2**-10
        assert weights < 2**-7
    else:
        # Without AVX-512 torch's bf16 products sum in an order that depends on which operand is transposed. Adding up
        # in bf16 instead of fp32 makes the norm wrong by 40 %.
        assert max(losses, norms, gradients) < 2**-7
        assert weights < 2**-5


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (Layout(pp=2), (1, 5, 2, 8)),
        (Layout(tp=2, pp=2, sequence_parallel=True), (1, 2, 5, 5, 2, 1)),
        (Layout(pp=2, dp=2), (1, 2, 3, 2)),
        (Layout(pp=2, schedule="interleaved", layers_per_stage=1), (1, 5, 2, 8)),
        (Layout(pp=2, schedule="zbv"), (3, 6, 5, 2)),
    ],
    ids=str,
)
def test_micro_batches_of_several_sizes(
    workers: WorkerPool, report: ReportTables, layout: Layout, sizes: tuple[int, ...]
) -> None:
    ranks = workers.run(train, layout.world_size, tiny_config(), layout, "float64", micro_batch_size=sizes)
    found = differences(join_stages(ranks, layout), one_process("float64", False, 128))
    report.add(TITLE, HEADER, f"{layout}, micro-batches of {sizes}", "float64", *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found


def step_events(layout: Layout) -> tuple[list[tuple[str, int]], int]:
    """What a process did in one step: actions and starts of reductions, in order; and how many reductions it made."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(tiny_config(), seed=5), mesh, torch.float32)
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    batches = micro_batches(128, 0, mesh, 2, masked=False)
    recorder, messages = Recorder(lambda: None), []

    class CountingDist:
        """`torch.distributed` as the collectives see it; torch's own schedules go on with the real one."""

        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def isend(self, *args: Any, **kwargs: Any) -> Any:
            if kwargs["group"] is mesh.group("dp"):
                messages.append(args)
            return dist.isend(*args, **kwargs)

    with patch.object(collectives, "dist", CountingDist()):
        run_pipeline(
            model, mesh, [batch.input for batch in batches],
            lambda number, logits: masked_sum(model, logits, batches[number], mesh), recorder,
            engine.begin_last_backward, engine.end_last_backward,
        )  # fmt: skip
        engine.step()
    events = [(action.start, action.kind, action.stage) for action in recorder.actions]
    events += [(one.start, "reduction", one.stage) for one in engine.optimizer.reduction.noted]
    # With one other data-parallel rank a small reduction is one message.
    return [(kind, stage) for _, kind, stage in sorted(events)], len(messages)


@pytest.mark.parametrize("mode", ["aiao", "fifo"])
def test_a_finished_stage_is_reduced_while_the_other_computes(
    workers: WorkerPool, report: ReportTables, mode: str
) -> None:
    config = ParallelConfig(
        pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1, foldx_mode=mode
    )
    layout = config.layout(4)
    for rank, (events, reductions) in enumerate(workers.run(step_events, 4, layout)):
        first, second = 0 + rank // 2, 2 + rank // 2
        assert [event for event in events if event[0] == "reduction"] == [
            ("reduction", second),
            ("reduction", first),
        ]
        # One reduction of each weight: two stages, nothing left for the optimizer's step.
        assert reductions == 2
        started = events.index(("reduction", second))
        later = [event for event in events[started:] if event[0] == "backward"]
        assert later
        assert set(later) == {("backward", first)}
        report.add(
            "Early reduction: backwards of the other stage that still run when a stage's reduction starts",
            ("mode", "rank", "micro-batches", "backwards", "reductions in the step"),
            mode, rank, 4, len(later), reductions,
        )  # fmt: skip


def test_interleaved_stages_are_dealt_out_in_turn() -> None:
    held = stages_of_ranks(8, Layout(pp=2, schedule="interleaved", layers_per_stage=2))
    assert [[list(stage.layers) for stage in own] for own in held] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert held[0][0].is_first
    assert held[1][1].is_last


def test_v_schedules_go_down_and_up_again() -> None:
    held = stages_of_ranks(7, Layout(pp=3, schedule="zbv"))
    assert [[list(stage.layers) for stage in own] for own in held] == [[[0, 1], [6]], [[2], [5]], [[3], [4]]]
    assert held[0][0].is_first
    assert held[0][1].is_last


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"num_layers_per_virtual_pipeline_stage": 3},
            "3 times pipeline_model_parallel_size=2 does not divide num_layers=4; choose 1, 2",
        ),
        ({"num_layers_per_virtual_pipeline_stage": 2}, "gives each of 2 ranks one stage only"),
    ],
)
def test_layers_that_do_not_fit(options: dict[str, int], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ParallelConfig(pipeline_model_parallel_size=2, **options).check_model(tiny_config())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"pipeline_schedule": "zbv"}, "pipeline_model_parallel_size=1, which has no pipeline"),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "which has no pipeline"),
        (
            {
                "pipeline_model_parallel_size": 2,
                "pipeline_schedule": "zbv",
                "num_layers_per_virtual_pipeline_stage": 1,
            },
            "goes with interleaved, interleaved-zb, looped-bfs, not with pipeline_schedule=zbv",
        ),
        (
            {"pipeline_model_parallel_size": 2, "foldx_mode": "aiao"},
            "foldx_mode=aiao needs --num-layers-per-virtual-pipeline-stage N and runs pipeline_schedule=looped-bfs",
        ),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved"},
            "give --num-layers-per-virtual-pipeline-stage N",
        ),
    ],
)
def test_options_that_contradict(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    ("layout", "count", "complaint"),
    [
        (Layout(pp=4, schedule="interleaved", layers_per_stage=1), 11, "give 8 or 12"),
        (Layout(pp=2, schedule="dualpipev"), 3, "a micro-batch for each of its 4 stages, not 3"),
    ],
)
def test_numbers_of_micro_batches(layout: Layout, count: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        layout.check_micro_batches(count)


def test_sizes_of_the_2023_examples() -> None:
    assert [(len(sizes), sum(sizes)) for sizes in MICRO_BATCH_EXAMPLES.values()] == [(16, 64), (24, 96)]
    batch = BatchConfig(
        global_batch_size=128,
        micro_batch_size=4,
        optimized_pipeline=True,
        manual_mbs="example-config-1",
    )
    assert batch.resolve_global_batch_size(2) == 128
    with pytest.raises(ValueError, match="makes 64 samples per device, with dp = 1 a step of 64, not"):
        batch.resolve_global_batch_size(1)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimized_pipeline": True}, "optimized_pipeline and manual_mbs go together"),
        ({"manual_mbs": "1,2"}, "go together"),
        (
            {"optimized_pipeline": True, "manual_mbs": "1,x"},
            "neither example-config-1 nor example-config-2 nor auto",
        ),
        ({"optimized_pipeline": True, "manual_mbs": "1,0"}, "every size must be 1 or more"),
        (
            {"optimized_pipeline": True, "manual_mbs": "1,2", "rampup_batch_size": (1, 1, 5)},
            "leave one of them out",
        ),
    ],
)
def test_sizes_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BatchConfig(**options)
