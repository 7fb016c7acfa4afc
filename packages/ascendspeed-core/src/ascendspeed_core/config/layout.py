"""How one model is spread over ranks: sizes of the mesh axes, pipeline stages; pure arithmetic, no torch."""

import itertools
from dataclasses import dataclass
from math import prod
from typing import Literal, NoReturn

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
        overlap_grad_reduce: gradients are summed over replicas while the last backward of their stage still computes.
        overlap_param_gather: parameters of a sharded optimizer are gathered while the next forward computes.
        bucket_elements: numbers of gradients and parameters that travel in one message.
        zero_stage: what DeepSpeed cuts over dp: optimizer state (1), gradients (2), weights (3); `None` without it.
        ep: shares of the experts of a layer, over the ranks of one stage.
        etp: ranks that share one expert; `None` is tp.
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
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_elements: int = 1 << 24
    zero_stage: int | None = None
    ep: int = 1
    etp: int | None = None

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the mesh's axes, slowest first: tp varies fastest with the rank, as in Megatron-LM.

        The ranks of a stage are counted in two ways: dp x cp x tp for all but experts, edp x ep x etp for these, tp and
        etp fastest. An axis that ends of the other count lie within stands here in pieces, `dp_0` and `dp_1`, of which
        `unions` makes the axis again.
        """
        return {"pp": self.pp} | {piece: size for _, piece, size, _ in reversed(self._pieces())}

    @property
    def unions(self) -> dict[str, tuple[str, ...]]:
        """Axes that have a name and a process group together.

        A rank's replicas hold the same weights and sum their gradients. Those of its experts are `edp`; the experts of
        a layer are spread over `experts`, ep x etp.
        """
        pieces = self._pieces()
        found: dict[str, tuple[str, ...]] = {}
        for axis in ("dp", "cp", "tp"):
            parts = tuple(piece for owner, piece, _, _ in pieces if owner == axis)
            if parts != (axis,):
                found[axis] = parts
        for axis in ("edp", "ep", "etp"):
            found[axis] = tuple(piece for _, piece, _, owner in pieces if owner == axis)
        return found | {"replicas": ("dp", "cp"), "experts": ("ep", "etp")}

    def _pieces(self) -> list[tuple[str, str, int, str]]:
        """Return the pieces of tp, cp and dp, fastest first: its axis, its name, its size, and its axis for experts.

        Raises:
            ConfigError: the two ways to count the ranks of a stage have no common pieces.
        """
        first, second = self.expert_tp, self.expert_tp * self.ep
        found, stride = [], 1
        for axis, size in (("tp", self.tp), ("cp", self.cp), ("dp", self.dp)):
            end = stride * size
            marks = [stride, *sorted({edge for edge in (first, second) if stride < edge < end}), end]
            steps = list(itertools.pairwise(marks))
            if any(upper % lower for lower, upper in steps):
                self._refuse_experts(f"divides or is a multiple of {' and '.join(map(str, self._strides()))}")
            for number, (lower, upper) in enumerate(steps):
                name = axis if len(steps) == 1 else f"{axis}_{len(steps) - 1 - number}"
                owner = "etp" if upper <= first else "ep" if upper <= second else "edp"
                found.append((axis, name, upper // lower, owner))
            stride = end
        if second > stride:
            self._refuse_experts(f"is no more than the {stride} ranks of a stage, dp x cp x tp")
        return found

    def _strides(self) -> list[int]:
        return sorted({self.tp, self.tp * self.cp, self.tp * self.cp * self.dp})

    def _refuse_experts(self, rule: str) -> NoReturn:
        raise ConfigError(
            f"expert_model_parallel_size={self.ep} with expert_tensor_parallel_size={self.expert_tp}: "
            f"{self.ep * self.expert_tp} ranks cannot share the experts of a layer on tp{self.tp} x cp{self.cp} x "
            f"dp{self.dp}; choose sizes of which each product, etp and etp x ep, {rule}"
        )

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
        sizes += f" x ep{self.ep}" * (self.ep > 1) + (f" x etp{self.etp}" if self.etp is not None else "")
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
