"""`asd-infer generate`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_core.config.load import NamedRecipe, load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.command_line.progress import Progress
from ascendspeed_data.command_line.stopping import keeping
from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_infer.config import GenerateConfig, LoadedModelConfig, inference_layout
from ascendspeed_infer.engines import NATIVE, check_options, find_engine, refuse_engine_options
from ascendspeed_infer.prompt_file import Format, PromptRecord, read_prompt_file, read_prompts

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource
    from ascendspeed_infer.requests import Completion
    from ascendspeed_infer.text_generator import TextGenerator


RECIPES = Path(__file__).parents[1] / "recipes"


@options_from(GenerateConfig)
def generate(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="Name of a recipe, or a TOML file; flags win over it. `asd-infer recipes` lists them.",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Texts to continue. [default: lines of stdin]")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="File with one prompt per line; of .jsonl files see --prompt-format."),
    ] = None,
    prompt_format: Annotated[
        Format | None,
        typer.Option(
            help="Lines are texts, or JSON: a text, a list of ids, or an object with prompt or prompt_token_ids. "
            "[default: jsonl for a .jsonl file, else text]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per completion.")] = False,
    **given: Any,
) -> None:
    """Continue texts with the model of any checkpoint.

    Completions go to stdout in the order of the prompts; everything else goes to stderr.
    """
    named = None if recipe is None else NamedRecipe(recipe, "generate", RECIPES)
    config = load_config(GenerateConfig, None, given, named=named)
    if not config.sampling.detokenize and not as_json:
        raise ConfigError("--no-detokenize gives ids, which are printed with --json; add it")
    if prompt and prompt_file:
        raise ConfigError("--prompt and --prompt-file were both given; give one")
    if prompt and prompt_format == "jsonl":
        raise ConfigError("--prompt takes texts; give JSON lines by --prompt-file or on stdin")
    is_jsonl = prompt_file is not None and prompt_file.suffix == ".jsonl"
    format_ = prompt_format or ("jsonl" if is_jsonl else "text")
    records = None
    if prompt:
        # One prompt needs no number.
        names = [f"prompt {number}" if len(prompt) > 1 else "" for number in range(1, len(prompt) + 1)]
        records = [PromptRecord(text, where=name) for text, name in zip(prompt, names, strict=True)]
    if prompt_file is not None:
        records = read_prompts(read_prompt_file(prompt_file), format_, str(prompt_file))
    with launched_ranks(config, sys.argv[1:]) as is_rank:
        if is_rank:
            run(config, records, format_, as_json)


@contextmanager
def launched_ranks(config: LoadedModelConfig, arguments: Sequence[str]) -> Iterator[bool]:
    """Check what can be checked without a process group, and start the ranks if there are to be several.

    Yields:
        Whether this process is a rank; the launcher is not.
    """
    from ascendspeed_core.launch import is_worker, launch, planned_world_size, worker_errors

    world_size = planned_world_size(config.launch.nproc_per_node)
    with worker_errors():
        from ascendspeed_core.device import prepare_torch

        is_own = config.engine.engine == NATIVE
        if is_own:
            refuse_engine_options(config, NATIVE)
            inference_layout(config.parallel, world_size)
        prepare_torch(config.launch.device)
        if not is_own:
            check_options(config, find_engine(config.engine.engine))
            if world_size > 1:
                raise ConfigError(
                    f"engine={config.engine.engine} starts the processes of its layout itself, and {world_size} were "
                    "started; start one"
                )
        from ascendspeed_infer.loading import check_source

        check_source(config, is_own)
        is_launcher = world_size > 1 and not is_worker()
        if is_launcher:
            launch("ascendspeed_infer.cli", arguments, config.launch.nproc_per_node, config.launch.device)
        yield not is_launcher


@contextmanager
def opened_model(config: LoadedModelConfig) -> Iterator[tuple["TextGenerator", "WeightSource"] | None]:
    """Load the model with the engine that was asked for; `None` on ranks that have followed the first one."""
    from ascendspeed_core.launch import process_group
    from ascendspeed_core.models.int8 import weights_nbytes
    from ascendspeed_infer.language_model import LanguageModel
    from ascendspeed_infer.loading import open_model_source, open_with, wanted_dtype

    if config.engine.engine != NATIVE:
        with open_with(find_engine(config.engine.engine), config) as opened:
            yield opened
        return
    is_zero = config.parallel.resolved_zero_stage() is not None
    with process_group(config.launch.device, even_alone=is_zero) as (world, device):
        source = open_model_source(config)
        dtype = wanted_dtype(config, source)
        tokenizer = config.tokenizer.tokenizer_name_or_path
        quantization = config.precision.weight_quantization
        model = LanguageModel.from_source(
            source,
            tokenizer,
            device.kind,
            dtype,
            config.parallel,
            weight_quantization=quantization,
            needs_tokenizer=config.needs_tokenizer,
        )
        if world.rank == 0:
            size = f"{source.config.num_parameters:,} parameters ({source.kind})"
            adapter = f", adapter {config.adapter.lora_load}" if config.adapter.lora_load else ""
            held = f"{weights_nbytes(model.model) / 1e6:,.1f} MB of weights on this device"
            integers = " with int8 matrices" if quantization == "int8" else ""
            log(f"model: {size}{adapter}, {dtype}{integers}, {held}, {model.mesh.layout}")
        with model.lead_or_follow() as leads:
            yield (model, source) if leads else None


def run(config: GenerateConfig, records: list[PromptRecord] | None, format_: Format, as_json: bool) -> None:
    """Generate; the first rank reads stdin and prints, the others follow it."""
    with opened_model(config) as opened:
        if opened is None:
            return
        model, _ = opened
        if records is None:
            records = read_prompts(_read_stdin(), format_, "stdin")
        if as_json:
            check_names(records)
        each, seed = config.sampling.num_return_sequences, config.sampling.seed
        completions = model.completions(
            [one.prompt for one in records],
            seeds=[seed if one.seed is None else one.seed for one in records],
            names=[one.where for one in records],
            **config.sampling.model_dump(exclude_unset=True),
        )
        started, count, printed = time.perf_counter(), 0, 0
        total = each * len(records)
        with (
            keeping(lambda: f"{printed} of {total} completions were printed, in the order of the prompts"),
            Progress("generating", total, "completions") as progress,
        ):
            for one, several in zip(records, completions, strict=True):
                count += sum(len(completion.token_ids) for completion in several)
                for completion in several:
                    print(_json_of(completion, one) if as_json else completion.text, flush=True)
                    printed += 1
                progress.advance(each)
        seconds = time.perf_counter() - started
        log(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s")


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"stdin cannot be read: it is not {error.encoding} ({error.reason} at byte {error.start}); give UTF-8"
        ) from None


def check_names(records: Sequence[PromptRecord]) -> None:
    """Refuse a field of a prompt's line that has the name of a field of the answer."""
    from ascendspeed_infer.requests import Completion

    names = {field.name for field in fields(Completion)}
    for number, one in enumerate(records, 1):
        taken = sorted(names & one.extra_fields.keys())
        if taken:
            where = one.where or f"prompt {number}"
            raise DataError(f"{where}: {taken[0]} is a field of the answer; rename it, or leave --json out")


def _json_of(completion: "Completion", record: PromptRecord) -> str:
    """Return a completion as JSON, with what its prompt's line held, without what was not asked for."""
    answer = {**record.extra_fields, **asdict(completion)}
    found = {name: one for name, one in answer.items() if one is not None}
    return json.dumps(found, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
