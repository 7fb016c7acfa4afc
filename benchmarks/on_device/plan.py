"""Which items there are, in their order, with how long each is expected to take. No torch, so that asking is quick."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Literal

from ascendspeed_core.config.compute import KERNELS

Group = Literal["correct", "limits", "train", "decode", "load"]

TITLES: Mapping[Group, str] = {
    "correct": "Correct on the device",
    "limits": "What the device can do",
    "train": "A training step",
    "decode": "Decoding",
    "load": "Loading",
}


@dataclass(frozen=True)
class Shape:
    """A LLaMA by the numbers that decide its speed.

    Attributes:
        layers: of the whole model; a training step takes as many of them as fit.
        batch: samples of a training step.
        length: tokens of each.
    """

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    ffn: int
    vocab: int
    batch: int
    length: int


SHAPES: Mapping[str, Shape] = {
    "1B": Shape(2048, 16, 32, 8, 8192, 32_000, 4, 4096),
    "3B": Shape(3072, 28, 24, 8, 8192, 32_000, 2, 4096),
    "7B": Shape(4096, 32, 32, 32, 11_008, 32_000, 2, 4096),
}
"""LLaMA 3.2 1B and 3B and LLaMA 7B, with the vocabulary of the last."""

SMALL = Shape(64, 2, 4, 2, 128, 256, 2, 32)
"""Stands in for each of them on a CPU."""


@dataclass(frozen=True)
class Item:
    """One thing to run.

    Attributes:
        group: heading in the table.
        name: what the table calls it.
        module: of the function, `on_device.kernels` for example.
        function: takes a `Setting` and the arguments, and returns figures by name.
        arguments: of the function.
        seconds: expected on a device; an item that no longer fits into the minutes is left out.
    """

    group: Group
    name: str
    module: str
    function: str
    arguments: tuple[Any, ...] = ()
    seconds: float = 5.0

    def run(self, setting: Any) -> dict[str, Any]:
        """Run it here."""
        found: dict[str, Any] = getattr(import_module(self.module), self.function)(setting, *self.arguments)
        return found


@dataclass
class Outcome:
    """What became of an item.

    Attributes:
        status: `passed`, `failed`, or `left out` with the reason in `error`.
        seconds: that it took.
        figures: what it measured.
        error: one line.
        trace: last lines of the traceback.
    """

    status: Literal["passed", "failed", "left out"]
    seconds: float
    figures: dict[str, Any]
    error: str = ""
    trace: tuple[str, ...] = ()

    def record(self, item: Item) -> dict[str, Any]:
        """Return what the JSON says of it."""
        kept = {key: value for key, value in asdict(self).items() if value or key == "seconds"}
        return {"group": item.group, "name": item.name, **kept}


TRAINING_CASES = (
    "llama float32",
    "llama bfloat16",
    "window and grouped heads float32",
    "ALiBi and layer norm float32",
    "biases and tied head float32",
    "normalised head float32",
    "packed samples float32",
    "packed samples bfloat16",
    "recompute full bfloat16",
    "recompute selective bfloat16",
    "LoRA float32",
    "joined projections bfloat16",
    "sharded optimizer bfloat16",
    "dropout float32",
    "float16 with a loss scale",
    "bfloat16 with float32 sums of four micro-batches",
    "sgd float32",
    "experts float32",
)
DECODING_CASES = (
    "llama float32",
    "llama bfloat16",
    "window float32",
    "ALiBi float32",
    "long prompts in chunks bfloat16",
    "shared prefixes bfloat16",
    "batch-invariant float32",
    "int8 bfloat16",
    "beams float32",
    "drawn tokens float32",
)


def items() -> list[Item]:
    """Return all items: what is right comes before what is fast, the cheap and telling ones first."""
    kernels = [
        Item(
            "correct",
            f"kernel {operator}: {name}",
            "on_device.kernels",
            "check_operator",
            (operator, name),
            3,
        )
        for operator, known in KERNELS.items()
        for name in known
    ]
    others = [
        Item("correct", f"kernel {name}", "on_device.kernels", f"check_{name}", (), 3)
        for name in ("int8_linear", "adamw", "attention_by_lengths", "loss_from_hidden")
    ] + [
        Item(
            "correct",
            f"kernel changed_scores: {name}",
            "on_device.kernels",
            "check_changed_scores",
            (name,),
            8,
        )
        for name in ("triangle", "flex")
    ]
    trained = [
        Item("correct", f"ten steps: {case}", "on_device.training_checks", "check", (case,), 5)
        for case in TRAINING_CASES
    ]
    decoded = [
        Item("correct", f"continued texts: {case}", "on_device.decoding_checks", "check", (case,), 5)
        for case in DECODING_CASES
    ]
    limits = [
        Item("limits", name, "on_device.limits", name.replace(" ", "_"), (), 4)
        for name in ("bandwidth", "product", "grouped product")
    ]
    limits.append(Item("limits", "loss at 151,936", "on_device.limits", "loss", (), 6))
    train = [
        Item("train", f"{name}: {way}", "on_device.training_speed", "measure", (name, way), seconds)
        for name, times in (("7B", (30, 35)), ("1B", (12, 25)), ("3B", (15, 25)))
        for way, seconds in zip(("ours", "transformers"), times, strict=True)
    ]
    decode = [
        Item("decode", f"{name}, {batch} texts", "on_device.decoding_speed", "measure", (name, batch), 8)
        for name, batch in (("7B", 1), ("7B", 64), ("1B", 1), ("1B", 64))
    ]
    load = [Item("load", "1B from files", "on_device.loading", "measure", ("1B",), 15)]
    return [
        *kernels,
        *others,
        *trained,
        *decoded,
        *limits,
        *decode[:2],
        *train[:2],
        *decode[2:],
        *train[2:4],
        *load,
        *train[4:],
    ]
