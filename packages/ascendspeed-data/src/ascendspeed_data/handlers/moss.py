"""Handlers for MOSS conversations: `chat` holds `turn_1`, `turn_2` ..., each with `Human` and `MOSS`."""

from dataclasses import replace
from typing import Any

from ascendspeed_data.conversation import json_value
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import check_turn, filled
from ascendspeed_data.handlers.base import HandlerBase
from ascendspeed_data.handlers.instruction import LAYOUT, Exchange, conversation
from ascendspeed_data.sample import Record, Sample, Segment
from ascendspeed_data.tokenizer import Tokenizer

BAICHUAN2_USER, BAICHUAN2_ASSISTANT = 195, 196
"""Ids of Baichuan2 before a user message and before an answer."""

SPEAKERS = ("Human", "MOSS")
LEFT_OUT = ("Inner Thoughts", "Commands", "Tool Responses")
"""Keys of turns that the rules of 2023 leave out."""

EXAMPLE: Record = {"chat": {"turn_1": {"Human": "<|Human|>: Hello <eoh>\n", "MOSS": "<|MOSS|>: Hi! <eom>\n"}}}


def moss_exchanges(record: Record) -> list[Exchange]:
    """Return the exchanges without MOSS's markers; empty turns are skipped.

    Raises:
        DataError: the record has another structure.
    """
    chat = record.get("chat")
    if isinstance(chat, str) and chat.lstrip().startswith("{"):
        chat = json_value(chat, "column 'chat'")
    if not isinstance(chat, dict):
        raise DataError(f"column 'chat' holds {type(chat).__name__}, not an object of turns")
    exchanges = []
    for name, turn in chat.items():
        if not turn:
            continue
        spoken = [_text(turn, name, role) for role in ("Human", "MOSS")]
        user = spoken[0].replace("<eoh>", "").replace("<|Human|>: ", "").strip()
        assistant = spoken[1].replace("<|MOSS|>:", "").replace("<eom>", "").strip()
        exchanges.append((user, assistant))
    if not exchanges:
        raise DataError("column 'chat' has no turns")
    return exchanges


def unused_keys(record: Record) -> tuple[str, ...]:
    """Return the keys of turns that the rules of 2023 leave out: thoughts, commands and results of tools.

    Raises:
        DataError: a turn has a key that can change what is learned.
    """
    chat = record.get("chat")
    chat = json_value(chat, "column 'chat'")
    found: dict[str, None] = {}
    for name, turn in chat.items():
        if filled(turn):
            try:
                found |= dict.fromkeys(
                    f"key {key!r} of turns" for key in check_turn(turn, SPEAKERS, LEFT_OUT)
                )
            except DataError as error:
                raise DataError(f"{name} of column 'chat': {error}") from None
    return tuple(found)


def _text(turn: Any, name: str, role: str) -> str:
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
        there = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
        raise DataError(f"{name} of column 'chat' has no text {role!r}; it has {there}")
    text: str = turn[role]
    return text


class MOSSInstructionHandler(HandlerBase):
    """One sample per answer: the conversation before it as context, and the answer with loss."""

    name = "MOSSInstructionHandler"
    columns = ("chat",)
    summary = (
        "MOSS conversations, one sample per answer: the turns before it as context, and the answer with loss"
    )
    template = LAYOUT
    reads_special_pieces = True
    example = EXAMPLE

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return one sample per answer."""
        exchanges = moss_exchanges(record)
        unused = unused_keys(record)
        return [
            replace(conversation(exchanges[:end], first_trained=end - 1), unused=unused)
            for end in range(1, len(exchanges) + 1)
        ]


class MOSSInstructionHandler2023(MOSSInstructionHandler):
    """The rule of 2023: no end-of-sequence ids, even with `--append-eod`."""

    name = "MOSSInstructionHandler2023"
    summary = "the rule of 2023: as MOSSInstructionHandler, without end-of-sequence ids"

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return one sample per answer."""
        return [
            replace(
                sample, segments=tuple(segment for segment in sample.segments if segment.content is not None)
            )
            for sample in super().samples(record, tokenizer)
        ]


class MOSSMultiTurnHandler(HandlerBase):
    """One sample per conversation, with loss on every answer."""

    name = "MOSSMultiTurnHandler"
    columns = ("chat",)
    summary = "MOSS conversations, one sample each, with loss on every answer"
    template = LAYOUT
    reads_special_pieces = True
    example = EXAMPLE

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the conversation as one sample."""
        return [replace(conversation(moss_exchanges(record)), unused=unused_keys(record))]


class MOSSMultiTurnHandler2023(HandlerBase):
    """The rule of November 2023 for Baichuan2: id 195 before the user, id 196 before the assistant, no template.

    The label at each 195 is the end-of-sequence id, so a model learns to end its answer there; the id itself is only
    at the end of the sample. The first revision of 2023 used 295 instead of 195.
    """

    name = "MOSSMultiTurnHandler2023"
    columns = ("chat",)
    summary = (
        "the rule of 2023 for Baichuan2: id 195 before the user, id 196 before the assistant, no template"
    )
    template = "<195>{user}<196>{assistant}"
    reads_special_pieces = True
    example = EXAMPLE

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the conversation as one sample."""
        if tokenizer.eos_id is None:
            raise DataError(f"{self.name} needs a tokenizer with an end-of-sequence id")
        segments = []
        for user, assistant in moss_exchanges(record):
            segments += [
                Segment(BAICHUAN2_USER, True, label=tokenizer.eos_id),
                Segment(user, False),
                Segment(BAICHUAN2_ASSISTANT, False),
                Segment(assistant, True),
            ]
        segments.append(Segment(tokenizer.eos_id, True))
        unused = unused_keys(record)
        return [Sample(tuple(segments), add_special_tokens=False, encode_separately=True, unused=unused)]
