"""Parse `--data-path`: one prefix, or a blend."""

import math
from collections.abc import Sequence

from ascendspeed_data.errors import ConfigError


def parse_blend(words: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Return the prefixes and their weights; a single prefix has no weight.

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
        or not all(weight > 0 and math.isfinite(weight) for weight in weights)
    ):
        raise ConfigError(
            f"data_path={' '.join(words)} is neither one prefix nor pairs of a positive weight and a prefix; write for "
            "example --data-path 0.7 corpus_a 0.3 corpus_b"
        )
    return prefixes, weights
