"""Characters that stand for special pieces which a text spells, until the text is encoded."""

from collections.abc import Iterable, Mapping

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
