"""`asd-data train-tokenizer`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece


def train_tokenizer_command(
    input: Annotated[list[str], typer.Option(help="Files, folders or globs with text.")],
    output_dir: Annotated[Path, typer.Option(help="Output folder, a Hugging Face tokenizer folder.")],
    vocab_size: Annotated[int, typer.Option(min=300, help="Vocabulary size, with special and byte tokens.")],
    model_type: Annotated[
        Literal["bpe", "unigram"], typer.Option(help="Algorithm of SentencePiece.")
    ] = "bpe",
    json_key: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    character_coverage: Annotated[
        float,
        typer.Option(
            min=0.9, max=1.0, help="Share of characters with their own token; the rest become bytes."
        ),
    ] = 0.9995,
    sample_bytes: Annotated[
        int, typer.Option(min=1000, help="Bytes of text to train on, from the start of the input.")
    ] = (20_000_000),
    num_threads: Annotated[int, typer.Option(min=1, help="Number of threads.")] = 2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
) -> None:
    """Train a SentencePiece tokenizer with the settings of LLaMA."""
    training = TokenizerTraining(vocab_size, model_type, character_coverage, sample_bytes, num_threads)
    folder = train_sentencepiece(input, json_key, output_dir, training, overwrite)
    log(f"wrote {folder}: {vocab_size} tokens")
