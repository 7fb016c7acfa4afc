"""Write the tables of docs/coming-from.md: flags of other programs, as the commands answer them.

The commands read the same file (other_programs.toml); a test keeps the page up to date. What stands before the first
table is written by hand.
"""

import sys
from itertools import groupby
from pathlib import Path

from ascendspeed_data.command_line.other_programs import Answer, read_answers

PAGE = Path(__file__).parents[1] / "docs/coming-from.md"

TITLES = {
    "accepted": "## Flags that are accepted and change nothing\n\nA line says what each means today.\n",
    "refused": "## Flags with another name, or none\n\nThe answer of the command that the row names.\n",
}


def page() -> str:
    """Return the page: its own text, then the tables."""
    answers = read_answers()
    parts = [PAGE.read_text(encoding="utf-8").partition(TITLES["accepted"].partition("\n")[0])[0]]
    for kind, title in TITLES.items():
        chosen = [one for one in answers if (one.values is not None) == (kind == "accepted")]
        parts.append(title)
        parts.append(
            "\n".join(["| flags | from | at | answer |", "|---|---|---|---|", *_rows(chosen)]) + "\n"
        )
    return parts[0] + "\n".join(parts[1:])


def _rows(answers: list[Answer]) -> list[str]:
    def what(one: Answer) -> tuple[str, tuple[str, ...], str]:
        return one.programs, one.at, one.say

    return [
        f"| {', '.join(f'`{one.flag}`' for one in rows)} | {programs} | {', '.join(f'`{one}`' for one in at)} | {say} |"
        for (programs, at, say), rows in ((key, list(group)) for key, group in groupby(answers, key=what))
    ]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
