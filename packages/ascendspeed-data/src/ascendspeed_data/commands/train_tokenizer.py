"""`asd-data train-tokenizer`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.train_tokenizer import TokenizerTraining, train_tokenizer


def train_tokenizer_command(
    input: Annotated[list[str], typer.Option(help="Files, folders or globs with text.")],
    output_dir: Annotated[Path, typer.Option(help="Folder to write: a Hugging Face tokenizer.")],
    vocab_size: Annotated[int, typer.Option(min=300, help="Pieces, special and byte pieces included.")],
    model_type: Annotated[
        Literal["bpe", "unigram"], typer.Option(help="How the vocabulary is built.")
    ] = "bpe",
    json_key: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    character_coverage: Annotated[
        float, typer.Option(min=0.9, max=1.0, help="Share of characters with pieces of their own.")
    ] = 0.9995,
    sample_bytes: Annotated[
        int, typer.Option(min=1000, help="Text to train on, from the start of the input.")
    ] = (20_000_000),
    num_threads: Annotated[int, typer.Option(min=1, help="Threads of the trainer.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
) -> None:
    """Train a SentencePiece tokenizer with LLaMA's settings on text."""
    training = TokenizerTraining(vocab_size, model_type, character_coverage, sample_bytes, num_threads)
    folder = train_tokenizer(input, json_key, output_dir, training, overwrite)
    log(f"wrote {folder}: {vocab_size} pieces")
