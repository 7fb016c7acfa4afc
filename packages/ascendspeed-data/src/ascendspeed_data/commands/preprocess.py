"""`asd-data preprocess`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.job import PreprocessJob
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.preprocess import check_options, preprocess


def preprocess_command(
    output_prefix: Annotated[
        Path,
        typer.Option(
            help="Writes <prefix>_<column>_document.bin, .idx, .manifest.json; of samples three arrays as "
            "<prefix>_packed_<array>_document."
        ),
    ],
    tokenizer_name_or_path: Annotated[
        Path, typer.Option(help="Tokenizer folder, tokenizer.json, or SentencePiece model.")
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Files, folders or globs: jsonl, json, csv, txt, each also .gz or .zst; parquet, arrow."
        ),
    ] = None,
    tokenizer_type: Annotated[
        str, typer.Option(help="PretrainedFromHF, or SentencePieceTokenizer to insist on tokenizer.model.")
    ] = "PretrainedFromHF",
    tokenizer_not_use_fast: Annotated[
        bool,
        typer.Option(
            "--tokenizer-not-use-fast",
            help="Leave gigatoken out: several times slower, the ids are the same.",
        ),
    ] = False,
    json_key: Annotated[
        list[str] | None,
        typer.Option("--json-key", "--json-keys", help="Columns; one dataset each. [default: text]"),
    ] = None,
    handler_name: Annotated[
        str,
        typer.Option(help="How a record becomes documents: a name of `asd-data handlers`, or module:Class."),
    ] = "GeneralPretrainHandler",
    hf_datasets_params: Annotated[
        Path | None,
        typer.Option(help="JSON file with arguments of datasets.load_dataset; takes the place of --input."),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Stream the dataset of --hf-datasets-params; files always are."),
    ] = False,
    append_eod: Annotated[
        bool,
        typer.Option("--append-eod/--no-append-eod", help="End each document with the end-of-sequence id."),
    ] = True,
    seq_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a training sequence; with --pack the length that is filled."),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Fill sequences of --seq-length from several samples.")
    ] = False,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template in place of the tokenizer's own.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the output does not depend on it.")] = 1,
    shard_size: Annotated[
        int, typer.Option(min=1, help="KiB of input in one piece of work; the output does not depend on it.")
    ] = 4096,
    dataset_impl: Annotated[str, typer.Option(help="Layout of the files; mmap is the only one.")] = "mmap",
    log_interval: Annotated[
        int, typer.Option(min=1, help="Documents between two lines of progress, ten seconds apart at least.")
    ] = 100,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace outputs that exist; discard an unfinished run.")
    ] = False,
) -> None:
    """Tokenize text into the .bin/.idx files that training reads, with a manifest of what made them.

    After a crash the same command goes on where the run was cut off.
    """
    check_options(dataset_impl)
    if hf_datasets_params is not None and input:
        log("--input is not read: --hf-datasets-params names the data")
    job = PreprocessJob(
        inputs=tuple(input or ()),
        output_prefix=output_prefix,
        tokenizer=tokenizer_name_or_path,
        tokenizer_type=tokenizer_type,
        use_fast=not tokenizer_not_use_fast,
        json_keys=tuple(json_key or ()),
        handler_name=handler_name,
        append_eod=append_eod,
        seq_length=seq_length,
        pack=pack,
        chat_template=chat_template,
        hf_datasets_params=hf_datasets_params,
        streaming=streaming,
        workers=workers,
        shard_bytes=shard_size << 10,
        overwrite=overwrite,
    )
    for key, manifest in preprocess(job, log_interval).items():
        prefix = job.prefix_of(key) if key else job.packed_prefix("*")
        log(f"wrote {prefix}.bin: {summary(manifest)}")


def summary(manifest: DatasetManifest) -> str:
    """Return the counts of a dataset in one line."""
    text = (
        f"{manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
        f"{manifest.num_text_bytes / max(manifest.num_tokens, 1):.2f} bytes per token, unigram entropy "
        f"{manifest.unigram_entropy_nats:.3f} nats"
    )
    if manifest.kind != "text":
        samples = "chosen and rejected" if manifest.kind == "pairs" else f"{manifest.num_sequences:,} samples"
        text += f"; {samples}, {manifest.num_trained_tokens:,} tokens learned"
    if manifest.num_empty_documents:
        what = "with two answers alike" if manifest.kind == "pairs" else "empty"
        text += f"; {manifest.num_empty_documents:,} {what} skipped"
    if manifest.pack is not None:
        pack = manifest.pack
        text += (
            f"; packed to {pack.seq_length}: padding {pack.padding_share:.1%} instead of "
            f"{pack.padding_share_unpacked:.1%}"
        )
        if pack.num_cut_samples or pack.num_dropped_samples:
            text += (
                f"; {pack.num_cut_samples:,} samples were longer and are cut, {pack.num_dropped_samples:,} had nothing "
                "left to learn and are dropped"
            )
    elif manifest.seq_length is not None:
        text += f"; {manifest.num_tokens // manifest.seq_length:,} sequences of {manifest.seq_length}"
    return text
