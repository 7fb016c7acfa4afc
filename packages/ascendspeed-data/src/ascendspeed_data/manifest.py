"""The manifest of a dataset: tokenizer, handler, counts and hashes. Training and inference check the tokenizer."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers.base import Kind
from ascendspeed_data.hub import origin_of
from ascendspeed_data.small_files import JsonObject, check_shape, read_json
from ascendspeed_data.template_values import Reasoning
from ascendspeed_data.tokenizer import Tokenizer, tokenizer_files

FORMAT_VERSION = 4


def _from_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 has plain text only, one sequence per document."""
    versions = content["versions"]
    library = "sentencepiece" if content["tokenizer"]["kind"] == "sentencepiece" else "tokenizers"
    return {
        **content,
        "kind": "text",
        "tokenizer": {**content["tokenizer"], "files": {}},
        "encoder": f"{library} {versions.get(library, 'of an unknown version')}",
        "template": "",
        "template_sha256": "",
        "seq_length": None,
        "pack": None,
        "num_sequences": content["num_documents"],
        "num_trained_tokens": content["num_tokens"],
        "files": [],
    }


def _from_version_2(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 does not count what nothing read."""
    return {**content, "unused_columns": {}}


def _from_version_3(content: dict[str, Any]) -> dict[str, Any]:
    """Version 3 gives chat templates no values."""
    return {
        **content,
        "chat_template_kwargs": {},
        "chat_template_date": None,
        "reasoning": "keep",
        "columns": {},
        "split_conversations": {},
        "num_other_prompts": 0,
    }


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _from_version_1,
    2: _from_version_2,
    3: _from_version_3,
}
"""For each old version, the function that converts its content to the next version."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenizerRecord(_Frozen):
    """The tokenizer of a dataset."""

    name: str
    kind: str
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    files: dict[str, str]

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "TokenizerRecord":
        """Describe a tokenizer; the record has the name of its folder, not the path, or name and commit on a hub."""
        keys = ("kind", "fingerprint", "vocab_size", "bos_id", "eos_id", "unk_id", "pad_id", "add_bos")
        files = tokenizer_files(tokenizer.path)
        return cls(
            name=origin_of(tokenizer.path) or tokenizer.path.name,
            files={file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
            **{key: getattr(tokenizer, key) for key in keys},
        )


class FileRecord(_Frozen):
    """Name, size and hash of a file."""

    name: str
    num_bytes: int
    sha256: str


class PackRecord(_Frozen):
    """How samples were packed: a pack is a document, and its samples are the sequences of the document.

    Attributes:
        seq_length: maximum tokens of a pack.
        padding_share: share of padding tokens in training, between 0 and 1.
        padding_share_unpacked: the share without packing.
        num_cut_samples: samples longer than `seq_length`, which lost their end.
        num_dropped_samples: samples longer than `seq_length` that had no trained tokens left.
    """

    seq_length: int
    padding_share: float
    padding_share_unpacked: float
    num_cut_samples: int
    num_dropped_samples: int


class DatasetManifest(_Frozen):
    """The settings that decide the bytes of a dataset, and the counts and hashes of the result.

    `tool_use_template` formats the conversations with tools, if the tokenizer has a template for them.
    `num_spelling_records` counts records whose texts spell special pieces, which were read as text.
    `unused_columns` names the columns and the keys of messages that nothing read, with the number of records in which
    they are filled.
    `chat_template_kwargs` and `chat_template_date` are the values that the template got besides the conversation.
    `num_other_prompts` counts records with an answer that a chat asks for with another prompt.
    `reasoning` says which thoughts were kept, and `split_conversations` why conversations became several samples.
    `hub` names the repositories that tokenizer and inputs came from, as `org/name@commit`.
    `columns` gives the names in the input by those that the handler read.
    """

    format_version: int = FORMAT_VERSION
    kind: Kind
    tokenizer: TokenizerRecord
    encoder: str
    handler: str
    template: str
    template_sha256: str
    tool_use_template: str | None = None
    json_key: str | None
    append_eod: bool
    seq_length: int | None
    pack: PackRecord | None
    token_format: str
    num_documents: int
    num_sequences: int
    num_empty_documents: int
    num_tokens: int
    num_trained_tokens: int
    num_text_bytes: int
    num_spelling_records: int = 0
    parse_special: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    chat_template_date: str | None = None
    reasoning: Reasoning = "keep"
    columns: dict[str, str] = {}
    split_conversations: dict[str, int] = {}
    num_other_prompts: int = 0
    hub: tuple[str, ...] = ()
    unused_columns: dict[str, int]
    unigram_entropy_nats: float
    inputs: tuple[FileRecord, ...]
    files: tuple[FileRecord, ...]
    versions: dict[str, str]
    command: str


def manifest_path(prefix: Path) -> Path:
    """Return the path of a dataset's manifest; the three arrays of samples share one manifest."""
    name = re.sub(r"_packed_(input_ids|attention_mask|labels)_document$", "_packed", prefix.name)
    return prefix.with_name(name + ".manifest.json")


def load_manifest(prefix: Path) -> DatasetManifest | None:
    """Read the manifest of a dataset; return `None` if it has none.

    Raises:
        DataError: the file is damaged, or a newer version wrote it.
    """
    path = manifest_path(prefix)
    return read_manifest(path) if path.is_file() else None


def read_manifest(path: Path) -> DatasetManifest:
    """Read a manifest file.

    Raises:
        DataError: the file is damaged, or a newer version wrote it.
    """
    remedy = "delete it to continue without its checks"
    content = read_json(path, JsonObject, f"{path} is damaged: it", remedy)
    try:
        content = migrate(content, MIGRATIONS, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error!r}; {remedy}") from None
    return check_shape(content, DatasetManifest, f"{path} is damaged", remedy)


def migrate(
    content: dict[str, Any], migrations: dict[int, Callable[[dict[str, Any]], dict[str, Any]]], path: Path
) -> dict[str, Any]:
    """Convert the content of a manifest to the current version, one version at a time."""
    newest = max([FORMAT_VERSION, *(version + 1 for version in migrations)])
    while (version := content.get("format_version")) != newest:
        if type(version) is not int or version not in migrations:
            raise DataError(
                f"{path}: format_version={version} is not supported; this version reads up to {newest}, so update "
                "ascendspeed-data"
            )
        content = {**migrations[version](content), "format_version": version + 1}
    return content


def check_tokenizer(manifest: DatasetManifest, tokenizer: Tokenizer, what: str = "the dataset") -> None:
    """Raise `DataError` unless the dataset was made with `tokenizer`."""
    made = manifest.tokenizer
    if made.fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"tokenizer {tokenizer.path} (vocab_size={tokenizer.vocab_size}, fingerprint "
            f"{tokenizer.fingerprint[:12]}) is not the tokenizer of {what}, which is {made.name} "
            f"(vocab_size={made.vocab_size}, fingerprint {made.fingerprint[:12]}); give that tokenizer, or preprocess "
            "again"
        )
