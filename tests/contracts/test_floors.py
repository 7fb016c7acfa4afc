"""One floor of ascendspeed-core imports only floors below it, and no file of any package is in a circle."""

from support.imports import FLOORS, file_cycles, import_graph, upward_imports


def test_no_file_is_in_a_circle() -> None:
    assert file_cycles(import_graph()) == []


def test_core_imports_only_downwards() -> None:
    assert upward_imports(import_graph()) == []


def test_every_file_of_core_stands_on_a_floor() -> None:
    known = {name for floor in FLOORS for name in floor}
    names = {name.split(".")[1] for name in import_graph() if name.startswith("ascendspeed_core.")}
    assert names == known
