"""`asd-eval tasks`, `asd-eval report` and `asd-eval compare`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_eval.report import joined
from ascendspeed_eval.tasks.base import Record, Task
from ascendspeed_eval.tasks.registry import all_tasks, find_protocol, find_task


def tasks(
    task: Annotated[str | None, typer.Option(help="Only this one; also a .yaml or .py file.")] = None,
    task_data_path: Annotated[
        str | None, typer.Option(help="Its files: then the first prompt of each protocol is shown.")
    ] = None,
) -> None:
    """List the benchmarks with their protocols; * marks the default."""
    chosen = [find_task(task)] if task is not None else list(all_tasks().values())
    for one in chosen:
        print(f"{one.name} (version {one.version}, {one.size}): {one.summary}; reads {one.format}")
        for protocol in one.protocols.values():
            mark = "*" if protocol.name == one.default_protocol else " "
            print(f"  {mark} {protocol.name}: {protocol.summary}")
            if protocol.template:
                print(f"      question: {protocol.template!r}")
            if task_data_path is not None and task is not None:
                print(_first_prompt(one, protocol.name, task_data_path))


def _first_prompt(task: Task, protocol: str, path: str) -> str:
    benchmark = task.read(path)
    first: list[Record] = list(benchmark.records[:1])
    (sample, *_) = task.samples(type(benchmark)(first, benchmark.examples, ()), find_protocol(task, protocol))
    return "\n".join("      | " + line for line in sample.prompt.split("\n"))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path | None, typer.Option(help="Write the table there instead of to stdout.")] = None,
) -> None:
    """Join runs into one Markdown table, with the published scores of their tasks."""
    table = joined(runs)
    if output is None:
        print(table, end="")
    else:
        output.write_text(table, encoding="utf-8")


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run on the same data.")],
    show: Annotated[int, typer.Option(min=0, help="List so many samples that changed.")] = 20,
) -> None:
    """Tell whether two runs differ by more than chance, and on which samples."""
    from ascendspeed_eval.compare import compare as compare_runs

    print(compare_runs(first, second, show), end="")
