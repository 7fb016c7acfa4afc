"""Timelines: the ideal of a schedule, and the command that measures one."""

import json
from pathlib import Path

import pytest

from ascendspeed_core.models.families import find_family
from ascendspeed_core.parallel.timeline import Action, Timeline, ideal
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
    assert numbers["ideal"]["seconds"] <= numbers["measured"]["seconds"] * 1.001
