"""Sizes of micro-batches that leave a 1F1B pipeline the least idle; pure arithmetic, no torch.

Small micro-batches at the start let the last stage begin early, small ones at the end let the first stage finish
early; between them large ones cost the fewest fixed parts.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """Seconds that one stage takes for a micro-batch of n samples: a fixed part, and a part for each sample.

    Attributes:
        forward_fixed: of a forward, whatever the size.
        forward_sample: of a forward, for each sample.
        backward_fixed: of a backward, whatever the size.
        backward_sample: of a backward, for each sample.
    """

    forward_fixed: float
    forward_sample: float
    backward_fixed: float
    backward_sample: float

    def forward(self, size: int) -> float:
        """Seconds of a forward."""
        return self.forward_fixed + self.forward_sample * size

    def backward(self, size: int) -> float:
        """Seconds of a backward."""
        return self.backward_fixed + self.backward_sample * size


MOST_IMPROVED = 32
"""Micro-batches above which single samples are not moved: the search would take longer than it saves."""

PROPORTIONAL = StageCost(0.0, 1.0, 0.0, 2.0)
"""Time in proportion to the size, a backward twice a forward: what is assumed when nothing is measured."""


def makespan(sizes: Sequence[int], pp: int, cost: StageCost) -> float:
    """Return the seconds of one step of 1F1B when messages take no time.

    Args:
        sizes: of the micro-batches, in order.
        pp: stages.
        cost: of every stage.
    """
    count = len(sizes)
    forwards, backwards = [cost.forward(size) for size in sizes], [cost.backward(size) for size in sizes]
    # A stage s runs min(pp - 1 - s, count) forwards, then a forward and a backward in turn, then what is left. Walked
    # along anti-diagonals, everything an entry waits for is known.
    orders = [_order(min(pp - 1 - stage, count), count) for stage in range(pp)]
    clocks, next_actions = [0.0] * pp, [0] * pp
    forward_ends = [[-1.0] * count for _ in range(pp)]
    backward_ends = [[-1.0] * count for _ in range(pp)]
    left = 2 * count * pp
    while left:
        for stage in range(pp):
            order = orders[stage]
            while next_actions[stage] < len(order):
                is_forward, number = order[next_actions[stage]]
                if is_forward:
                    ready = forward_ends[stage - 1][number] if stage else 0.0
                else:
                    ready = (
                        backward_ends[stage + 1][number] if stage < pp - 1 else forward_ends[stage][number]
                    )
                if ready < 0:
                    break
                length = forwards[number] if is_forward else backwards[number]
                clocks[stage] = max(clocks[stage], ready) + length
                (forward_ends if is_forward else backward_ends)[stage][number] = clocks[stage]
                next_actions[stage] += 1
                left -= 1
    return max(clocks)


def bubble_seconds(sizes: Sequence[int], pp: int, cost: StageCost) -> float:
    """Return how long a stage is idle in one step of 1F1B."""
    return makespan(sizes, pp, cost) - sum(cost.forward(size) + cost.backward(size) for size in sizes)


def best_sizes(samples: int, pp: int, cost: StageCost, most: int | None = None) -> tuple[int, ...]:
    """Return sizes that add up to `samples` and take the least time that a search finds.

    It starts from even micro-batches and from ramps of every height, and then moves single samples as long as that
    helps. Steps of very many micro-batches are left as they are found: moving one sample hardly matters there.

    Args:
        samples: of one rank and step.
        pp: stages.
        cost: of every stage; fixed parts speak for few micro-batches.
        most: largest micro-batch, for the sake of memory.
    """
    most = min(most or samples, samples)
    starts = {_even(samples, count) for count in range(-(-samples // most), samples + 1)}
    starts |= {_ramp(samples, height, tail) for height in range(1, most + 1) for tail in range(1, height + 1)}
    ordered = sorted(starts, key=lambda sizes: (makespan(sizes, pp, cost), len(sizes)))
    improved = [
        _improve(sizes, pp, cost, most) if len(sizes) <= MOST_IMPROVED else sizes for sizes in ordered[:3]
    ]
    return min(improved, key=lambda sizes: (makespan(sizes, pp, cost), len(sizes)))


def _order(warm_up: int, count: int) -> list[tuple[bool, int]]:
    order = [(True, number) for number in range(warm_up)]
    for number in range(count - warm_up):
        order += [(True, warm_up + number), (False, number)]
    return order + [(False, number) for number in range(count - warm_up, count)]


def _even(samples: int, count: int) -> tuple[int, ...]:
    edges = [samples * number // count for number in range(count + 1)]
    return tuple(b - a for a, b in itertools.pairwise(edges))


def _ramp(samples: int, height: int, tail: int) -> tuple[int, ...]:
    """Return sizes that rise by one to `height`, stay there, and fall to `tail`."""
    up, down = list(range(1, height)), list(range(height - 1, tail - 1, -1))
    while sum(up) + sum(down) > samples:
        (down if len(down) >= len(up) else up).pop()
    middle, rest = divmod(samples - sum(up) - sum(down), height)
    sizes = [*up, *[height] * middle, *down]
    return tuple(sorted(sizes[: len(up)] + ([rest] if rest else []))) + tuple(sizes[len(up) :])


def _improve(sizes: tuple[int, ...], pp: int, cost: StageCost, most: int) -> tuple[int, ...]:
    """Move single samples between micro-batches, or let one go, as long as the step gets shorter."""
    best = makespan(sizes, pp, cost)
    while True:
        candidates = []
        for source in range(len(sizes)):
            for target in range(len(sizes)):
                if source != target and sizes[target] < most:
                    moved = list(sizes)
                    moved[source] -= 1
                    moved[target] += 1
                    kept = tuple(size for size in moved if size)
                    candidates.append((makespan(kept, pp, cost), kept))
        if not candidates or min(candidates)[0] >= best * (1 - 1e-9):
            return sizes
        best, sizes = min(candidates)
