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

from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.command_line.progress import Progress
from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_infer.config import GenerateConfig, LoadedModelConfig, inference_layout
from ascendspeed_infer.engines import OWN, check_options, find_engine
from ascendspeed_infer.prompt_file import Format, PromptRecord, asked_in, text_of

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource
    from ascendspeed_infer.requests import Completion
    from ascendspeed_infer.text_generator import TextGenerator


@options_from(GenerateConfig)
def generate(
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

    The continuations go to stdout, one after the other; everything else goes to stderr.
    """
    config = load_config(GenerateConfig, None, given)
    if not config.sampling.detokenize and not as_json:
        raise ConfigError("--no-detokenize gives ids, which are printed with --json; add it")
    if prompt and prompt_file:
        raise ConfigError("--prompt and --prompt-file were both given; give one")
    if prompt and prompt_format == "jsonl":
        raise ConfigError("--prompt takes texts; give JSON lines by --prompt-file or on stdin")
    is_jsonl = prompt_file is not None and prompt_file.suffix == ".jsonl"
    format_ = prompt_format or ("jsonl" if is_jsonl else "text")
    asked = [PromptRecord(text) for text in prompt] if prompt else None
    if prompt_file is not None:
        asked = asked_in(text_of(prompt_file), format_, str(prompt_file))
    with on_every_process(config, sys.argv[1:]) as is_here:
        if is_here:
            run(config, asked, format_, as_json)


@contextmanager
def on_every_process(config: LoadedModelConfig, arguments: Sequence[str]) -> Iterator[bool]:
    """Check what can be checked without a process group, and start the processes if there are to be several.

    Yields:
        Whether this process takes part; the launcher itself does not.
    """
    from ascendspeed_core.launch import is_worker, launch, planned_world_size, worker_errors

    world_size = planned_world_size(config.launch.nproc_per_node)
    with worker_errors():
        from ascendspeed_core.device import prepare_torch

        is_own = config.engine.engine == OWN
        if is_own:
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
def opened_model(config: LoadedModelConfig) -> Iterator[tuple["TextGenerator", "WeightSource"]]:
    """Load the model with the engine that was asked for; under the own one on this process, with the others."""
    from ascendspeed_core.launch import process_group
    from ascendspeed_core.models.int8 import weights_nbytes
    from ascendspeed_infer.language_model import LanguageModel
    from ascendspeed_infer.loading import open_model_source, open_with, wanted_dtype

    if config.engine.engine != OWN:
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
            source, tokenizer, device.kind, dtype, config.parallel, weight_quantization=quantization
        )
        if world.rank == 0:
            size = f"{source.config.num_parameters:,} parameters ({source.kind})"
            adapter = f", adapter {config.adapter.lora_load}" if config.adapter.lora_load else ""
            held = f"{weights_nbytes(model.model) / 1e6:,.1f} MB of weights on this device"
            integers = " with int8 matrices" if quantization == "int8" else ""
            log(f"model: {size}{adapter}, {dtype}{integers}, {held}, {model.mesh.layout}")
        yield model, source


def run(config: GenerateConfig, asked: list[PromptRecord] | None, format_: Format, as_json: bool) -> None:
    """Generate on this process, with the others if there are any; the first one reads stdin and prints."""
    with opened_model(config) as (model, _):
        is_first = model.is_first
        if asked is None:
            asked = model.from_first(lambda: asked_in(sys.stdin.read(), format_, "stdin"))
        if as_json:
            check_names(asked)
        each, seed = config.sampling.num_return_sequences, config.sampling.seed
        completions = model.completions(
            [one.prompt for one in asked],
            seeds=[seed if one.seed is None else one.seed for one in asked],
            **config.sampling.model_dump(exclude_unset=True),
        )
        started, count = time.perf_counter(), 0
        with Progress("generating", each * len(asked), "completions", quiet=not is_first) as progress:
            for one, several in zip(asked, completions, strict=True):
                count += sum(len(completion.token_ids) for completion in several)
                for completion in several if is_first else ():
                    print(_json_of(completion, one) if as_json else completion.text, flush=True)
                progress.advance(each)
        if is_first:
            seconds = time.perf_counter() - started
            log(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s")


def check_names(asked: Sequence[PromptRecord]) -> None:
    """Refuse what a line holds beside its prompt under a name of the answer's."""
    from ascendspeed_infer.requests import Completion

    names = {field.name for field in fields(Completion)}
    for number, one in enumerate(asked, 1):
        taken = sorted(names & one.beside.keys())
        if taken:
            raise DataError(
                f"prompt {number}: {taken[0]} is a name of the answer's; rename it, or leave --json out"
            )


def _json_of(completion: "Completion", asked: PromptRecord) -> str:
    """Return a completion as JSON, with what its prompt's line held, without what was not asked for."""
    answer = {**asked.beside, **asdict(completion)}
    return json.dumps({name: one for name, one in answer.items() if one is not None}, ensure_ascii=False)
