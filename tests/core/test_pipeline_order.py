"""The orders that the planner walks through are those that torch runs, and take the time that theory says."""

import pytest
from torch.distributed.pipelining import schedules

from ascendspeed_core.config.layout import Layout, PipelineSchedule
from ascendspeed_core.planner.pipeline_order import PipelineWork, makespan_of, pipeline_orders

KINDS = {"FORWARD": "forward", "FULL_BACKWARD": "backward"}


@pytest.mark.parametrize("pp", [2, 3, 4])
@pytest.mark.parametrize("per_rank", [2, 3])
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_interleaved_is_torchs(pp: int, per_rank: int, rounds: int) -> None:
    count = pp * rounds
    theirs = object.__new__(schedules.ScheduleInterleaved1F1B)
    theirs.pp_group_size, theirs.n_local_stages = pp, per_rank
    theirs._num_stages, theirs._n_microbatches = pp * per_rank, count
    theirs.number_of_rounds, theirs.microbatches_per_round = rounds, pp
    ours = pipeline_orders(Layout(pp=pp, schedule="interleaved", layers_per_stage=1), per_rank, count)
    for rank in range(pp):
        wanted = [
            (KINDS[one.computation_type.name], one.stage_index, one.microbatch_index)
            for one in theirs._calculate_single_rank_operations(rank)
            if one is not None
        ]
        assert [tuple(work) for work in ours[rank]] == wanted


@pytest.mark.parametrize(
    ("schedule", "per_rank"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("looped-bfs", 2)]
)
@pytest.mark.parametrize("pp", [2, 4])
def test_bubble_in_closed_form(schedule: PipelineSchedule, per_rank: int, pp: int) -> None:
    """m micro-batches take (m + (p - 1) / v) times v stages (Narayanan et al., 2021, section 2.2)."""
    count, forward, backward = 4 * pp, 1.5, 3.0
    orders = pipeline_orders(Layout(pp=pp, schedule=schedule), per_rank, count)
    taken = makespan_of(orders, lambda work: forward if work.kind == "forward" else backward, 0.0)
    assert taken == pytest.approx((count + (pp - 1) / per_rank) * per_rank * (forward + backward))


@pytest.mark.parametrize("schedule", ["interleaved-zb", "zbv", "dualpipev"])
def test_split_backwards_fill_the_bubble(schedule: PipelineSchedule) -> None:
    """With equal thirds of work these schedules leave less idle than interleaved 1F1B, and lose no work."""
    pp, count = 4, 16
    orders = pipeline_orders(Layout(pp=pp, schedule=schedule), 2, count)
    seconds = {"forward": 1.0, "backward": 2.0, "input gradient": 1.0, "weight gradient": 1.0}
    taken = makespan_of(orders, lambda work: seconds[work.kind], 0.0)
    assert 2 * count * 3.0 < taken < (count + (pp - 1) / 2) * 2 * 3.0
    for order in orders:
        done = [(work.stage, work.micro_batch) for work in order if work.kind == "forward"]
        assert len(set(done)) == len(done) == 2 * count


def test_messages_are_waited_for() -> None:
    orders = [
        [PipelineWork("forward", 0, 0), PipelineWork("backward", 0, 0)],
        [PipelineWork("forward", 1, 0), PipelineWork("backward", 1, 0)],
    ]
    assert makespan_of(orders, lambda _: 1.0, 0.25) == pytest.approx(4.5)
    with pytest.raises(ValueError, match="never comes"):
        makespan_of([orders[0][::-1], orders[1]], lambda _: 1.0, 0.0)
