"""Train the same few steps under several layouts and features, and say how far each is from one process."""

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ascendspeed_core.config.layout import V_SCHEDULES
from ascendspeed_core.config.parallel import FOLD_SCHEDULES
from ascendspeed_core.observability.metrics import METRICS, read_metrics
from ascendspeed_core.weights import open_weights
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError

TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest accepted relative deviation of losses and gradient norms: what the order of sums can explain."""

_ERROR = "asd-core: error: "
"""Begins the line with which a command ends."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "sp": ("--sequence-parallel",),
    "sharded": ("--use-distributed-optimizer",),
    "ep(N)": ("--expert-model-parallel-size", "N"),
    "etp(N)": ("--expert-tensor-parallel-size", "N"),
    "zero(N)": ("--zero-stage", "N"),
    **{name: ("--pipeline-schedule", name) for name in ("gpipe", *V_SCHEDULES)},
    **{name: ("--foldx-mode", name) for name in FOLD_SCHEDULES},
    "vpp(N)": ("--num-layers-per-virtual-pipeline-stage", "N"),
    "vpp(N)-zb": ("--num-layers-per-virtual-pipeline-stage", "N", "--pipeline-schedule", "interleaved-zb"),
    **{
        name: ("--checkpoint-activations", "--checkpoint-policy", name)
        for name in ("full", "selective", "attention")
    },
    "block(N)": ("--checkpoint-activations", "--checkpoint-policy", "block", "--checkpoint-block-layer", "N"),
    "triangle": ("--triangle-attn",),
    "reference": ("--attention", "reference"),
    "mlp-fusion": ("--mlp-layer-fusion",),
    "mbs(N-N)": ("--optimized-pipeline", "--manual-mbs", "N,N"),
}
"""What may stand behind a plus, and the flags it means; N is a number, N-N two or more."""


ENGINES: dict[str, tuple[str, ...]] = {
    "ascendspeed": (),
    "deepspeed": ("--zero-stage", "1"),
    "megatron": ("--engine", "megatron"),
}
"""Engines that can be compared, and the flags that choose them."""


@dataclass(frozen=True)
class Candidate:
    """One way to train.

    Attributes:
        name: as written, `tp2pp2+sp`, with the engine if there are several.
        sizes: ranks along each dimension.
        flags: of `asd-core pretrain`.
        may_be_refused: an engine may lack the layout, which is no failure.
    """

    name: str
    sizes: Mapping[str, int]
    flags: tuple[str, ...] = ()
    may_be_refused: bool = False

    @property
    def world_size(self) -> int:
        """Processes it takes."""
        return math.prod(self.sizes.values())


@dataclass(frozen=True)
class ParityRow:
    """What one candidate computed, against one process.

    Attributes:
        name: the candidate, as written.
        loss: largest relative deviation of a step's loss, auxiliary losses included.
        grad_norm: largest relative deviation of a step's gradient norm.
        weights: largest deviation of a weight after the last step, relative to the largest entry of its tensor.
        refusal: why the engine did not train at all; empty where it did.
    """

    name: str
    loss: float
    grad_norm: float
    weights: float
    refusal: str = ""

    def within(self, tolerance: float) -> bool:
        """Whether losses and gradient norms are as close as that; weights are for information."""
        return bool(self.refusal) or (self.loss <= tolerance and self.grad_norm <= tolerance)

    def verdict(self, tolerance: float) -> str:
        """Return it in one word."""
        if self.refusal:
            return "refused"
        return "equal" if self.within(tolerance) else "DIFFERENT"


def parse_layouts(text: str) -> list[Candidate]:
    """Read `tp2,pp2,cp2,tp2pp2dp2+sp`: sizes, and behind each plus one of `OPTIONS`; `1` is one process with options.

    Raises:
        ConfigError: a part that is no layout.
    """
    candidates = []
    for part in text.split(","):
        sizes, *options = part.strip().split("+")
        found = re.findall(r"(tp|cp|pp|dp)([1-9]\d*)", sizes)
        is_read = "".join(name + size for name, size in found) == ("" if sizes == "1" else sizes)
        chosen = [_flags(option) for option in options]
        if not is_read or not sizes or len({name for name, _ in found}) < len(found) or None in chosen:
            raise ConfigError(
                f"layouts={text!r}: {part!r} is no layout; write for example tp2,pp2,cp2,tp2pp2dp2,tp2+sp,1+full; "
                f"behind a plus stand {', '.join(OPTIONS)}"
            )
        flags = tuple(flag for option in chosen for flag in option or ())
        candidates.append(Candidate(part.strip(), {name: int(size) for name, size in found}, flags))
    return candidates


def with_engines(candidates: Sequence[Candidate], engines: str) -> list[Candidate]:
    """Return each candidate under each of some engines: `ascendspeed,deepspeed,megatron`.

    Raises:
        ConfigError: an engine that there is not.
    """
    names = [name.strip() for name in engines.split(",")]
    unknown = [name for name in names if name not in ENGINES]
    if unknown or len(set(names)) < len(names):
        raise ConfigError(f"engines={engines!r}: give some of {', '.join(ENGINES)}, each once")
    chosen = next((one.name for one in candidates if "--zero-stage" in one.flags), None)
    if chosen is not None:
        raise ConfigError(
            f"layouts={chosen} names the engine DeepSpeed, and engines={engines} names engines too; leave zero out, "
            "deepspeed means stage 1"
        )
    return [
        replace(
            candidate,
            name=f"{candidate.name} {name}",
            flags=(*candidate.flags, *ENGINES[name]),
            may_be_refused=name != "ascendspeed",
        )
        for candidate in candidates
        for name in names
    ]


def _flags(option: str) -> tuple[str, ...] | None:
    """Return the flags that `+option` means; `None` when it is no option."""
    for name, flags in OPTIONS.items():
        pattern = name.replace("(N-N)", r"(\d+(?:-\d+)+)").replace("(N)", r"([1-9]\d*)")
        found = re.fullmatch(pattern, option)
        if found:
            number = found[1].replace("-", ",") if found.groups() else ""
            return tuple(number if flag in ("N", "N,N") else flag for flag in flags)
    return None


def run_parity(
    candidates: Sequence[Candidate], arguments: Sequence[str], scratch: Path, device: str
) -> list[ParityRow]:
    """Train with one process and as each candidate says, in turn.

    Args:
        candidates: those to compare.
        arguments: of `asd-core pretrain`: model, data, batch, dtype; neither layout nor `--save`.
        scratch: folder for the runs; each is removed once it is compared.
        device: of all runs.

    Raises:
        AscendSpeedError: a run failed; the message is its own.
    """
    one = _train(Candidate("one process", {}), arguments, scratch / "one", device)
    rows = []
    for candidate in candidates:
        try:
            run = _train(candidate, arguments, scratch / "candidate", device)
        except _RefusedError as error:
            rows.append(ParityRow(candidate.name, math.nan, math.nan, math.nan, str(error)))
            continue
        rows.append(_compare(candidate, run, one))
        shutil.rmtree(run)
    return rows


class _RefusedError(Exception):
    """An engine lacks what a candidate asks for; the message says what."""


def _train(candidate: Candidate, arguments: Sequence[str], run: Path, device: str) -> Path:
    log(f"training: {candidate.name}")
    sizes = candidate.sizes
    flags = [
        "--tensor-model-parallel-size", sizes.get("tp", 1), "--pipeline-model-parallel-size", sizes.get("pp", 1),
        "--context-parallel-size", sizes.get("cp", 1), "--nproc-per-node", candidate.world_size, "--device", device,
        "--save", run, "--data-cache-path", run.parent / "cache", *candidate.flags,
    ]  # fmt: skip
    command = [sys.executable, "-m", "ascendspeed_core.cli", "pretrain", *arguments, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = reason_of(done.stderr)
        is_refused = done.returncode == ConfigError.exit_code or reason.startswith("engine=")
        if is_refused and candidate.may_be_refused:
            raise _RefusedError(reason)
        raise AscendSpeedError(f"training as {candidate.name} failed: {reason}")
    return run


def reason_of(stderr: str) -> str:
    """Return why a run failed: its error, which a library may speak after; without one its last line."""
    lines = stderr.strip().splitlines() or ["no output"]
    errors = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    return errors[-1] if errors else lines[-1]


def _compare(candidate: Candidate, run: Path, one: Path) -> ParityRow:
    ours, theirs = read_metrics(run / METRICS), read_metrics(one / METRICS)

    def largest(key: str) -> float:
        pairs = [(a.get(key), b.get(key)) for a, b in zip(ours, theirs, strict=True)]
        if any((a is None) != (b is None) for a, b in pairs):
            return float("inf")
        return max((_deviation(a, b) for a, b in pairs if a is not None and b is not None), default=0.0)

    # Auxiliary losses are compared too, where the model has any.
    losses = {key for record in (*ours, *theirs) for key in record if key.startswith("auxiliary_losses/")}
    loss = max(map(largest, ("lm_loss", *sorted(losses))))
    return ParityRow(candidate.name, loss, largest("grad_norm"), _weights(run, one))


def _deviation(found: float, expected: float) -> float:
    """Return the relative deviation; a balancing loss may be exactly zero."""
    if found == expected:
        return 0.0
    return abs(found - expected) / abs(expected) if expected else math.inf


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
            "layout": row.name,
            "loss": _shown(row.loss),
            "gradient norm": _shown(row.grad_norm),
            "weights": _shown(row.weights),
            "verdict": row.verdict(tolerance),
        }
        for row in rows
    ]
    head = {key: key for key in cells[0]}
    widths = {key: max(len(row[key]) for row in [head, *cells]) for key in head}
    lines = ["  ".join(row[key].ljust(widths[key]) for key in head).rstrip() for row in [head, *cells]]
    return lines + [f"{row.name}: {row.refusal}" for row in rows if row.refusal]


def _shown(deviation: float) -> str:
    return "-" if math.isnan(deviation) else f"{deviation:.2e}"
