"""One floor of ascendspeed-core imports only floors below it, and no file of any package is in a circle."""

import subprocess
import sys
from pathlib import Path

from support.imports import FLOORS, REPOSITORY, file_cycles, import_graph, upward_imports


def test_no_file_is_in_a_circle() -> None:
    assert file_cycles(import_graph()) == []


def test_core_imports_only_downwards() -> None:
    assert upward_imports(import_graph()) == []


def test_every_file_of_core_stands_on_a_floor() -> None:
    known = {name for floor in FLOORS for name in floor}
    names = {name.split(".")[1] for name in import_graph() if name.startswith("ascendspeed_core.")}
    assert names == known


def test_the_floors_can_be_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "floors.png"
    command = [sys.executable, REPOSITORY / "scripts" / "draw_floors.py", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{len(FLOORS)} floors" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
