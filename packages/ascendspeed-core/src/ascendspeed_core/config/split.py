"""The shares of a dataset for training, validation and test, as `--split` writes them."""

import math
import re
from collections.abc import Sequence

SPLITS = ("training", "validation", "test")

WHOLE = ("1,0,0", "0,1,0", "0,0,1")
"""For each split the shares that give it everything: data of its own is not shared out."""

_NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+", re.ASCII)


def parse_split(text: str) -> tuple[float, float, float]:
    """Return the three shares, as they are written: they need not add up to anything.

    Args:
        text: numbers between commas or slashes, `969,30,1`.

    Raises:
        ValueError: not three decimal numbers, or all of them zero.
    """
    parts = [part.strip() for part in text.replace("/", ",").split(",")]
    shares = [float(part) for part in parts if _NUMBER.fullmatch(part)]
    if len(parts) != 3 or len(shares) != 3 or not math.isfinite(_total(shares)):
        raise ValueError(
            f"split={text!r} is not three numbers of 0 or more, for {', '.join(SPLITS)}; write for example "
            "--split 969,30,1"
        )
    if not _total(shares):
        raise ValueError(
            f"split={text!r} gives no document to anything: at least one of its numbers must be above 0; write for "
            "example --split 969,30,1"
        )
    return shares[0], shares[1], shares[2]


def split_fractions(text: str) -> tuple[float, float, float]:
    """Return the three shares as parts of one; equal ones are the same split, however it is written."""
    shares = parse_split(text)
    whole = _total(shares)
    return shares[0] / whole, shares[1] / whole, shares[2] / whole


def split_edges(text: str, count: int) -> list[int]:
    """Return where the splits of `count` documents begin, and where the last ends, as megatron-core rounds them."""
    edges = [0.0]
    for fraction in split_fractions(text):
        edges.append(edges[-1] + fraction)
    return [round(edge * float(count)) for edge in edges]


def _total(shares: Sequence[float]) -> float:
    """Add up one by one, as numpy does for megatron-core; newer versions of Python correct the rounding of `sum`."""
    total = 0.0
    for share in shares:
        total += share
    return total
