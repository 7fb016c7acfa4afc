"""Pictures of plans: memory by part, time by part, and what is gained in speed for memory. No torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ascendspeed_core.observability.metrics import save_figure
from ascendspeed_core.planner.search import Found, Plan, Question, pareto

GIB = 1 << 30
MOST_BARS = 8
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#eeca3b", "#b279a2", "#9d9da1")


def draw_plans(question: Question, found: Found, folder: Path) -> list[Path]:
    """Draw `memory.png`, `time.png` and `pareto.png` into a folder, and return their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    plans = (found.fitting or found.others)[:MOST_BARS]
    paths = [folder / name for name in ("memory.png", "time.png", "pareto.png")]
    memory = [{part: size / GIB for part, size in vars(plan.memory).items()} for plan in plans]
    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(plans) + 1.8), dpi=120)
    _bars(axes, plans, memory, "GiB of the rank that needs most")
    axes.axvline(question.budget / GIB, color="black", linewidth=1)
    save_figure(figure, paths[0])
    figure, axes = pyplot.subplots(figsize=(10, 0.5 * len(plans) + 1.8), dpi=120)
    _bars(axes, plans, [dict(vars(plan.seconds)) for plan in plans], "seconds of a step")
    save_figure(figure, paths[1])
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    _draw_pareto(axes, question, found)
    save_figure(figure, paths[2])
    return paths


def _bars(axes: Any, plans: Sequence[Plan], parts: Sequence[dict[str, float]], label: str) -> None:
    names = [f"{plan.layout}\nmicro-batch {plan.micro_batch}, recompute {plan.recompute}" for plan in plans]
    left = [0.0] * len(plans)
    for colour, part in zip(COLOURS, parts[0], strict=True):
        widths = [one[part] for one in parts]
        axes.barh(range(len(plans)), widths, left=left, color=colour, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(plans)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0))


def _draw_pareto(axes: Any, question: Question, found: Found) -> None:
    every = (*found.fitting, *found.others)
    for plans, colour, name in ((found.others, "#d62728", "too large"), (found.fitting, "#9d9da1", "fits")):
        axes.scatter(
            [plan.memory.total / GIB for plan in plans],
            [plan.tokens_per_second for plan in plans],
            s=6, color=colour, label=name,
        )  # fmt: skip
    front = pareto(every)
    axes.step(
        [plan.memory.total / GIB for plan in front],
        [plan.tokens_per_second for plan in front],
        where="post", color="#4c78a8", label="Pareto front",
    )  # fmt: skip
    axes.axvline(question.budget / GIB, color="black", linewidth=1, label="budget")
    axes.set_xlim(0, 2.5 * question.budget / GIB)
    axes.set_xlabel("GiB of a device")
    axes.set_ylabel("tokens/s of a device")
    axes.legend(fontsize=8)
