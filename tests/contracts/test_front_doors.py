"""What a package exports at its top level: every name exists, is imported on first use, and costs nothing before."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import environment

PACKAGES = Path(__file__).parents[2] / "packages"
NAMES = ("data", "core", "ckpt", "infer", "eval")
HEAVY = {
    "torch", "numpy", "pydantic", "typer", "transformers", "megatron", "pyarrow", "sentencepiece", "tokenizers",
    "matplotlib", "jinja2", "safetensors",
}  # fmt: skip


def exported(name: str) -> list[str]:
    """Names of `__all__`; a package without one has no front door yet and exports nothing."""
    return list(getattr(importlib.import_module(f"ascendspeed_{name}"), "__all__", ()))


def imported_for_types(name: str) -> dict[str, str]:
    """By name the module that type checkers take it from."""
    path = PACKAGES / f"ascendspeed-{name}" / "src" / f"ascendspeed_{name}" / "__init__.py"
    return {
        alias.asname or alias.name: str(statement.module)
        for block in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


def in_fresh_python(program: str) -> list[str]:
    """The modules that a program adds to those of a Python that has just started."""
    lines = (
        "import sys",
        "before = set(sys.modules)",
        program,
        "added = sorted(set(sys.modules) - before)",
        "import json",
        "print(json.dumps(added))",
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return list(json.loads(done.stdout))


@pytest.mark.parametrize("name", NAMES)
def test_importing_a_package_imports_nothing_heavy(name: str) -> None:
    modules = in_fresh_python(f"import ascendspeed_{name}; dir(ascendspeed_{name})")
    assert f"ascendspeed_{name}" in modules
    assert not {module for module in modules if module.partition(".")[0] in HEAVY}
    inside = {module for module in modules if module.startswith("ascendspeed_")}
    assert inside == {f"ascendspeed_{name}"}, "its own modules are imported on first use"


@pytest.mark.parametrize("name", NAMES)
def test_exports_exist_and_are_what_type_checkers_see(name: str) -> None:
    package = importlib.import_module(f"ascendspeed_{name}")
    types = imported_for_types(name)
    names = [export for export in exported(name) if not export.startswith("__")]
    assert len(names) == len(set(names))
    assert set(names) == types.keys()
    for export in names:
        assert getattr(package, export) is getattr(importlib.import_module(types[export]), export)


@pytest.mark.parametrize("name", NAMES)
def test_dir_lists_exports_and_other_names_are_refused(name: str) -> None:
    package = importlib.import_module(f"ascendspeed_{name}")
    assert set(exported(name)) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"ascendspeed_{name}.* has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018


def test_core_exports_what_its_example_needs() -> None:
    """The example in the package's README has one import of the package, from its top level."""
    text = (PACKAGES / "ascendspeed-core" / "README.md").read_text(encoding="utf-8")
    program = text.split("```python\n")[1].split("```")[0]
    modules = [node.module for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)]
    assert modules == ["ascendspeed_core"]
