"""Characters that stand for special pieces which a text spells, until the text is encoded."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ascendspeed_data.errors import DataError

FIRST_STAND_IN = 0x100000
"""The first of the characters that stand for pieces: the last of Unicode's areas for private use."""


def check_literal(ids: Iterable[int], special: Mapping[str, int], path: object) -> None:
    """Raise `DataError` if the ids of a text hold a special one."""
    found = next((piece for number in ids for piece, own in special.items() if own == number), None)
    if found is not None:
        raise DataError(
            f"{path} reads {found} in a text as its special piece in any case; remove it from the text, or give "
            "--parse-special"
        )


class WrittenOut(NamedTuple):
    """A text in which characters were replaced, with the way back.

    Attributes:
        text: the text.
        begins: by character of the text, where what it came from begins.
        ends: by character of the text, where that ends.
    """

    text: str
    begins: Sequence[int]
    ends: Sequence[int]

    def ranges(self, offsets: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return ranges of characters as ranges of the text before."""
        size = self.ends[-1] if self.ends else 0
        found = []
        for start, end in offsets:
            begin = self.begins[start] if start < len(self.begins) else size
            found.append((begin, self.ends[end - 1] if end > start else begin))
        return found


def written_out(parts: Iterable[tuple[str, str]]) -> WrittenOut:
    """Join parts of a text, each with what replaces it; an equal part is kept character by character."""
    text: list[str] = []
    begins: list[int] = []
    ends: list[int] = []
    done = 0
    for before, after in parts:
        text.append(after)
        if before == after:
            begins += range(done, done + len(before))
            ends += range(done + 1, done + len(before) + 1)
        else:
            begins += [done] * len(after)
            ends += [done + len(before)] * len(after)
        done += len(before)
    return WrittenOut("".join(text), begins, ends)
