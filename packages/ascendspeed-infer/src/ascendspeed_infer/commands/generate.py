"""`asd-infer generate`."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.command_line.progress import Progress
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_infer.config import GenerateConfig, LoadedModelConfig, inference_layout

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource
    from ascendspeed_infer.language_model import LanguageModel
    from ascendspeed_infer.requests import Completion

Prompt = str | list[int]
Format = Literal["text", "jsonl"]


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
    prompts: list[Prompt] | None = list(prompt) if prompt else None
    if prompt_file is not None:
        prompts = prompts_of(text_of(prompt_file), format_, str(prompt_file))
    with on_every_process(config, sys.argv[1:]) as is_here:
        if is_here:
            run(config, prompts, format_, as_json)


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

        inference_layout(config.parallel, world_size)
        prepare_torch(config.launch.device)
        from ascendspeed_infer.opening import check_source

        check_source(config)
        is_launcher = world_size > 1 and not is_worker()
        if is_launcher:
            launch("ascendspeed_infer.cli", arguments, config.launch.nproc_per_node, config.launch.device)
        yield not is_launcher


@contextmanager
def opened_model(config: LoadedModelConfig) -> Iterator[tuple["LanguageModel", "WeightSource"]]:
    """Load the model on this process, with the others if there are any."""
    from ascendspeed_core.launch import process_group
    from ascendspeed_infer.language_model import LanguageModel
    from ascendspeed_infer.opening import open_model_source, wanted_dtype

    with process_group(config.launch.device) as (world, device):
        source, beside = open_model_source(config)
        dtype = wanted_dtype(config, source)
        tokenizer = config.tokenizer.tokenizer_name_or_path
        model = LanguageModel.from_source(source, tokenizer, device.kind, dtype, config.parallel, beside)
        if world.rank == 0:
            size = f"{source.config.num_parameters:,} parameters ({source.kind})"
            adapter = f", adapter {config.adapter.lora_load}" if config.adapter.lora_load else ""
            log(f"model: {size}{adapter}, {dtype}, {model.mesh.layout}")
        yield model, source


def run(config: GenerateConfig, prompts: list[Prompt] | None, format_: Format, as_json: bool) -> None:
    """Generate on this process, with the others if there are any; the first one reads stdin and prints."""
    from ascendspeed_infer.sharing import from_first

    with opened_model(config) as (model, _):
        is_first = model.mesh.rank == 0
        if prompts is None:
            prompts = from_first(model.mesh, lambda: prompts_of(sys.stdin.read(), format_, "stdin"))
        each = config.sampling.num_return_sequences
        started, count = time.perf_counter(), 0
        with Progress("generating", each * len(prompts), "completions", quiet=not is_first) as progress:
            for completion in model.completions(prompts, **config.sampling.model_dump(exclude_unset=True)):
                count += len(completion.token_ids)
                if is_first:
                    print(_json_of(completion) if as_json else completion.text, flush=True)
                progress.advance()
        if is_first:
            seconds = time.perf_counter() - started
            log(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s")


def text_of(file: Path) -> str:
    """Return the text of a file of prompts."""
    if not file.is_file():
        raise AscendSpeedError(f"prompt_file={file} does not exist; check --prompt-file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"prompt_file={file} is not UTF-8: {error}") from None


def prompts_of(text: str, format_: Format, where: str) -> list[Prompt]:
    """Return the prompts in lines of text; empty lines of JSON are left out.

    Raises:
        ConfigError: there is none.
        DataError: a line is not JSON, or holds no prompt.
    """
    # Not splitlines, which also cuts at characters that belong to a text.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    prompts: list[Prompt] = list(lines)
    if format_ == "jsonl":
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        prompts = [_prompt_of(line, f"{where}, line {number}") for number, line in numbered]
    if not prompts:
        raise ConfigError(
            f"no prompt given ({where} is empty); give --prompt TEXT, --prompt-file FILE, or lines on stdin"
        )
    return prompts


def _prompt_of(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("prompt", value.get("prompt_token_ids"))
    if isinstance(value, str) or (isinstance(value, list) and all(type(one) is int for one in value)):
        return value
    raise DataError(
        f"{where} holds no prompt; give a text, a list of ids, or an object with prompt or prompt_token_ids"
    )


def _json_of(completion: "Completion") -> str:
    """Return a completion as JSON, without what it has only of other ways to generate."""
    fields = asdict(completion)
    return json.dumps(
        {name: value for name, value in fields.items() if value is not None}, ensure_ascii=False
    )
