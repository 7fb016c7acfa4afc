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

USERS = ("user", "human", "tool", "observation", "tool_response", "ipython", "function")
"""Roles whose texts hold no control of a template, such as the `<think>` that an answer may begin with."""

USER_COLUMNS = ("prompt", "tools", "documents")
"""Columns whose texts are as those of users."""


class LiteralTokenizer:
    """A tokenizer that reads stand-ins as the text that they stand for, and is otherwise the one given.

    Args:
        tokenizer: of the model.
        sources: chat templates; added tokens that stand in them are control too, and text if a user spells them.
    """

    def __init__(self, tokenizer: Tokenizer, sources: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        control = {
            piece
            for piece in tokenizer.added_ids
            if piece.strip() and piece not in tokenizer.special_ids and any(piece in one for one in sources)
        }
        self._control = frozenset(control)
        pieces = sorted({*tokenizer.special_ids, *control}, key=len, reverse=True)
        self._stand_ins = {piece: chr(FIRST_STAND_IN + number) for number, piece in enumerate(pieces)}
        self._literals = {stand_in: piece for piece, stand_in in self._stand_ins.items()}
        special = [piece for piece in pieces if piece in tokenizer.special_ids]
        self._pattern = re.compile("|".join(map(re.escape, special)) or r"(?!)")
        self._of_users = re.compile("|".join(map(re.escape, pieces)) or r"(?!)")

    @classmethod
    def for_tokenizer(cls, tokenizer: Tokenizer) -> "LiteralTokenizer":
        """Return such a tokenizer for records that the tokenizer's own chat templates format."""
        own = [tokenizer.chat_template, *tokenizer.named_chat_templates.values()]
        return cls(tokenizer, [source for source in own if source])

    def control(self, is_rendered: bool) -> set[str]:
        """Return the pieces that become ids where a text spells them.

        Args:
            is_rendered: whether a chat template made the text.
        """
        return {*self.special_ids, *self._control} if is_rendered else set(self.added_ids)

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

    def mask(self, text: str, is_of_user: bool = False) -> str:
        """Put stand-ins in place of the special pieces in a text, and of all control if it is of a user.

        Raises:
            DataError: it holds such a character already.
        """
        taken = next((c for c in text if c in self._literals), None)
        if taken is not None:
            raise DataError(
                f"the text holds U+{ord(taken):X}, a private character, beside special pieces; remove it"
            )
        pattern = self._of_users if is_of_user else self._pattern
        return pattern.sub(lambda found: self._stand_ins[found[0]], text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a user's text, with what the tokenizer adds to a text."""
        ids, _ = self.encode_rendered(self.mask(text))
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts that hold stand-ins."""
        return TokenBatch.from_lists([self.encode_rendered(text)[0] for text in texts])

    def spelled_in(self, value: object) -> list[str]:
        """Return the pieces that the texts of a record or message spell and that are text there, each once."""
        found = (
            piece
            for text, is_of_user in _texts(value)
            for piece in (self._of_users if is_of_user else self._pattern).findall(text)
        )
        return list(dict.fromkeys(found))

    def masked(self, value: Any, is_of_user: bool = False) -> Any:
        """Put stand-ins in place of these pieces in all texts of a record or message."""
        if isinstance(value, str):
            return self.mask(value, is_of_user)
        if isinstance(value, dict):
            return {
                self.masked(key): self.masked(one, _is_of_user(value, key, is_of_user))
                for key, one in value.items()
            }
        return [self.masked(one, is_of_user) for one in value] if isinstance(value, list) else value

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
    read = literal.control(any(one.is_rendered for one in made))
    if not made or not any(piece in read for piece in spelled):
        return None
    masked = make(literal.masked(record))
    texts = [[one.content for one in sample.segments if isinstance(one.content, str)] for sample in made]
    again = [
        [literal.written_out(one.content) for one in sample.segments if isinstance(one.content, str)]
        for sample in masked
    ]
    # Segments may be divided elsewhere, and a text that ends as control does may seem to end an answer; their texts
    # together are the same.
    shown, shown_again = (["".join(one) for one in several] for several in (texts, again))
    if shown != shown_again and (len(shown) == len(shown_again) or shown[-1] != shown_again[-1]):
        raise DataError(
            f"the handler or its template reads {', '.join(spelled)} in a text, so it is not known whether control is "
            "meant; give --parse-special if it is, or remove it from the record"
        )
    return masked


def _texts(value: object, is_of_user: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield all texts of a record or message, with whether they are of a user."""
    if isinstance(value, str):
        yield value, is_of_user
    elif isinstance(value, dict):
        for key, one in value.items():
            yield str(key), False
            yield from _texts(one, _is_of_user(value, key, is_of_user))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, is_of_user)


def _is_of_user(holder: dict[Any, Any], key: object, is_outer: bool) -> bool:
    """Return whether the values of a key are texts of a user: of a user's message, or of a column of users."""
    role = holder.get("role", holder.get("from"))
    if isinstance(role, str):
        return role.lower() in USERS and key not in ("role", "from")
    return is_outer or key in USER_COLUMNS
