"""What is refused about checkpoints by a table, as data: names, reasons and remedies, for a page of the documents."""

from dataclasses import dataclass

from ascendspeed_core.weights.derived_tensors import DERIVED
from ascendspeed_core.weights.huggingface.files import OTHER_WEIGHTS
from ascendspeed_core.weights.huggingface.quantised import METHODS


@dataclass(frozen=True)
class Refusal:
    """Something that ends a command with one line.

    Attributes:
        name: what it is, as files or flags name it.
        reason: why it is not read.
        remedy: what to do instead.
    """

    name: str
    reason: str
    remedy: str


def refusals() -> tuple[Refusal, ...]:
    """Return everything about checkpoints that a table refuses by name."""
    quantised = (
        Refusal(
            f"weights quantised with {method.name}",
            "they mean something only together with their scales, in a packing of this method",
            method.remedy,
        )
        for method in {method.name: method for method in METHODS}.values()
    )
    others = (
        Refusal(name, what.partition("; ")[0], what.partition("; ")[2])
        for name, what in OTHER_WEIGHTS.items()
    )
    derived = (
        Refusal(
            f"stored {kind.what} that the config does not mean",
            "the model was computed in another way than its config says",
            "correct the config, or use the one that belongs to these weights",
        )
        for kind in {kind.what: kind for kind in DERIVED}.values()
    )
    return (*derived, *quantised, *others)
