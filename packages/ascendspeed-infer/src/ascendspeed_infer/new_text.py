"""The text of new ids after a prompt, whole or as it grows."""

from collections.abc import Sequence

from ascendspeed_data.tokenizer import Tokenizer

ANCHOR_TOKENS = 16
"""Ids of a prompt that new ids are decoded after, so that the space before the first is kept."""
INCOMPLETE_CHARACTER = "\ufffd"
"""What a tokenizer writes for bytes that are not a whole character yet."""


class NewText:
    """The text of new ids after a prompt.

    Only the last ids of the prompt are decoded with them, for the space before the first: decoding all of it again at
    every token would cost more than the model does.

    Args:
        tokenizer: of the model.
        prompt: ids before.
        hidden: ids that give no text, those that end it.
        stop: texts that end it, and are cut off.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], hidden: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer, self._hidden, self._stop = tokenizer, frozenset(hidden), tuple(stop)
        self._anchor = list(prompt[-ANCHOR_TOKENS:])
        self._before = tokenizer.decode(self._anchor)
        self._shown = ""

    def of(self, new_ids: Sequence[int]) -> str:
        """Return the text of ids."""
        kept = [token for token in new_ids if token not in self._hidden]
        whole = self._tokenizer.decode([*self._anchor, *kept])
        return whole[len(self._before) :] if whole.startswith(self._before) else self._tokenizer.decode(kept)

    def ends(self, new_ids: Sequence[int]) -> bool:
        """Tell whether a stop text is there."""
        if not self._stop:
            return False
        text = self.of(new_ids)
        return any(stop in text for stop in self._stop)

    def final(self, new_ids: Sequence[int]) -> str:
        """Return the text before the first stop text."""
        text = self.of(new_ids)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else text

    def grown(self, new_ids: Sequence[int], is_last: bool) -> str:
        """Return what can be shown now and was not before.

        Held back until it is certain: bytes that are not a whole character yet, and what could be the beginning of a
        stop text.
        """
        text = self.final(new_ids)
        if not is_last:
            text = text.rstrip(INCOMPLETE_CHARACTER)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
            if not text.startswith(self._shown):
                return ""
        added = text[len(self._shown) :]
        self._shown += added
        return added


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
