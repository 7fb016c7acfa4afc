"""Train a SentencePiece tokenizer and save it as a Hugging Face tokenizer folder."""

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, DataError
from ascendspeed_data.reading.inputs import find_inputs
from ascendspeed_data.reading.records import read_records, text_of

MAX_SENTENCE_BYTES = 4096
"""SentencePiece skips longer sentences, so texts are split at line ends."""


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of the training.

    Attributes:
        vocab_size: vocabulary size, with special and byte tokens.
        model_type: algorithm of SentencePiece.
        character_coverage: share of characters with their own token; other characters become bytes.
        sample_bytes: bytes of text to train on, from the start of the input.
        num_threads: threads of SentencePiece.
    """

    vocab_size: int
    model_type: Literal["bpe", "unigram"] = "bpe"
    character_coverage: float = 0.9995
    sample_bytes: int = 20_000_000
    num_threads: int = 2


def train_sentencepiece(
    inputs: Sequence[str], json_key: str, folder: Path, training: TokenizerTraining, overwrite: bool = False
) -> Path:
    """Train a SentencePiece tokenizer and return its folder.

    Other settings are LLaMA's: no normalisation, each digit alone, unknown characters as bytes, ids 0 `<unk>`,
    1 `<s>`, 2 `</s>`. The same input and settings give the same bytes.

    Args:
        inputs: files, folders and globs.
        json_key: column with the text.
        folder: output folder.
        training: settings of the training.
        overwrite: replace an existing folder.

    Raises:
        AscendSpeedError: the folder exists, or the text is too short for `vocab_size`.
    """
    import sentencepiece

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())) and not overwrite:
        raise AscendSpeedError(
            f"output_dir={folder} already exists; give --overwrite to replace it, or another folder"
        )
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(inputs, json_key, training.sample_bytes),
            model_writer=written,
            vocab_size=training.vocab_size,
            model_type=training.model_type,
            character_coverage=training.character_coverage,
            num_threads=training.num_threads,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_training_problem(training, " ".join(str(error).split()))) from None
    scratch = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "tokenizer.model").write_bytes(written.getvalue())
    _write_configs(scratch)
    if folder.exists():
        shutil.rmtree(folder)
    return scratch.rename(folder)


def _training_problem(training: TokenizerTraining, reason: str) -> str:
    """Return our message for an error of SentencePiece's trainer."""
    limit = re.search(r"Vocabulary size too high.* a value <= (\d+)", reason)
    if limit:
        return f"vocab_size={training.vocab_size} is too large for this text; give at most {limit[1]}, or more text"
    return f"vocab_size={training.vocab_size} does not work: {reason}; choose another size or give more text"


def _sentences(inputs: Sequence[str], json_key: str, sample_bytes: int) -> Iterator[str]:
    """Yield sentences short enough for SentencePiece, up to `sample_bytes` in all."""
    taken = 0
    for path in find_inputs(inputs):
        for number, record in enumerate(read_records(path, [json_key]), 1):
            try:
                text = text_of(record, json_key)
            except DataError as error:
                raise DataError(f"{path}: record {number}: {error}") from None
            for sentence in _split_text(text):
                size = _size_of(sentence, f"{path}: record {number}")
                if taken + size > sample_bytes:
                    log(f"training on the first {taken:,} bytes of text (--sample-bytes)")
                    return
                taken += size
                yield sentence
    log(f"training on all {taken:,} bytes of text")


def _size_of(text: str, where: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise DataError(f"{where}: half a surrogate pair is not valid text; repair the record") from None


def _split_text(text: str) -> Iterator[str]:
    """Split a text at line ends, and split longer lines anywhere."""
    characters = MAX_SENTENCE_BYTES // 4
    sentence = ""
    for line in text.splitlines(keepends=True):
        if sentence and len(sentence) + len(line) > characters:
            yield sentence
            sentence = ""
        sentence += line
        while len(sentence) > characters:
            yield sentence[:characters]
            sentence = sentence[characters:]
    if sentence:
        yield sentence


def _write_configs(folder: Path) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "sp_model_kwargs": {},
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
