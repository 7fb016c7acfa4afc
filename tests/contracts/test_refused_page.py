"""docs/refused.md is what the code says."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from refused_page import PAGE, TABLES, page  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python scripts/refused_page.py"


def test_no_table_is_empty() -> None:
    for table in TABLES:
        rows = list(table.rows())
        assert rows, table.title
        assert all(len(row) == len(table.columns) for row in rows), table.title
