"""Count token ids, and the entropy of their frequencies."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.errors import DataError

IDS_PER_CHUNK = 1 << 20
READ_BYTES = 1 << 24


def count_ids(ids: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Return how often each id occurs, int64 [vocab_size].

    Counts in chunks, because numpy converts ids to eight bytes each.
    """
    counted = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), IDS_PER_CHUNK):
        counted += np.bincount(ids[start : start + IDS_PER_CHUNK], minlength=vocab_size)
    return counted


def count_ids_in_file(path: Path, token_format: Any, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each id occurs in a `.bin` file, int64 [vocab_size].

    Raises:
        DataError: an id is negative, or `vocab_size` or more.
    """
    counted = np.zeros(vocab_size, np.int64)
    with path.open("rb") as file:
        while content := file.read(READ_BYTES):
            ids = np.frombuffer(content, token_format)
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise DataError(
                    f"{path} holds ids from {ids.min()} to {ids.max()}, the tokenizer has {vocab_size}; the file is "
                    "damaged, or was made with another tokenizer: preprocess again"
                )
            counted += count_ids(ids, vocab_size)
    return counted


def unigram_entropy_nats(counts: NDArray[np.int64]) -> float:
    """Return the entropy of token frequencies, nats per token: the loss of the best unigram model."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
