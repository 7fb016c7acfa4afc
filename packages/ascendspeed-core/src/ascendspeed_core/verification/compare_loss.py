"""Compare the losses of runs: under two layouts, on two devices, before and after a change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_core.observability.metrics import METRICS, read_metrics, save_figure
from ascendspeed_data.errors import DataError

AT_END = 10
"""Iterations whose mean loss is the loss at the end."""


@dataclass(frozen=True)
class LossComparison:
    """How far one run is from the first.

    Attributes:
        run: its folder.
        num_iterations: iterations that both have, with a finite loss.
        only_in_one: iterations that one of the two lacks.
        largest: largest relative deviation of the loss.
        at_iteration: where that is.
        mean: mean relative deviation.
        at_end: losses of the first run and of this one at the end: means of their last common iterations.
        num_at_end: iterations in these means.
    """

    run: Path
    num_iterations: int
    only_in_one: int
    largest: float
    at_iteration: int
    mean: float
    at_end: tuple[float, float]
    num_at_end: int

    def verdict(self, first: Path) -> str:
        """Say which of the two runs has the lower loss at the end, and by how much."""
        ours, theirs = self.at_end
        over = f"means of the last {self.num_at_end} common iterations"
        if ours == theirs:
            return f"at the end {self.run} and {first} have the same loss, {ours:.4f} ({over})"
        better, worse = (first, self.run) if ours < theirs else (self.run, first)
        return (
            f"at the end {better} is better than {worse} by {abs(ours - theirs):.3g}: {min(ours, theirs):.4f} and "
            f"{max(ours, theirs):.4f} ({over})"
        )

    def within(self, tolerance: float) -> bool:
        """Whether no iteration deviates by more."""
        return self.largest <= tolerance


def losses_of(run: Path) -> dict[int, float]:
    """Return the loss of each iteration of a run.

    Raises:
        DataError: the folder holds no metrics.
    """
    path = run / METRICS
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the --save folder of a run")
    found = {r["iteration"]: r["lm_loss"] for r in read_metrics(path) if r["lm_loss"] is not None}
    if not found:
        raise DataError(f"{path} holds no iteration yet")
    return found


def compare_losses(first: Mapping[int, float], other: Mapping[int, float], run: Path) -> LossComparison:
    """Compare one run with the first, iteration by iteration.

    Raises:
        DataError: they have no iteration in common.
    """
    common = sorted(set(first) & set(other))
    if not common:
        raise DataError(f"{run} has no iteration in common with the first run")
    deviations = {number: abs(other[number] - first[number]) / abs(first[number]) for number in common}
    worst = max(common, key=lambda number: deviations[number])
    mean = sum(deviations.values()) / len(common)
    last = common[-AT_END:]
    at_end = (sum(first[n] for n in last) / len(last), sum(other[n] for n in last) / len(last))
    return LossComparison(
        run, len(common), len(set(first) ^ set(other)), deviations[worst], worst, mean, at_end, len(last)
    )


def draw_comparison(runs: Sequence[tuple[str, Mapping[int, float]]], path: Path) -> None:
    """Draw the losses of all runs, and below them how far each is from the first, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6.5), dpi=120, sharex=True)
    first: Mapping[int, Any] = runs[0][1]
    for name, losses in runs:
        above.plot(list(losses), list(losses.values()), lw=1, label=name)
    for name, losses in runs[1:]:
        common = [number for number in losses if number in first]
        below.plot(common, [abs(losses[n] - first[n]) / abs(first[n]) for n in common], lw=1, label=name)
    above.set_ylabel("loss, nats per token")
    below.set_ylabel(f"relative deviation\nfrom {runs[0][0]}")
    below.set_yscale("symlog", linthresh=1e-16)
    below.set_xlabel("iteration")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)
