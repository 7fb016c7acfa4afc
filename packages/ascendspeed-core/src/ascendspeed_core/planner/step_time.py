"""Seconds of a training step on a device that a profile describes: compute, recompute, messages, bubble, update."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ascendspeed_core.config.layout import SPLIT_BACKWARD_SCHEDULES, Layout, Stage, stages_of_ranks
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.planner.hardware import FORMAT_BYTES, HardwareProfile
from ascendspeed_core.planner.part_work import Message, PartWork
from ascendspeed_core.planner.pipeline_order import (
    PipelineWork,
    makespan_of,
    pipeline_orders,
    stages_per_rank,
)
from ascendspeed_core.planner.workload import Workload

MOST_SIMULATED = 20_000
"""Pieces of work of a pipeline up to which its order is walked through; above, its bubble has a closed form."""

NOT_SIMULATED = 0
"""For `StepTimer.most_simulated`: always the closed form."""


class PartSeconds(NamedTuple):
    """Seconds of a part of a micro-batch.

    Attributes:
        forward: computing.
        backward: computing, without recompute.
        again: computing what was dropped.
        waiting: for messages, in forward and backward; those of recompute included.
        forward_waiting: of them, in the forward.
    """

    forward: float
    backward: float
    again: float
    waiting: float
    forward_waiting: float

    def plus(self, other: "PartSeconds") -> "PartSeconds":
        """Return the sum of both."""
        return PartSeconds(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = PartSeconds(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class StepSeconds:
    """Where the seconds of a step go, on the rank that has most to do.

    Attributes:
        compute: forwards and backwards.
        recompute: what was dropped and computed again.
        model_messages: tensor, context and expert parallelism, and what stages send that nothing hides.
        bubble: of the pipeline.
        reduction: sums of gradients and gathers of weights that nothing hides.
        update: of the optimizer.
    """

    compute: float
    recompute: float
    model_messages: float
    bubble: float
    reduction: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return (
            self.compute + self.recompute + self.model_messages + self.bubble + self.reduction + self.update
        )  # fmt: skip

    def shares(self) -> dict[str, float]:
        """Return by name what part of the step each is."""
        return {name: seconds / self.total for name, seconds in vars(self).items()}


def spans_nodes(layout: Layout, axis: str, devices_per_node: int) -> bool:
    """Tell whether the ranks along an axis stand in several nodes: tp varies fastest, then cp, dp, pp."""
    return _stride(layout, axis) * _size(layout, axis) > devices_per_node and _size(layout, axis) > 1


def _size(layout: Layout, axis: str) -> int:
    sizes = {
        "experts": layout.ep * layout.expert_tp,
        "edp": layout.tp * layout.cp * layout.dp // (layout.ep * layout.expert_tp),
        "replicas": layout.cp * layout.dp,
    }
    return int(sizes.get(axis) or getattr(layout, axis))


def _stride(layout: Layout, axis: str) -> int:
    strides = {
        "tp": 1,
        "experts": 1,
        "cp": layout.tp,
        "replicas": layout.tp,
        "dp": layout.tp * layout.cp,
        "edp": layout.ep * layout.expert_tp,
        "pp": layout.tp * layout.cp * layout.dp,
    }
    return strides[axis]


class StepTimer:
    """Times parts, stages and steps of one workload on one kind of device.

    Args:
        work: a micro-batch under its layout.
        profile: of the devices.
        slowdown: factor of computing, where several ranks share what the profile calls a device.
        most_simulated: pieces of work of a pipeline up to which its order is walked through.
    """

    def __init__(
        self,
        work: Workload,
        profile: HardwareProfile,
        slowdown: float = 1.0,
        most_simulated: int = MOST_SIMULATED,
    ) -> None:
        self.work, self.profile = work, profile
        self._slowdown, self._most_simulated = slowdown, most_simulated
        self._known: dict[tuple[int, Mode], tuple[PartWork, PartSeconds]] = {}

    def message(self, one: Message) -> float:
        """Return the seconds of a collective."""
        return self._collective(one.name, one.axis, one.size)

    def _collective(self, name: str, axis: str, size: float) -> float:
        layout, per_node = self.work.layout, self.profile.devices_per_node
        ranks = _size(layout, axis)
        spans = spans_nodes(layout, axis, per_node)
        local = max(min(per_node // _stride(layout, axis), ranks), 1) if spans else 1
        # Rings enter a node as often as it has adapters for these ranks.
        inside = self.profile.links.node_gb_per_second.value / self.profile.links.network_gb_per_second.value
        lanes = min(local, max(inside, 1.0)) if name != "all_to_all" else 1
        return self.profile.collective_seconds(name, ranks, size, spans, lanes)  # type: ignore[arg-type]

    def part(self, part: PartWork, mode: Mode) -> PartSeconds:
        """Return the seconds of a part of a micro-batch, of which a mode says what is computed again."""
        key = (id(part), mode)
        if key not in self._known:
            # The part stays alive here, so that its identity is its own.
            self._known[key] = part, self._time(part, mode)
        return self._known[key][1]

    def _time(self, part: PartWork, mode: Mode) -> PartSeconds:
        profile, dtype = self.profile, self.work.dtype
        products_forward = products_backward = operators_forward = operators_backward = 0.0
        for product in (*part.products, *part.adapters):
            forward, backward = profile.product_seconds(product.m, product.n, product.k, dtype)
            products_forward += forward * product.times
            products_backward += backward * product.times / (2 if product.is_frozen else 1)
        if part.hidden_loss:
            # The logits are made again, which is a forward of the head (Wijmans et al., 2025).
            products_backward += products_forward
        if part.attention is not None:
            forward, backward = profile.attention_seconds(*part.attention, dtype)
            products_forward, products_backward = products_forward + forward, products_backward + backward
        for name, elements in part.operators:
            forward, backward = profile.operator_seconds(name, elements, dtype)
            operators_forward, operators_backward = operators_forward + forward, operators_backward + backward
        operators_backward += profile.operator_seconds("accumulate", part.trained, dtype)[1]
        forward_waiting = sum(self.message(one) for one in part.forward_messages)
        waiting = forward_waiting + sum(self.message(one) for one in part.backward_messages)
        again = 0.0
        if mode == "selective":
            again = operators_forward
        if mode == "full":
            again, waiting = products_forward + operators_forward, waiting + forward_waiting
            if part.stops_early:
                last = part.products[-1]
                again -= profile.product_seconds(last.m, last.n, last.k, dtype)[0]
                if part.block_messages:
                    waiting -= self.message(part.forward_messages[part.block_messages - 1])
        factor = self._slowdown
        return PartSeconds(
            (products_forward + operators_forward) * factor,
            (products_backward + operators_backward) * factor,
            again * factor,
            waiting,
            forward_waiting,
        )

    def stage(self, stage: Stage, modes: Sequence[Mode]) -> PartSeconds:
        """Return the seconds of a micro-batch in a stage, for a mode of each of its layers."""
        total = NOTHING
        if stage.is_first:
            total = total.plus(self.part(self.work.embedding(), "none"))
        for number, mode in zip(stage.layers, modes, strict=True):
            total = total.plus(self.part(self.work.layer(number), mode))
        if stage.is_last:
            total = total.plus(self.part(self.work.head(), "none"))
        return total

    def step(self, micro_batches: int, modes: Mode | Sequence[Sequence[Mode]]) -> StepSeconds:
        """Return the seconds of a step.

        Args:
            micro_batches: of one data-parallel rank.
            modes: what is computed again: of all layers, or of those of each pipeline rank.
        """
        layout = self.work.layout
        held = stages_of_ranks(self.work.model.num_layers, layout)
        of_stage: dict[int, PartSeconds] = {}
        for rank, stages in enumerate(held):
            mine = list(modes[rank]) if not isinstance(modes, str) else []
            for stage in stages:
                count = len(stage.layers)
                own: Sequence[Mode] = [modes] * count if isinstance(modes, str) else mine[:count]
                mine = mine[count:]
                of_stage[stage.index] = self.stage(stage, own)
        spent = [_sum([of_stage[stage.index] for stage in stages]) for stages in held]
        busiest = max(range(len(held)), key=lambda rank: _busy(spent[rank]))
        mine_seconds = spent[busiest]
        makespan = self._makespan(of_stage, micro_batches)
        busy = micro_batches * _busy(mine_seconds)
        last_backward = mine_seconds.backward + mine_seconds.again
        reduction = max(
            self._reduction(stages, micro_batches, spent[rank], last_backward)
            for rank, stages in enumerate(held)
        )
        update = max(self._update(*self.work.trained(stages)) for stages in held)
        bubble = max(makespan - busy, 0.0)
        reference = NOTHING
        if self.work.tuning.pairs:
            # The reference reads all micro-batches first, one stage after the other.
            reference = mine_seconds
            bubble += (layout.pp - 1) * (reference.forward + reference.forward_waiting)
        return StepSeconds(
            compute=micro_batches * (mine_seconds.forward + mine_seconds.backward + reference.forward),
            recompute=micro_batches * mine_seconds.again,
            model_messages=micro_batches * (mine_seconds.waiting + reference.forward_waiting),
            bubble=bubble,
            reduction=reduction,
            update=update,
        )

    def _makespan(self, of_stage: dict[int, PartSeconds], micro_batches: int) -> float:
        """Return the seconds of all forwards and backwards.

        In closed form m micro-batches of v stages on each of p ranks take (m + (p - 1) / v) times what a rank does for
        one (Narayanan et al., 2021, section 2.2); with weight gradients in the bubble a third of it is left (Qi et al.,
        2023, ZB-H1, table 2).
        """
        layout = self.work.layout
        per_rank = stages_per_rank(layout, self.work.model.num_layers)
        if layout.pp == 1:
            return micro_batches * _busy(of_stage[0])
        sending = self._collective("send", "pp", self.work.sent_bytes)
        if 2 * layout.pp * per_rank * micro_batches > self._most_simulated:
            busiest = max(map(_busy, of_stage.values())) * per_rank
            share = 1 / 3 if layout.schedule in SPLIT_BACKWARD_SCHEDULES else 1.0
            warm_up = (layout.pp - 1) / per_rank * share
            return (micro_batches + warm_up) * busiest + 2 * (layout.pp - 1) * sending
        orders = pipeline_orders(layout, per_rank, micro_batches)

        def seconds(work: PipelineWork) -> float:
            one = of_stage[work.stage]
            if work.kind == "forward":
                return one.forward + one.forward_waiting
            backward = one.backward + one.again + one.waiting - one.forward_waiting
            if work.kind == "weight gradient":
                return one.backward / 2
            # A layer that is computed again for the gradient of its input is there for that of its weights.
            return backward - (one.backward / 2 if work.kind == "input gradient" else 0.0)

        return makespan_of(orders, seconds, sending)

    def _reduction(
        self,
        stages: Sequence[Stage],
        micro_batches: int,
        mine: PartSeconds,
        last_backward: float,
    ) -> float:
        """Return the seconds of sums over replicas, and of gathers of weights, that nothing hides.

        Gradients are copied into messages and back, gathered weights out of them (`optim/gradient_sum.py`), which takes
        the device itself. Sums start while the last backward computes, gathers while the next first forward does; the
        profile says what share of them can be hidden at best.
        """
        layout, width = self.work.layout, FORMAT_BYTES[self.work.dtype]
        parameters, of_experts = self.work.trained(stages)
        if layout.zero_stage:
            return self._zero_messages(self.work.parameters(stages)[0], parameters, micro_batches, mine)
        master = max(width, 4)
        sums = gathers = copied = 0.0
        for count, axis in ((parameters - of_experts, "replicas"), (of_experts, "edp")):
            ranks = _size(layout, axis)
            if ranks == 1:
                continue
            # An empty message is written, gradients are read and written into it; what comes back is, too.
            copied += 3 * count * master
            if layout.sharded_optimizer:
                sums += self._collective("reduce_scatter", axis, count * master)
                gathers += self._collective("all_gather", axis, count * width)
                copied += 2 * count * (master / ranks + width)
            else:
                sums += self._collective("all_reduce", axis, count * master)
                copied += 2 * count * master
        hidden = self.profile.shares.overlap.value
        left = sums
        if layout.overlap_grad_reduce or layout.early_reduction:
            left = max(sums - hidden * last_backward, sums * (1 - hidden))
        left_gathers = gathers
        if layout.overlap_param_gather:
            left_gathers = max(gathers - hidden * mine.forward, gathers * (1 - hidden))
        return left + left_gathers + self.profile.memory_seconds(copied) * self._slowdown

    def _zero_messages(
        self, parameters: float, trained: float, micro_batches: int, mine: PartSeconds
    ) -> float:
        """Return what DeepSpeed's stages send that nothing hides (Rajbhandari et al., 2020, sections 5 and 7.2).

        Stage 1 sums gradients once a step and gathers weights; stage 2 scatters sums of every micro-batch; stage 3
        gathers weights for every forward and backward as well.
        """
        layout, width = self.work.layout, FORMAT_BYTES[self.work.dtype]
        scatter = self._collective("reduce_scatter", "dp", trained * width)
        gathered = parameters if layout.zero_stage == 3 else trained
        gather = self._collective("all_gather", "dp", gathered * width)
        hidden = self.profile.shares.overlap.value

        def left(sent: float, beside: float) -> float:
            return max(sent - hidden * beside, sent * (1 - hidden))

        if layout.zero_stage == 3:
            return micro_batches * (
                left(gather, mine.forward) + left(gather + scatter, mine.backward + mine.again)
            )  # fmt: skip
        rounds = micro_batches if layout.zero_stage == 2 else 1
        return rounds * left(scatter, mine.backward + mine.again) + gather

    def _update(self, parameters: float, of_experts: float) -> float:
        layout, dtype = self.work.layout, self.work.dtype
        if layout.sharded_optimizer:
            parameters = (parameters - of_experts) / _size(layout, "replicas") + of_experts / _size(
                layout, "edp"
            )
        if layout.zero_stage:
            parameters /= layout.dp
        return self.profile.operator_seconds("adamw", parameters, dtype)[0] * self._slowdown


def _busy(seconds: PartSeconds) -> float:
    return seconds.forward + seconds.backward + seconds.again + seconds.waiting


def _sum(parts: Sequence[PartSeconds]) -> PartSeconds:
    total = NOTHING
    for part in parts:
        total = total.plus(part)
    return total
