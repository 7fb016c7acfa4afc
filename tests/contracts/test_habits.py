"""What contributors rely on: the workflow, the hooks, the changelogs, the guide and the site name what exists."""

import ast
import datetime
import importlib.metadata
import json
import re
import sys
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
CHANGELOGS = sorted(ROOT.glob("packages/*/CHANGELOG.md"))
WORKFLOW = ROOT / ".github/workflows/ci.yml"
KINDS_OF_CHANGE = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
NOX_SESSION = re.compile(r"python -m nox -s ([a-z]+)")


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def nox_sessions() -> set[str]:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(decorator).startswith("nox.session") for decorator in node.decorator_list)
    }


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0]: line.partition("==")[2] for line in lines if "==" in line}


def core_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "packages/ascendspeed-core/pyproject.toml").read_text())["project"]
    return {found.name: found for found in map(Requirement, project["dependencies"])}


def test_the_workflow_runs_sessions_that_exist() -> None:
    jobs = read_yaml(WORKFLOW)["jobs"]
    named = {name for job in jobs.values() for name in job["strategy"]["matrix"].get("session", [])}
    for job in jobs.values():
        for step in job["steps"]:
            named |= set(NOX_SESSION.findall(step.get("run", "")))
    assert named <= nox_sessions()
    assert {"lint", "types", "docs", "isolated", "tests", "nightly", "quickstart"} <= named


def test_the_workflow_tests_every_declared_python() -> None:
    tested = read_yaml(WORKFLOW)["jobs"]["tests"]["strategy"]["matrix"]["python"]
    for path in ROOT.glob("packages/*/pyproject.toml"):
        project = tomllib.loads(path.read_text())["project"]
        prefix = "Programming Language :: Python :: 3."
        declared = [item for item in project["classifiers"] if item.startswith(prefix)]
        assert [item.rpartition(" ")[2] for item in declared] == tested, path
        assert project["requires-python"] == f">={tested[0]}", path


@pytest.mark.parametrize("name", ["torch", "megatron-core"])
def test_the_workflow_tests_the_ends_of_the_declared_ranges(name: str) -> None:
    runs = read_yaml(WORKFLOW)["jobs"]["ranges"]["strategy"]["matrix"]["include"]
    asked = [
        {wanted.name: wanted.specifier for wanted in map(Requirement, run["versions"].split())}
        for run in runs
    ]
    declared = core_requirements()[name].specifier
    (bound,) = (one for one in declared if one.operator == ">=")
    pins = [pin for versions in asked for pin in versions.get(name, ()) if pin.operator == "=="]
    assert Version(bound.version) in [Version(pin.version) for pin in pins]
    (newest,) = (versions for run, versions in zip(runs, asked, strict=True) if run["name"] == "newest")
    assert newest[name] == declared


def test_the_workflow_runs_the_rows_of_versions_toml() -> None:
    jobs = read_yaml(WORKFLOW)["jobs"]
    ran = {(python, "", "") for python in jobs["tests"]["strategy"]["matrix"]["python"]}
    ran |= {
        (run["python"], run["versions"], run.get("tests", ""))
        for run in jobs["ranges"]["strategy"]["matrix"]["include"]
    }
    rows = tomllib.loads((ROOT / "versions.toml").read_text())["row"]
    assert ran == {(row["python"], " ".join(row["versions"]), " ".join(row.get("tests", ()))) for row in rows}


def test_the_rows_of_versions_toml_name_tests_that_exist() -> None:
    rows = tomllib.loads((ROOT / "versions.toml").read_text())["row"]
    for name in (name for row in rows for name in row.get("tests", ())):
        assert (ROOT / name).exists(), name


def test_the_versions_page_has_the_table_of_the_results() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    from versions_page import PAGE, RESULTS, page

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    text = PAGE.read_text()
    assert page(text, results) == text


def test_the_tests_import_what_their_session_installs() -> None:
    """A module that only a developer's own environment has would fail on a fresh machine.

    The session installs TEST_TOOLS and the five packages, and what these need with it.
    """
    needed = [*tools_of_tests()]
    for path in ROOT.glob("packages/*/pyproject.toml"):
        needed += tomllib.loads(path.read_text())["project"]["dependencies"]
    pinned = {canonicalize_name(name) for name in constraints()}
    installed: set[str] = set()
    while needed:
        wanted = Requirement(needed.pop())
        name = canonicalize_name(wanted.name)
        if name not in installed and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            installed.add(name)
            # An environment of one's own may lack a tool; what it needs shows where the session runs.
            with suppress(importlib.metadata.PackageNotFoundError):
                needed += importlib.metadata.requires(name) or ()
    provided = importlib.metadata.packages_distributions()
    own = {path.stem for folder in ("tests", "benchmarks", "scripts") for path in (ROOT / folder).iterdir()}
    for path in (ROOT / "tests").rglob("*.py"):
        for module in imported(path) - sys.stdlib_module_names - own:
            names = {canonicalize_name(name) for name in provided.get(module, [module])}
            if not any(name.startswith("ascendspeed-") for name in names):
                assert names & installed, f"{path} imports {module}, which TEST_TOOLS in noxfile.py lacks"
                assert names & pinned, f"{path} imports {module}, which constraints.txt lacks"


def tools_of_tests() -> tuple[str, ...]:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (found,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TEST_TOOLS"
    )
    return tuple(ast.literal_eval(found))


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    whole |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in whole}


def test_hooks_have_the_versions_that_lint_has() -> None:
    repositories = read_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = {hook["id"]: repository["rev"] for repository in repositories for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "codespell", "check-yaml", "end-of-file-fixer"} <= hooks.keys()
    pinned = constraints()
    assert hooks["ruff-check"] == hooks["ruff-format"] == f"v{pinned['ruff']}"
    assert hooks["codespell"] == f"v{pinned['codespell']}"


@pytest.mark.parametrize("path", CHANGELOGS, ids=lambda path: path.parent.name)
def test_changelogs_keep_their_form(path: Path) -> None:
    """That of keepachangelog.com: Unreleased first, then releases with dates, newest first."""
    text = path.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert releases
    assert all(releases), headings
    versions = [Version(found[1]) for found in releases if found]
    dates = [datetime.date.fromisoformat(found[2]) for found in releases if found]
    assert versions == sorted(versions, reverse=True)
    assert dates == sorted(dates, reverse=True)
    assert set(re.findall(r"^### (.+)$", text, re.MULTILINE)) <= KINDS_OF_CHANGE


def test_the_guide_for_contributors_names_what_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(NOX_SESSION.findall(text))
    assert named <= nox_sessions()
    assert {"lint", "types", "tests", "isolated", "docs", "build", "nightly"} <= named
    for path in re.findall(r"(?:tests|packages|docs|benchmarks|\.ci|\.github|scripts)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(\w+\.(?:py|txt|md))`", text):
        assert (ROOT / path).exists() or path in ("CHANGELOG.md", "utils.py"), path


def test_the_check_before_landing_runs_every_fast_session() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert set(NOX_SESSION.findall(script)) == {"lint", "docs", "types", "isolated", "tests"} & nox_sessions()
    for command in NOX_SESSION.findall((ROOT / "README.md").read_text()):
        assert command in nox_sessions()


def test_every_page_stands_in_the_navigation() -> None:
    listed = {
        page
        for section in read_yaml(ROOT / "mkdocs.yml")["nav"]
        for pages in section.values()
        for page in ([pages] if isinstance(pages, str) else [path for one in pages for path in one.values()])
    }
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("packages/*/*.md")]
    assert {path.relative_to(ROOT).as_posix() for path in pages} == {
        p for p in listed if not p.startswith("api/")
    }
