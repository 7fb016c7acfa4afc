"""Read answers that come in channels, as gpt-oss writes them, into thoughts, calls and what is said.

An answer is `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`, and a
call of a tool goes to `functions.NAME` in the channel `commentary` (https://cookbook.openai.com/articles/openai-harmony).
It becomes the form of other families: thoughts between `<think>` and `</think>`, calls between `<tool_call>` and
`</tool_call>`.
"""

import json
import re
from collections.abc import Sequence

from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.thinking import CLOSE, OPEN
from ascendspeed_infer.tool_calls import CALL_MARKS

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
CONSTRAIN = "<|constrain|>"
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class ChannelReader:
    """Reads one answer, token by token.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = {number: piece for piece, number in tokenizer.special_ids.items()}
        self._header: str | None = ""
        """What stands before the message; `None` inside of it."""
        self._end = ""
        """What is to be written after the message."""

    def feed(self, token_id: int, text: str) -> str:
        """Return what a token adds to the answer; what is cut off stays open.

        Args:
            token_id: of the token.
            text: that it adds without special pieces.
        """
        piece = self._pieces.get(token_id)
        if self._header is None:
            return text if piece is None else text + self._close()
        self._header += text if piece is None or piece == MESSAGE else text + piece
        if piece is None and self._is_said():
            said, self._header = self._header, None
            return said
        return self._open() if piece == MESSAGE else ""

    def end(self) -> str:
        """Return what closes a message that ended without a piece of its own."""
        return self._close() if self._header is None else ""

    def _is_said(self) -> bool:
        """Tell whether what stands where a header may stand is none: the model writes no channels."""
        begun = (self._header or "").lstrip()
        has_pieces = CHANNEL in begun or START in begun
        return bool(begun) and not (has_pieces or "to=".startswith(begun) or begun.startswith("to="))

    def _open(self) -> str:
        header, self._header = self._header or "", None
        if called := _RECIPIENT.search(header):
            self._end = "}\n" + CALL_MARKS[1] + "\n"
            return f'{CALL_MARKS[0]}\n{{"name": {json.dumps(called[1])}, "arguments": '
        is_thought = "analysis" in header.rpartition(CHANNEL)[2]
        self._end = f"\n{CLOSE}\n\n" if is_thought else ""
        return f"{OPEN}\n" if is_thought else ""

    def _close(self) -> str:
        end, self._end, self._header = self._end, "", ""
        return end


def has_channels(sources: Sequence[str]) -> bool:
    """Tell whether a chat template writes answers in channels."""
    return any(CHANNEL in one and MESSAGE in one for one in sources)
