"""`asd-eval run`: its own options and those of the installed backends."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from ascendspeed_eval.backends import Backends, find_backends
from ascendspeed_eval.conversations import ChatSettings
from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.evaluation import Evaluation, prepare_evaluation
from ascendspeed_eval.hub import HUGGING_FACE
from ascendspeed_eval.hub_datasets import find_data
from ascendspeed_eval.model import Backend, EvaluatedModel
from ascendspeed_eval.output_folder import SAMPLES
from ascendspeed_eval.progress import log
from ascendspeed_eval.recipes import Kind, recipe_options
from ascendspeed_eval.report import markdown, warnings
from ascendspeed_eval.runner import MAX_FAILURES, evaluate
from ascendspeed_eval.small_files import read_text
from ascendspeed_eval.stopping import keeping
from ascendspeed_eval.tasks.base import Task
from ascendspeed_eval.tasks.registry import find_task, find_variant
from ascendspeed_eval.tasks.samples import GenerationSettings


def _take_recipe(context: typer.Context, name: str | None) -> str | None:
    """Make the options of a recipe the defaults of the command, before its other options are read."""
    if name is not None and not context.resilient_parsing:
        kinds: dict[str, Kind] = {}
        for option in context.command.params:
            if option.name not in (None, "recipe"):
                kind: Kind = "list" if getattr(option, "multiple", False) else "value"
                kinds[str(option.name)] = "flag" if getattr(option, "is_flag", False) else kind
        context.default_map = recipe_options(name, kinds)
    return name


def run_command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            is_eager=True,
            callback=_take_recipe,
            help="Name of a recipe, or a TOML file; flags win over it. `asd-eval recipes` lists them.",
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="One or several benchmarks; `asd-eval tasks` lists them. Or your own task: a .yaml or .py file."
        ),
    ] = None,
    task_data_path: Annotated[
        list[str] | None,
        typer.Option(
            help="Data of each benchmark, in the order of --task: a file, a folder, a name on the Hugging Face hub "
            "(org/name@revision; hf: alone is the task's own) or modelscope:org/name, or for boolq `sample`, the "
            "small file that the package contains."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json, samples.jsonl, report.md and report.html; with several tasks each has a "
            "folder of its name in it. [default: write no files]"
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="How to prompt and score the task; `asd-eval tasks` lists the protocols of each task."
        ),
    ] = None,
    subset: Annotated[
        list[str] | None, typer.Option(help="Evaluate only these subjects or groups. [default: all]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Evaluate only the first LIMIT samples of each subset.")
    ] = None,
    limit_seed: Annotated[
        int | None,
        typer.Option(help="Draw the samples of --limit at random with this seed. [default: the first ones]"),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt. [default: as the protocol says]")
    ] = None,
    prompt_template: Annotated[
        Path | None, typer.Option(help="File with your own prompt; write fields of a record in braces.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "--max-new-token",
            min=1,
            help="Length limit of generated answers. [default: as the protocol says]",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Answers per question, for pass@k.")] = 1,
    temperature: Annotated[
        float, typer.Option(min=0, help="Sampling temperature; 0 is greedy decoding.")
    ] = 0.0,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            help="Ask in conversations, by the model's chat template; reasoning is removed from answers (see "
            "docs/evaluation.md).",
        ),
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(help="System message of each conversation; the task's own header follows it."),
    ] = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(help='JSON object with variables of the template, such as {"enable_thinking": false}.'),
    ] = None,
    chat_template_date: Annotated[
        str | None,
        typer.Option(help="Day that a template with a date shows: YYYY-MM-DD, or today."),
    ] = None,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            help="Give each example of the prompt as a turn, or all in one message. [default: turns]",
        ),
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Allow running programs that the model wrote."),
    ] = False,
    allow_weak_sandbox: Annotated[
        bool,
        typer.Option(
            "--allow-weak-sandbox",
            help="Run them even where this machine can only limit their time and memory (see docs/sandbox.md).",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 1234,
    max_failures: Annotated[
        int, typer.Option(min=1, help="End the run when this number of samples fail one after the other.")
    ] = MAX_FAILURES,
    **options: Any,
) -> None:
    """Evaluate a model on one or several benchmarks.

    Each sample is written as soon as it is scored. Run the same command again to resume an interrupted run, or to ask
    for samples that failed; batch size, number of devices and a server's address may differ.
    """
    if not task:
        raise UsageError("task is missing; give --task, or a recipe (`asd-eval recipes` lists them)")
    if recipe is not None:
        log(f"recipe: {recipe}")
    backend, own = find_backends().choose(options)
    chat = ChatSettings.of_flags(
        apply_chat_template, system, chat_template_kwargs, chat_template_date, fewshot_as_multiturn
    )
    generation = GenerationSettings(
        max_new_tokens, num_samples, temperature, seed, allow_code_execution, allow_weak_sandbox
    )
    with TemporaryDirectory(prefix="asd-eval-data-") as scratch:
        prepared = []
        for number, (found, path) in enumerate(_with_data(task, task_data_path)):
            _check_generation(found, generation)
            variant = find_variant(found, protocol)
            if prompt_template is not None:
                variant = replace(variant, template=_read_template(prompt_template))
            settings = generation
            if max_new_tokens is not None and not variant.max_new_tokens:
                log(
                    f"{found.name}, protocol {variant.name}, generates no text; --max-new-tokens has no effect"
                )
                settings = replace(generation, max_new_tokens=None)
            (written := Path(scratch) / str(number)).mkdir()
            path, origin = find_data(found.name, path, written)
            evaluation = prepare_evaluation(
                found, variant, path, subsets=subset or (), limit=limit, limit_seed=limit_seed,
                num_fewshot=num_fewshot, generation=settings, seed=seed,
                chat=chat,
            )  # fmt: skip
            prepared.append(replace(evaluation, data_origin=origin, recipe=recipe))
        if backend.launch(_options_of(backend, own, prepared[0]), sys.argv[1:]):
            return
        for evaluation in prepared:
            folder = (
                output_dir if output_dir is None or len(prepared) == 1 else output_dir / evaluation.task.name
            )
            with (
                keeping(partial(_what_is_kept, folder)),
                backend.open(_options_of(backend, own, evaluation)) as model,
            ):
                if model is not None:
                    _evaluate_and_print(evaluation, model, folder, max_failures)


def _with_data(names: Sequence[str], paths: Sequence[str] | None) -> list[tuple[Task, str]]:
    """Return each task with its data; `sample` and `hf:` alone hold for all tasks.

    Raises:
        UsageError: a task without data, or twice.
    """
    tasks = [find_task(name) for name in names]
    if len({task.name for task in tasks}) < len(tasks):
        raise UsageError(f"--task {' '.join(names)} names a task twice; name each once")
    if not paths:
        raise UsageError(
            f"--task-data-path is missing; {names[0]} reads {tasks[0].format}; `--task boolq --task-data-path "
            "sample` reads the small file that the package contains"
        )
    if len(paths) == 1 and paths[0] in ("sample", HUGGING_FACE):
        paths = [paths[0]] * len(tasks)
    if len(paths) != len(tasks):
        raise UsageError(
            f"--task-data-path has {len(paths)} {'path' if len(paths) == 1 else 'paths'} for {len(tasks)} "
            f"{'task' if len(tasks) == 1 else 'tasks'}; give one for each, in the order of --task, separated by spaces"
        )
    return list(zip(tasks, paths, strict=True))


def _options_of(backend: Backend, given: Mapping[str, Any], evaluation: Evaluation) -> dict[str, Any]:
    """Return the options of a backend, with the length that the protocol asks for where the user gave none."""
    length = evaluation.variant.seq_length
    takes_length = "seq_length" in {option.name for option in backend.options}
    return ({"seq_length": length} if takes_length and length else {}) | dict(given)


def _check_generation(task: Task, generation: GenerationSettings) -> None:
    if not isfinite(generation.temperature):
        raise UsageError(f"--temperature {generation.temperature} is not finite; give 0, or 0.8 to sample")
    if generation.num_samples > 1 and generation.temperature == 0:
        raise UsageError(
            f"num_samples={generation.num_samples} at temperature 0 generates the same text each time; give "
            "--temperature 0.8"
        )
    task.prepare(generation)


def _evaluate_and_print(
    evaluation: Evaluation, model: EvaluatedModel, output_dir: Path | None, max_failures: int
) -> None:
    if output_dir is not None:
        results = evaluate(evaluation, model, output_dir, max_failures)
        log(f"wrote {output_dir}/results.json, samples.jsonl, report.md, report.html")
    else:
        with TemporaryDirectory() as scratch:
            results = evaluate(evaluation, model, Path(scratch), max_failures)
    for warning in warnings(results):
        log(f"note: {warning}")
    print(markdown(results).encode("utf-8", "backslashreplace").decode())
    failed = sum(task["num_failed"] for task in results["tasks"].values())
    if failed:
        first = next(task["first_failure"] for task in results["tasks"].values() if task["num_failed"])
        again = "; run the same command again to ask for them" if output_dir is not None else ""
        raise EvaluationError(f"{failed} samples failed and have no score{again}. The first: {first}")


def _what_is_kept(folder: Path | None) -> str:
    """Say what an evaluation that ends early has kept, and how to go on."""
    if folder is None:
        return "nothing is kept, as no --output-dir was given"
    samples = folder / SAMPLES
    finished = samples.read_bytes().count(b"\n") if samples.is_file() else 0
    return f"{folder} holds {finished} finished samples; the same command goes on after them"


def _read_template(path: Path) -> str:
    return read_text(path, f"prompt_template={path}", "--prompt-template")


def with_backend_options(function: Callable[..., None], backends: Backends) -> Callable[..., None]:
    """Add the options of the installed backends to a command; the command receives only those that were given."""
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
        # An option that was not given is None, or an empty list where it may be given several times.
        given = {n: value for n, value in arguments.items() if n not in added or value not in (None, [])}
        function(**given)

    command.__signature__ = inspect.Signature([*own, *added.values()])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*own, *added.values()]}
    command.__doc__ = function.__doc__
    return command


run = with_backend_options(run_command, find_backends())
