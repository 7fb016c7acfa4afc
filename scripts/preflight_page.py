"""Write the table of docs/preflight.md from runs that cannot start: `python scripts/preflight_page.py`.

The runs are those of tests/support/preflight.py; tests/contracts/test_preflight_page.py compares the page with them.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "preflight.md"
MARK = "<!-- Written by scripts/preflight_page.py from runs; change the runs and start it again. -->"


def page(rows: Iterable[tuple[str, str, str]]) -> str:
    """Return the page: its own text, then the table."""
    own = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    lines = ["| checked | what is wrong | message |", "|---|---|---|"]
    for kind, wrong, message in rows:
        escaped = message.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {kind} | {wrong} | {escaped} |")
    return own + MARK + "\n\n" + "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from support.preflight import rows

    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(rows(Path(folder))), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
