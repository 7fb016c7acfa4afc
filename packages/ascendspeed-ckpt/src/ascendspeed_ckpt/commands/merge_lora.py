"""`asd-ckpt merge-lora`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_ckpt.commands.convert import open_input, parse_size, plan, run
from ascendspeed_ckpt.config import ConvertOptions
from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line.options import options_from


@options_from(ConvertOptions)
def merge_lora_command(
    lora_load: Annotated[
        Path,
        typer.Option(
            "--lora-load",
            "--adapter",
            help="Folder of the adapter: in peft's format, of a training run, or of AscendSpeed 2023.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")
    ] = False,
    **given: Any,
) -> None:
    """Merge a LoRA adapter into a checkpoint of any kind, and write the result as any kind."""
    options = load_config(ConvertOptions, None, given)
    max_shard_bytes = parse_size(options.output.max_shard_size)
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
    from ascendspeed_core.weights.adapters.merge import MergedAdapter

    base = open_input(options)
    adapter = open_adapter(lora_load, base.config, base.path)
    adapter.announce(base.path)
    run(plan(options, MergedAdapter(base, adapter), max_shard_bytes), dry_run)
