"""`asd-data merge`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.merge import merge


def merge_command(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefixes of the datasets, in the order wanted.")],
    output_prefix: Annotated[
        Path, typer.Option(help="Prefix of the new pair; of samples, what stands before _packed.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Join datasets of one tokenizer into one."""
    merged = merge(prefixes, output_prefix, overwrite)
    info = merged.ids.info
    log(f"wrote {output_prefix}: {info.num_documents:,} documents, {info.num_tokens:,} tokens")
    if merged.manifest is None:
        log("no manifest: one of the datasets has none")
