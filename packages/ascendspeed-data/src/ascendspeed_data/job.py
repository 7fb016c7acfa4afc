"""What a run is to do, and what of it decides the output."""

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_data.encoding import ATTENTION_MASK, INPUT_IDS, LABELS
from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.handlers import SampleHandler, TextHandler, find_handler, kind_of
from ascendspeed_data.reading.inputs import find_inputs
from ascendspeed_data.reading.sources import DatasetsSource, FileSource, Source
from ascendspeed_data.tokenizer import Tokenizer

ARRAYS = (INPUT_IDS, ATTENTION_MASK, LABELS)
SHARD_BYTES = 4 << 20


@dataclass(frozen=True)
class PreprocessJob:
    """What to tokenize, and how.

    Attributes:
        inputs: files, folders, globs.
        output_prefix: text gives `<prefix>_<column>_document.bin` and `.idx`, samples
            `<prefix>_packed_<array>_document` with the three arrays.
        tokenizer: folder or file.
        tokenizer_type: one of `ascendspeed_data.tokenizer.KINDS`.
        use_fast: whether gigatoken may be used.
        json_keys: columns; `text` if empty.
        handler_name: how a record becomes documents.
        append_eod: end each document with the tokenizer's end-of-sequence id.
        seq_length: tokens of a training sequence.
        pack: fill sequences of `seq_length` from several samples.
        chat_template: file with a template in place of the tokenizer's own.
        hf_datasets_params: JSON file with arguments of `datasets.load_dataset`, in place of `inputs`.
        streaming: stream the dataset that it names.
        workers: processes that tokenize.
        shard_bytes: input that goes into one piece of work.
        overwrite: replace outputs that exist, discard an unfinished run.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer: Path
    tokenizer_type: str = "PretrainedFromHF"
    use_fast: bool = True
    json_keys: tuple[str, ...] = ()
    handler_name: str = "GeneralPretrainHandler"
    append_eod: bool = True
    seq_length: int | None = None
    pack: bool = False
    chat_template: Path | None = None
    hf_datasets_params: Path | None = None
    streaming: bool = False
    workers: int = 1
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns."""
        return self.json_keys or ("text",)

    def prefix_of(self, key: str) -> Path:
        """Return the dataset prefix of a column."""
        return self.output_prefix.with_name(f"{self.output_prefix.name}_{key}_document")

    def packed_prefix(self, array: str) -> Path:
        """Return the dataset prefix of an array of samples."""
        return self.prefix_of(f"packed_{array}")

    def beside(self, ending: str) -> Path:
        """Return the output prefix with an ending."""
        return self.output_prefix.with_name(self.output_prefix.name + ending)

    def handler(self) -> TextHandler | SampleHandler:
        """Find the handler, and check that the options fit it.

        Raises:
            ConfigError: an option that the handler would ignore.
        """
        handler = find_handler(self.handler_name)
        if self.json_keys and handler.columns:
            raise ConfigError(
                f"json_key={' '.join(self.json_keys)} has no meaning for {handler.name}, which reads the columns "
                f"{', '.join(handler.columns)}; leave it out"
            )
        if len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(f"json_key={' '.join(self.json_keys)} names a column twice; name each once")
        if self.pack and not isinstance(handler, SampleHandler):
            raise ConfigError(
                f"--pack is for handlers of samples, {handler.name} makes text, which training packs itself; "
                "leave --pack out"
            )
        if self.pack and kind_of(handler) == "pairs":
            raise ConfigError(
                f"--pack fills sequences with samples, {handler.name} makes pairs, which stay together; leave --pack "
                "out"
            )
        if self.pack and self.seq_length is None:
            raise ConfigError("--pack needs --seq-length, the tokens of a sequence to fill")
        return handler

    def sources(self, handler: TextHandler | SampleHandler) -> list[Source]:
        """Open the inputs."""
        if self.hf_datasets_params is not None:
            return [DatasetsSource(self.hf_datasets_params, self.streaming)]
        if not self.inputs:
            raise ConfigError("no input; give --input, or --hf-datasets-params")
        columns = [*handler.columns, *getattr(handler, "optional_columns", ())] or list(self.keys)
        return [FileSource(path, columns) for path in find_inputs(self.inputs)]

    def identity(
        self, tokenizer: Tokenizer, handler: TextHandler | SampleHandler, encoder: str
    ) -> dict[str, Any]:
        """Return what decides the bytes of the output besides the inputs."""
        return {
            "tokenizer": tokenizer.fingerprint,
            "encoder": encoder,
            "handler": handler.name,
            "handler code": handler_code(handler),
            "chat template": template_of(handler, tokenizer),
            "json_key": list(self.keys),
            "append_eod": self.append_eod,
            "seq_length": self.seq_length if self.pack else None,
            "pack": self.pack,
        }


def template_of(handler: TextHandler | SampleHandler, tokenizer: Tokenizer) -> str:
    """Return the text around the columns; of a chat, the tokenizer's template."""
    template = str(getattr(handler, "template", ""))
    if template == "the tokenizer's chat template":
        return tokenizer.chat_template or ""
    return template


def handler_code(handler: TextHandler | SampleHandler) -> str:
    """Return the hash of a handler's source, so that a changed handler is not taken for the same one."""
    try:
        source = inspect.getsource(type(handler))
    except (OSError, TypeError):
        source = repr(type(handler))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def read_chat_template(path: Path) -> str:
    """Return the text of a template file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template={path} cannot be read: {error}") from None
