"""`asd-eval run`: its options are its own and those of the installed backends."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_eval.backends import Backends, find_backends
from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.progress import log
from ascendspeed_eval.report import markdown, warnings
from ascendspeed_eval.runner import Evaluation
from ascendspeed_eval.runner import run as run_evaluation
from ascendspeed_eval.tasks.registry import find_protocol, find_task


def evaluate(
    task: Annotated[str, typer.Option(help="Benchmark; asd-eval tasks lists them.")],
    task_data_path: Annotated[
        str | None,
        typer.Option(help="Its files: a file, a folder, or `sample` for the small one that is included."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of results.json, samples.jsonl, report.md. [default: keep nothing]"),
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="How the task is asked and scored.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many samples.")] = None,
    prompt_template: Annotated[
        Path | None, typer.Option(help="File with another prompt; fields of a record in braces.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "--max-new-token", min=1, help="Limit of generated answers, where any are."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Recorded with the results; scoring draws nothing.")] = 1234,
    **options: Any,
) -> None:
    """Measure a model on a benchmark.

    Samples are written as they are answered: the same command goes on where an earlier one stopped.
    """
    found_task = find_task(task)
    found_protocol = find_protocol(found_task, protocol)
    backend, own = find_backends().choose(options)
    if task_data_path is None:
        raise UsageError(
            f"--task-data-path is missing; {task} reads {found_task.format}; `--task-data-path sample` takes the small "
            "file that comes with the package"
        )
    if prompt_template is not None:
        found_protocol = replace(found_protocol, template=_read_template(prompt_template))
    if max_new_tokens is not None:
        log(f"{task}, protocol {found_protocol.name}: no text is generated, --max-new-tokens changes nothing")
    files = found_task.find_files(task_data_path)
    found_task.load(files, found_protocol)
    if backend.launch(own, sys.argv[1:]):
        return
    evaluation = Evaluation(found_task, found_protocol, files, limit, {"limit": limit, "seed": seed})
    with backend.open(own) as model:
        if model is not None:
            _measure(evaluation, model, output_dir)


def _measure(evaluation: Evaluation, model: Any, output_dir: Path | None) -> None:
    from tempfile import TemporaryDirectory

    if output_dir is not None:
        results = run_evaluation(evaluation, model, output_dir)
        log(f"wrote {output_dir}/results.json, samples.jsonl, report.md")
    else:
        with TemporaryDirectory() as scratch:
            results = run_evaluation(evaluation, model, Path(scratch))
    for warning in warnings(results):
        log(f"note: {warning}")
    print(markdown(results))


def _read_template(path: Path) -> str:
    if not path.is_file():
        raise EvaluationError(f"prompt_template={path} does not exist; check --prompt-template")
    return path.read_text(encoding="utf-8")


def with_backend_options(function: Callable[..., None], backends: Backends) -> Callable[..., None]:
    """Add the options of the installed backends to a command; those not given are left out of its call."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    added = {}
    for backend in backends.found.values():
        for option in backend.options:
            flag = "--" + option.name.replace("_", "-")
            spelled = typer.Option(
                flag,
                *option.flags,
                help=option.help,
                show_default=False,
                rich_help_panel=f"Backend {backend.name}",
            )
            added[option.name] = inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[option.type | None, spelled],
            )

    def command(**arguments: Any) -> None:
        given = {name: value for name, value in arguments.items() if name not in added or value is not None}
        function(**given)

    command.__signature__ = inspect.Signature([*own, *added.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*own, *added.values()]}
    command.__doc__ = function.__doc__
    return command


run = with_backend_options(evaluate, find_backends())
