"""In which order the ranks of a pipeline compute, and how long a step then takes. No torch but for the split schedules.

The orders are those of torch.distributed.pipelining, which runs them; tests compare the two.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ascendspeed_core.config.layout import SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES, Layout, PipelineSchedule
from ascendspeed_core.parallel.timeline import Kind


class PipelineWork(NamedTuple):
    """One piece of work of a rank.

    Attributes:
        kind: what.
        stage: of which stage, counted over the whole model.
        micro_batch: for which.
    """

    kind: Kind
    stage: int
    micro_batch: int


def stages_per_rank(layout: Layout, num_layers: int) -> int:
    """Return how many stages each rank of a pipeline holds."""
    if layout.schedule in V_SCHEDULES:
        return 2
    return num_layers // (layout.pp * layout.layers_per_stage) if layout.layers_per_stage else 1


def pipeline_orders(layout: Layout, per_rank: int, micro_batches: int) -> list[Sequence[PipelineWork]]:
    """Return by pipeline rank what it computes, in order; see `order_of_rank`."""
    return [order_of_rank(layout, per_rank, micro_batches, rank) for rank in range(layout.pp)]


def order_of_rank(layout: Layout, per_rank: int, micro_batches: int, rank: int) -> Sequence[PipelineWork]:
    """Return what a pipeline rank computes, in order.

    Args:
        layout: its schedule and number of ranks count.
        per_rank: stages of each rank.
        micro_batches: of a step.
        rank: of the pipeline.
    """
    return _order(layout.schedule, layout.pp, per_rank, micro_batches, rank)


@lru_cache(maxsize=4096)
def _order(name: PipelineSchedule, pp: int, per_rank: int, count: int, rank: int) -> tuple[PipelineWork, ...]:
    if name in SPLIT_BACKWARD_SCHEDULES:
        return tuple(_of_torch(name, pp, per_rank, count, rank))
    numbers = list(range(count))
    if name == "gpipe" or (name == "1f1b" and count < pp):
        return tuple(_breadth_first([rank], numbers, numbers))
    if name == "1f1b":
        return tuple(_one_forward_one_backward(rank, pp, count))
    if name == "looped-bfs":
        stages = [local * pp + rank for local in range(per_rank)]
        return tuple(_breadth_first(stages, numbers, numbers[::-1]))
    return tuple(_interleaved(rank, pp, per_rank, count))


def _breadth_first(stages: list[int], forwards: list[int], backwards: list[int]) -> list[PipelineWork]:
    forward = [PipelineWork("forward", stage, number) for stage in stages for number in forwards]
    return forward + [
        PipelineWork("backward", stage, number) for stage in stages[::-1] for number in backwards
    ]


def _one_forward_one_backward(rank: int, pp: int, count: int) -> list[PipelineWork]:
    """Forwards until the first backward can come, then a backward and a forward in turn."""
    warm_up = min(pp - rank, count)
    order = [PipelineWork("forward", rank, number) for number in range(warm_up)]
    for number in range(count):
        order.append(PipelineWork("backward", rank, number))
        if warm_up + number < count:
            order.append(PipelineWork("forward", rank, warm_up + number))
    return order


def _interleaved(rank: int, pp: int, per_rank: int, count: int) -> list[PipelineWork]:
    """Rounds of equal length; each goes through all stages of a rank (Narayanan et al., 2021, section 2.2)."""
    in_round = count // max(count // pp, 1)
    total = per_rank * count
    warm_up = min((per_rank - 1) * in_round + 2 * (pp - 1 - rank), total)

    def micro_batch(step: int) -> int:
        rounds, within = divmod(step, in_round * per_rank)
        return rounds * in_round + within % in_round

    def forward(step: int) -> PipelineWork:
        local = step // in_round % per_rank
        return PipelineWork("forward", local * pp + rank, micro_batch(step))

    def backward(step: int) -> PipelineWork:
        local = per_rank - 1 - step // in_round % per_rank
        return PipelineWork("backward", local * pp + rank, micro_batch(step))

    order = [forward(step) for step in range(warm_up)]
    for step in range(total - warm_up):
        order += [forward(warm_up + step), backward(step)]
    return order + [backward(step) for step in range(total - warm_up, total)]


def _of_torch(name: str, pp: int, per_rank: int, count: int, rank: int) -> list[PipelineWork]:
    """Ask torch for the order of a schedule that takes input and weight gradients apart."""
    from torch.distributed.pipelining import schedules

    classes: dict[str, Any] = {
        "interleaved-zb": schedules.ScheduleInterleavedZeroBubble,
        "zbv": schedules.ScheduleZBVZeroBubble,
        "dualpipev": schedules.ScheduleDualPipeV,
    }
    schedule = object.__new__(classes[name])
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = pp, per_rank, count
    schedule._num_stages = schedule.num_stages = pp * per_rank
    schedule.number_of_rounds = max(1, count // pp)
    schedule.microbatches_per_round = count // schedule.number_of_rounds
    kinds: Mapping[str, Kind] = {
        "FORWARD": "forward",
        "FULL_BACKWARD": "backward",
        "BACKWARD_INPUT": "input gradient",
        "BACKWARD_WEIGHT": "weight gradient",
    }
    return [
        PipelineWork(kinds[one.computation_type.name], one.stage_index, one.microbatch_index)
        for action in schedule._calculate_single_rank_operations(rank)
        for one in (() if action is None else action.sub_actions or (action,))
    ]


def makespan_of(
    orders: Sequence[Sequence[PipelineWork]],
    seconds: Callable[[PipelineWork], float],
    sending: float,
) -> float:
    """Return the seconds from the first start to the last end.

    A forward waits for the stage before, a gradient of the input for the stage behind it; `parallel.timeline.ideal`
    is the same of what was measured.

    Args:
        orders: of `pipeline_orders`.
        seconds: of a piece of work.
        sending: seconds that hidden states, or their gradients, travel from rank to rank.

    Raises:
        ValueError: the order of a rank waits for something that never comes.
    """
    last = max(work.stage for order in orders for work in order)
    holder = {work.stage: rank for rank, order in enumerate(orders) for work in order}
    ended: dict[tuple[bool, int, int], float] = {}
    clocks, next_work, left = [0.0] * len(orders), [0] * len(orders), sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while next_work[rank] < len(order):
                work = order[next_work[rank]]
                ready = 0.0
                is_forward = work.kind == "forward"
                needed = None
                if is_forward and work.stage > 0:
                    needed = (True, work.stage - 1, work.micro_batch)
                elif work.kind in ("backward", "input gradient"):
                    needed = (work.stage == last, min(work.stage + 1, last), work.micro_batch)
                if needed is not None:
                    known = ended.get(needed)
                    if known is None:
                        break
                    ready = known + (sending if holder[needed[1]] != rank else 0.0)
                clocks[rank] = max(clocks[rank], ready) + seconds(work)
                if work.kind != "weight gradient":
                    ended[is_forward, work.stage, work.micro_batch] = clocks[rank]
                next_work[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("the order of a rank waits for something that never comes")
    return max(clocks)
