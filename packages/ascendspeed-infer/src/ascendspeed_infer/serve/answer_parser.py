"""What of an answer is thought, said and called, as it grows."""

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendspeed_infer.thinking import CLOSE, OPEN, ThoughtSplitter
from ascendspeed_infer.tool_calls import CallSplitter, ToolCall


@dataclass
class AnswerPart:
    """What a piece of text adds to an answer.

    Attributes:
        reasoning: of thoughts.
        content: of what is said.
        calls: of tools, each whole.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)


class AnswerParser:
    """Parses an answer piece by piece; the parts of all pieces together are the parts of the whole.

    Args:
        thinks: whether the prompt opened the thoughts.
        has_tools: whether tool calls are looked for.
        tools: as they were declared.
        marks: before and after thoughts.
    """

    def __init__(
        self,
        thinks: bool,
        has_tools: bool,
        tools: Sequence[Any] | None = None,
        marks: tuple[str, str] = (OPEN, CLOSE),
    ) -> None:
        self._thoughts, self._marks = ThoughtSplitter(thinks, marks), marks
        self.num_reasoning_tokens = 0
        """Tokens of thoughts, with those of their marks."""
        self._calls = CallSplitter(tools) if has_tools else None
        self._num_calls = 0
        self._has_reasoning = thinks
        self._has_begun = {"reasoning": False, "content": False}
        self._held_newlines = ""

    @property
    def num_calls(self) -> int:
        """Tool calls so far."""
        return self._num_calls

    def feed(self, text: str, is_last: bool, num_tokens: int = 0) -> AnswerPart:
        """Return what a piece of the text adds.

        Args:
            text: the piece.
            is_last: whether it ends the answer.
            num_tokens: that it has.
        """
        part, was_open = AnswerPart(), self._thoughts.is_open
        parts = [*self._thoughts.feed(text), *(self._thoughts.end() if is_last else [])]
        if was_open or self._thoughts.is_open or any(is_thought for _, is_thought in parts):
            self.num_reasoning_tokens += num_tokens
        for piece, is_thought in parts:
            if is_thought:
                self._has_reasoning = True
                part.reasoning += self._reasoning(
                    piece.replace(self._marks[0], "").replace(self._marks[1], "")
                )
            elif self._calls is None:
                part.content += self._content(piece)
            else:
                self._add(part, self._calls.feed(piece))
        if is_last and self._calls is not None:
            self._add(part, self._calls.end())
        return part

    def _add(self, part: AnswerPart, pieces: list[str | ToolCall]) -> None:
        for piece in pieces:
            if isinstance(piece, str):
                part.content += self._content(piece)
            else:
                part.calls.append(_openai_call(piece, self._num_calls))
                self._num_calls += 1

    def _reasoning(self, piece: str) -> str:
        """Leave out line ends around thoughts."""
        if not self._has_begun["reasoning"]:
            piece = piece.lstrip("\n")
        piece = self._held_newlines + piece
        kept = piece.rstrip("\n")
        self._held_newlines = piece[len(kept) :]
        self._has_begun["reasoning"] |= bool(kept)
        return kept

    def _content(self, piece: str) -> str:
        """Leave out line ends between thoughts and what is said."""
        if self._has_reasoning and not self._has_begun["content"]:
            piece = piece.lstrip("\n")
        self._has_begun["content"] |= bool(piece)
        return piece


def _openai_call(call: ToolCall, index: int) -> dict[str, Any]:
    """Return a tool call in OpenAI's form, with the arguments as text."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
