"""Read special pieces that a user's text spells, such as `<|im_end|>`, as text, while those of a template stay control.

Each spelled piece is replaced by a stand-in character before a template is applied, so that control in the result is
the template's own. The tokenizer then encodes the whole, with the stand-ins written out, as text that was never split
there.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ascendspeed_data.errors import DataError
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer import Tokenizer

FIRST_STAND_IN = 0x100000
"""The first of the characters that stand for pieces: the last of Unicode's areas for private use."""


class LiteralTokenizer:
    """A tokenizer that reads stand-ins as the text that they stand for, and is otherwise the one given.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        pieces = sorted(tokenizer.special_ids, key=len, reverse=True)
        self._stand_ins = {piece: chr(FIRST_STAND_IN + number) for number, piece in enumerate(pieces)}
        self._literals = {stand_in: piece for piece, stand_in in self._stand_ins.items()}
        self._pattern = re.compile("|".join(map(re.escape, pieces)) or r"(?!)")

    @classmethod
    def for_texts(
        cls, tokenizer: Tokenizer, texts: Iterable[str], is_rendered: bool = False
    ) -> "LiteralTokenizer | None":
        """Return such a tokenizer if a text spells a piece that would become an id; `None` if none does.

        Args:
            tokenizer: of the model.
            texts: of users.
            is_rendered: whether they become parts of a rendered conversation, in which all special pieces are ids.
        """
        literal = cls(tokenizer)
        read = tokenizer.special_ids if is_rendered else tokenizer.added_ids
        spelled = {piece for text in texts for piece in literal.spelled(text)}
        return literal if spelled & read.keys() else None

    def spelled(self, text: str) -> list[str]:
        """Return the special pieces that a text spells, each once."""
        return list(dict.fromkeys(self._pattern.findall(text)))

    def mask(self, text: str) -> str:
        """Put stand-ins in place of the special pieces in a text.

        Raises:
            DataError: it holds such a character already.
        """
        taken = next((c for c in text if c in self._literals), None)
        if taken is not None:
            raise DataError(
                f"the text holds U+{ord(taken):X}, a private character, beside special pieces; remove it"
            )
        return self._pattern.sub(lambda found: self._stand_ins[found[0]], text)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a user's text, with what the tokenizer adds to a text."""
        return [*self.prefix_ids, *self.encode_rendered(self.mask(text))[0], *self.suffix_ids]

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts that hold stand-ins."""
        return TokenBatch.from_lists([self.encode_rendered(text)[0] for text in texts])

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a conversation that holds stand-ins; the ranges of characters are not known.

        Raises:
            DataError: the tokenizer's model itself makes a special id of the text of a piece.
        """
        ids = self._tokenizer.encode_literals(text, self._literals)
        return ids, [(0, 1)] * len(ids)

    def split_rendered(self, text: str) -> None:
        """Give no parts: `encode_rendered` encodes the whole."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def check_literal(ids: Iterable[int], special: Mapping[str, int], path: object) -> None:
    """Raise `DataError` if the ids of a text hold a special one."""
    found = next((piece for number in ids for piece, own in special.items() if own == number), None)
    if found is not None:
        raise DataError(
            f"{path} reads {found} in a text as its special piece in any case; remove it from the text, or give "
            "--parse-special"
        )
