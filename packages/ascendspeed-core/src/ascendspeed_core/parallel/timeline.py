"""What each pipeline device did when in one step, and what it could have done had no message taken time.

No torch here: the ideal is planned from the order and the lengths of what was measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["forward", "backward", "input gradient", "weight gradient"]
"""A backward is an input gradient and a weight gradient in one."""


@dataclass(frozen=True)
class Action:
    """One piece of work of one device.

    Attributes:
        kind: what.
        stage: of which stage.
        micro_batch: for which micro-batch.
        start: seconds on the machine's clock.
        end: seconds.
    """

    kind: Kind
    stage: int
    micro_batch: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Reduction:
    """The sum of some gradients of a stage over the data-parallel devices, in one message.

    Attributes:
        stage: whose gradients; `None` for those of weights that several stages of the device use.
        start: seconds on the machine's clock.
        end: when it had been waited for, which may be later than when it was done.
        waited: seconds that the device did nothing but wait for it, once all devices had ended their backwards.
        sent_bytes: of the gradients.
    """

    stage: int | None
    start: float
    end: float
    waited: float
    sent_bytes: int


def describe_reductions(reductions: Sequence[Reduction], seconds_alone: float) -> str:
    """Say how much of some reductions other work hides.

    Args:
        reductions: of one device in a step.
        seconds_alone: that they take together, beside nothing else.
    """
    waited = sum(one.waited for one in reductions)
    hidden = max(1 - waited / seconds_alone, 0.0)
    return (
        f"{len(reductions)} reductions of gradients, {sum(one.sent_bytes for one in reductions):,} bytes, "
        f"{seconds_alone * 1000:.0f} ms beside nothing else, of which {waited * 1000:.0f} ms were waited for: "
        f"{hidden:.0%} hidden"
    )


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of the ranks that share a layer's experts, inside an action.

    Attributes:
        start: seconds on the machine's clock.
        end: when all had arrived; it includes the wait for ranks that come later.
        sent_bytes: from this device to others.
    """

    start: float
    end: float
    sent_bytes: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass
class Recorder:
    """Notes the actions of this process.

    Attributes:
        synchronize: waits until the device has done what it was given.
        actions: in the order in which they ran.
        reductions: in the order in which they started.
        seconds_alone: of the reductions together, beside nothing else.
        exchanges: all-to-alls of experts, in the order in which they ran.
    """

    synchronize: Callable[[], None]
    actions: list[Action] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    seconds_alone: float = 0.0
    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def noted(self) -> tuple[tuple[Action, ...], tuple[Reduction, ...], tuple[Exchange, ...]]:
        """What a `Timeline` has of one device."""
        return tuple(self.actions), tuple(self.reductions), tuple(self.exchanges)

    @contextmanager
    def note(self, kind: Kind, stage: int, micro_batch: int) -> Iterator[None]:
        """Time one action."""
        self.synchronize()
        started = time.perf_counter()
        yield
        self.synchronize()
        self.actions.append(Action(kind, stage, micro_batch, started, time.perf_counter()))

    @contextmanager
    def note_exchange(self, sent_bytes: int) -> Iterator[None]:
        """Time one all-to-all."""
        self.synchronize()
        started = time.perf_counter()
        yield
        self.synchronize()
        self.exchanges.append(Exchange(started, time.perf_counter(), sent_bytes))


@dataclass(frozen=True)
class Timeline:
    """What all devices of one pipeline did, by pipeline rank.

    Attributes:
        devices: actions, each in its order.
        reductions: of gradients over data-parallel devices; empty without them.
        exchanges: all-to-alls of experts; empty without them.
    """

    devices: tuple[tuple[Action, ...], ...]
    reductions: tuple[tuple[Reduction, ...], ...] = ()
    exchanges: tuple[tuple[Exchange, ...], ...] = ()

    @property
    def start(self) -> float:
        """When the first action started."""
        return min(actions[0].start for actions in self.devices)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max(action.end for actions in self.devices for action in actions) - self.start

    @property
    def bubble(self) -> float:
        """Share of all devices' time in which they did nothing."""
        busy = sum(action.seconds for actions in self.devices for action in actions)
        return 1 - busy / (len(self.devices) * self.makespan)

    def messages(self) -> list[tuple[int, float, int, float]]:
        """Return what travelled between devices: (from device, when it was ready, to device, when it was used)."""
        sent: dict[tuple[bool, int, int], tuple[int, float]] = {}
        for device, actions in enumerate(self.devices):
            for action in actions:
                if action.kind != "weight gradient":
                    sent[action.kind == "forward", action.stage, action.micro_batch] = (device, action.end)
        found = []
        for device, actions in enumerate(self.devices):
            for action in actions:
                is_forward = action.kind == "forward"
                before = action.stage + (-1 if is_forward else 1)
                origin = sent.get((is_forward, before, action.micro_batch))
                if origin is not None and origin[0] != device and action.kind != "weight gradient":
                    found.append((*origin, device, action.start))
        return found


def ideal(measured: Timeline) -> Timeline:
    """Return when each action could have run: same order, same lengths, messages that take no time.

    A forward waits for the stage before, a gradient of the input for the stage behind it.

    Raises:
        ValueError: the order of a device waits for something that never comes.
    """
    ended: dict[tuple[str, int, int], float] = {}
    clocks = [0.0] * len(measured.devices)
    left = [list(actions) for actions in measured.devices]
    planned: list[list[Action]] = [[] for _ in measured.devices]
    last = max(action.stage for actions in measured.devices for action in actions)
    while any(left):
        moved = False
        for device, actions in enumerate(left):
            while actions and (ready := _ready_at(actions[0], ended, last)) is not None:
                action = actions.pop(0)
                start = max(clocks[device], ready)
                clocks[device] = start + action.seconds
                planned[device].append(replace(action, start=start, end=clocks[device]))
                if action.kind != "weight gradient":
                    step = "forward" if action.kind == "forward" else "backward"
                    ended[step, action.stage, action.micro_batch] = clocks[device]
                moved = True
        if not moved:
            waiting = next(actions[0] for actions in left if actions)
            raise ValueError(f"the order of actions never lets {waiting} start")
    return Timeline(tuple(map(tuple, planned)))


def _ready_at(action: Action, ended: dict[tuple[str, int, int], float], last: int) -> float | None:
    """Return when what an action needs from other stages is there; `None` when that is not known yet."""
    if action.kind == "weight gradient":
        return 0.0
    if action.kind == "forward":
        return 0.0 if action.stage == 0 else ended.get(("forward", action.stage - 1, action.micro_batch))
    if action.stage == last:
        return ended.get(("forward", last, action.micro_batch))
    return ended.get(("backward", action.stage + 1, action.micro_batch))
