"""Train the same few steps under several layouts, and say how far each is from one process."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_core.config.parallel import FOLD_SCHEDULES, V_SCHEDULES, Layout
from ascendspeed_core.training.metrics import METRICS, read_metrics
from ascendspeed_core.weights import open_weights
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError

TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest accepted relative deviation of losses and gradient norms: what the order of sums can explain."""


@dataclass(frozen=True)
class ParityRow:
    """What one layout computed, against one process.

    Attributes:
        layout: devices along each dimension.
        loss: largest relative deviation of a step's loss.
        grad_norm: largest relative deviation of a step's gradient norm.
        weights: largest deviation of a weight after the last step, relative to the largest entry of its tensor.
    """

    layout: Layout
    loss: float
    grad_norm: float
    weights: float

    def within(self, tolerance: float) -> bool:
        """Whether losses and gradient norms are as close as that; weights are for information."""
        return self.loss <= tolerance and self.grad_norm <= tolerance


def parse_layouts(text: str) -> list[Layout]:
    """Read `tp2,pp2,tp2pp2,dp2`.

    Behind a plus: `sp` for sequence parallelism, `sharded` for a sharded optimizer, `gpipe`, `zbv` or `dualpipev` for
    the pipeline's schedule, `vppN` or `vppN-zb` for virtual stages of N layers, `vppN+fifo` or `vppN+aiao` to reduce
    their gradients early.

    Raises:
        ConfigError: a part that is no layout.
    """
    layouts = []
    for part in text.split(","):
        sizes, *options = part.strip().split("+")
        found = re.findall(r"(tp|pp|dp)([1-9]\d*)", sizes)
        names = [name for name, _ in found]
        is_read = found and "".join(name + size for name, size in found) == sizes
        chosen = [_option(option) for option in options]
        if not is_read or len(set(names)) < len(names) or None in chosen:
            raise ConfigError(
                f"layouts={text!r}: {part!r} is no layout; write for example "
                "tp2,pp2,tp2pp2dp2,tp2+sp,dp2+sharded,pp2+zbv,pp2+vpp1,pp2dp2+vpp1+aiao"
            )
        given: dict[str, Any] = {name: int(size) for name, size in found}
        for option in chosen:
            given |= option or {}
        layouts.append(Layout(**given))
    return layouts


def _option(text: str) -> dict[str, Any] | None:
    """Return what `+text` sets in a `Layout`; `None` when it is no option."""
    virtual = re.fullmatch(r"vpp([1-9]\d*)(-zb)?", text)
    if virtual:
        schedule = "interleaved-zb" if virtual[2] else "interleaved"
        return {"schedule": schedule, "layers_per_stage": int(virtual[1])}
    if text in ("gpipe", *V_SCHEDULES):
        return {"schedule": text}
    if text in FOLD_SCHEDULES:
        return {"schedule": FOLD_SCHEDULES[text], "early_reduction": True}
    return {"sp": {"sequence_parallel": True}, "sharded": {"sharded_optimizer": True}}.get(text)


def run_parity(
    layouts: Sequence[Layout], arguments: Sequence[str], scratch: Path, device: str
) -> list[ParityRow]:
    """Train under one process and under each layout, one after the other.

    Args:
        layouts: those to compare.
        arguments: of `asd-core pretrain`: model, data, batch, dtype; neither layout nor `--save`.
        scratch: folder for the runs; each is removed once it is compared.
        device: of all runs.

    Raises:
        AscendSpeedError: a run failed; the message is its own.
    """
    one = _train(Layout(), arguments, scratch, device)
    rows = []
    for layout in layouts:
        run = _train(layout, arguments, scratch, device)
        rows.append(_compare(layout, run, one))
        shutil.rmtree(run)
    return rows


def _train(layout: Layout, arguments: Sequence[str], scratch: Path, device: str) -> Path:
    run = scratch / str(layout).replace(" ", "")
    shutil.rmtree(run, ignore_errors=True)
    log(f"training under {layout}")
    flags = [
        "--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp, "--nproc-per-node",
        layout.world_size, "--device", device, "--save", run, "--data-cache-path", scratch / "cache",
    ]  # fmt: skip
    flags += ["--sequence-parallel"] * layout.sequence_parallel
    flags += ["--use-distributed-optimizer"] * layout.sharded_optimizer
    if layout.layers_per_stage:
        flags += ["--num-layers-per-virtual-pipeline-stage", layout.layers_per_stage]
    if layout.early_reduction:
        flags += ["--foldx-mode", "aiao" if layout.schedule == FOLD_SCHEDULES["aiao"] else "fifo"]
    elif layout.schedule != "1f1b":
        flags += ["--pipeline-schedule", layout.schedule]
    command = [sys.executable, "-m", "ascendspeed_core.cli", "pretrain", *arguments, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise AscendSpeedError(
            f"training under {layout} failed: {lines[-1].removeprefix('asd-core: error: ')}"
        )
    return run


def _compare(layout: Layout, run: Path, one: Path) -> ParityRow:
    ours, theirs = read_metrics(run / METRICS), read_metrics(one / METRICS)

    def largest(key: str) -> float:
        pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True)]
        if any((a is None) != (b is None) for a, b in pairs):
            return float("inf")
        return max((abs(a - b) / abs(b) for a, b in pairs if b is not None), default=0.0)

    return ParityRow(layout, largest("lm_loss"), largest("grad_norm"), _weights(run, one))


def _weights(run: Path, one: Path) -> float:
    ours, theirs = open_weights(run), open_weights(one)
    found = 0.0
    for name in theirs.tensors():
        a, b = ours.read(name).double(), theirs.read(name).double()
        found = max(found, float((a - b).abs().max() / b.abs().max()))
    return found


def table(rows: Sequence[ParityRow], tolerance: float) -> list[str]:
    """Return the rows as aligned lines."""
    cells: list[Mapping[str, str]] = [
        {
            "layout": str(row.layout),
            "loss": f"{row.loss:.2e}",
            "gradient norm": f"{row.grad_norm:.2e}",
            "weights": f"{row.weights:.2e}",
            "verdict": "equal" if row.within(tolerance) else "DIFFERENT",
        }
        for row in rows
    ]
    head = {key: key for key in cells[0]}
    widths = {key: max(len(row[key]) for row in [head, *cells]) for key in head}
    return ["  ".join(row[key].ljust(widths[key]) for key in head).rstrip() for row in [head, *cells]]
