"""`asd-eval run`: its options are its own and those of the installed backends."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ascendspeed_eval.backends import Backends, find_backends
from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.hub import PREFIX, write_files
from ascendspeed_eval.progress import log
from ascendspeed_eval.report import markdown, warnings
from ascendspeed_eval.runner import Evaluation, prepare
from ascendspeed_eval.runner import run as run_evaluation
from ascendspeed_eval.tasks.base import AskSettings
from ascendspeed_eval.tasks.registry import find_protocol, find_task


def evaluate(
    task: Annotated[
        str, typer.Option(help="Benchmark; asd-eval tasks lists them. Or a .yaml or .py file of your own.")
    ],
    task_data_path: Annotated[
        str | None,
        typer.Option(
            help="Its files: a file, a folder, hf:NAME for a Hugging Face dataset, or `sample` for the small file that "
            "is included."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of results.json, samples.jsonl, report.md and .html. [default: keep nothing]"
        ),
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="How the task is asked and scored.")] = None,
    subset: Annotated[
        list[str] | None, typer.Option(help="Only these subjects or groups of them. [default: all]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many samples of each subset.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt. [default: the protocol's]")
    ] = None,
    prompt_template: Annotated[
        Path | None, typer.Option(help="File with another prompt; fields of a record in braces.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "--max-new-token", min=1, help="Limit of generated answers, where any are."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Texts per question, for pass@k.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the draws; 0 takes the likeliest token.")
    ] = 0.0,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Consent to running programs that the model wrote.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the draws, where there are any.")] = 1234,
    **options: Any,
) -> None:
    """Measure a model on a benchmark.

    Samples are written as they are answered: the same command goes on where an earlier one stopped, also with another
    batch size or number of devices.
    """
    found_task = find_task(task)
    found_protocol = find_protocol(found_task, protocol)
    backend, own = find_backends().choose(options)
    if task_data_path is None:
        raise UsageError(
            f"--task-data-path is missing; {task} reads {found_task.format}; `--task-data-path sample` takes the small "
            "file that comes with the package"
        )
    if found_task.runs_code and not allow_code_execution:
        raise UsageError(f"{task} runs programs that the model wrote; consent with --allow-code-execution")
    if num_samples > 1 and temperature == 0:
        raise UsageError(
            f"num_samples={num_samples} at temperature 0 gives the same text again; give --temperature 0.8"
        )
    if prompt_template is not None:
        found_protocol = replace(found_protocol, template=_read_template(prompt_template))
    if max_new_tokens is not None and not found_protocol.max_new_tokens:
        log(f"{task}, protocol {found_protocol.name}: no text is generated, --max-new-tokens changes nothing")
        max_new_tokens = None
    if "seq_length" in {option.name for option in backend.options} and found_protocol.seq_length:
        own.setdefault("seq_length", found_protocol.seq_length)
    ask = AskSettings(max_new_tokens, num_samples, temperature, seed, allow_code_execution)
    with TemporaryDirectory(prefix="asd-eval-data-") as scratch:
        if task_data_path.startswith(PREFIX):
            task_data_path = write_files(found_task.name, task_data_path, Path(scratch))
        evaluation = prepare(
            found_task, found_protocol, task_data_path, subsets=subset or (), limit=limit, num_fewshot=num_fewshot,
            ask=ask, seed=seed,
        )  # fmt: skip
        if backend.launch(own, sys.argv[1:]):
            return
        with backend.open(own) as model:
            if model is not None:
                _measure(evaluation, model, output_dir)


def _measure(evaluation: Evaluation, model: Any, output_dir: Path | None) -> None:
    if output_dir is not None:
        results = run_evaluation(evaluation, model, output_dir)
        log(f"wrote {output_dir}/results.json, samples.jsonl, report.md, report.html")
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
