from collections.abc import Iterator
from typing import Any

import pytest

from support.processes import WorkerPool
from support.tables import ReportTables

TABLES = ReportTables()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def report() -> ReportTables:
    return TABLES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in TABLES.render():
        terminalreporter.write_line(line)
