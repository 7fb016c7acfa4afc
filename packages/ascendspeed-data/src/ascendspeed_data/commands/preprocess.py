"""`asd-data preprocess`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.preprocess import PreprocessJob, check_options, preprocess


def preprocess_command(
    input: Annotated[
        list[str], typer.Option(help="Files, folders or globs: jsonl, json, csv, txt, parquet, arrow.")
    ],
    output_prefix: Annotated[
        Path, typer.Option(help="Writes <prefix>_<column>_document.bin, .idx, .manifest.json.")
    ],
    tokenizer_name_or_path: Annotated[Path, typer.Option(help="Tokenizer folder, or a SentencePiece model.")],
    tokenizer_type: Annotated[str, typer.Option(help="Kind of tokenizer.")] = "PretrainedFromHF",
    tokenizer_not_use_fast: Annotated[
        bool,
        typer.Option(
            "--tokenizer-not-use-fast",
            help="Accepted for old scripts: ids are exact either way, nothing changes.",
        ),
    ] = False,
    json_key: Annotated[
        list[str] | None,
        typer.Option("--json-key", "--json-keys", help="Columns; one dataset each. [default: text]"),
    ] = None,
    handler_name: Annotated[
        str, typer.Option(help="How a record becomes documents.")
    ] = "GeneralPretrainHandler",
    append_eod: Annotated[
        bool,
        typer.Option("--append-eod/--no-append-eod", help="End each document with the end-of-sequence id."),
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the output does not depend on it.")] = 1,
    dataset_impl: Annotated[str, typer.Option(help="Layout of the files; mmap is the only one.")] = "mmap",
    log_interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two lines of progress.")
    ] = 10.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")] = False,
) -> None:
    """Tokenize text into the .bin/.idx files that training reads, with a manifest of what made them."""
    check_options(dataset_impl)
    job = PreprocessJob(
        inputs=tuple(input),
        output_prefix=output_prefix,
        tokenizer=tokenizer_name_or_path,
        tokenizer_type=tokenizer_type,
        json_keys=tuple(json_key or ["text"]),
        handler_name=handler_name,
        append_eod=append_eod,
        workers=workers,
        overwrite=overwrite,
    )
    for key, manifest in preprocess(job, log_interval).items():
        log(
            f"wrote {job.prefix_of(key)}.bin: {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
            f"{manifest.num_text_bytes / manifest.num_tokens:.2f} bytes per token, unigram entropy "
            f"{manifest.unigram_entropy_nats:.3f} nats"
            + (f"; {manifest.num_empty_documents:,} empty skipped" if manifest.num_empty_documents else "")
        )
