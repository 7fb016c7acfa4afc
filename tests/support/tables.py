"""Tables that a test run prints at its end."""

from collections.abc import Sequence


class ReportTables:
    """Rows by table title, in the order in which they came."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[Sequence[str], list[Sequence[str]]]] = {}

    def add(self, title: str, header: Sequence[str], *row: object) -> None:
        """Add one row."""
        self._add_cells(title, header, [_cell(value) for value in row])

    def merge(self, tables: "dict[str, tuple[Sequence[str], list[Sequence[str]]]]") -> None:
        """Add what another process of this test run collected."""
        for title, (header, rows) in tables.items():
            for row in rows:
                self._add_cells(title, header, row)

    def _add_cells(self, title: str, header: Sequence[str], cells: Sequence[str]) -> None:
        self.tables.setdefault(title, (header, []))[1].append(cells)

    def render(self) -> list[str]:
        """Return all tables as aligned lines."""
        lines = []
        for title, (header, rows) in self.tables.items():
            table = [list(header), *rows]
            widths = [max(len(row[i]) for row in table) for i in range(len(header))]
            lines += ["", title]
            lines += [
                "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                for row in table
            ]
        return lines


def _cell(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
