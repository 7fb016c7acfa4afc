"""Pictures of what each pipeline rank did when."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascendspeed_core.observability.metrics import save_figure
from ascendspeed_core.parallel.timeline import Kind, Timeline

COLOURS: dict[Kind, str] = {
    "forward": "#4c78a8",
    "backward": "#f58518",
    "input gradient": "#eeca3b",
    "weight gradient": "#54a24b",
}


REDUCTION_COLOUR = "#b279a2"
EXCHANGE_COLOUR = "#d62728"


def draw_timelines(timelines: Sequence[tuple[str, Timeline]], path: Path) -> None:
    """Draw timelines above one another, one row a device, on the same scale, as a PNG.

    Args:
        timelines: title and what ran.
        path: the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    devices = max(len(timeline.devices) for _, timeline in timelines)
    figure, rows = pyplot.subplots(
        len(timelines),
        1,
        figsize=(12, (0.4 * devices + 1.2) * len(timelines)),
        dpi=120,
        sharex=True,
        squeeze=False,
    )
    for axes, (title, timeline) in zip(rows[:, 0], timelines, strict=True):
        _draw(axes, timeline)
        axes.set_title(
            f"{title}: {timeline.makespan * 1000:.0f} ms, bubble {timeline.bubble:.1%}",
            fontsize=10,
            loc="left",
        )
    rows[-1, 0].set_xlabel(
        "ms; the number is that of the micro-batch, paler is a later stage of the device, thin lines are messages"
    )
    shown = {action.kind for _, timeline in timelines for actions in timeline.devices for action in actions}
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in shown]
    if any(any(timeline.reductions) for _, timeline in timelines):
        handles.append(Patch(color=REDUCTION_COLOUR, label="reduction of gradients"))
    if any(any(timeline.exchanges) for _, timeline in timelines):
        handles.append(Patch(color=EXCHANGE_COLOUR, label="all-to-all of experts"))
    figure.legend(handles=handles, loc="upper right", ncols=6, fontsize=8)
    save_figure(figure, path)


def _draw(axes: Any, timeline: Timeline) -> None:
    """Draw one timeline: a row for each device, its reductions at the foot of the row, exchanges at its head."""
    zero = timeline.start
    for device, actions in enumerate(timeline.devices):
        stages = sorted({action.stage for action in actions})
        for action in actions:
            left, width = (action.start - zero) * 1000, action.seconds * 1000
            paleness = 0.7 * stages.index(action.stage) / len(stages)
            axes.barh(
                device, width, left=left, height=0.7, color=COLOURS[action.kind], alpha=1 - paleness,
                edgecolor="white", lw=0.5,
            )  # fmt: skip
            axes.text(left + width / 2, device, action.micro_batch, ha="center", va="center", fontsize=6)
    for device, reductions in enumerate(timeline.reductions):
        for one in reductions:
            left, width = (one.start - zero) * 1000, (one.end - one.start) * 1000
            axes.barh(device + 0.43, width, left=left, height=0.12, color=REDUCTION_COLOUR, alpha=0.6)
            name = "rest" if one.stage is None else f"stage {one.stage}"
            axes.text(left, device + 0.43, name, ha="left", va="center", fontsize=4)
    for device, exchanges in enumerate(timeline.exchanges):
        for exchange in exchanges:
            left, width = (exchange.start - zero) * 1000, exchange.seconds * 1000
            axes.barh(device - 0.4, width, left=left, height=0.1, color=EXCHANGE_COLOUR)
    for origin, ready, device, used in timeline.messages():
        axes.plot(
            [(ready - zero) * 1000, (used - zero) * 1000], [origin, device], color="black", lw=0.3, alpha=0.4
        )
    count = len(timeline.devices)
    axes.set_yticks(range(count), [f"device {number}" for number in range(count)])
    axes.invert_yaxis()
