"""`asd-core doctor`."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_data.errors import AscendSpeedError

if TYPE_CHECKING:
    from ascendspeed_core.commands.environment import Fact
    from ascendspeed_core.device import Hardware

GIB = 1 << 30


@dataclass(frozen=True)
class Report:
    """What doctor found.

    Attributes:
        versions: of packages and toolkits.
        devices: accelerators.
        cores: of the CPU.
        memory_bytes: of the machine.
        kernels: by operator the implementation that bf16 training would use, and why.
        problems: what keeps a run from starting, each with its remedy.
    """

    versions: list["Fact"]
    devices: list["Hardware"]
    cores: int
    memory_bytes: int
    kernels: list[dict[str, str]]
    problems: list[str]


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this environment: versions and whether they fit, devices, kernels, and what is missing.

    The status is 1 if something that is needed is missing or does not fit; what only one feature needs is listed with
    the command that installs it.
    """
    report = examine()
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        print("\n".join(describe(report)))
    if report.problems:
        raise AscendSpeedError(f"{len(report.problems)} problems: " + "; ".join(report.problems))


def examine() -> Report:
    """Look at this environment."""
    from ascendspeed_core.commands.environment import (
        installed_version,
        python_fact,
        requirement_facts,
        server_facts,
        toolkit_facts,
    )
    from ascendspeed_core.device import hardware_here, prepare_torch, toolkit_version

    problems = []
    try:
        prepare_torch("auto")
        has_torch = True
    except AscendSpeedError as error:
        problems.append(str(error))
        has_torch = False
    hardware = hardware_here(has_torch)
    needed = any(one.library != "torch" for one in hardware)
    versions = [
        python_fact(),
        *requirement_facts(),
        *toolkit_facts(installed_version, toolkit_version(), needed),
        *server_facts(installed_version),
    ]
    problems += [
        f"{fact.name} {fact.installed or 'is missing'}, wanted {fact.wanted}: {fact.remedy}"
        for fact in versions
        if fact.status in ("wrong", "missing")
    ]
    problems += [
        f"the driver shows {one.files} devices of kind {one.kind}, torch sees {one.seen}: install a build of "
        f"{one.library} for them"
        for one in hardware
        if one.seen < one.files and has_torch
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernels = kernels_here() if has_torch else []
    return Report(versions, hardware, os.cpu_count() or 1, memory, kernels, problems)


def kernels_here() -> list[dict[str, str]]:
    """Return what bf16 training of a plain model would use on the first device that `--device auto` takes, and on a CPU
    what decoding would."""
    import torch

    from ascendspeed_core.device import HOST, choose_device
    from ascendspeed_core.kernels import panels, single_tokens
    from ascendspeed_core.kernels.onednn import has_packed_product
    from ascendspeed_core.kernels.registry import OPERATORS, Choice, KernelContext, choose, update_choice

    device = choose_device("auto", quiet=True)
    context = KernelContext(device=device, dtype=torch.bfloat16, seq_length=4096)
    rows = [choose(operator, "auto", context)[1] for operator in OPERATORS]
    rows.append(update_choice("adam", context))
    if device == HOST:
        reason = single_tokens.why_not()
        name = "text by text" if reason else "native"
        rows.append(
            Choice("decoding", name, reason or "attention of new tokens in C++, compiled for this processor")
        )
        reason = panels.why_not(context.dtype, 2)
        without = "oneDNN" if has_packed_product(context.dtype, device.torch) else "torch"
        name = without if reason else "panels"
        rows.append(
            Choice("inference weights", name, reason or "products in C++, compiled for this processor")
        )
    return [
        {"operator": row.operator, "implementation": row.implementation, "reason": row.reason} for row in rows
    ]


def describe(report: Report) -> Iterator[str]:
    """Yield a report as lines for people."""
    yield "versions"
    names = max(len(fact.name) for fact in report.versions)
    for fact in report.versions:
        line = f"  {fact.status:8}  {fact.name:{names}}  {fact.installed or '-'}  wants {fact.wanted}"
        yield line + (f"  -> {fact.remedy}" if fact.remedy else "")
    yield f"machine: {report.cores} cores, {report.memory_bytes / GIB:.1f} GiB of memory"
    if not report.devices:
        yield "devices: no accelerator; runs are computed on the CPU"
    for one in report.devices:
        yield from _describe_devices(one)
    yield "kernels of bf16 training (--device auto)"
    for row in report.kernels:
        yield f"  {row['operator']}: {row['implementation']} ({row['reason']})"
    yield from (f"problem: {problem}" for problem in report.problems)


def _describe_devices(one: Any) -> Iterator[str]:
    yield f"devices: {one.seen} of kind {one.kind} seen by torch, {one.files} by the driver"
    for number, (name, memory) in enumerate(zip(one.names, one.memory_bytes, strict=True)):
        yield f"  {number}: {name}, {memory / GIB:.1f} GiB"
    if one.joined is None:
        yield "  how they are joined is not known: the driver's program is not there"
    else:
        yield from (f"  {line}" for line in one.joined.splitlines())
