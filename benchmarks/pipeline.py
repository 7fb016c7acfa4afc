"""What each pipeline schedule leaves idle, measured against what it must leave idle.

Layers that sleep stand in for layers that compute, so that 16 stages run at full speed on two cores: everything else,
torch's schedules, our stages and gloo's messages, is what training runs. A layer sleeps for each sample once in the
forward, once for the gradient of its input and once for that of its weight. The ideal takes the order that was
measured, the lengths that were slept, and messages that take no time.

    python benchmarks/pipeline.py [--stages 4 8 16] [--layer-ms 40] [--pictures FOLDER]
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.config.batch import MICRO_BATCH_EXAMPLES
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.layer import TransformerLayer
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.observability.timeline import draw_timelines
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.timeline import Action, Reduction, Timeline, ideal
from ascendspeed_core.planner.micro_batches import StageCost, best_sizes
from ascendspeed_core.planner.profile_pipeline import record_step
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

LAYERS_PER_DEVICE = 2
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"schedule": "1f1b"},
    {"schedule": "gpipe"},
    {"schedule": "looped-bfs", "layers_per_stage": 1},
    {"schedule": "interleaved", "layers_per_stage": 1},
    {"schedule": "interleaved-zb", "layers_per_stage": 1},
    {"schedule": "zbv"},
    {"schedule": "dualpipev"},
)
TITLE = "One step of sleeping layers, 2 layers a device"
HEADER = (
    "schedule",
    "pp",
    "micro-batches",
    "measured, ms",
    "ideal, ms",
    "measured / ideal",
    "idle, measured",
    "idle, ideal",
)


@dataclass(frozen=True)
class LayerCost:
    """Seconds that a layer takes in each of its three parts: a fixed one, and one for each sample."""

    fixed: float
    sample: float

    def of(self, size: int) -> float:
        return self.fixed + self.sample * size


def even(seconds: float) -> LayerCost:
    """So long for a micro-batch, whatever its size."""
    return LayerCost(seconds, 0.0)


def in_proportion(seconds: float) -> LayerCost:
    """So long for the four samples of an even micro-batch."""
    return LayerCost(0.0, seconds / 4)


def with_fixed_part(seconds: float) -> LayerCost:
    """As `in_proportion`, and as long as one sample for each micro-batch."""
    return LayerCost(seconds / 4, seconds / 4)


PARTS = {"forward": 1, "backward": 2, "input gradient": 1, "weight gradient": 1}
"""Sleeps of a layer in each kind of action."""


class SleepingLayer(TransformerLayer):
    """Takes the time of a layer, and none of the processor; one of its weights has a gradient."""

    def __init__(self, config: ModelConfig, layer: int, cost: LayerCost) -> None:
        super().__init__(config, layer)
        self.cost = cost

    def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
        seconds = self.cost.of(x.shape[0])
        y: torch.Tensor = _Sleep.apply(x, seconds, seconds)
        # A branch of its own, which a schedule may leave for later.
        weight: torch.Tensor = _Sleep.apply(self.mlp.get_submodule("gate_proj").weight, 0.0, seconds)
        return y + weight[0]


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, before: float, behind: float) -> torch.Tensor:
        ctx.behind = behind
        time.sleep(before)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        time.sleep(ctx.behind)
        return gradients[0], None, None


def sleeping_model(mesh: ParallelMesh, cost: LayerCost, ffn_hidden_size: int) -> Transformer:
    """This process's stages, with layers that sleep."""
    from ascendspeed_core.config.layout import stages_of_ranks

    config = tiny_config(
        num_layers=LAYERS_PER_DEVICE * mesh.layout.pp, vocab_size=32, ffn_hidden_size=ffn_hidden_size
    )
    model = Transformer(config, stages_of_ranks(config.num_layers, mesh.layout)[mesh.pp_rank])
    for number in model.layers:
        model.layers[number] = SleepingLayer(config, int(number), cost)
    return model


def one_step(
    layout: Layout, sizes: Sequence[int], cost: LayerCost, ffn_hidden_size: int = 1
) -> tuple[list[Action], list[Reduction]]:
    """Run in each process: two steps to warm up, then the one that is returned."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = sleeping_model(mesh, cost, ffn_hidden_size)
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    step = record_step(model, mesh, sizes, 4, engine)
    return step.actions, step.reductions


def planned(measured: Timeline, sizes: Sequence[int], cost: LayerCost) -> Timeline:
    """The order that was measured, with the lengths that were slept, and messages that take no time."""
    stages = {action.stage for actions in measured.devices for action in actions}
    layers = LAYERS_PER_DEVICE * len(measured.devices) // len(stages)

    def slept(action: Action) -> Action:
        seconds = layers * PARTS[action.kind] * cost.of(sizes[action.micro_batch])
        return replace(action, start=0.0, end=seconds)

    return ideal(Timeline(tuple(tuple(map(slept, actions)) for actions in measured.devices)))


def measure(
    pool: WorkerPool, layout: Layout, sizes: Sequence[int], cost: LayerCost
) -> tuple[Timeline, Timeline]:
    measured = Timeline(tuple(tuple(own) for own, _ in pool.run(one_step, layout.pp, layout, sizes, cost)))
    return measured, planned(measured, sizes, cost)


def schedules(pool: WorkerPool, tables: ReportTables, pp: int, seconds: float, pictures: Path | None) -> None:
    """Every schedule with 2 pp even micro-batches."""
    drawn = []
    for schedule in SCHEDULES:
        layout = Layout(pp=pp, **schedule)
        count = 2 * pp
        measured, best = measure(pool, layout, (1,) * count, even(seconds))
        tables.add(TITLE, HEADER, schedule["schedule"], pp, count, *figures(measured, best))
        drawn += [(f"{schedule['schedule']}, measured", measured), (f"{schedule['schedule']}, ideal", best)]
    if pictures:
        for name in ("1f1b", "interleaved", "zbv", "interleaved-zb", "dualpipev"):
            chosen = [(title, timeline) for title, timeline in drawn if title.startswith(f"{name},")]
            draw_timelines(chosen, pictures / f"timeline-{name}-pp{pp}.png")


def early_reduction(pool: WorkerPool, tables: ReportTables, seconds: float, pictures: Path | None) -> None:
    """When the gradients of each stage start to be added up over two pipelines, and when the step is over."""
    pp, ffn_hidden_size, sizes, cost = 2, 50_000, (1,) * 8, even(seconds)
    drawn = []
    for name, schedule, early in (
        ("looped-bfs", "looped-bfs", False),
        ("--foldx-mode aiao", "looped-bfs", True),
        ("interleaved", "interleaved", False),
        ("--foldx-mode fifo", "interleaved", True),
    ):
        layout = Layout(pp=pp, dp=2, schedule=schedule, layers_per_stage=1, early_reduction=early)
        ranks = pool.run(one_step, layout.world_size, layout, sizes, cost, ffn_hidden_size)
        # The first pipeline of the two.
        own = ranks[:: layout.dp]
        timeline = Timeline(tuple(tuple(a) for a, _ in own), tuple(tuple(r) for _, r in own))
        drawn.append((f"{name}, measured", timeline))
        for device, (actions, reductions) in enumerate(own):
            zero = timeline.start
            starts = ", ".join(
                f"{'rest' if one.stage is None else f'stage {one.stage}'} {(one.start - zero) * 1e3:.0f}"
                for one in reductions
            )
            tables.add(
                f"Gradients of {3 * 32 * ffn_hidden_size:,} weights a layer, dp 2, pp 2, 2 stages a device",
                ("schedule", "device", "reductions", "start, ms", "last backward ends, ms", "all added up, ms"),
                name, device, len(reductions), starts, f"{(actions[-1].end - zero) * 1e3:.0f}",
                f"{(max(one.end for one in reductions) - zero) * 1e3:.0f}",
            )  # fmt: skip
    if pictures:
        draw_timelines(drawn[:2], pictures / "timeline-fold.png")


def figures(measured: Timeline, best: Timeline) -> tuple[str, ...]:
    return (
        f"{measured.makespan * 1e3:.0f}", f"{best.makespan * 1e3:.0f}", f"{measured.makespan / best.makespan:.3f}",
        f"{measured.bubble:.1%}", f"{best.bubble:.1%}",
    )  # fmt: skip


def sizes_of_micro_batches(pool: WorkerPool, tables: ReportTables, seconds: float) -> None:
    """1F1B with micro-batches of several sizes, and where costs have a fixed part."""
    for pp, example in ((4, "example-config-1"), (8, "example-config-2")):
        sizes = MICRO_BATCH_EXAMPLES[example]
        samples = sum(sizes)
        for name, cost in (
            ("in proportion", in_proportion(seconds)),
            ("with a fixed part", with_fixed_part(seconds)),
        ):
            stage = StageCost(
                *(LAYERS_PER_DEVICE * part * share for part in (1, 2) for share in (cost.fixed, cost.sample))
            )
            found = best_sizes(samples, pp, stage, most=max(sizes))
            for label, chosen in (("even, 4", (4,) * (samples // 4)), (example, sizes), ("auto", found)):
                measured, best = measure(pool, Layout(pp=pp), chosen, cost)
                busy = sum(action.seconds for action in best.devices[0])
                tables.add(
                    "1F1B with micro-batches of several sizes",
                    ("pp", "samples", "time of a layer", "sizes", "micro-batches", "measured, ms", "ideal, ms",
                     "idle a device, measured, ms", "ideal, ms "),
                    pp, samples, name, label, len(chosen), f"{measured.makespan * 1e3:.0f}",
                    f"{best.makespan * 1e3:.0f}", f"{(measured.makespan - busy) * 1e3:.0f}",
                    f"{(best.makespan - busy) * 1e3:.0f}",
                )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="*", default=[4, 8, 16], help="pipeline devices")
    parser.add_argument(
        "--pictures", type=Path, help="folder for pictures of the timelines with the fewest devices"
    )
    parser.add_argument("--layer-ms", type=float, default=40.0, help="sleep of a layer, three times a step")
    given = parser.parse_args()
    seconds = given.layer_ms / 1e3
    pool, tables = WorkerPool(), ReportTables()
    for pp in given.stages:
        schedules(pool, tables, pp, seconds, given.pictures if pp == min(given.stages) else None)
    sizes_of_micro_batches(pool, tables, seconds)
    early_reduction(pool, tables, seconds, given.pictures)
    pool.close()
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
