"""Tokenizers: a `tokenizer.json`, or a SentencePiece `tokenizer.model`.

SentencePiece itself encodes with a `tokenizer.model`. transformers would convert it first, and the conversion drops a
leading space and merges double spaces differently, so models trained with SentencePiece would get other ids.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError, DataError, did_you_mean

TOKENIZER_TYPES = ("PretrainedFromHF", "SentencePieceTokenizer", "HuggingFaceTokenizer")
"""Names of AscendSpeed 2023 and Megatron-LM. SentencePieceTokenizer requires a tokenizer.model."""

DEFINING_FILES = ("tokenizer.json", "tokenizer.model")
"""Files that define the ids; the first one found is used."""

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


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of several texts.

    Attributes:
        ids: concatenated ids of the texts, int64 or uint32.
        lengths: number of ids of each text, int64.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]

    @classmethod
    def from_lists(cls, encoded: Sequence[Sequence[int]]) -> "TokenBatch":
        """Concatenate lists of ids."""
        lengths = np.fromiter((len(ids) for ids in encoded), np.int64, len(encoded))
        joined = np.empty(int(lengths.sum()), np.int64)
        start = 0
        for ids in encoded:
            joined[start : start + len(ids)] = ids
            start += len(ids)
        return cls(joined, lengths)

    def split(self) -> list[NDArray[Any]]:
        """Return the ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


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
        chat_template: Jinja template for conversations, or `None`.
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
    chat_template: str | None
    fingerprint: str

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text.

        A `tokenizer.json` recognises special tokens in the text; SentencePiece encodes them as plain text.
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

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model with the special tokens of its folder's `tokenizer_config.json`."""

    kind = "sentencepiece"

    def __init__(self, path: Path, model_file: Path, config: dict[str, Any]) -> None:
        import sentencepiece

        self.path = path
        self.chat_template = _chat_template(path, config)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{model_file} is not a SentencePiece model: {error}") from None
        self.vocab_size = int(self._model.vocab_size())
        self.bos_id = self._special(config, "bos_token", self._model.bos_id())
        self.eos_id = self._special(config, "eos_token", self._model.eos_id())
        self.unk_id = self._special(config, "unk_token", self._model.unk_id())
        self.pad_id = self._special(config, "pad_token", self._model.pad_id())
        # SentencePiece never encodes text as control tokens.
        control = [i for i in range(self.vocab_size) if self._model.is_control(i)]
        self.special_ids: dict[str, int] = {self._model.id_to_piece(i): i for i in control}
        self.add_bos = bool(config.get("add_bos_token", bool(config))) and self.bos_id is not None
        self.prefix_ids = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        add_eos = bool(config.get("add_eos_token")) and self.eos_id is not None
        self.suffix_ids = [self.eos_id] if add_eos and self.eos_id is not None else []
        settings = [self.add_bos, True] if add_eos else [self.add_bos]
        self.model_file = model_file
        self.fingerprint = _sha256(model_file.read_bytes(), json.dumps(settings).encode())

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return SentencePiece's ids, with BOS and EOS if the config says so."""
        ids: list[int] = self._model.encode(text)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, on one thread."""
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        return [[*self.prefix_ids, *ids, *self.suffix_ids] for ids in encoded]

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without BOS and EOS, on one thread."""
        encoded: Any = self._model.encode(list(texts), out_type="numpy", num_threads=1)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return TokenBatch(np.concatenate(encoded) if len(encoded) else np.empty(0, np.int32), lengths)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the character range of each.

        If bytes encode a character, all their ranges start at it; only the last range ends after it.
        """
        mapped: Any = self._model.encode(text, out_type="offset_mapping")
        return list(mapped["ids"]), list(mapped["offsets"])

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id."""
        named: list[str] = self._model.id_to_piece([int(i) for i in ids])
        return named

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without control tokens."""
        text: str = self._model.decode([int(i) for i in ids if not self._model.is_control(int(i))])
        return text

    def _special(self, config: dict[str, Any], key: str, default: int) -> int | None:
        if key not in config:
            return default if default >= 0 else None
        token = _token_text(config[key])
        if token is None:
            return None
        number = int(self._model.piece_to_id(token))
        if self._model.id_to_piece(number) != token:
            raise DataError(
                f"{self.path}: {key}={token!r} of tokenizer_config.json is not in tokenizer.model; correct the config"
            )
        return number


class JsonTokenizer:
    """A `tokenizer.json` with the special tokens of its folder's `tokenizer_config.json`."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, json_file: Path, config: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self.path = path
        self.chat_template = _chat_template(path, config)
        content = json_file.read_bytes()
        try:
            self._tokenizer = FastTokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
            raise DataError(f"{json_file} is not a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._special(config, "bos_token")
        self.eos_id = self._special(config, "eos_token")
        self.unk_id = self._special(config, "unk_token")
        self.pad_id = self._special(config, "pad_token")
        self.prefix_ids, self.suffix_ids = self._prefix_and_suffix()
        self.add_bos = self.bos_id is not None and self.prefix_ids[:1] == [self.bos_id]
        self.special_ids = {
            token.content: number
            for number, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.model_file = json_file
        self.fingerprint = _sha256(content)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without prefix and suffix."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return TokenBatch.from_lists([encoding.ids for encoding in encoded])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the character range of each."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id."""
        return [self._tokenizer.id_to_token(int(i)) or f"<{int(i)}>" for i in ids]

    def _prefix_and_suffix(self) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor adds before and after a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise DataError(
            f"{self.path}: the post-processor changes ids inside a text, which is not supported; use another tokenizer"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    @cached_property
    def _ids(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def _special(self, config: dict[str, Any], key: str) -> int | None:
        token = _token_text(config.get(key))
        if token is not None and token not in self._ids:
            raise DataError(
                f"{self.path}: {key}={token!r} of tokenizer_config.json is not in tokenizer.json; correct the config"
            )
        return None if token is None else self._ids[token]


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
    state = "has neither tokenizer.json nor tokenizer.model" if path.is_dir() else "does not exist"
    raise DataError(
        f"tokenizer {path} {state}; check --tokenizer-name-or-path (nothing is downloaded from the Hugging Face hub)"
    )


def _open_tokenizer(path: Path, only_sentencepiece: bool) -> SentencePieceTokenizer | JsonTokenizer | None:
    if path.is_file():
        if path.suffix == ".json" and not only_sentencepiece:
            return JsonTokenizer(path, path, {})
        return SentencePieceTokenizer(path, path, {})
    for name in DEFINING_FILES[1:] if only_sentencepiece else DEFINING_FILES:
        if (path / name).is_file():
            config = _read_config(path)
            if name == "tokenizer.json":
                return JsonTokenizer(path, path / name, config)
            return SentencePieceTokenizer(path, path / name, config)
    return None


def tokenizer_files(source: Path) -> list[Path]:
    """Return the files of a tokenizer; `source` is a folder or a file."""
    if source.is_file():
        return [source]
    return [source / name for name in TOKENIZER_FILES if (source / name).is_file()]


def copy_tokenizer(source: Path, folder: Path) -> list[Path]:
    """Copy the files of a tokenizer (a folder, or one file) into `folder`, and return the copies."""
    files = tokenizer_files(source)
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for file in files:
        name = file.name
        if source.is_file():
            name = "tokenizer.json" if file.suffix == ".json" else "tokenizer.model"
        if not (folder / name).is_file() or not file.samefile(folder / name):
            shutil.copyfile(file, folder / name)
        copies.append(folder / name)
    return copies


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if config.get("tokenizer_class") == "LLaMATokenizer":
        log(f"{path} names LLaMATokenizer, an old name of LlamaTokenizer")
    return config


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template of a folder; if there are several, the one named `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((item["template"] for item in template if item.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    """Return a special token, which a config writes as text or as an object with `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
