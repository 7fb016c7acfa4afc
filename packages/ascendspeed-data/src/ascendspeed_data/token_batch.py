"""Token ids of several texts in one array."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TokenBatch:
    """Token ids of several texts.

    Attributes:
        ids: concatenated ids of the texts, int64 or uint32.
        lengths: number of ids of each text, int64.
    """

    ids: NDArray[Any]
    lengths: NDArray[np.int64]

    @classmethod
    def from_lists(cls, encoded: Sequence[Sequence[int]]) -> "TokenBatch":
        """Concatenate lists of ids."""
        lengths = np.fromiter((len(ids) for ids in encoded), np.int64, len(encoded))
        joined = np.empty(int(lengths.sum()), np.int64)
        start = 0
        for ids in encoded:
            joined[start : start + len(ids)] = ids
            start += len(ids)
        return cls(joined, lengths)

    def split(self) -> list[NDArray[Any]]:
        """Return the ids of each text."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []
