"""Read special pieces that a user's text spells, such as `<|im_end|>`, as text, while those of a template stay control.

Each spelled piece is replaced by a stand-in character before a template is applied, so that control in the result is
the template's own. The tokenizer then encodes the whole, with the stand-ins written out, as text that was never split
there.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ascendspeed_data.errors import DataError
from ascendspeed_data.sample import Sample
from ascendspeed_data.stand_ins import FIRST_STAND_IN
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer import Tokenizer


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

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a user's text, with what the tokenizer adds to a text."""
        ids, _ = self.encode_rendered(self.mask(text))
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts that hold stand-ins."""
        return TokenBatch.from_lists([self.encode_rendered(text)[0] for text in texts])

    def spelled_in(self, value: object) -> list[str]:
        """Return the special pieces that the texts of a record or message spell, each once."""
        return list(dict.fromkeys(piece for text in _texts(value) for piece in self._pattern.findall(text)))

    def masked(self, value: Any) -> Any:
        """Put stand-ins in place of the special pieces in all texts of a record or message."""
        if isinstance(value, str):
            return self.mask(value)
        if isinstance(value, dict):
            return {self.masked(key): self.masked(one) for key, one in value.items()}
        return [self.masked(one) for one in value] if isinstance(value, list) else value

    def written_out(self, text: str) -> str:
        """Return a text with the special pieces that its stand-ins stand for."""
        return "".join(self._literals.get(character, character) for character in text)

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and ranges of a conversation that holds stand-ins.

        Raises:
            DataError: the tokenizer's model itself makes a special id of the text of a piece.
        """
        return self._tokenizer.encode_literals(text, self._literals)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and ranges of a text that holds stand-ins."""
        return self.encode_rendered(text)

    def split_rendered(self, text: str) -> None:
        """Give no parts: `encode_rendered` encodes the whole."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def literal_samples(
    make: Callable[[Any], list[Sample]], record: Any, made: list[Sample], literal: LiteralTokenizer
) -> list[Sample] | None:
    """Return the samples of a record with stand-ins for the special pieces that it spells; `None` if it spells none.

    Args:
        make: the handler.
        record: as it came.
        made: what the handler made of it.
        literal: for the special pieces of the tokenizer.

    Raises:
        DataError: the handler or the template itself looks for a piece in the text of a record.
    """
    spelled = literal.spelled_in(record)
    read = literal.special_ids if any(one.is_rendered for one in made) else literal.added_ids
    if not made or not any(piece in read for piece in spelled):
        return None
    masked = make(literal.masked(record))
    texts = [[one.content for one in sample.segments if isinstance(one.content, str)] for sample in made]
    again = [
        [literal.written_out(one.content) for one in sample.segments if isinstance(one.content, str)]
        for sample in masked
    ]
    # Segments may be divided elsewhere; their texts together are the same.
    if ["".join(one) for one in texts] != ["".join(one) for one in again]:
        raise DataError(
            f"the handler or its template reads {', '.join(spelled)} in a text, so it is not known whether control is "
            "meant; give --parse-special if it is, or remove it from the record"
        )
    return masked


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield str(key)
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
