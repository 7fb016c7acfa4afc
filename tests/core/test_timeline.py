"""Timelines: the ideal of a schedule, and the command that measures one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from ascendspeed_core.config.batch import MICRO_BATCH_EXAMPLES
from ascendspeed_core.config.experts import Experts
from ascendspeed_core.models.families import find_family
from ascendspeed_core.parallel.timeline import Action, Timeline, ideal
from ascendspeed_core.planner.micro_batches import (
    PROPORTIONAL,
    StageCost,
    best_sizes,
    bubble_seconds,
    makespan,
)
from support.commands import call, run_command
from support.models import tiny_config


def one_forward_one_backward(pp: int, count: int, forward: float, backward: float) -> Timeline:
    """The order of 1F1B, with lengths; when each action ran is not said."""
    devices = []
    for device in range(pp):
        warm_up = min(pp - 1 - device, count)
        order = [("forward", n) for n in range(warm_up)]
        for n in range(count - warm_up):
            order += [("forward", warm_up + n), ("backward", n)]
        order += [("backward", n) for n in range(count - warm_up, count)]
        lengths = {"forward": forward, "backward": backward}
        devices.append(tuple(Action(kind, device, n, 0.0, lengths[kind]) for kind, n in order))
    return Timeline(tuple(devices))


@pytest.mark.parametrize(("pp", "count"), [(2, 4), (4, 8), (4, 16), (8, 8)])
def test_the_bubble_of_1f1b_is_the_known_one(pp: int, count: int) -> None:
    planned = ideal(one_forward_one_backward(pp, count, 1.0, 2.0))
    # Narayanan et al., 2021, section 2.2: (pp - 1) of a forward and a backward are idle.
    assert planned.makespan == pytest.approx(3.0 * (count + pp - 1))
    assert planned.bubble == pytest.approx((pp - 1) / (count + pp - 1))


@pytest.mark.parametrize("sizes", [(4,) * 8, (1, 2, 3, 3, 2, 1), (5, 1), (3,)])
@pytest.mark.parametrize("pp", [2, 4])
def test_the_planned_length_of_a_step_is_that_of_the_timeline(sizes: tuple[int, ...], pp: int) -> None:
    cost = StageCost(0.5, 1.0, 0.25, 2.0)
    even = one_forward_one_backward(pp, len(sizes), 1.0, 1.0)
    lengths = {"forward": cost.forward, "backward": cost.backward}
    timed = Timeline(
        tuple(
            tuple(replace(a, end=lengths[a.kind](sizes[a.micro_batch])) for a in own) for own in even.devices
        )
    )
    assert makespan(sizes, pp, cost) == pytest.approx(ideal(timed).makespan)


@pytest.mark.parametrize(
    ("name", "pp", "saved"), [("example-config-1", 4, 0.31), ("example-config-2", 8, 0.24)]
)
def test_the_examples_of_2023_leave_less_idle(name: str, pp: int, saved: float) -> None:
    sizes = MICRO_BATCH_EXAMPLES[name]
    even = (4,) * (sum(sizes) // 4)
    ratio = bubble_seconds(sizes, pp, PROPORTIONAL) / bubble_seconds(even, pp, PROPORTIONAL)
    assert 1 - ratio == pytest.approx(saved, abs=0.006)


def least_makespan(samples: int, count: int, pp: int) -> float:
    """The shortest step of 1F1B with so many micro-batches of whole samples, by integer linear programming.

    Every action ends no earlier than what it waits for plus its own length, which is linear in the sizes; the step
    ends with the last action of any stage.
    """
    sizes, ends = range(count), count

    def end_of(kind: str, stage: int, number: int) -> int:
        return ends + ((kind == "backward") * pp + stage) * count + number

    last = ends + 2 * pp * count
    rows = []

    def wait(later: int, earlier: int | None, number: int, length: float) -> None:
        row = np.zeros(last + 1)
        row[later] -= 1
        row[number] += length
        if earlier is not None:
            row[earlier] += 1
        rows.append(row)

    for stage, actions in enumerate(one_forward_one_backward(pp, count, 1.0, 2.0).devices):
        before = None
        for action in actions:
            mine = end_of(action.kind, stage, action.micro_batch)
            wait(mine, before, action.micro_batch, action.seconds)
            if action.kind == "forward" and stage:
                wait(mine, end_of("forward", stage - 1, action.micro_batch), action.micro_batch, 1.0)
            if action.kind == "backward":
                source = ("backward", stage + 1) if stage < pp - 1 else ("forward", stage)
                wait(mine, end_of(*source, action.micro_batch), action.micro_batch, 2.0)
            before = mine
        wait(last, before, 0, 0.0)
    total = np.zeros(last + 1)
    total[list(sizes)] = 1
    found = milp(
        c=np.eye(last + 1)[last],
        constraints=[LinearConstraint(np.array(rows), ub=0.0), LinearConstraint(total, samples, samples)],
        integrality=total,
        bounds=Bounds(np.where(total, 1.0, 0.0), np.inf),
    )
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize(("name", "pp"), [("example-config-1", 4), ("example-config-2", 8)])
def test_the_examples_of_2023_are_the_best_for_their_number_of_micro_batches(name: str, pp: int) -> None:
    sizes = MICRO_BATCH_EXAMPLES[name]
    assert makespan(sizes, pp, PROPORTIONAL) == pytest.approx(least_makespan(sum(sizes), len(sizes), pp))


@pytest.mark.parametrize(("name", "pp"), [("example-config-1", 4), ("example-config-2", 8)])
def test_found_sizes_beat_the_examples_where_their_number_is_free(name: str, pp: int) -> None:
    sizes = MICRO_BATCH_EXAMPLES[name]
    for cost in (PROPORTIONAL, StageCost(4.0, 1.0, 8.0, 2.0)):
        found = best_sizes(sum(sizes), pp, cost)
        assert makespan(found, pp, cost) < makespan(sizes, pp, cost)


@pytest.mark.parametrize("fixed", [0.0, 1.0, 4.0])
def test_found_sizes_are_never_worse(fixed: float) -> None:
    cost = StageCost(fixed, 1.0, fixed, 2.0)
    found = best_sizes(24, 4, cost, most=5)
    assert sum(found) == 24
    assert max(found) <= 5
    others = [(4,) * 6, (3,) * 8, (1,) * 24, (1, 2, 3, 4, 4, 4, 3, 2, 1)]
    assert all(makespan(found, 4, cost) <= makespan(sizes, 4, cost) + 1e-9 for sizes in others)


def test_weight_gradients_wait_for_nobody() -> None:
    first = (
        Action("forward", 0, 0, 0, 1),
        Action("input gradient", 0, 0, 0, 1),
        Action("weight gradient", 0, 0, 0, 1),
    )
    second = tuple(Action(a.kind, 1, 0, 0, 1) for a in first)
    planned = ideal(Timeline((first, second)))
    assert [(a.kind, a.start) for a in planned.devices[1]] == [
        ("forward", 1), ("input gradient", 2), ("weight gradient", 3),
    ]  # fmt: skip
    assert planned.devices[0][1].start == 3
    assert planned.makespan == 5


def test_messages_are_drawn_between_devices_only() -> None:
    first = (Action("forward", 0, 0, 0, 1), Action("forward", 2, 0, 2, 3), Action("backward", 0, 0, 9, 10))
    second = (
        Action("forward", 1, 0, 1, 2),
        Action("backward", 1, 0, 7, 8),
        Action("weight gradient", 1, 0, 8, 9),
    )
    assert Timeline((first, second)).messages() == [(1, 2, 0, 2), (1, 8, 0, 9), (0, 1, 1, 1)]


def test_an_order_that_waits_for_ever_is_an_error() -> None:
    wrong = Timeline(((Action("backward", 0, 0, 0, 1),), (Action("forward", 1, 0, 0, 1),)))
    with pytest.raises(ValueError, match="never lets"):
        ideal(wrong)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(find_family("llama").write_config(tiny_config())))
    arguments = [
        "asd-core", "timeline", "--model-config", tmp_path / "model.json", "--seq-length", 16, "--global-batch-size", 4,
        "--device", "cpu", "--picture", tmp_path / "steps.png",
    ]  # fmt: skip
    assert "give --pipeline-model-parallel-size 2 or more" in call(*arguments).complaint
    done = run_command(
        *arguments, "--pipeline-model-parallel-size", 2, "--pipeline-schedule", "zbv", "--nproc-per-node", 2
    )
    assert done.status == 0, done.stderr
    assert "bubble" in done.complaint
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "steps.json").read_text())
    kinds = [action["kind"] for action in numbers["actions"][0]]
    # Two stages a device, four micro-batches; a backward is whole or in two parts.
    assert kinds.count("forward") == 8
    assert kinds.count("backward") + kinds.count("input gradient") == 8
    assert kinds.count("input gradient") == kinds.count("weight gradient") > 0
    assert numbers["reductions"] == [[], []]
    assert numbers["ideal"]["seconds"] <= numbers["measured"]["seconds"] * 1.001


def test_early_reductions_are_on_the_timeline(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text(json.dumps(find_family("llama").write_config(tiny_config())))
    done = run_command(
        "asd-core", "timeline", "--model-config", tmp_path / "model.json", "--seq-length", 16, "--global-batch-size", 8,
        "--device", "cpu", "--picture", tmp_path / "new" / "fold.png", "--pipeline-model-parallel-size", 2,
        "--num-layers-per-virtual-pipeline-stage", 1, "--foldx-mode", "aiao", "--nproc-per-node", 4,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    numbers = json.loads((tmp_path / "new" / "fold.json").read_text())
    for actions, reductions in zip(numbers["actions"], numbers["reductions"], strict=True):
        early, late = reductions
        ends = {
            stage: max(a["end"] for a in actions if a["stage"] == stage)
            for stage in (early["stage"], late["stage"])
        }
        # The first starts in the last backward of its stage, before the device's other stage is done.
        assert early["start"] <= ends[early["stage"]] < ends[late["stage"]]
        assert early["start"] < late["start"] <= ends[late["stage"]]


def test_reductions_of_data_parallel_ranks_are_on_the_timeline(tmp_path: Path) -> None:
    """No pipeline: messages start inside the last backward, and their bytes are those of all gradients."""
    config = tiny_config()
    (tmp_path / "model.json").write_text(json.dumps(find_family("llama").write_config(config)))
    done = run_command(
        "asd-core", "timeline", "--model-config", tmp_path / "model.json", "--seq-length", 16, "--global-batch-size", 8,
        "--device", "cpu", "--picture", tmp_path / "dp.png", "--ddp-bucket-size", 5000, "--nproc-per-node", 2,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    numbers = json.loads((tmp_path / "dp.json").read_text())
    (actions,), (reductions,), (alone,) = (
        numbers[name] for name in ("actions", "reductions", "reduction_seconds_alone")
    )
    assert sum(one["sent_bytes"] for one in reductions) == 4 * config.num_parameters
    last = [action for action in actions if action["kind"] == "backward"][-1]
    inside = [one for one in reductions if last["start"] < one["start"] < last["end"]]
    assert len(inside) == len(reductions) > 4
    waited = sum(one["waited"] for one in reductions)
    assert alone > 0
    assert (
        f"device 0: {len(reductions)} reductions of gradients, {4 * config.num_parameters:,} bytes"
        in done.complaint
    )
    assert f"{max(1 - waited / alone, 0):.0%} hidden" in done.complaint


def test_all_to_alls_of_experts_are_on_the_timeline(tmp_path: Path) -> None:
    experts = Experts(count=4, per_token=2, ffn_hidden_size=48)
    config = tiny_config(family="mixtral", experts=experts)
    (tmp_path / "model.json").write_text(json.dumps(find_family("mixtral").write_config(config)))
    done = run_command(
        "asd-core", "timeline", "--model-config", tmp_path / "model.json", "--seq-length", 16, "--micro-batch-size", 2,
        "--global-batch-size", 8, "--device", "cpu", "--picture", tmp_path / "experts.png",
        "--expert-model-parallel-size", 2, "--nproc-per-node", 2,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    numbers = json.loads((tmp_path / "experts.json").read_text())
    (actions,), (exchanges,) = numbers["actions"], numbers["exchanges"]
    # Two micro-batches of each rank, four layers: there and back, in the forward and in the backward.
    assert len(exchanges) == 2 * 4 * 4
    assert "device 0: 32 all-to-alls of experts" in done.complaint
    row = config.hidden_size * 4
    for action in actions:
        inside = [
            one["sent_bytes"]
            for one in exchanges
            if action["start"] <= one["start"] < one["end"] <= action["end"]
        ]
        assert len(inside) == 8
        there, back = inside[::2], inside[1::2]
        if action["kind"] == "forward":
            sent = there, back
        else:
            # Gradients go the ways of what they are of, the last layer's first.
            assert (there[::-1], back[::-1]) == sent
        # No more than all rows: 2 x 16 tokens, two experts of each; and whole rows.
        assert all(0 < size <= 2 * 16 * 2 * row and size % row == 0 for size in inside)
