"""How the models of a chat template write thoughts and calls of tools.

Marks that are control, which texts leave out, are put back where they stand, so that thoughts and calls are found in
the text alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.channels import ChannelReader, has_channels
from ascendspeed_infer.thinking import CLOSE, OPEN, opens_thoughts
from ascendspeed_infer.tool_calls import ARGUMENTS_MARK, CALL_ID_MARK, CALL_MARKS, LIST_MARK

CallForm = Literal["marked", "list", "named", "object", "channels"]
"""Calls between marks (Hermes, Qwen, GLM-4.5), in a list or by name after one mark (Mistral), as an object that is all
that is said (Llama 3.1 and 3.2), or in a channel (gpt-oss).
"""
THOUGHT_MARKS = (
    (OPEN, CLOSE),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("◁think▷", "◁/think▷"),
)
"""Before and after thoughts: of DeepSeek and Qwen, Magistral, Seed-OSS, and others."""
OBJECT_RULE = '{"name": function name, "parameters": '
"""What the templates of Llama 3.1 and 3.2 tell the model."""
FORM_NAMES = "Hermes, Qwen, GLM-4.5, Mistral, Llama 3.1 and gpt-oss"
"""Families whose calls are read."""


class AnswerReader(Protocol):
    """Puts marks back into an answer, token by token."""

    def feed(self, token_id: int, text: str) -> str:
        """Return what a token adds, given what it adds without special pieces."""
        ...

    def end(self) -> str:
        """Return what closes an answer that was not cut off."""
        ...


class MarkReader:
    """Shows some control pieces as text.

    Args:
        shown: text of each of them.
    """

    def __init__(self, shown: Mapping[int, str]) -> None:
        self._shown = shown

    def feed(self, token_id: int, text: str) -> str:
        """See `AnswerReader`."""
        return text + self._shown.get(token_id, "")

    def end(self) -> str:
        """See `AnswerReader`."""
        return ""


@dataclass(frozen=True)
class AnswerForm:
    """How answers are written.

    Attributes:
        thoughts: marks before and after thoughts.
        calls: how tools are called; `None` if the template says nothing that is read here.
        control: ids of the marks that are control, by their text.
        is_in_channels: whether answers come in channels.
    """

    thoughts: tuple[str, str]
    calls: CallForm | None
    control: Mapping[str, int]
    is_in_channels: bool = False

    @classmethod
    def of(cls, sources: Sequence[str], tokenizer: Tokenizer) -> "AnswerForm":
        """Find the form in the sources of a chat template."""
        if has_channels(sources):
            return cls((OPEN, CLOSE), "channels", dict(tokenizer.special_ids), is_in_channels=True)
        found = [marks for marks in THOUGHT_MARKS if any(marks[1] in one for one in sources)]
        thoughts = found[0] if found else THOUGHT_MARKS[0]
        marks = (*thoughts, *CALL_MARKS, LIST_MARK, ARGUMENTS_MARK, CALL_ID_MARK)
        special = tokenizer.special_ids
        return cls(thoughts, _call_form(sources), {one: special[one] for one in marks if one in special})

    def reader(self, tokenizer: Tokenizer) -> AnswerReader | None:
        """Return what reads one answer; `None` if its text says all."""
        if self.is_in_channels:
            return ChannelReader(tokenizer)
        return MarkReader({number: mark for mark, number in self.control.items()}) if self.control else None

    def opens_thoughts(self, tokenizer: Tokenizer, ids: Sequence[int]) -> bool:
        """Tell whether a prompt ends with the mark that opens thoughts."""
        opened = self.control.get(self.thoughts[0])
        return opens_thoughts(tokenizer, ids, self.thoughts[0]) or (opened is not None and ids[-1] == opened)


def _call_form(sources: Sequence[str]) -> CallForm | None:
    whole = "\n".join(sources)
    if CALL_MARKS[0] in whole:
        return "marked"
    if LIST_MARK in whole:
        return "named" if ARGUMENTS_MARK in whole else "list"
    return "object" if OBJECT_RULE in whole else None
