"""Tokenizers: a `tokenizer.json`, or a SentencePiece `tokenizer.model`.

SentencePiece itself encodes with a `tokenizer.model`. transformers would convert it first, and the conversion drops a
leading space and merges double spaces differently, so models trained with SentencePiece would get other ids.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ascendspeed_data.added_tokens import TextPart
from ascendspeed_data.errors import ConfigError, DataError, did_you_mean, not_downloaded
from ascendspeed_data.json_tokenizer import JsonTokenizer
from ascendspeed_data.sentencepiece_tokenizer import SentencePieceTokenizer
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer_config import TEMPLATES_FOLDER, TokenizerFiles

TOKENIZER_TYPES = ("PretrainedFromHF", "SentencePieceTokenizer", "HuggingFaceTokenizer")
"""Names of AscendSpeed 2023 and Megatron-LM. SentencePieceTokenizer requires a tokenizer.model."""

DEFINING_FILES = ("tokenizer.json", "tokenizer.model")
"""Files that define the ids; the first one found is used."""

OTHER_VOCABULARIES = (
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "qwen.tiktoken",
    "tiktoken.model",
    "spiece.model",
)
"""Files of tokenizers that transformers opens and turns into a `tokenizer.json`."""

TOKENIZER_FILES = (
    *DEFINING_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""All files of a Hugging Face tokenizer."""


class Tokenizer(Protocol):
    """Encodes text into ids and decodes ids.

    Attributes:
        path: folder or file.
        kind: `sentencepiece` or `tokenizer.json`.
        vocab_size: all ids are smaller.
        bos_id: beginning-of-sequence id, or `None`.
        eos_id: end-of-sequence id, or `None`.
        unk_id: id of unknown text, or `None`.
        pad_id: padding id, or `None`.
        add_bos: whether `encode` begins with `bos_id`.
        prefix_ids: ids that the tokenizer adds before a text, most often BOS or nothing.
        suffix_ids: ids that it adds after a text.
        special_ids: id of each special token.
        added_ids: id of each token that a text is split at before it is encoded, special or not.
        chat_template: Jinja template for conversations, or `None`.
        named_chat_templates: further templates by name; `tool_use` is for conversations with tools.
        template_values: further values that its chat templates get.
        fingerprint: SHA-256 of everything that defines the ids.
    """

    path: Path
    kind: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    prefix_ids: list[int]
    suffix_ids: list[int]
    special_ids: dict[str, int]
    added_ids: dict[str, int]
    chat_template: str | None
    named_chat_templates: dict[str, str]
    template_values: TemplateValues
    fingerprint: str

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        Added tokens in the text become their ids. The control pieces of a SentencePiece model are plain text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""
        ...

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts, without `prefix_ids` and `suffix_ids`."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text, without prefix and suffix, and the character range (begin, end) of each."""
        ...

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and character ranges of a rendered conversation, in which all special tokens become their ids."""
        ...

    def encode_literals(
        self, text: str, literals: Mapping[str, str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and ranges of a rendered conversation in which some characters stand for texts, not for control.

        Args:
            text: special tokens in it become their ids.
            literals: by such a character the text that it stands for, most often the spelling of a special token.
        """
        ...

    def split_rendered(self, text: str) -> list[TextPart] | None:
        """Return parts of a rendered conversation that `encode` encodes each by itself, or `None` if it cannot."""
        ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...


def load_tokenizer(path: Path, kind: str = "PretrainedFromHF") -> SentencePieceTokenizer | JsonTokenizer:
    """Open a tokenizer folder, a bare SentencePiece model, or a `tokenizer.json`.

    Args:
        path: a folder with `tokenizer.json` or `tokenizer.model`, or one of these files. If a folder has both,
            `tokenizer.json` is used. Code that a config names (`auto_map`) never runs.
        kind: one of `KINDS`.

    Raises:
        ConfigError: `kind` is unknown.
        DataError: the file is missing or not a tokenizer.
    """
    if kind not in TOKENIZER_TYPES:
        raise ConfigError(
            f"tokenizer_type={kind} is unknown; choose from {', '.join(TOKENIZER_TYPES)}"
            f"{did_you_mean(kind, TOKENIZER_TYPES)}"
        )
    try:
        opened = _open_tokenizer(path, only_sentencepiece=kind == "SentencePieceTokenizer")
    except OSError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error.strerror or error}") from None
    if opened is not None:
        return opened
    if path.is_dir() and any((path / name).is_file() for name in OTHER_VOCABULARIES):
        found = next(name for name in OTHER_VOCABULARIES if (path / name).is_file())
        raise DataError(
            f"tokenizer {path} has neither tokenizer.json nor tokenizer.model, only {found}; write a tokenizer.json "
            f"beside it with transformers: AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained({str(path)!r})"
        )
    state = "has neither tokenizer.json nor tokenizer.model" if path.is_dir() else "does not exist"
    hint = "" if path.is_dir() else not_downloaded(path)
    raise DataError(f"tokenizer {path} {state}; " + (hint or "check --tokenizer-name-or-path"))


def _open_tokenizer(path: Path, only_sentencepiece: bool) -> SentencePieceTokenizer | JsonTokenizer | None:
    if path.is_file():
        if path.suffix == ".json" and not only_sentencepiece:
            return JsonTokenizer(path, path, TokenizerFiles(path.parent))
        return SentencePieceTokenizer(path, path, TokenizerFiles(path.parent))
    for name in DEFINING_FILES[1:] if only_sentencepiece else DEFINING_FILES:
        if (path / name).is_file():
            files = TokenizerFiles.read(path)
            if name == "tokenizer.json":
                return JsonTokenizer(path, path / name, files)
            return SentencePieceTokenizer(path, path / name, files)
    return None


def tokenizer_files(source: Path) -> list[Path]:
    """Return the files of a tokenizer; `source` is a folder or a file."""
    if source.is_file():
        return [source]
    templates = sorted((source / TEMPLATES_FOLDER).glob("*.jinja"))
    return [*(source / name for name in TOKENIZER_FILES if (source / name).is_file()), *templates]


def copy_tokenizer(source: Path, folder: Path) -> list[Path]:
    """Copy the files of a tokenizer (a folder, or one file) into `folder`, and return the copies."""
    files = tokenizer_files(source)
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for file in files:
        name = file.name if source.is_file() else str(file.relative_to(source))
        if source.is_file():
            name = "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).is_file() or not file.samefile(folder / name):
            shutil.copyfile(file, folder / name)
        copies.append(folder / name)
    return copies
