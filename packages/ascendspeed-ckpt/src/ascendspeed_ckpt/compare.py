"""Compare two checkpoints as logical models, tensor by tensor, whatever kinds they are."""

from dataclasses import dataclass, field

import torch

from ascendspeed_core.weights import WeightSource
from ascendspeed_data.command_line import Progress

SHOWN = 3


@dataclass
class Comparison:
    """What was found.

    Attributes:
        num_tensors: tensors compared.
        num_different: of these, how many differ by more than the tolerance.
        largest: largest absolute difference of any element.
        findings: the first differences, in words.
    """

    num_tensors: int = 0
    num_different: int = 0
    largest: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not self.findings

    def summary(self) -> str:
        """Return the first findings as one line."""
        return "; ".join(self.findings[:SHOWN])


def compare(
    a: WeightSource, b: WeightSource, dtype: torch.dtype | None = None, tolerance: float = 0.0
) -> Comparison:
    """Read both tensor by tensor.

    Args:
        a: one checkpoint.
        b: the other.
        dtype: bring `a` to this format first, as a conversion did.
        tolerance: largest accepted absolute difference of an element.
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
    with Progress("comparing", len(both), "tensors") as bar:
        for name in both:
            _compare_tensor(found, name, a, b, dtype, tolerance)
            bar.advance()
    return found


def _compare_tensor(
    found: Comparison,
    name: str,
    a: WeightSource,
    b: WeightSource,
    dtype: torch.dtype | None,
    tolerance: float,
) -> None:
    first, second = a.read(name), b.read(name)
    found.num_tensors += 1
    if first.shape != second.shape:
        found.findings.append(f"{name}: shapes {list(first.shape)} and {list(second.shape)}")
        found.num_different += 1
        return
    if dtype is not None:
        first = first.to(dtype)
    if first.dtype == second.dtype and torch.equal(first, second):
        return
    difference = float((first.double() - second.double()).abs().max())
    found.largest = max(found.largest, difference)
    if not difference <= tolerance:
        found.num_different += 1
        found.findings.append(f"{name}: largest difference {difference:.3e}")
