"""Any module can be imported first: no import depends on the order, and no `__init__.py` closes a circle."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import environment
from support.imports import file_cycles, package_graph

SCRIPT = Path(__file__).parents[1] / "support" / "import_alone.py"
WITH_TORCH = ("core", "ckpt", "infer")


@pytest.mark.parametrize("name", ["data", "eval", *WITH_TORCH])
def test_every_module_can_be_imported_alone(name: str) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        f"ascendspeed_{name}",
        *(["--libraries"] if name in WITH_TORCH else []),
    ]
    # Each process would compile the same files again without their bytecode.
    env = environment(PYTHONDONTWRITEBYTECODE="")
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]


@pytest.mark.parametrize("name", ["data", "eval", *WITH_TORCH])
def test_no_export_has_the_name_of_a_module(name: str) -> None:
    """`from package import name` would give the module once something has imported it."""
    package = importlib.import_module(f"ascendspeed_{name}")
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert modules & set(getattr(package, "__all__", ())) == set()


def test_no_init_file_closes_a_circle() -> None:
    assert file_cycles(package_graph()) == []


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / "packages" / "one" / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_circle_through_an_init_file_is_found(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {
            "one/__init__.py": "",
            "one/template.py": "from one.handlers.base import Sample",
            "one/handlers/__init__.py": "from one.handlers.chat import Chat",
            "one/handlers/base.py": "",
            "one/handlers/chat.py": "from one.template import Template",
        },
    )
    assert file_cycles(package_graph(tmp_path)) == [["one.handlers", "one.handlers.chat", "one.template"]]


def test_modules_next_to_each_other_are_no_circle(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {
            "one/__init__.py": "__version__ = '1'",
            "one/handlers/__init__.py": "from one.handlers.registry import find",
            "one/handlers/registry.py": "from one import __version__\nfrom one.handlers import chat",
            "one/handlers/chat.py": "from one.handlers.base import Sample",
            "one/handlers/base.py": "",
        },
    )
    assert file_cycles(package_graph(tmp_path)) == []
