"""What a run reports: one JSON object per iteration, lines on the terminal, and a picture."""

import json
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.command_line import log
from ascendspeed_data.files import INCOMPLETE, write_durably
from ascendspeed_data.small_files import read_json_lines

METRICS = "metrics.jsonl"
PICTURE = "loss.png"
LOAD_PICTURE = "expert_load.png"


class Iteration(BaseModel):
    """One line of `metrics.jsonl`, as far as it is read again."""

    model_config = ConfigDict(extra="allow")

    iteration: int
    lm_loss: float | None
    grad_norm: float | None = None
    validation_loss: float | None = None


class MetricsFile:
    """`metrics.jsonl` of a run's folder, appended to and flushed at every iteration.

    Args:
        run_folder: folder of the run.
        iteration: where the run goes on; later lines of an interrupted run are dropped, with a log line.
    """

    def __init__(self, run_folder: Path, iteration: int) -> None:
        self.path = run_folder / METRICS
        written, is_cut = _read_lines(self.path)
        self.records = [record for record in written if record["iteration"] <= iteration]
        if self.path.exists():
            dropped = len(written) - len(self.records) + is_cut
            if dropped:
                log(f"{self.path}: dropped {dropped} lines past iteration {iteration}")
            write_durably(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        # Without a buffer nothing is left to write when the disk is full, and the file can be closed.
        self._file = self.path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one iteration."""
        self.records.append(dict(record))
        rest = (json.dumps(record) + "\n").encode()
        while rest:
            rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file; a last line that a crash cut short is left out.

    Raises:
        DataError: the file is damaged.
    """
    return _read_lines(path)[0]


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return the records of a metrics file, and whether a crash cut its last line short."""
    if not path.exists():
        return [], False
    lines, is_cut = read_json_lines(path, Iteration, "delete the line, or give another --save")
    return [line.model_dump(exclude_unset=True) for line in lines], is_cut


def finite_or_none(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return values as JSON can hold them."""
    return {name: value if isfinite(value) else None for name, value in values.items()}


def load_metrics(loads: Sequence[Sequence[float]], model: ModelConfig) -> dict[str, float]:
    """Return how unequally tokens fell on the experts of each layer: the largest and smallest load over the mean.

    Args:
        loads: tokens that chose each expert, by layer.
        model: says which layers have experts.
    """
    found: dict[str, float] = {}
    for layer, load in enumerate(loads):
        mean = sum(load) / len(load)
        if model.has_experts(layer) and mean:
            found[f"expert_load/{layer}/largest"] = max(load) / mean
            found[f"expert_load/{layer}/smallest"] = min(load) / mean
    return found


def format_iteration(record: Mapping[str, Any], train_iters: int, logged_metrics: Mapping[str, int]) -> str:
    """Return the line of the log for one iteration.

    Args:
        record: of `metrics.jsonl`.
        train_iters: steps of the whole run.
        logged_metrics: metrics of the objective to show, with their decimal decimals.
    """
    parts = [f"iteration {record['iteration']}/{train_iters}", f"loss {_format(record['lm_loss'], 4)}"]
    if "validation_loss" in record:
        parts.append(f"validation {_format(record['validation_loss'], 4)}")
    if "test_loss" in record:
        parts.append(f"test {_format(record['test_loss'], 4)}")
    parts += [
        f"{name.replace('_', ' ')} {_format(record[name], decimals)}"
        for name, decimals in logged_metrics.items()
    ]
    norm = record["grad_norm"]
    parts.append("overflow, skipped" if norm is None else f"grad norm {norm:.3f}")
    if "loss_scale" in record:
        parts.append(f"loss scale {record['loss_scale']:.0f}")
    parts.append(f"lr {record['learning_rate']:.2e}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    left = (train_iters - record["iteration"]) * record["step_seconds"]
    return " | ".join([*parts, f"{left:,.0f} s left"])


def _format(value: float | None, decimals: int) -> str:
    return "not finite" if value is None else f"{value:.{decimals}f}"


def draw_loss(
    records: Sequence[Mapping[str, Any]],
    path: Path,
    unigram_entropy_nats: float | None,
    unit: str = "nats per token",
) -> None:
    """Draw the loss curve of a run as a PNG.

    Args:
        records: of `metrics.jsonl`.
        path: the picture.
        unigram_entropy_nats: entropy per token of the training data, drawn as a line: what a model reaches that
            knows only how often each token occurs.
        unit: of the loss.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    known = [r for r in records if r["lm_loss"] is not None]
    axes.plot([r["iteration"] for r in known], [r["lm_loss"] for r in known], lw=1, label="training loss")
    measured = [r for r in records if r.get("validation_loss") is not None]
    if measured:
        axes.plot(
            [r["iteration"] for r in measured],
            [r["validation_loss"] for r in measured],
            "o-",
            ms=3,
            label="validation loss",
        )
    written = [r["iteration"] for r in records if "samples" in r]
    if written:
        edge = axes.get_xaxis_transform()
        axes.plot(written, [0.02] * len(written), "^", ms=4, transform=edge, label="samples written")
    if unigram_entropy_nats is not None:
        axes.axhline(
            unigram_entropy_nats,
            color="grey",
            ls="--",
            lw=1,
            label=f"unigram entropy, {unigram_entropy_nats:.2f} nats",
        )
    axes.set_xlabel("iteration")
    axes.set_ylabel(f"loss, {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def draw_expert_load(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw how unequally tokens fell on experts, a curve for each layer, as a PNG; nothing for models without.

    Args:
        records: of `metrics.jsonl`.
        path: the picture.
    """
    layers = sorted(
        {int(key.split("/")[1]) for record in records for key in record if key.startswith("expert_load/")}
    )
    if not layers:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    colours = mpl.colormaps["viridis"]
    for layer in layers:
        colour = colours(layers.index(layer) / max(len(layers) - 1, 1))
        for extreme in ("largest", "smallest"):
            key = f"expert_load/{layer}/{extreme}"
            known = [record for record in records if key in record]
            label = f"layer {layer}" if extreme == "largest" and layer in (layers[0], layers[-1]) else None
            axes.plot(
                [record["iteration"] for record in known],
                [record[key] for record in known],
                color=colour,
                lw=1,
                label=label,
            )
    axes.axhline(1.0, color="grey", ls="--", lw=1, label="all experts alike")
    axes.set_xlabel("iteration")
    axes.set_ylabel("largest and smallest load of an expert / mean")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture as PNG under a temporary name, rename it, and close the figure; its folder is made if need be."""
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + INCOMPLETE)
    figure.savefig(scratch, format="png")
    scratch.replace(path)
    pyplot.close(figure)
