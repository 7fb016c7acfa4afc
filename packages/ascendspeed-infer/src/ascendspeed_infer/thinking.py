"""Tell what a model thinks from what it answers, in a text that grows."""

from collections.abc import Sequence

from ascendspeed_data.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"

_MARK_TOKENS = 16
"""Tokens of a mark with the white space behind it, where a tokenizer spells it byte by byte."""

Part = tuple[str, bool]
"""A text, and whether it is a thought; the marks around thoughts are part of them."""


class ThoughtSplitter:
    """Splits an answer into thoughts and the rest, piece by piece.

    Args:
        is_open: whether the prompt already opened the thoughts.
        marks: before and after thoughts; others than those of thoughts tell other parts, such as tool calls.
    """

    def __init__(self, is_open: bool = False, marks: tuple[str, str] = (OPEN, CLOSE)) -> None:
        self.is_open = is_open
        """Whether the text so far ends inside of thoughts."""
        self._marks = marks
        self._held = ""

    def feed(self, text: str) -> list[Part]:
        """Return the parts that are certain after a further piece of the text."""
        self._held += text
        found: list[Part] = []
        while True:
            mark = self._marks[int(self.is_open)]
            before, is_there, after = self._held.partition(mark)
            if not is_there:
                break
            thought = before + mark if self.is_open else mark
            if not self.is_open and before:
                found.append((before, False))
            found.append((thought, True))
            self.is_open, self._held = not self.is_open, after
        kept = begun(self._held, mark)
        if len(self._held) > kept:
            found.append((self._held[: len(self._held) - kept], self.is_open))
            self._held = self._held[len(self._held) - kept :]
        return found

    def end(self) -> list[Part]:
        """Return what was held back because a mark could have followed."""
        held, self._held = self._held, ""
        return [(held, self.is_open)] if held else []


def split_thoughts(text: str, is_open: bool = False) -> tuple[str, str]:
    """Return the thoughts of a whole answer without their marks, and the rest.

    Args:
        text: the answer.
        is_open: whether the prompt already opened the thoughts.
    """
    splitter = ThoughtSplitter(is_open)
    parts = [*splitter.feed(text), *splitter.end()]
    thoughts = "".join(part for part, is_thought in parts if is_thought)
    said = "".join(part for part, is_thought in parts if not is_thought)
    return thoughts.replace(OPEN, "").replace(CLOSE, "").strip("\n"), said.strip()


def opens_thoughts(tokenizer: Tokenizer, ids: Sequence[int], mark: str = OPEN) -> bool:
    """Tell whether a prompt ends with the mark that opens thoughts."""
    return tokenizer.decode(ids[-_MARK_TOKENS:]).rstrip().endswith(mark)


def begun(text: str, mark: str) -> int:
    """Return how many characters at the end of a text could begin a mark."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
