"""Records, and the training samples that handlers make of them."""

from dataclasses import dataclass
from typing import Any

from ascendspeed_data.errors import DataError

Record = dict[str, Any]
"""One record of the input: values by column."""

IGNORED_LABEL = -100
"""Label of tokens without loss; the `ignore_index` of torch's cross entropy."""


@dataclass(frozen=True)
class Segment:
    """A segment of a sample: text or a special token, with or without loss.

    Attributes:
        content: text; or a token id; or `None` for the end-of-sequence id, which `--no-append-eod` omits.
        trained: whether the loss includes its tokens.
        label: label to use in place of the id itself; for a token id only.
    """

    content: str | int | None
    trained: bool
    label: int | None = None


@dataclass(frozen=True)
class Sample:
    """One training sample.

    The tokenizer encodes adjacent texts as one text, so a token may span two segments. The loss includes a token if
    any of its characters is trained.

    Attributes:
        segments: in order.
        add_special_tokens: whether to add what the tokenizer adds to a text, most often BOS at the start.
        encode_separately: whether to encode each text separately, with its own BOS and EOS, as rules of 2023 do.
        is_rendered: whether a chat template made the texts: special tokens in them become their ids.
        unused: keys inside the record that have no effect, to be counted.
        reason: why a conversation has more samples than this one; empty for its last one.
        has_other_prompt: whether a chat asks for one of its answers with another prompt.
    """

    segments: tuple[Segment, ...]
    add_special_tokens: bool = True
    encode_separately: bool = False
    is_rendered: bool = False
    unused: tuple[str, ...] = ()
    reason: str = ""
    has_other_prompt: bool = False


def text_in(record: Record, column: str) -> str:
    """Return the text in a column; a missing column and a null are an empty text.

    Raises:
        DataError: the column holds something else.
    """
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r} holds {type(value).__name__}, not text")
    return value
