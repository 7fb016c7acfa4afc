"""Parse `--data-path`: one prefix, or a blend."""

import math
from collections.abc import Sequence

from ascendspeed_data.errors import ConfigError

Blend = tuple[list[str], list[float] | None]
"""Prefixes and their weights; a single prefix may have none."""


def parse_blend(words: Sequence[str], option: str = "data_path") -> Blend:
    """Return the prefixes and their weights; a single prefix has no weight.

    Args:
        words: of the option.
        option: that gave them, for the message.

    Raises:
        ConfigError: the words are neither one prefix nor pairs of a positive weight and a prefix.
    """
    if len(words) == 1:
        return [words[0]], None
    try:
        weights = [float(word) for word in words[0::2]]
    except ValueError:
        weights = []
    prefixes = list(words[1::2])
    if (
        not weights
        or len(weights) != len(prefixes)
        or not math.isfinite(sum(weights))
        or min(weights) <= 0
        or min(weights) / sum(weights) == 0
    ):
        raise ConfigError(
            f"{option}={' '.join(words)} is neither one prefix nor pairs of a positive weight and a prefix; write for "
            f"example --{option.replace('_', '-')} 0.7 corpus_a 0.3 corpus_b"
        )
    return prefixes, weights
