"""Compare two checkpoints as logical models, tensor by tensor, whatever kinds they are."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from ascendspeed_ckpt.threads import run_in_threads
from ascendspeed_core.weights import Index, TensorInfo, WeightSource
from ascendspeed_core.weights.stream import SLAB_BYTES, as_format
from ascendspeed_data.command_line import Progress

SHOWN = 3


@dataclass
class Comparison:
    """What was found.

    Attributes:
        num_tensors: tensors compared.
        num_bytes: bytes of these tensors, as the first checkpoint holds them.
        num_different: of these, how many differ by more than the tolerance.
        largest: largest absolute difference of any element.
        findings: the first differences, in words.
    """

    num_tensors: int = 0
    num_bytes: int = 0
    num_different: int = 0
    largest: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.findings

    def summary(self) -> str:
        """Return the first findings as one line."""
        more = f"; and {len(self.findings) - SHOWN} more" if len(self.findings) > SHOWN else ""
        return "; ".join(self.findings[:SHOWN]) + more


def compare(
    a: WeightSource,
    b: WeightSource,
    dtype: torch.dtype | None = None,
    tolerance: float = 0.0,
    workers: int = 1,
) -> Comparison:
    """Compare two checkpoints, slab by slab.

    Args:
        a: one checkpoint.
        b: the other.
        dtype: convert `a` to this dtype first, as a conversion did.
        tolerance: largest accepted absolute difference of an element.
        workers: tensors compared at once.
    """
    found = Comparison()
    if a.config != b.config:
        ours, theirs = a.config.model_dump(), b.config.model_dump()
        found.findings += [
            f"{key}: {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]
        ]
    have, other = a.tensors(), b.tensors()
    found.findings += [f"{name} is only in the first" for name in sorted(set(have) - set(other))]
    found.findings += [f"{name} is only in the second" for name in sorted(set(other) - set(have))]
    both = [name for name in have if name in other]
    differences: dict[str, str] = {}
    lock = threading.Lock()
    with Progress("comparing", sum(have[name].num_bytes for name in both), "bytes") as bar:

        def one(name: str) -> None:
            finding, largest = _difference(name, a, b, (have[name], other[name]), dtype, tolerance)
            with lock:
                found.num_tensors += 1
                found.num_bytes += have[name].num_bytes
                found.largest = max(found.largest, largest)
                if finding is not None:
                    differences[name] = finding
                bar.advance(have[name].num_bytes)

        run_in_threads([partial(one, name) for name in both], workers)
    found.num_different = len(differences)
    found.findings += [differences[name] for name in both if name in differences]
    return found


def _difference(
    name: str,
    a: WeightSource,
    b: WeightSource,
    infos: tuple[TensorInfo, TensorInfo],
    dtype: torch.dtype | None,
    tolerance: float,
) -> tuple[str | None, float]:
    """Return what differs between two tensors, in words, and the largest difference of an element."""
    shapes = [info.shape for info in infos]
    if shapes[0] != shapes[1]:
        return f"{name}: shapes {list(shapes[0])} and {list(shapes[1])}", 0.0
    largest, where = 0.0, ""
    for index in _parts(shapes[0], max(info.dtype.itemsize for info in infos)):
        first, second = as_format(a.read(name, index), dtype, name), b.read(name, index)
        if first.dtype == second.dtype and torch.equal(_bits(first), _bits(second)):
            continue
        difference = (first.double() - second.double()).abs().nan_to_num(nan=float("inf"))
        # NaN at the same position in both is no difference.
        difference = difference.masked_fill(first.isnan() & second.isnan(), 0.0)
        here = float(difference.max()) if difference.numel() else 0.0
        if here > largest or not where:
            row = (
                int(difference.flatten(1).max(1).values.argmax())
                if difference.dim() > 1
                else int(difference.argmax())
            )
            largest, where = max(largest, here), f"in row {index[0].start + row}"
    if largest <= tolerance:
        return None, largest
    return f"{name}: largest difference {largest:.3e} {where}", largest


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers' bits, so that equal not-a-numbers are equal."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return tensor.contiguous().view(kinds[tensor.dtype.itemsize])


def _parts(shape: Sequence[int], itemsize: int) -> list[Index]:
    """Cut a tensor into runs of rows."""
    width = 1
    for length in shape[1:]:
        width *= length
    rows = max(SLAB_BYTES // max(width * itemsize, 1), 1)
    rest = tuple(slice(0, length) for length in shape[1:])
    return [(slice(start, min(start + rows, shape[0])), *rest) for start in range(0, shape[0], rows)]
