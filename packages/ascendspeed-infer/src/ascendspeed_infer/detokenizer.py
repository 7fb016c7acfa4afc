"""The text of new ids after a prompt, whole or as it grows."""

from collections.abc import Sequence

from ascendspeed_data.tokenizer import Tokenizer

ANCHOR_TOKENS = 16
"""Ids of a prompt that new ids are decoded after, so that the space before the first is kept."""
SETTLED_TOKENS = 32
"""New ids of a growing text that are decoded again at each token, until their text is settled."""
MAX_BYTES_PER_CHARACTER = 4
"""At most, in UTF-8; a token may be one byte."""
INCOMPLETE_CHARACTER = "\ufffd"
"""What a tokenizer writes for bytes that are not a whole character yet."""


class Detokenizer:
    """The text of new ids after a prompt.

    Only the last ids of the prompt are decoded with them, for the space before the first: decoding all of it again at
    every token would cost more than the model does.

    Args:
        tokenizer: of the model.
        prompt: ids before.
        skipped: ids that give no text, those that end it.
        stop: strings that end it, and are cut off.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], skipped: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer, self._skipped, self._stop = tokenizer, frozenset(skipped), tuple(stop)
        self._anchor = list(prompt[-ANCHOR_TOKENS:])
        self._before = tokenizer.decode(self._anchor)
        self._shown = ""
        self._settled, self._num_settled = "", 0
        self._recent, self._before_recent = self._anchor, self._before
        longest = max(map(len, self._stop), default=0)
        self._window = MAX_BYTES_PER_CHARACTER * longest + ANCHOR_TOKENS

    def decode(self, new_ids: Sequence[int]) -> str:
        """Return the text of ids."""
        return self._after(self._anchor, self._before, self._kept(new_ids))

    def has_stop_string(self, new_ids: Sequence[int]) -> bool:
        """Return whether a stop string is there; call it after every token, as it looks at the last ones only."""
        if not self._stop:
            return False
        if len(new_ids) <= self._window:
            text = self.decode(new_ids)
        else:
            text = self._tokenizer.decode(self._kept(new_ids[-self._window :]))
        return any(stop in text for stop in self._stop)

    def final_text(self, new_ids: Sequence[int]) -> str:
        """Return the text before the first stop string."""
        return self._cut(self.decode(new_ids))

    def next_text(self, new_ids: Sequence[int], is_last: bool) -> str:
        """Return what can be shown now and was not before.

        Held back until it is certain: bytes that are not a whole character yet, and what could be the beginning of a
        stop string.
        """
        text = self._cut(self._so_far(new_ids))
        if not is_last:
            text = text.rstrip(INCOMPLETE_CHARACTER)
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
            if not text.startswith(self._shown):
                return ""
        added = text[len(self._shown) :]
        self._shown += added
        return added

    def _so_far(self, new_ids: Sequence[int]) -> str:
        """Return what `decode` does, without decoding all of it again."""
        fresh = self._kept(new_ids[self._num_settled :])
        text = self._settled + self._after(self._recent, self._before_recent, fresh)
        if len(fresh) > SETTLED_TOKENS and not text.endswith(INCOMPLETE_CHARACTER):
            self._settled, self._num_settled = text, len(new_ids)
            self._recent = fresh[-ANCHOR_TOKENS:]
            self._before_recent = self._tokenizer.decode(self._recent)
        return text

    def _kept(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token not in self._skipped]

    def _after(self, anchor: list[int], before: str, ids: list[int]) -> str:
        whole = self._tokenizer.decode([*anchor, *ids])
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(ids)

    def _cut(self, text: str) -> str:
        found = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        return text[: min(found)] if found else text


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` begin `stop`."""
    tail = text[max(len(text) - len(stop) + 1, 0) :]
    start = tail.find(stop[:1])
    while start >= 0:
        if stop.startswith(tail[start:]):
            return len(tail) - start
        start = tail.find(stop[:1], start + 1)
    return 0
