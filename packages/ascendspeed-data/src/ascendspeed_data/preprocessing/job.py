"""The job of a preprocessing run, and which of its settings decide the output."""

import hashlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_data.chat_template import chat_template_named, variables_read_by
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.handlers import SampleHandler, TextHandler, find_handler, kind_of
from ascendspeed_data.reading.inputs import find_inputs
from ascendspeed_data.reading.sources import DatasetsSource, FileSource, Source
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_data.tokenizer_config import TOOL_USE

SHARD_BYTES = 4 << 20
OF_TOKENIZER = "the tokenizer's chat template"
"""Template of handlers that use the tokenizer's."""


@dataclass(frozen=True)
class PreprocessJob:
    """Inputs, output, tokenizer, handler and options of a preprocessing run.

    Attributes:
        inputs: files, folders and globs.
        output_prefix: text becomes `<prefix>_<column>_document.bin` and `.idx`, samples
            become `<prefix>_packed_<array>_document`, one pair for each of three arrays.
        tokenizer: folder or file.
        tokenizer_type: one of `ascendspeed_data.tokenizer.KINDS`.
        use_fast: whether gigatoken is allowed.
        json_keys: columns to tokenize; `text` if empty.
        handler_name: handler that turns records into documents or samples.
        append_eod: end each document with the end-of-sequence id.
        seq_length: tokens of a training sequence.
        pack: pack several samples into each sequence of `seq_length`.
        chat_template: file with a chat template to use instead of the tokenizer's, or the name of one of its templates.
        hf_datasets_params: JSON file with arguments of `datasets.load_dataset`, instead of `inputs`.
        streaming: stream that dataset.
        parse_special: read special pieces that records of samples spell, such as `<|im_end|>`, as control.
        chat_template_kwargs: JSON object with variables of the chat template.
        chat_template_date: day of the chat template's `strftime_now`, `YYYY-MM-DD` or `today`.
        reasoning: `keep`, `drop` or `last`: what to do with the thoughts of answers.
        columns: pairs of a name that the handler reads and the name in the input.
        workers: number of processes that tokenize.
        shard_bytes: size of the input that a worker takes at a time.
        overwrite: replace existing outputs and discard an interrupted run.
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
    chat_template: str | Path | None = None
    hf_datasets_params: Path | None = None
    streaming: bool = False
    parse_special: bool = False
    chat_template_kwargs: str | None = None
    chat_template_date: str | None = None
    reasoning: str = "keep"
    columns: tuple[tuple[str, str], ...] = ()
    workers: int = 1
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The columns to tokenize."""
        return self.json_keys or ("text",)

    def column_prefix(self, key: str) -> Path:
        """Return the dataset prefix of a column."""
        return self.output_prefix.with_name(f"{self.output_prefix.name}_{key}_document")

    def packed_prefix(self, array: str) -> Path:
        """Return the dataset prefix of one array of samples."""
        return self.column_prefix(f"packed_{array}")

    def path_with_suffix(self, suffix: str) -> Path:
        """Return the output prefix with a suffix."""
        return self.output_prefix.with_name(self.output_prefix.name + suffix)

    def handler(self) -> TextHandler | SampleHandler:
        """Return the handler, after checking the options against it.

        Raises:
            ConfigError: the handler is unknown, or would ignore an option.
        """
        handler = find_handler(self.handler_name)
        if self.json_keys and handler.columns:
            raise ConfigError(
                f"json_key={' '.join(self.json_keys)} has no effect: {handler.name} reads the columns "
                f"{', '.join(handler.columns)}; leave it out"
            )
        if len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(
                f"json_key={' '.join(self.json_keys)} names a column twice; name each column once"
            )
        if self.pack and not isinstance(handler, SampleHandler):
            raise ConfigError(
                f"--pack needs a handler of samples, but {handler.name} makes text, which training packs itself; "
                "leave --pack out"
            )
        if self.pack and kind_of(handler) == "pairs":
            raise ConfigError(
                f"--pack packs samples, but {handler.name} makes pairs, which must stay together; leave --pack out"
            )
        if self.pack and self.seq_length is None:
            raise ConfigError("--pack needs --seq-length, the length of the sequences to fill")
        if self.parse_special and not isinstance(handler, SampleHandler):
            raise ConfigError(
                f"parse_special has no effect: {handler.name} makes text, in which added tokens are ids in any case; "
                "leave it out"
            )
        return handler

    def use_chat_template(self, tokenizer: Tokenizer, handler: TextHandler | SampleHandler) -> None:
        """Make the template of `chat_template`, and the values that it gets, those of the tokenizer.

        Raises:
            ConfigError: it is neither a file nor the name of a template, or does not read a value.
            DataError: the file cannot be read.
        """
        values = TemplateValues.of_flags(self.chat_template_kwargs, self.chat_template_date, self.reasoning)
        if values != TemplateValues() and getattr(handler, "template", "") != OF_TOKENIZER:
            raise ConfigError(
                f"chat_template_kwargs, chat_template_date and reasoning are for chat templates, and {handler.name} "
                "uses none; leave them out"
            )
        self._choose_template(tokenizer)
        sources = [tokenizer.chat_template, *tokenizer.named_chat_templates.values()]
        values.check_read({name for source in sources if source for name in variables_read_by(source)})
        tokenizer.template_values = values

    def _choose_template(self, tokenizer: Tokenizer) -> None:
        if self.chat_template is None:
            return
        given, known = str(self.chat_template), sorted(tokenizer.named_chat_templates)
        template = chat_template_named(given, tokenizer)
        if template is None:
            others = f", which has {', '.join(known)}{did_you_mean(given, known)}" if known else ""
            raise ConfigError(
                f"chat_template={given} is neither a file nor a chat template of the tokenizer{others}"
            )
        tokenizer.chat_template, tokenizer.named_chat_templates = template, {}

    def input_files(self) -> list[Path]:
        """Return the files of `inputs`."""
        return find_inputs(self.inputs)

    def sources(self, handler: TextHandler | SampleHandler) -> list[Source]:
        """Open the inputs.

        Raises:
            ConfigError: there is no input.
        """
        if self.hf_datasets_params is not None:
            return [DatasetsSource(self.hf_datasets_params, self.streaming)]
        if not self.inputs:
            raise ConfigError("no input is given; give --input or --hf-datasets-params")
        # A handler of samples gets whole records: a column that it does not read may change what is to be learned.
        columns = None
        if not isinstance(handler, SampleHandler):
            read = [*handler.columns, *getattr(handler, "optional_columns", ())] or list(self.keys)
            columns = [dict(self.columns).get(name, name) for name in read]
        return [FileSource(path, columns) for path in self.input_files()]

    def identity(
        self, tokenizer: Tokenizer, handler: TextHandler | SampleHandler, encoder: str
    ) -> dict[str, Any]:
        """Return all settings that decide the bytes of the output; the inputs are not included."""
        tool_use, values = tool_use_template_of(handler, tokenizer), tokenizer.template_values
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
            "parse_special": self.parse_special,
        } | {
            name: value
            for name, value in {
                "chat template for tools": tool_use,
                "template values": [vars(values)] if values != TemplateValues() else None,
                "columns": [list(pair) for pair in self.columns] or None,
            }.items()
            if value is not None
        }


def template_of(handler: TextHandler | SampleHandler, tokenizer: Tokenizer) -> str:
    """Return the text around the columns; for a chat handler, the tokenizer's chat template."""
    template = str(getattr(handler, "template", ""))
    if template == OF_TOKENIZER:
        return tokenizer.chat_template or tool_use_template_of(handler, tokenizer) or ""
    return template


def tool_use_template_of(handler: TextHandler | SampleHandler, tokenizer: Tokenizer) -> str | None:
    """Return the tokenizer's chat template for conversations with tools, if it has one and the handler uses it."""
    if getattr(handler, "template", "") != OF_TOKENIZER:
        return None
    return tokenizer.named_chat_templates.get(TOOL_USE)


def handler_code(handler: TextHandler | SampleHandler) -> str:
    """Return the hash of a handler's source; an interrupted run must not resume with a changed handler."""
    try:
        source = inspect.getsource(type(handler))
    except (OSError, TypeError):
        source = repr(type(handler))
    return hashlib.sha256(source.encode()).hexdigest()[:16]
