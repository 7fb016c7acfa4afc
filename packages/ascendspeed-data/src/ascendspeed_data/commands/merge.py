"""`asd-data merge`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.merge import merge_datasets


def merge_command(
    prefixes: Annotated[
        list[Path], typer.Argument(help="Prefixes of the datasets, in the order of the output.")
    ],
    output_prefix: Annotated[
        Path, typer.Option(help="Prefix of the merged dataset; for samples, without _packed.")
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Merge datasets that have the same tokenizer into one dataset."""
    merged = merge_datasets(prefixes, output_prefix, overwrite)
    info = merged.ids.info
    log(f"wrote {output_prefix}: {info.num_documents:,} documents, {info.num_tokens:,} tokens")
    if merged.manifest is None:
        log("the merged dataset has no manifest, because one of the datasets has none")
