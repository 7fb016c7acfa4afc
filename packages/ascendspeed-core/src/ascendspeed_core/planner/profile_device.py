"""Measure this device for the planner: products, operators over memory, attention, collectives.

Every number is the least of several runs in several rounds, which other work on the machine disturbs least; on a CPU,
of processor time. Where several processes measure together it is the least of the rounds' middle runs: what the others
do at the time belongs to it. A product finds its operands in memory, as weights are in a step, an operator what the one
before it just wrote. Under torchrun all ranks measure at the same time, as they train, and rank 0 writes what the
slowest took.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ascendspeed_core.config.planning import ProfileDeviceConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.registry import KernelContext, choose
from ascendspeed_core.parallel.collectives import (
    all_gather_rows,
    all_reduce_sum,
    exchange_rows,
    reduce_scatter_sum,
)
from ascendspeed_core.planner.hardware import HardwareProfile
from ascendspeed_core.planner.profile_operators import HIDDEN, operator_makers

PRODUCTS = (
    (64, 64),
    (256, 256),
    (1024, 256),
    (256, 1024),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
    (4096, 4096),
)
"""Outputs and inputs of linear layers."""

ROWS = (64, 256, 1024, 4096)
ELEMENTS = (1 << 13, 1 << 16, 1 << 19, 1 << 22)
MESSAGES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
"""Bytes of collectives."""

LEAST_RUNS, MOST_RUNS = 1, 30
PROCESSOR_CACHE, ACCELERATOR_CACHE = 1 << 26, 1 << 28
"""Bytes that are written before a product, so that caches hold none of its operands: twice the 32 MB that cores of an
EPYC share; 256 MiB on an accelerator, as `triton.testing.do_bench` does."""

ROUNDS = 3
"""Through everything, so that a slow minute of a machine that others share spoils no number."""

SMALL = 1 << 24
"""Multiplications of a product, elements of an operator x 256, bytes of a message x 16: as far as `quick` goes."""

LINKS_ASSUMED = "not measured: start it under torchrun with several processes"


Rows = list[dict[str, Any]]


class Measured(NamedTuple):
    """The least seconds of a forward and of its backward."""

    forward: float
    backward: float


class Stopwatch:
    """Times work on a device.

    Args:
        device: of this process.
        is_shared: other ranks measure at the same time.
        seconds: that one measurement may take.
    """

    def __init__(self, device: Device, is_shared: bool, seconds: float) -> None:
        self.device, self._is_shared, self._seconds = device, is_shared, seconds
        size = PROCESSOR_CACHE if device.memory_bytes() is None else ACCELERATOR_CACHE
        self._evicting = torch.zeros(size // 4, device=device.torch)

    def least(self, work: Callable[[], Any]) -> float:
        """Return the least seconds of several runs, on the slowest rank."""
        return self.forward_and_backward(lambda: (work(), None)[1], lambda _: None).forward

    def forward_and_backward(
        self, forward: Callable[[], Any], backward: Callable[[Any], Any], is_cold: bool = False
    ) -> Measured:
        """Return the seconds of a forward, and of a backward of what it gave.

        `is_cold` puts the operands into memory first, out of the caches.
        """
        backward(forward())
        ahead: list[float] = []
        back: list[float] = []
        ends = time.perf_counter() + self._seconds
        while len(ahead) < LEAST_RUNS or (time.perf_counter() < ends and len(ahead) < MOST_RUNS):
            took, result = self._timed(forward, is_cold)
            ahead.append(took)
            back.append(self._timed(lambda result=result: backward(result), is_cold)[0])  # type: ignore[misc]
        of_runs = median if self._is_shared else min
        found = torch.tensor([of_runs(ahead), of_runs(back)], dtype=torch.float64)
        if self._is_shared:
            rows: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(rows, found.tolist())
            found = torch.tensor(rows, dtype=torch.float64).amax(0)
        return Measured(*(max(float(value), 1e-9) for value in found))

    def _timed(self, work: Callable[[], Any], is_cold: bool) -> tuple[float, Any]:
        """Return the seconds of one run, and what it gave."""
        if is_cold:
            self._evicting.add_(1)
        self.device.synchronize()
        started = self.device.computing_seconds()
        result = work()
        self.device.synchronize()
        return self.device.computing_seconds() - started, result

    def collective(self, work: Callable[[], Any]) -> float:
        """Return the seconds of a collective that all ranks start together."""
        times = []
        ends = time.perf_counter() + self._seconds
        for run in range(MOST_RUNS):
            go_on = torch.tensor([float(run <= LEAST_RUNS or time.perf_counter() < ends)])
            dist.broadcast(go_on.to(self.device.torch), 0)
            if not go_on.item():
                break
            dist.barrier()
            started = time.perf_counter()
            work()
            self.device.synchronize()
            times.append(time.perf_counter() - started)
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, median(times[1:]))
        return float(max(rows))


def profile_device(config: ProfileDeviceConfig, device: Device, world_size: int) -> dict[str, Any]:
    """Measure, and return the content of a profile.

    Args:
        config: names, formats, duration.
        device: of this process.
        world_size: processes that measure together.
    """
    kinds = len(config.dtypes) * (len(PRODUCTS) * len(ROWS) + 8 * len(ELEMENTS)) + 5 * len(MESSAGES)
    rounds = 1 if config.quick else ROUNDS
    watch = Stopwatch(device, world_size > 1, config.budget_seconds / kinds / rounds)
    fused = False
    products: list[Rows] = []
    operators: list[Rows] = []
    collectives: list[Rows] = []
    for _ in range(rounds):
        products.append([])
        operators.append([])
        for name in config.dtypes:
            dtype = getattr(torch, name)
            products[-1] += _products(watch, name, dtype, config.quick)
            rows, is_fused = _operators(watch, name, dtype, config.quick)
            operators[-1] += rows
            fused = fused or is_fused
        collectives.append(_collectives(watch, world_size, config.quick) if world_size > 1 else [])
    return _content(
        config, device, world_size, _least(products), _least(operators), _least(collectives), fused, watch
    )


def _least(rounds: Sequence[Rows]) -> Rows:
    """Return rows with the least seconds of all rounds."""
    return [
        {
            key: min(row[key] for row in same) if key.endswith("seconds") else value
            for key, value in same[0].items()
        }
        for same in zip(*rounds, strict=True)
    ]


def _products(watch: Stopwatch, name: str, dtype: torch.dtype, is_quick: bool) -> list[dict[str, Any]]:
    where, found = watch.device.torch, []
    for n, k in PRODUCTS:
        weight = torch.randn(n, k, device=where).to(dtype).requires_grad_()
        for m in ROWS:
            if is_quick and m * n * k > SMALL:
                continue
            x = torch.randn(m, k, device=where).to(dtype).requires_grad_()
            gradient = torch.randn(m, n, device=where).to(dtype)

            def backward(
                out: torch.Tensor, x: Any = x, weight: Any = weight, gradient: Any = gradient
            ) -> None:
                torch.autograd.grad(out, (x, weight), gradient)

            forward = partial(F.linear, x, weight)
            measured = watch.forward_and_backward(forward, backward, is_cold=True)
            found.append(
                {"format": name, "m": m, "n": n, "k": k, "forward_seconds": measured.forward,
                 "backward_seconds": measured.backward}
            )  # fmt: skip
    return found


def _operators(
    watch: Stopwatch, name: str, dtype: torch.dtype, is_quick: bool
) -> tuple[list[dict[str, Any]], bool]:
    """Measure operators as `auto` chooses them for this device, and tell whether the MLP's is fused."""
    device = watch.device
    context = KernelContext(device=device, dtype=dtype, seq_length=1024, micro_batch_tokens=1024)
    kernels: dict[str, Any] = {}
    is_fused = False
    for operator in ("rms_norm", "rotary", "swiglu", "cross_entropy", "attention"):
        implementation, choice = choose(operator, "auto", context)
        kernels[operator] = implementation.run
        is_fused = is_fused or (operator == "swiglu" and choice.implementation != "reference")
    found = []
    for operator, make in operator_makers(kernels).items():
        for elements in ELEMENTS:
            if is_quick and elements * HIDDEN > SMALL:
                continue
            forward, backward, counted = make(elements, dtype, device)
            measured = watch.forward_and_backward(forward, backward)
            found.append(
                {"name": operator, "format": name, "elements": counted, "forward_seconds": measured.forward,
                 "backward_seconds": measured.backward}
            )  # fmt: skip
    return found, is_fused


def _collectives(watch: Stopwatch, world_size: int, is_quick: bool) -> list[dict[str, Any]]:
    group = dist.group.WORLD
    assert group is not None
    rank, found = dist.get_rank(), []
    for size in MESSAGES:
        if is_quick and size > SMALL >> 4:
            continue
        count = size // 4 // world_size * world_size
        flat = torch.zeros(count, device=watch.device.torch)
        rows = flat.view(world_size, -1)
        ways: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda flat=flat: all_reduce_sum(flat, group),  # type: ignore[misc]
            "reduce_scatter": lambda rows=rows: reduce_scatter_sum(rows, group),  # type: ignore[misc]
            "all_gather": lambda rows=rows: all_gather_rows(rows[0], group),  # type: ignore[misc]
            "all_to_all": lambda rows=rows: exchange_rows(rows, group),  # type: ignore[misc]
        }

        def send(flat: torch.Tensor = flat) -> None:
            if rank == 0:
                dist.send(flat, 1)
                dist.recv(flat, 1)
            elif rank == 1:
                dist.recv(flat, 0)
                dist.send(flat, 0)

        for name, way in ways.items():
            seconds = watch.collective(way)
            found.append({"name": name, "ranks": world_size, "bytes": flat.nbytes, "seconds": seconds})
        # There and back.
        found.append(
            {"name": "send", "ranks": 2, "bytes": flat.nbytes, "seconds": watch.collective(send) / 2}
        )
    return found


def _memory_rate(watch: Stopwatch) -> float:
    """Return bytes per second that a large copy reads and writes."""
    x = torch.zeros(1 << 24, device=watch.device.torch)
    y = torch.empty_like(x)
    return 2 * x.nbytes / watch.least(lambda: y.copy_(x))


def _content(
    config: ProfileDeviceConfig,
    device: Device,
    world_size: int,
    products: list[dict[str, Any]],
    operators: list[dict[str, Any]],
    collectives: list[dict[str, Any]],
    is_fused: bool,
    watch: Stopwatch,
) -> dict[str, Any]:
    def fact(value: float, kind: str = "measured", source: str = "asd-core profile-device") -> dict[str, Any]:
        return {"value": value, "kind": kind, "source": source}

    assumed = "assumed"
    peaks: dict[str, float] = {}
    for row in products:
        rate = 2e-12 * row["m"] * row["n"] * row["k"] / row["forward_seconds"]
        peaks[row["format"]] = max(peaks.get(row["format"], 0.0), rate)
    whole = device.memory_bytes()
    memory = (
        (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world_size) if whole is None else whole
    )
    gathers = [row for row in collectives if row["name"] == "all_gather"]
    link = max((row["bytes"] / row["seconds"] / 1e9 for row in gathers), default=1.0)
    step = min((row["seconds"] * 1e6 for row in gathers), default=100.0)
    measured = ("measured", "asd-core profile-device") if gathers else (assumed, LINKS_ASSUMED)
    kernels = "fused operators" if is_fused else "plain torch"
    content = {
        "format_version": 1,
        "name": config.name,
        "title": device.name,
        "note": f"measured with {world_size} processes at once, {torch.get_num_threads()} threads each, torch "
        f"{torch.__version__}, norms and MLP by {kernels}",
        "peak_tflops": {name: fact(rate, source="the fastest product") for name, rate in peaks.items()},
        "memory": {
            "gib": fact(memory / (1 << 30), source="what the system reports, shared out"),
            "gb_per_second": fact(_memory_rate(watch) / 1e9),
        },
        "links": {
            "node_gb_per_second": fact(link, *measured),
            "node_microseconds": fact(step, *measured),
            "network_gb_per_second": fact(link, assumed, "as inside a node"),
            "network_microseconds": fact(step, assumed, "as inside a node"),
        },
        "machine": {
            "devices_per_node": fact(world_size, source="processes that measured together"),
            "watts": fact(config.watts, assumed, "--watts"),
        },
        "shares": {
            "products": fact(1.0, source="products are measured by size"),
            "attention": fact(1.0, source="attention is measured by size"),
            "memory": fact(1.0, source="operators are measured by size"),
            "links": fact(1.0, source="collectives are measured by size"),
            "overlap": fact(0.8, assumed, "messages beside computing") if whole is not None
            else fact(0.01, assumed, "the processor that computes sends the messages too"),
            "kernel_microseconds": fact(5.0, assumed, "within what is measured"),
        },
        "products": products,
        "operators": operators,
        "collectives": collectives,
    }  # fmt: skip
    HardwareProfile.model_validate(content)
    return content


def profile_text(content: dict[str, Any]) -> str:
    """Return a profile as TOML."""
    lines = [
        f"{key} = {_toml(value)}" for key, value in content.items() if not isinstance(value, dict | list)
    ]
    for name, value in content.items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(inner)}" for key, inner in value.items())]
        elif isinstance(value, list) and value:
            lines += ["", f"{name} = [", *(f"  {_toml(row)}," for row in value), "]"]
    # Lists belong to the file, and stand before its tables.
    tables = [index for index, line in enumerate(lines) if line.startswith("[")]
    lists = next((index for index, line in enumerate(lines) if line.endswith(" = [")), len(lines))
    return "\n".join([*lines[: tables[0]], *lines[lists:], "", *lines[tables[0] : lists]]) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, float):
        return f"{value:.6g}" if "." in f"{value:.6g}" or "e" in f"{value:.6g}" else f"{value:.1f}"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
