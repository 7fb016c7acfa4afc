"""`asd-ckpt merge-lora`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ascendspeed_ckpt.commands.convert import default_target, open_input, parse_size, plan, run
from ascendspeed_ckpt.config import EXTERNAL_KINDS, ConvertOptions, TargetKind
from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.hub_files import local_path

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource


@options_from(ConvertOptions)
def merge_lora_command(
    lora_load: Annotated[
        Path,
        typer.Option(
            "--lora-load",
            "--adapter",
            help="Folder of the adapter: in peft's format, of a training run, or of AscendSpeed 2023; or a name on a "
            "hub.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")
    ] = False,
    **given: Any,
) -> None:
    """Merge a LoRA adapter into a checkpoint of any kind; the result is of that kind unless --to names another."""
    options = load_config(ConvertOptions, None, given)
    max_shard_bytes = parse_size(options.output.max_shard_size)
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
    from ascendspeed_core.weights.adapters.merge import MergedAdapter

    base = open_input(options)
    adapter = open_adapter(local_path(lora_load, "adapter", "--lora-load"), base.config, base.path)
    adapter.announce(base.path)
    merged = MergedAdapter(base, adapter)
    run(plan(options, merged, max_shard_bytes, kind_of(options, base)), dry_run)


def kind_of(options: ConvertOptions, base: "WeightSource") -> TargetKind:
    """Return the kind to write when `--to` is not given: that of the base, if it can be written."""
    written: tuple[TargetKind, ...] = get_args(TargetKind)
    if options.output.has_layout and base.kind not in EXTERNAL_KINDS:
        return default_target(options, base)
    return next((kind for kind in written if kind == base.kind), "huggingface")
