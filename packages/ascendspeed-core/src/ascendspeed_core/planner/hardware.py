"""What a device can do: its data sheet with a source for each value, or what `asd-core profile-device` measured.

Seconds of a matrix product, of an operator over memory, and of a collective follow from it. No torch.
"""

from collections.abc import Mapping
from functools import cached_property
from math import exp, log, sqrt
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.load import validate
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.small_files import read_toml

FOLDER = Path(__file__).parent / "devices"
"""Profiles that come with the package."""

ALIASES = {
    "ascend-910b": "ascend-910b3", "910a": "ascend-910a", "910b": "ascend-910b3", "910c": "ascend-910c",
    "a100": "a100-80gb", "h100": "h100-sxm",
}  # fmt: skip
"""Shorter names of profiles."""

Width = Literal["float64", "float32", "bfloat16", "float16"]
"""A number format."""

FORMAT_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number by format."""

Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"]


class Fact(Config):
    """A value and where it comes from."""

    value: float = Field(gt=0)
    kind: Literal["published", "derived", "assumed", "measured"]
    source: str


class Memory(Config):
    """Memory of one device."""

    gib: Fact
    gb_per_second: Fact


class Links(Config):
    """What one device sends in one direction, inside a node and to other nodes."""

    node_gb_per_second: Fact
    node_microseconds: Fact
    network_gb_per_second: Fact
    network_microseconds: Fact


class Machine(Config):
    """What devices stand in."""

    devices_per_node: Fact
    watts: Fact


class Shares(Config):
    """What a training step reaches of what the data sheet says, and the fixed part of every kernel."""

    products: Fact
    attention: Fact
    memory: Fact
    links: Fact
    overlap: Fact
    kernel_microseconds: Fact


class MeasuredProduct(Config):
    """A linear layer, [m, k] with weights [n, k], forwards and backwards."""

    format: Width
    m: int = Field(ge=1)
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    forward_seconds: float = Field(gt=0)
    backward_seconds: float = Field(gt=0)


class MeasuredOperator(Config):
    """An operator over a number of elements, forwards and backwards."""

    name: str
    format: Width
    elements: int = Field(ge=1)
    forward_seconds: float = Field(gt=0)
    backward_seconds: float = Field(gt=0)


class MeasuredCollective(Config):
    """A collective of some ranks, each with that many bytes."""

    name: Collective
    ranks: int = Field(ge=2)
    bytes: int = Field(ge=1)
    seconds: float = Field(gt=0)


class HardwareProfile(Config):
    """A device, its memory, its links and its machine."""

    format_version: Literal[1] = 1
    name: str
    title: str
    note: str = ""
    peak_tflops: dict[Width, Fact]
    memory: Memory
    links: Links
    machine: Machine
    shares: Shares
    products: tuple[MeasuredProduct, ...] = ()
    operators: tuple[MeasuredOperator, ...] = ()
    collectives: tuple[MeasuredCollective, ...] = ()

    @model_validator(mode="after")
    def _shares_are_shares(self) -> "HardwareProfile":
        for name in ("products", "attention", "memory", "links", "overlap"):
            if getattr(self.shares, name).value > 1:
                raise ValueError(
                    f"shares.{name}={getattr(self.shares, name).value} is more than all; write 1 or less"
                )
        return self

    @property
    def devices_per_node(self) -> int:
        """Devices of one machine."""
        return int(self.machine.devices_per_node.value)

    @property
    def memory_bytes(self) -> int:
        """Memory of one device."""
        return int(self.memory.gib.value * (1 << 30))

    def peak_flops(self, dtype: str) -> float:
        """Return the operations per second of dense products in a format.

        Raises:
            ConfigError: the device has no products in it.
        """
        fact = self.peak_tflops.get(dtype)  # type: ignore[call-overload]
        if fact is None:
            raise ConfigError(
                f"dtype={dtype}: the profile {self.name} has no products in it; choose "
                f"{', '.join(self.peak_tflops)}"
            )
        return float(fact.value) * 1e12

    @cached_property
    def _rates(self) -> dict[str, list[tuple[tuple[float, ...], float, float]]]:
        """Logarithms of measured operations per second, by format: at (log m, log n, log k) forwards and backwards."""
        found: dict[str, list[tuple[tuple[float, ...], float, float]]] = {}
        for row in self.products:
            flops = 2.0 * row.m * row.n * row.k
            at = (log(row.m), log(row.n), log(row.k))
            rates = log(flops / row.forward_seconds), log(2 * flops / row.backward_seconds)
            found.setdefault(row.format, []).append((at, *rates))
        return found

    @cached_property
    def _lines(self) -> dict[tuple[str, ...], list[tuple[int, float, float]]]:
        """Measured operators, and collectives by ranks: at ascending sizes forwards and backwards."""
        found: dict[tuple[str, ...], list[tuple[int, float, float]]] = {}
        for row in self.operators:
            of_operator = (row.name, str(row.format))
            found.setdefault(of_operator, []).append(
                (row.elements, row.forward_seconds, row.backward_seconds)
            )
        for one in self.collectives:
            of_collective = (str(one.name), str(one.ranks))
            found.setdefault(of_collective, []).append((one.bytes, one.seconds, one.seconds))
        return {key: sorted(rows) for key, rows in found.items()}

    def product_seconds(self, m: float, n: float, k: float, dtype: str) -> tuple[float, float]:
        """Return seconds of a linear layer, [m, k] with weights [n, k]: forwards, and backwards by both factors.

        Measured ones are interpolated: the logarithm of the rate, weighted by the inverse square of the distance in
        (log m, log n, log k). Of a data sheet a product takes the longer of arithmetic and memory
        (Williams et al., 2009, Roofline), and the fixed part of a kernel.
        """
        if not min(m, n, k):
            return 0.0, 0.0
        rows = self._rates.get(dtype)
        flops = 2.0 * m * n * k
        if rows:
            forward, backward = _interpolated((log(m), log(n), log(k)), rows)
            return flops / exp(forward), 2 * flops / exp(backward)
        rate = self.peak_flops(dtype) * self.shares.products.value
        moved = FORMAT_BYTES[dtype] * (m * k + n * k + m * n)
        fixed = self.shares.kernel_microseconds.value * 1e-6
        once = max(flops / rate, self.memory_seconds(moved))
        return once + fixed, 2 * (once + fixed)

    def attention_seconds(
        self, rows: float, heads: float, queries: float, keys: float, width: float, dtype: str
    ) -> tuple[float, float]:
        """Return seconds of attention without a mask in memory, forwards and backwards.

        Two products forwards, five backwards (Dao, 2023, FlashAttention-2, section 3.1); `keys` is what a query sees
        on average.
        """
        flops = 4.0 * rows * heads * queries * keys * width
        line = self._lines.get(("attention", dtype))
        if line:
            # Elements of a measured attention are its products, rows x heads x queries x keys x width.
            return _on_line(flops / 4, line)
        rate = self.peak_flops(dtype) * self.shares.attention.value
        fixed = self.shares.kernel_microseconds.value * 1e-6
        return flops / rate + fixed, 2.5 * flops / rate + fixed

    def memory_seconds(self, moved: float) -> float:
        """Return how long a device takes to read and write some bytes in all."""
        return moved / (self.memory.gb_per_second.value * 1e9 * self.shares.memory.value)

    def operator_seconds(self, name: str, elements: float, dtype: str) -> tuple[float, float]:
        """Return seconds of an operator over memory, forwards and backwards: measured, or by the bytes that it moves.

        Raises:
            KeyError: no such operator.
        """
        if elements <= 0:
            return 0.0, 0.0
        line = self._lines.get((name, dtype))
        if line:
            return _on_line(elements, line)
        fixed = self.shares.kernel_microseconds.value * 1e-6
        forward, backward = (
            self.memory_seconds(elements * (narrow * FORMAT_BYTES[dtype] + wide * 4)) + fixed * (narrow + wide > 0)
            for narrow, wide in OPERATOR_BYTES[name]
        )  # fmt: skip
        return forward, backward

    def collective_seconds(
        self, name: Collective, ranks: int, size: float, spans_nodes: bool, lanes: float = 1.0
    ) -> float:
        """Return seconds of a collective.

        Rings: n - 1 steps of size / n for a reduce-scatter or all-gather of `size` bytes, twice that for an
        all-reduce (Thakur et al., 2005, section 4); an all-to-all sends (n - 1) / n of `size`.

        Args:
            name: which.
            ranks: of the group, n.
            size: bytes of the whole on one rank: reduced, gathered, exchanged, or sent.
            spans_nodes: some of its messages leave the node.
            lanes: network adapters of a node that take part.
        """
        if ranks == 1 or size <= 0:
            return 0.0
        measured = self._measured_collective(name, ranks, size)
        if measured is not None:
            return measured
        links = self.links
        rate = (links.network_gb_per_second if spans_nodes else links.node_gb_per_second).value * 1e9
        rate = min(rate * lanes, links.node_gb_per_second.value * 1e9) * self.shares.links.value
        latency = (links.network_microseconds if spans_nodes else links.node_microseconds).value * 1e-6
        if name == "send":
            return latency + size / rate
        passes = 2 if name == "all_reduce" else 1
        # Small messages go by trees, whose depth is the logarithm (NCCL 2.4).
        steps = min(ranks - 1, 2 * sqrt(ranks)) if name != "all_to_all" else ranks - 1
        return passes * (steps * latency + size * (ranks - 1) / ranks / rate)

    def _measured_collective(self, name: Collective, ranks: int, size: float) -> float | None:
        sizes = [
            (int(key[1]), line) for key, line in self._lines.items() if key[0] == name and key[1].isdigit()
        ]
        if not sizes:
            return None
        nearest, line = min(sizes, key=lambda one: abs(log(one[0] / ranks)))
        # Of other groups than those measured the steps of a ring are scaled.
        return _on_line(size, line)[0] * (ranks - 1) / (nearest - 1)


OPERATOR_BYTES: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "norm": ((2, 0), (3, 0)),
    "rotary": ((2, 0), (2, 0)),
    "gated": ((3, 0), (5, 0)),
    "activation": ((2, 0), (3, 0)),
    "add": ((3, 0), (1, 0)),
    "embedding": ((2, 0), (1, 2)),
    "cross_entropy": ((2, 2), (2, 2)),
    "permute": ((4, 0), (4, 0)),
    "accumulate": ((0, 0), (1, 2)),
    "adamw": ((1, 10), (0, 0)),
    "recompute": ((0, 0), (0, 0)),
}
"""Numbers that a fused operator reads and writes for each element: in the model's format and in fp32, forwards and
backwards. AdamW reads weight, gradient and two moments and writes three of them (28 bytes) and the model's copy; the
norm of the gradient reads it once, clipping reads and writes it (12 bytes)."""


def _interpolated(
    at: tuple[float, ...], rows: list[tuple[tuple[float, ...], float, float]]
) -> tuple[float, float]:
    total = forward = backward = 0.0
    for known, first, second in rows:
        distance = sum((a - b) ** 2 for a, b in zip(at, known, strict=True))
        weight = 1 / (distance * distance + 1e-6)
        total, forward, backward = total + weight, forward + weight * first, backward + weight * second
    return forward / total, backward / total


def _on_line(size: float, line: list[tuple[int, float, float]]) -> tuple[float, float]:
    """Interpolate linearly between measured sizes; below the first the fixed part stays, above the last the rate."""
    if len(line) == 1:
        known, *seconds = line[0]
        return seconds[0] * size / known, seconds[1] * size / known
    upper = next((number for number, row in enumerate(line) if row[0] >= size), len(line) - 1)
    upper = max(upper, 1)
    (small, *low), (large, *high) = line[upper - 1], line[upper]
    share = (size - small) / (large - small)
    found = [a + (b - a) * share for a, b in zip(low, high, strict=True)]
    floor = [seconds * min(size / line[0][0], 1.0) for seconds in line[0][1:]]
    return max(found[0], floor[0]), max(found[1], floor[1])


def known_profiles() -> list[str]:
    """Return the names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_profile(name: str) -> HardwareProfile:
    """Return a profile by its name or its file.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = FOLDER / f"{ALIASES.get(name, name)}.toml"
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
    elif not path.is_file():
        known = [*known_profiles(), *ALIASES]
        raise ConfigError(
            f"device={name} is no profile{did_you_mean(name, known)}; give one of {', '.join(known_profiles())}, or "
            "a file of `asd-core profile-device`"
        )
    return validate(HardwareProfile, read_toml(path, f"device profile {path}", ConfigError, "--device"))
