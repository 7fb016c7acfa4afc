"""Do what the README tells a newcomer, in a fresh environment, and write what it prints to docs/newcomer.md.

    $ python scripts/newcomer_walk.py

The steps are the block under "A first model" of the README; tests/contracts/test_newcomer_walk.py keeps both equal.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "newcomer.md"
SECTION = "## A first model, step by step"
INTRODUCTION = """\
# A first model

<!-- Written by scripts/newcomer_walk.py; run it again after a change of the README. -->

What the steps of the [README](../README.md#a-first-model-step-by-step) print, recorded in {where}. \
The toy model knows four fruits; its score says nothing, and shows how one is made.
"""
LONGEST = 24
"""Lines of a step that are shown; of longer ones the first and the last."""
PACKAGES = ("data", "core", "ckpt", "infer", "eval")


def steps() -> list[str]:
    """Return the commands of the README, each with its here-document."""
    text = README.read_text(encoding="utf-8").partition(SECTION)[2]
    found = re.search(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"{README} has no block under {SECTION!r}"
    commands: list[str] = []
    end = None
    for line in found[1].splitlines():
        if end is not None:
            commands[-1] += "\n" + line
            end = None if line == end else end
            continue
        here = re.search(r"<<'(\w+)'", line)
        end = here[1] if here else None
        commands.append(line)
    return commands


def install(folder: Path) -> Path:
    """Make an environment with the five packages; return the folder of its programs."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    packages = [part for name in PACKAGES for part in ("-e", str(ROOT / "packages" / f"ascendspeed-{name}"))]
    command = [
        programs / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        ROOT / "constraints.txt",
        *packages,
    ]
    subprocess.run(command, check=True)
    return programs


def walk(programs: Path, folder: Path) -> list[tuple[str, str]]:
    """Return each command with what it printed."""
    variables = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    printed = []
    for command in steps():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=variables, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{command}\n{done.stdout}")
        printed.append((command, done.stdout))
    return printed


def page(printed: list[tuple[str, str]], where: str) -> str:
    """Return the page.

    Args:
        printed: each command with what it printed.
        where: the environment.
    """
    parts = [INTRODUCTION.format(where=where)]
    for command, output in printed:
        lines = [line for line in output.splitlines() if line.strip()]
        if len(lines) > LONGEST:
            lines = [*lines[: LONGEST // 2], "...", *lines[-(LONGEST // 2) :]]
        shown = command.replace("\n", "\n> ")
        parts.append("\n".join(["```console", f"$ {shown}", *lines, "```", ""]))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--programs", type=Path, help="folder of installed commands, in place of a fresh environment"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        programs = args.programs or install(Path(scratch) / "environment")
        where = "an environment with the packages installed" if args.programs else "a fresh environment"
        PAGE.write_text(page(walk(programs, work), where), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
