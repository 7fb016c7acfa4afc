"""Handlers for MOSS conversations: `chat` holds `turn_1`, `turn_2` ..., each with `Human` and `MOSS`."""

from dataclasses import replace
from typing import Any

from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers.base import HandlerBase, Part, Record, Sample
from ascendspeed_data.handlers.instruction import LAYOUT, Turn, conversation
from ascendspeed_data.tokenizer import Tokenizer

BAICHUAN2_USER, BAICHUAN2_ASSISTANT = 195, 196
"""Ids that Baichuan2 puts before what a user and an assistant say."""

EXAMPLE: Record = {"chat": {"turn_1": {"Human": "<|Human|>: Hello <eoh>\n", "MOSS": "<|MOSS|>: Hi! <eom>\n"}}}


def moss_turns(record: Record) -> list[Turn]:
    """Return what was said without MOSS's markers; turns without content are left out.

    Raises:
        DataError: the record is built differently.
    """
    chat = record.get("chat")
    if not isinstance(chat, dict):
        raise DataError(f"column 'chat' holds {type(chat).__name__}, not an object of turns")
    turns = []
    for name, turn in chat.items():
        if not turn:
            continue
        spoken = [_text(turn, name, role) for role in ("Human", "MOSS")]
        user = spoken[0].replace("<eoh>", "").replace("<|Human|>: ", "").strip()
        assistant = spoken[1].replace("<|MOSS|>:", "").replace("<eom>", "").strip()
        turns.append((user, assistant))
    if not turns:
        raise DataError("column 'chat' holds no turn")
    return turns


def _text(turn: Any, name: str, role: str) -> str:
    if not isinstance(turn, dict) or not isinstance(turn.get(role), str):
        there = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
        raise DataError(f"{name} of column 'chat' has no text {role!r}; it has {there}")
    text: str = turn[role]
    return text


class MOSSInstructionHandler(HandlerBase):
    """One sample for every answer: what was said until then, and the answer, which is learned."""

    name = "MOSSInstructionHandler"
    columns = ("chat",)
    summary = "MOSS conversations; one sample for every answer, which is learned, with the turns before it"
    template = LAYOUT
    example = EXAMPLE

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return as many samples as there are turns."""
        turns = moss_turns(record)
        return [conversation(turns[:end], first_trained=end - 1) for end in range(1, len(turns) + 1)]


class MOSSInstructionHandler2023(MOSSInstructionHandler):
    """As in 2023: no end-of-sequence id anywhere, whatever the flags say."""

    name = "MOSSInstructionHandler2023"
    summary = "the rule of 2023: as above without an end after any answer"

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return as many samples as there are turns."""
        return [
            replace(sample, parts=tuple(part for part in sample.parts if part.content is not None))
            for sample in super().samples(record, tokenizer)
        ]


class MOSSMultiTurnHandler(HandlerBase):
    """A conversation as one sample; every answer is learned."""

    name = "MOSSMultiTurnHandler"
    columns = ("chat",)
    summary = "MOSS conversations; one sample each, every answer is learned"
    template = LAYOUT
    example = EXAMPLE

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the conversation as one sample."""
        return [conversation(moss_turns(record))]


class MOSSMultiTurnHandler2023(HandlerBase):
    """As in November 2023, for Baichuan2: ids 195 and 196 before the speakers, no template.

    The label at each 195 is the end-of-sequence id, so that an answer is learned to end there though the id itself
    stands only at the end of the sample. The first revision of 2023 wrote 295 for 195.
    """

    name = "MOSSMultiTurnHandler2023"
    columns = ("chat",)
    summary = "the rule of 2023 for Baichuan2: ids 195 and 196 before user and assistant, no other text"
    template = "<195>{user}<196>{assistant}"
    example = EXAMPLE

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the conversation as one sample."""
        if tokenizer.eos_id is None:
            raise DataError(f"{self.name} needs a tokenizer with an end-of-sequence id")
        parts = []
        for user, assistant in moss_turns(record):
            parts += [
                Part(BAICHUAN2_USER, True, label=tokenizer.eos_id),
                Part(user, False),
                Part(BAICHUAN2_ASSISTANT, False),
                Part(assistant, True),
            ]
        parts.append(Part(tokenizer.eos_id, True))
        return [Sample(tuple(parts), surrounded=False, each_text_alone=True)]
