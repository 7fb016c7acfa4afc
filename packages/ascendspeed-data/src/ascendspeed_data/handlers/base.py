"""What a handler is: how one record becomes documents, or samples with the tokens to be learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer import Tokenizer

Record = dict[str, Any]

IGNORED_LABEL = -100
"""Label of tokens that are not learned; torch's cross entropy leaves it out."""


@dataclass(frozen=True)
class Part:
    """A piece of a sample.

    Attributes:
        content: text; or an id that is placed as it is; or `None`, the end-of-sequence id, which
            `--no-append-eod` leaves out.
        trained: whether its tokens are labels.
        label: the label in place of the id itself, for an id only.
    """

    content: str | int | None
    trained: bool
    label: int | None = None


@dataclass(frozen=True)
class Sample:
    """One training sample.

    Texts that follow each other are tokenized as one, so a token may lie in two of them; it is a label if any of
    its characters is trained.

    Attributes:
        parts: in order.
        surrounded: whether the tokenizer's own setting applies (most often: BOS in front of the sample).
        each_text_alone: whether every text gets what the tokenizer puts around one, as in rules of 2023.
    """

    parts: tuple[Part, ...]
    surrounded: bool = True
    each_text_alone: bool = False


class Handler(Protocol):
    """What text handlers and sample handlers have in common.

    Attributes:
        name: as given to `--handler-name`.
        columns: columns that a record must have; empty for a text handler that takes those of `--json-key`.
        optional_columns: columns that it uses where they are.
        summary: one line.
        template: the text around the columns, as it is written into the manifest.
        example: a record.
    """

    name: str
    columns: Sequence[str]
    optional_columns: Sequence[str]
    summary: str
    template: str
    example: Record


@runtime_checkable
class TextHandler(Protocol):
    """Turn one record into documents of plain text, every token of which is learned."""

    name: str
    columns: Sequence[str]

    def texts(self, record: Record, key: str) -> list[str]:
        """Return the documents of a record for the output `key`."""
        ...


@runtime_checkable
class SampleHandler(Protocol):
    """Turn one record into samples with labels.

    With an attribute `makes_pairs` that is true these are two or none: a chosen and a rejected one.
    """

    name: str
    columns: Sequence[str]

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the samples of a record; together they are one document."""
        ...


class HandlerBase:
    """Defaults for the attributes of a handler; deriving from it is a convenience, not a must."""

    name: str = ""
    columns: Sequence[str] = ()
    optional_columns: Sequence[str] = ()
    summary: str = ""
    template: str = ""
    example: Record = {}  # noqa: RUF012 - never changed


Kind = Literal["text", "samples", "pairs"]
"""What a dataset holds: documents of text, samples with labels, or pairs of samples for preference tuning."""


def kind_of(handler: TextHandler | SampleHandler) -> Kind:
    """Return what a handler makes."""
    if not isinstance(handler, SampleHandler):
        return "text"
    return "pairs" if getattr(handler, "makes_pairs", False) else "samples"


def text_in(record: Record, column: str) -> str:
    """Return the text in a column; nothing and an absent column are an empty text.

    Raises:
        DataError: something else is in it.
    """
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    return value
