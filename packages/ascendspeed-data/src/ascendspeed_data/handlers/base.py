"""The interface of handlers: they turn one record into documents of text, or into samples with labels."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from ascendspeed_data.sample import Record, Sample
from ascendspeed_data.tokenizer import Tokenizer


class Handler(Protocol):
    """The attributes of text handlers and sample handlers.

    Attributes:
        name: as given to `--handler-name`.
        columns: columns that a record must have; empty for a text handler that reads the columns of `--json-key`.
        optional_columns: columns that it reads if they exist.
        refused_columns: columns that have a meaning in its format, but that it does not read.
        summary: one line.
        template: the text around the columns; the manifest records it.
        example: an example record.
    """

    name: str
    columns: Sequence[str]
    optional_columns: Sequence[str]
    refused_columns: Sequence[str]
    summary: str
    template: str
    example: Record


@runtime_checkable
class TextHandler(Protocol):
    """Turn one record into documents of plain text, with loss on every token."""

    name: str
    columns: Sequence[str]

    def texts(self, record: Record, key: str) -> list[str]:
        """Return the documents of a record for the output `key`."""
        ...


@runtime_checkable
class SampleHandler(Protocol):
    """Turn one record into samples with labels.

    If an attribute `makes_pairs` is true, the samples are a chosen and a rejected one, or none.
    """

    name: str
    columns: Sequence[str]

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the samples of a record; together they are one document."""
        ...


class HandlerBase:
    """Default attributes of a handler; a handler need not derive from it."""

    name: str = ""
    columns: Sequence[str] = ()
    optional_columns: Sequence[str] = ()
    refused_columns: Sequence[str] = ()
    summary: str = ""
    template: str = ""
    example: Record = {}  # noqa: RUF012 - never changed
    reads_special_pieces: bool = False
    """Whether its records hold control in their texts; otherwise special pieces there are text."""


Kind = Literal["text", "samples", "pairs"]
"""Kind of a dataset: documents of text, samples with labels, or pairs of samples for preference tuning."""


def kind_of(handler: TextHandler | SampleHandler) -> Kind:
    """Return the kind of dataset that a handler makes."""
    if not isinstance(handler, SampleHandler):
        return "text"
    return "pairs" if getattr(handler, "makes_pairs", False) else "samples"
