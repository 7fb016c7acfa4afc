"""What the packages promise each other and their users."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support.commands import MODULES, environment
from support.tables import ReportTables

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "packages"
NAMES = ("core", "data", "ckpt", "infer", "eval")


def sources(name: str) -> list[Path]:
    return sorted((PACKAGES / f"ascendspeed-{name}" / "src").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Packages that a file imports anywhere, also inside functions; those for types alone are left out."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


ALLOWED = {
    "data": {"data"},
    "eval": {"eval"},
    "core": {"data", "core"},
    "ckpt": {"data", "core", "ckpt"},
    "infer": {"data", "core", "infer"},
}


@pytest.mark.parametrize("name", NAMES)
def test_packages_import_only_what_they_require(name: str) -> None:
    project = tomllib.loads((PACKAGES / f"ascendspeed-{name}" / "pyproject.toml").read_text())["project"]
    required = {re.split(r"[<>=\[ ]", item)[0].replace("-", "_") for item in project["dependencies"]}
    required = {{"megatron_core": "megatron", "pyyaml": "yaml"}.get(item, item) for item in required}
    used = {package for path in sources(name) for package in imported(path)}
    ours = {package.removeprefix("ascendspeed_") for package in used if package.startswith("ascendspeed_")}
    assert ours <= ALLOWED[name]
    foreign = {p for p in used if p not in sys.stdlib_module_names and not p.startswith("ascendspeed_")}
    # Extras are imported where they are used.
    extras = [item for items in project.get("optional-dependencies", {}).values() for item in items]
    required |= {re.split(r"[<>=\[ ]", item)[0].replace("-", "_") for item in extras}
    # What another of our packages requires comes with it.
    for other in ALLOWED[name] - {name}:
        more = tomllib.loads((PACKAGES / f"ascendspeed-{other}" / "pyproject.toml").read_text())["project"]
        required |= {re.split(r"[<>=\[ ]", item)[0].replace("-", "_") for item in more["dependencies"]}
    # Extras are imported inside functions, which say which extra is missing.
    for items in project.get("optional-dependencies", {}).values():
        required |= {re.split(r"[<>=\[ ]", item)[0].replace("-", "_") for item in items}
    assert foreign <= required, foreign - required
    own = {re.split(r"[<>=\[ ]", item)[0].replace("-", "_") for item in project["dependencies"]}
    unused = {item for item in own if item not in used and item not in ("megatron_core", "pyyaml")}
    assert not unused, unused


@pytest.mark.parametrize("name", NAMES)
def test_every_package_is_complete(name: str) -> None:
    folder = PACKAGES / f"ascendspeed-{name}"
    for file in ("pyproject.toml", "README.md", "CHANGELOG.md", f"src/ascendspeed_{name}/py.typed"):
        assert (folder / file).is_file(), file
    version = re.search(r'__version__ = "(.+)"', (folder / f"src/ascendspeed_{name}/__init__.py").read_text())
    assert version
    assert f"## [{version[1]}] - " in (folder / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["data", "eval"])
def test_data_and_eval_know_no_torch(name: str) -> None:
    heavy = {"torch", "megatron", "transformers", "deepspeed", "peft", "torch_npu"}
    for path in sources(name):
        assert not imported(path) & heavy, path


HEAVY = ("torch", "numpy", "pydantic", "transformers", "megatron", "pyarrow", "sentencepiece", "matplotlib")


@pytest.mark.parametrize("name", NAMES)
def test_help_is_quick(name: str, report: ReportTables) -> None:
    """CPU seconds are reported, not asserted; what is asserted is that nothing heavy is imported."""
    command = [sys.executable, "-X", "importtime", "-m", MODULES[f"asd-{name}"], "--help"]
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert not {module for module in modules if module.partition(".")[0] in HEAVY}
    assert "Usage" in done.stdout
    report.add(
        "CPU seconds of --help", ("command", "median of five"), f"asd-{name}", f"{sorted(seconds)[2]:.2f}"
    )


def test_device_names_stand_in_one_place() -> None:
    """A device or its back end is named in device.py, in kernels/ and in their table only; texts for people may."""
    names = {"cuda", "npu", "hccl", "nccl", "gloo"}
    for name in ("core", "ckpt", "infer"):
        for path in sources(name):
            is_table_of_kernels = path.parts[-2:] == ("config", "compute.py")
            if path.name == "device.py" or "kernels" in path.parts or is_table_of_kernels:
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert node.value not in names, f"{path}:{node.lineno}"
                if isinstance(node, ast.Attribute):
                    assert node.attr not in {"cuda", "npu"}, f"{path}:{node.lineno}"


def functions(path: Path) -> dict[str, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_the_copy_of_the_command_line_is_a_copy() -> None:
    """ascendspeed-eval needs none of the other packages, so it holds those of these functions that it calls itself."""
    ours = PACKAGES / "ascendspeed-data/src/ascendspeed_data/command_line"
    copies = PACKAGES / "ascendspeed-eval/src/ascendspeed_eval"
    for name, copy in (("app.py", "command_line.py"), ("running.py", "running.py")):
        assert functions(copies / copy).items() <= functions(ours / name).items()


def test_versions_that_are_tested_satisfy_every_package() -> None:
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    for name in NAMES:
        project = tomllib.loads((PACKAGES / f"ascendspeed-{name}" / "pyproject.toml").read_text())["project"]
        for item in map(Requirement, project["dependencies"]):
            if not item.name.startswith("ascendspeed-"):
                assert item.specifier.contains(pinned[item.name.lower().replace("_", "-")]), item


def test_examples_of_backends_fit_the_protocol() -> None:
    """ascendspeed-infer serves ascendspeed-eval without importing it; their shapes must agree."""
    from dataclasses import fields

    from ascendspeed_eval import model as shapes
    from ascendspeed_infer import eval_backend, scoring

    for ours, theirs in (
        (eval_backend.BackendOption, shapes.BackendOption),
        (eval_backend.ModelDescription, shapes.ModelDescription),
        (eval_backend.GenerateResult, shapes.GenerateResult),
        (scoring.Score, shapes.LoglikelihoodResult),
    ):
        assert [field.name for field in fields(ours)] == [field.name for field in fields(theirs)]
    for method in ("claims", "launch", "open", "name", "summary", "options"):
        assert hasattr(eval_backend.backend, method)
