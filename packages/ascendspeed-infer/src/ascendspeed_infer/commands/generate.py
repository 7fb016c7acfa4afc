"""`asd-infer generate`."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.config import GenerateConfig, inference_layout


@options_from(GenerateConfig)
def generate(
    prompt: Annotated[
        list[str] | None, typer.Option(help="Texts to continue. [default: lines of stdin]")
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with one prompt per line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per completion.")] = False,
    **given: Any,
) -> None:
    """Continue texts with the model of any checkpoint.

    The continuations go to stdout, one after the other; everything else goes to stderr.
    """
    config = load_config(GenerateConfig, None, given)
    from ascendspeed_core.launch import is_worker, launch, planned_world_size, worker_errors

    world_size = planned_world_size(config.launch.nproc_per_node)
    with worker_errors():
        from ascendspeed_core.device import prepare_torch

        inference_layout(config.parallel, world_size)
        prepare_torch(config.launch.device)
        from ascendspeed_infer.opening import check_source

        check_source(config)
        if world_size > 1 and not is_worker():
            prompts = read_prompts(prompt, prompt_file)
            arguments = [*sys.argv[1:], *([] if prompt or prompt_file else ["--prompt", *prompts])]
            launch("ascendspeed_infer.cli", arguments, config.launch.nproc_per_node, config.launch.device)
            return
        run(config, read_prompts(prompt, prompt_file), as_json)


def run(config: GenerateConfig, prompts: list[str], as_json: bool) -> None:
    """Generate on this process, with the others if there are any; the first one prints."""
    from ascendspeed_core.launch import process_group
    from ascendspeed_infer.language_model import LanguageModel
    from ascendspeed_infer.opening import open_model_source, wanted_dtype

    with process_group(config.launch.device) as (world, device):
        source, beside = open_model_source(config)
        dtype = wanted_dtype(config, source)
        tokenizer = config.tokenizer.tokenizer_name_or_path
        model = LanguageModel.from_source(source, tokenizer, device.kind, dtype, config.parallel, beside)
        if world.rank == 0:
            log(
                f"model: {source.config.num_parameters:,} parameters ({source.kind}), {dtype}, {model.mesh.layout}"
            )
        started, count = time.perf_counter(), 0
        for text in prompts:
            (completion,) = model.generate(text, **config.sampling.model_dump(exclude_unset=True))
            count += len(completion.token_ids)
            if world.rank == 0:
                print(
                    json.dumps(asdict(completion), ensure_ascii=False) if as_json else completion.text,
                    flush=True,
                )
        if world.rank == 0:
            seconds = time.perf_counter() - started
            log(f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s")


def read_prompts(given: list[str] | None, file: Path | None) -> list[str]:
    """Return the prompts from the one place that was named; without any, from stdin."""
    if given and file:
        raise ConfigError("--prompt and --prompt-file were both given; give one")
    if given:
        return given
    if file is not None:
        if not file.is_file():
            raise AscendSpeedError(f"prompt_file={file} does not exist; check --prompt-file")
        return file.read_text(encoding="utf-8").splitlines()
    prompts = sys.stdin.read().splitlines()
    if not prompts:
        raise ConfigError("no prompt given; give --prompt TEXT, --prompt-file FILE, or lines on stdin")
    return prompts
