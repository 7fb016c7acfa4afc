"""How one model is spread over ranks: sizes of the mesh axes, pipeline stages; pure arithmetic, no torch."""

from dataclasses import dataclass
from math import prod
from typing import Literal

from ascendspeed_data.errors import ConfigError

PipelineSchedule = Literal["1f1b", "gpipe", "looped-bfs", "interleaved", "interleaved-zb", "zbv", "dualpipev"]
"""Orders of forwards and backwards:

- `1f1b`: one stage for each rank, one forward and one backward in turn (Narayanan et al., 2021, PipeDream-Flush).
- `gpipe`: all forwards, then all backwards (Huang et al., 2019).
- `looped-bfs`: several stages for each rank, each runs all micro-batches in turn (Lamy-Poirier, 2022, breadth-first).
- `interleaved`: several stages for each rank, dealt out in turn (Narayanan et al., 2021, Megatron-LM, section 2.2).
- `interleaved-zb`: the same, with the gradients of the weights moved into the bubble (Qi et al., 2023, ZB1P).
- `zbv`, `dualpipev`: two stages for each rank, down and up again like a V (Qi et al., 2024; DeepSeek-AI, 2025).
"""


V_SCHEDULES = ("zbv", "dualpipev")
"""The first rank holds the first and the last stage."""


INTERLEAVED_SCHEDULES = ("interleaved", "interleaved-zb", "looped-bfs")
"""Several stages for each rank, dealt out in turn."""


SPLIT_BACKWARD_SCHEDULES = ("interleaved-zb", "zbv", "dualpipev")
"""Schedules that compute the gradients of inputs first and those of weights later: autograd runs twice."""


@dataclass(frozen=True)
class Layout:
    """Number of ranks along each axis of the mesh, and what else decides where a model's parts are.

    Attributes:
        tp: ranks that share every layer.
        pp: stages of layers.
        dp: shares of the batch.
        cp: parts of every sequence.
        sequence_parallel: the tp ranks cut the sequence between layers.
        sharded_optimizer: the ranks that hold the same weights cut the optimizer's state.
        schedule: order of forwards and backwards of the pipeline.
        layers_per_stage: layers of each stage when ranks hold several (virtual pipeline); `None` cuts as evenly as
            can be.
        early_reduction: gradients of a stage are summed over its replicas while other stages of the rank still
            compute.
        zero_stage: what DeepSpeed cuts over dp: optimizer state (1), gradients (2), weights (3); `None` without it.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    sharded_optimizer: bool = False
    schedule: PipelineSchedule = "1f1b"
    layers_per_stage: int | None = None
    early_reduction: bool = False
    zero_stage: int | None = None

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the mesh's axes, slowest first: tp varies fastest with the rank, as in Megatron-LM."""
        return {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp}

    @property
    def unions(self) -> dict[str, tuple[str, ...]]:
        """Axes that have a name and a process group together.

        A rank's replicas hold the same weights and sum their gradients.
        """
        return {"replicas": ("dp", "cp")}

    def expand(self, *names: str) -> tuple[str, ...]:
        """Return the axes that some axes and unions consist of, slowest first.

        Raises:
            ConfigError: no axis or union has that name.
        """
        found: set[str] = set()
        for name in names:
            if name in self.axes:
                found.add(name)
            elif name in self.unions:
                found |= set(self.expand(*self.unions[name]))
            else:
                known = ", ".join((*self.axes, *self.unions))
                raise ConfigError(f"the mesh has no axis {name}; its axes and their unions are {known}")
        return tuple(axis for axis in self.axes if axis in found)

    def spanned(self, *names: str) -> tuple[str, ...]:
        """Return those axes of `expand` that have more than one rank."""
        return tuple(axis for axis in self.expand(*names) if self.axes[axis] > 1)

    def size(self, *names: str) -> int:
        """Return how many ranks there are along some axes or unions together."""
        sizes = self.axes
        return prod(sizes[axis] for axis in self.expand(*names))

    def index(self, rank: int, *names: str) -> int:
        """Return the number of a rank among those along some axes or unions together."""
        index = 0
        stride = self.world_size
        axes = self.expand(*names)
        for axis, size in self.axes.items():
            stride //= size
            if axis in axes:
                index = index * size + rank // stride % size
        return index

    def groups(self, *names: str) -> list[list[int]]:
        """Return the ranks of each group along some axes or unions together, in order of their `index`."""
        others = tuple(axis for axis in self.axes if axis not in self.expand(*names))
        found: list[list[int]] = [[] for _ in range(self.size(*others))]
        for rank in range(self.world_size):
            found[self.index(rank, *others)].append(rank)
        return found

    @property
    def world_size(self) -> int:
        """All ranks."""
        return prod(self.axes.values())

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights and sum their gradients: dp x cp."""
        return self.size("replicas")

    def check_micro_batches(self, count: int) -> None:
        """Raise `ConfigError` when the schedule cannot run this number of micro-batches per step and rank."""
        if self.schedule in ("interleaved", "interleaved-zb"):
            rounds = max(count // self.pp, 1)
            if count % rounds:
                raise ConfigError(
                    f"{count} micro-batches per step and rank do not fill rounds of equal length on "
                    f"pipeline_model_parallel_size={self.pp} ranks, which pipeline_schedule={self.schedule} needs; "
                    f"choose sizes that give {count // self.pp * self.pp or 1} or {-(-count // self.pp) * self.pp}"
                )
        if self.schedule == "dualpipev" and count < 2 * self.pp:
            raise ConfigError(
                f"pipeline_schedule=dualpipev needs a micro-batch for each of its {2 * self.pp} stages, not "
                f"{count} per step and rank; choose sizes that give more, or another schedule"
            )

    def __str__(self) -> str:
        sizes = f"tp{self.tp} x pp{self.pp} x dp{self.dp}" + f" x cp{self.cp}" * (self.cp > 1)
        pipeline = "" if self.schedule == "1f1b" else f" + {self.schedule}"
        if self.layers_per_stage:
            pipeline += f" of {self.layers_per_stage} layer{'s' * (self.layers_per_stage > 1)}"
        pipeline += " + early reduction" * self.early_reduction
        return (
            sizes
            + pipeline
            + " + sp" * self.sequence_parallel
            + " + sharded optimizer" * self.sharded_optimizer
            + (f" + zero{self.zero_stage}" if self.zero_stage else "")
        )


@dataclass(frozen=True)
class Stage:
    """The part of a model that one pipeline stage holds.

    Attributes:
        index: number of the stage.
        count: stages in all.
        layers: global numbers of its layers.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the final norm and the head are here."""
        return self.index == self.count - 1


def stages_of_ranks(num_layers: int, layout: Layout) -> list[tuple[Stage, ...]]:
    """Return by pipeline rank the stages that it holds, first ones first.

    One stage for each rank is the rule. Interleaved schedules deal several out in turn; V schedules two, down and up
    again, so that the first rank has the first and the last.

    Raises:
        ConfigError: the layers cannot be cut like that.
    """
    pp, per_stage = layout.pp, layout.layers_per_stage
    if layout.schedule in V_SCHEDULES:
        cut = stages(num_layers, 2 * pp, f"two stages for each of pipeline_model_parallel_size={pp} ranks")
        return [(cut[rank], cut[-1 - rank]) for rank in range(pp)]
    if per_stage is None:
        cut = stages(num_layers, pp, f"pipeline_model_parallel_size={pp}")
        return [(stage,) for stage in cut]
    if num_layers % (pp * per_stage):
        fitting = [n for n in divisors(num_layers) if num_layers % (pp * n) == 0]
        choose = f"choose {', '.join(map(str, fitting))}" if fitting else f"{pp} must divide the layers"
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={per_stage} times pipeline_model_parallel_size={pp} does not "
            f"divide num_layers={num_layers}; {choose}"
        )
    if num_layers == pp * per_stage:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={per_stage} gives each of {pp} ranks one stage only; choose "
            "fewer layers, or leave it out"
        )
    cut = stages(num_layers, num_layers // per_stage, "the virtual pipeline")
    return [tuple(cut[rank::pp]) for rank in range(pp)]


def stages(num_layers: int, count: int, asked_by: str) -> list[Stage]:
    """Cut the layers into stages as equal as can be; the first ones are longer, as the head works in the last.

    Args:
        num_layers: of the model.
        count: of stages.
        asked_by: what asks for that number, for the message.

    Raises:
        ConfigError: a stage would be without a layer.
    """
    if count > num_layers:
        raise ConfigError(
            f"{asked_by} leaves a stage without any of the num_layers={num_layers} layers; "
            f"choose {num_layers} stages or less"
        )
    edges = [-(-num_layers * number // count) for number in range(count + 1)]
    return [Stage(number, count, range(edges[number], edges[number + 1])) for number in range(count)]


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
