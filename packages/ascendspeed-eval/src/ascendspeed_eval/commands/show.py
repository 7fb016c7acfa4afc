"""`asd-eval tasks`, `asd-eval report` and `asd-eval compare`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_eval.protocol import describe_protocol
from ascendspeed_eval.recipes import find_recipe, read_recipe, recipe_names
from ascendspeed_eval.report import join_runs
from ascendspeed_eval.small_files import read_text
from ascendspeed_eval.tasks.base import Task
from ascendspeed_eval.tasks.registry import all_tasks, find_task, find_variant
from ascendspeed_eval.tasks.samples import Record


def tasks(
    task: Annotated[
        str | None, typer.Option(help="Show only this task: a name, or a .yaml or .py file.")
    ] = None,
    task_data_path: Annotated[
        str | None, typer.Option(help="Data of --task: shows the first prompt of each protocol.")
    ] = None,
) -> None:
    """List the benchmarks and their protocols; * marks the default protocol."""
    chosen = [find_task(task)] if task is not None else list(all_tasks().values())
    for one in chosen:
        print(f"{one.name} (version {one.version}, {one.size}): {one.summary}; reads {one.format}")
        for variant in one.variants.values():
            mark = "*" if variant.name == one.default_variant else " "
            print(f"  {mark} {variant.name}: {describe_protocol(one, variant)}")
            if variant.template:
                print(f"      question: {variant.template!r}")
            if task_data_path is not None and task is not None:
                print(_first_prompt(one, variant.name, task_data_path))


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print. [default: list all]")] = None,
) -> None:
    """List the recipes of evaluation, or print one as TOML.

    A recipe is run by its name: asd-eval run mmlu --load MODEL --task-data-path DATA --output-dir OUT.
    """
    if name is not None:
        print(read_text(find_recipe(name), f"recipe {name}", "the name of the recipe"), end="")
        return
    for one in recipe_names():
        options = read_recipe(find_recipe(one))
        print(f"{one}: {', '.join(f'{key} {_shown(value)}' for key, value in options.items())}")


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _first_prompt(task: Task, variant: str, path: str) -> str:
    benchmark = task.read(path)
    first: list[Record] = list(benchmark.records[:1])
    (sample, *_) = task.samples(type(benchmark)(first, benchmark.examples, ()), find_variant(task, variant))
    return "\n".join("      | " + line for line in sample.prompt.split("\n"))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[
        Path | None, typer.Option(help="Write the table to this file. [default: stdout]")
    ] = None,
) -> None:
    """Put several runs into one Markdown table, with the published scores of their tasks."""
    table = join_runs(runs)
    if output is None:
        print(table, end="")
    else:
        output.write_text(table, encoding="utf-8")


def compare(
    first: Annotated[Path, typer.Argument(help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(help="Folder of another run on the same data.")],
    show: Annotated[int, typer.Option(min=0, help="Number of changed samples to list.")] = 20,
) -> None:
    """Test whether two runs differ significantly, and list the samples whose scores differ."""
    from ascendspeed_eval.compare import compare_runs

    # Answers of models may hold half a surrogate pair, which no terminal can show.
    print(compare_runs(first, second, show).encode("utf-8", "backslashreplace").decode(), end="")
