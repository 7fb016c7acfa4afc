"""Write the table of docs/versions.md from what `python -m nox -s versions` ran: `python scripts/versions_page.py`.

Each row of versions.toml that was run left its results beside its environments. They are added to
benchmarks/results/versions.json, from which the table is made.
"""

import json
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "versions.md"
RESULTS = ROOT / "benchmarks" / "results" / "versions.json"
RUNS = ROOT / ".nox" / "versions"
SHOWN = ("torch", "megatron-core", "transformers", "deepspeed", "peft", "numpy")
BEGIN, END = "<!-- versions that were run -->\n", "<!-- end of the versions -->\n"
ASK = """
import json, platform
from importlib.metadata import version
print(json.dumps({"Python": platform.python_version()} | {name: version(name) for name in %r}))
"""


def rows() -> list[dict[str, Any]]:
    """Return the rows of versions.toml."""
    found: list[dict[str, Any]] = tomllib.loads((ROOT / "versions.toml").read_text())["row"]
    return found


def result_of(folder: Path) -> dict[str, Any] | None:
    """Return what a row's run gave; `None` if it was not run here."""
    report, pythons = folder / "tests.xml", sorted(folder.glob("tests*/bin/python"))
    if not report.exists() or not pythons:
        return None
    asked = [pythons[0], "-c", ASK % (SHOWN,)]
    installed = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"versions": installed, "date": suite.attrib["timestamp"][:10], **counts, "failed": failed}


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table."""
    heads = ["row", "Python", *SHOWN, "passed", "not passed", "date"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + " --- |" * len(heads)
    for row in rows():
        run = results.get(row["name"])
        if run is None:
            cells = [row["name"], row["python"], *[""] * len(SHOWN), "not run", "", ""]
        else:
            bad = run["failures"] + run["errors"]
            passed = run["tests"] - bad - run["skipped"]
            cells = [row["name"], *run["versions"].values(), f"{passed:,}", str(bad), run["date"]]
        yield "| " + " | ".join(cells) + " |"


def page(text: str, results: dict[str, Any]) -> str:
    """Return the page with the table renewed."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + "\n".join(table(results)) + "\n\n" + END + rest.split(END)[1]


def main() -> None:
    """Add new results to the JSON, and renew the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in rows():
        found = result_of(RUNS / row["name"])
        if found is not None:
            results[row["name"]] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
