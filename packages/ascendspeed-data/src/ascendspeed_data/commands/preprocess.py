"""`asd-data preprocess`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.column_names import columns_of_flag
from ascendspeed_data.command_line import log
from ascendspeed_data.hub_files import data_paths, local_path
from ascendspeed_data.preprocess import check_options, preprocess_dataset
from ascendspeed_data.preprocessing.job import PreprocessJob
from ascendspeed_data.preprocessing.report import report
from ascendspeed_data.template_values import DATE_HELP, KWARGS_HELP


def preprocess_command(
    output_prefix: Annotated[
        Path,
        typer.Option(
            help="Text becomes <prefix>_<column>_document.bin, .idx and .manifest.json; samples become three "
            "arrays <prefix>_packed_<array>_document."
        ),
    ],
    tokenizer_name_or_path: Annotated[
        Path, typer.Option(help="Tokenizer folder, tokenizer.json or SentencePiece model.")
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(
            help="Files, folders or globs: jsonl, json, csv, txt (also .gz or .zst), parquet, arrow."
        ),
    ] = None,
    tokenizer_type: Annotated[
        str, typer.Option(help="PretrainedFromHF, or SentencePieceTokenizer to require tokenizer.model.")
    ] = "PretrainedFromHF",
    tokenizer_not_use_fast: Annotated[
        bool,
        typer.Option(
            "--tokenizer-not-use-fast",
            help="Do not use gigatoken; this is several times slower and gives the same ids.",
        ),
    ] = False,
    json_key: Annotated[
        list[str] | None,
        typer.Option(
            "--json-key",
            "--json-keys",
            help="Columns to tokenize; one dataset each. [default: text]",
        ),
    ] = None,
    handler_name: Annotated[
        str,
        typer.Option(
            help="Turns records into documents or samples: a name of `asd-data handlers`, or module:Class."
        ),
    ] = "GeneralPretrainHandler",
    hf_datasets_params: Annotated[
        Path | None,
        typer.Option(help="JSON file with arguments of datasets.load_dataset; replaces --input."),
    ] = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming", help="Stream the dataset of --hf-datasets-params; --input always streams."
        ),
    ] = False,
    append_eod: Annotated[
        bool,
        typer.Option("--append-eod/--no-append-eod", help="End each document with the end-of-sequence id."),
    ] = True,
    seq_length: Annotated[
        int | None,
        typer.Option(
            min=2, help="Length of training sequences in tokens; --pack fills sequences of this length."
        ),
    ] = None,
    pack: Annotated[
        bool, typer.Option("--pack", help="Pack several samples into each sequence of --seq-length.")
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="File with a chat template to use instead of the tokenizer's, or the name of one of the tokenizer's."
        ),
    ] = None,
    parse_special: Annotated[
        bool,
        typer.Option(
            "--parse-special",
            help="Read special pieces that records of samples spell, such as <|im_end|> in a message, as control; "
            "without it they are text.",
        ),
    ] = False,
    chat_template_kwargs: Annotated[str | None, typer.Option(help=KWARGS_HELP)] = None,
    chat_template_date: Annotated[
        str | None,
        typer.Option(
            help=f"{DATE_HELP} [default: templates have no strftime_now; some fall back to a fixed day]"
        ),
    ] = None,
    reasoning: Annotated[
        str,
        typer.Option(
            help="Thoughts of answers: keep learns each as it is served, in a sample of its own where the template "
            "drops it later; drop takes all off; last keeps those after the last question, one sample a conversation."
        ),
    ] = "keep",
    columns: Annotated[
        list[str] | None,
        typer.Option(help="NAME=COLUMN,...: the handler reads COLUMN of the input as its column NAME."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes; does not change the output.")] = 1,
    shard_size: Annotated[
        int,
        typer.Option(min=1, help="KiB of input that a process takes at a time; does not change the output."),
    ] = 4096,
    dataset_impl: Annotated[str, typer.Option(help="File format; only mmap is supported.")] = "mmap",
    log_interval: Annotated[
        int,
        typer.Option(
            min=1,
            help="Minimum number of documents (and ten seconds) between two progress lines.",
        ),
    ] = 100,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing outputs and discard an interrupted run.")
    ] = False,
) -> None:
    """Tokenize text into .bin/.idx files for training, with a manifest.

    Run the same command again to resume an interrupted run.
    """
    check_options(dataset_impl)
    if hf_datasets_params is not None and input:
        log("--input has no effect, because --hf-datasets-params is given")
    job = PreprocessJob(
        inputs=tuple(path for one in input or () for path in data_paths(one, "--input")),
        output_prefix=output_prefix,
        tokenizer=local_path(tokenizer_name_or_path, "tokenizer", "--tokenizer-name-or-path"),
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
        parse_special=parse_special,
        chat_template_kwargs=chat_template_kwargs,
        chat_template_date=chat_template_date,
        reasoning=reasoning,
        columns=tuple(columns_of_flag(columns or ()).items()),
        workers=workers,
        shard_bytes=shard_size << 10,
        overwrite=overwrite,
    )
    manifests = preprocess_dataset(job, log_interval)
    report(job, manifests)
