"""The images install the versions that are tested, from files that are there; they are built elsewhere."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
FILES = sorted(DOCKER.glob("*.Dockerfile"))
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Dockerfile: name and arguments, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            yield name, " ".join(rest.split())


def arguments(path: Path) -> dict[str, str]:
    """Return the build arguments with their defaults."""
    found = (rest.partition("=") for name, rest in instructions(path) if name == "ARG")
    return {name: default for name, _, default in found}


def base(path: Path) -> str:
    """Return the image that a Dockerfile begins with, its build arguments filled in."""
    (image,) = (rest for name, rest in instructions(path) if name == "FROM")
    return re.sub(r"\$\{(\w+)\}", lambda match: arguments(path)[match[1]], image)


def project(package: Path) -> dict[str, object]:
    loaded: dict[str, object] = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    return loaded


def requirement(line: object, name: str) -> SpecifierSet:
    assert isinstance(line, list)
    (found,) = (one for one in map(Requirement, line) if one.name == name)
    return found.specifier


def test_there_is_one_for_each_kind_of_device() -> None:
    assert [path.name for path in FILES] == ["ascend.Dockerfile", "cpu.Dockerfile", "cuda.Dockerfile"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_torch_is_a_version_that_the_core_allows(path: Path) -> None:
    allowed = requirement(project(ROOT / "packages/ascendspeed-core")["dependencies"], "torch")
    assert Version(arguments(path)["TORCH"]) in allowed


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_torch_is_the_pinned_one(name: str) -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert arguments(DOCKER / f"{name}.Dockerfile")["TORCH"] == pins["torch"]


def test_torch_npu_is_built_for_its_torch() -> None:
    versions = arguments(DOCKER / "ascend.Dockerfile")
    assert Version(versions["TORCH_NPU"]).base_version == versions["TORCH"]
    extras = project(ROOT / "packages/ascendspeed-core")["optional-dependencies"]
    assert isinstance(extras, dict)
    assert Version(versions["TORCH_NPU"]) in requirement(extras["npu"], "torch_npu")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_python_is_a_version_that_the_packages_allow(path: Path) -> None:
    (python,) = re.findall(r"(?:python:|-py)(\d\.\d+)", base(path))
    for package in PACKAGES:
        assert Version(python) in SpecifierSet(str(project(package)["requires-python"]))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_packages_are_installed_with_extras_that_exist(path: Path) -> None:
    (install,) = (rest for _, rest in instructions(path) if "./packages/" in rest)
    named = dict(re.findall(r"\./packages/([\w-]+)(?:\[([\w,-]+)\])?", install))
    assert named.keys() == {package.name for package in PACKAGES}
    for name, extras in named.items():
        offered = project(ROOT / "packages" / name).get("optional-dependencies", {})
        assert isinstance(offered, dict)
        assert set(filter(None, extras.split(","))) <= offered.keys()
    assert "-c constraints.txt" in install


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_is_there_and_not_ignored(path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, rest in instructions(path):
        if name == "COPY":
            source = rest.split()[0]
            assert (ROOT / source).exists()
            assert any(fnmatch(source, pattern) or pattern.startswith(source + "/") for pattern in kept)
    for package in PACKAGES:
        for part in ("pyproject.toml", "README.md", "src"):
            assert any(fnmatch(f"packages/{package.name}/{part}", pattern) for pattern in kept)


def test_the_entry_point_says_what_is_missing_without_cann() -> None:
    script = DOCKER / "ascend-entrypoint.sh"
    ended = subprocess.run([script, "echo", "ran"], capture_output=True, text=True, check=False)
    if any(map(Path.exists, map(Path, re.findall(r"/usr/local/\S+set_env\.sh", script.read_text())))):
        assert ended.stdout == "ran\n"
    else:
        assert ended.returncode == 1
        assert ended.stderr.startswith("error: neither /usr/local/Ascend/ascend-toolkit/set_env.sh")
