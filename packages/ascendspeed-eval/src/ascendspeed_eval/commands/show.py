"""`asd-eval tasks` and `asd-eval report`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_eval.report import joined
from ascendspeed_eval.tasks.registry import all_tasks


def tasks() -> None:
    """List the benchmarks with their protocols; * marks the default."""
    for task in all_tasks().values():
        print(f"{task.name} (version {task.version}, {task.metric}); reads {task.format}")
        for protocol in task.protocols.values():
            mark = "*" if protocol.name == task.default_protocol else " "
            print(f"  {mark} {protocol.name}: {protocol.summary}")
            print(f"      prompt: {protocol.template!r}, choices: {list(protocol.choices)}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
) -> None:
    """Join runs into one Markdown table."""
    print(joined(runs), end="")
