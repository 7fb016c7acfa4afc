"""Pairs for preference tuning: a chosen and a rejected answer to one prompt, each a row of its own.

Both rows of a pair are in one micro-batch, the chosen one first, padded on the right to one length. What is compared
is in the labels: the answers' tokens alone.

Shapes: B pairs of a micro-batch, S padded length of the step.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_core.config.split import SPLITS
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.padded_dataset import (
    DatasetFormat,
    TrainingExample,
    collate,
    read_sample,
    split_documents,
)
from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import DataError


class PreferenceDataset:
    """The pairs of one split of one dataset, those with nothing to learn in one of their answers left out.

    Args:
        dataset: pairs; each document is the chosen and the rejected sequence.
        split: shares of the documents.
        split_index: which of the splits.
        seq_length: longest row; longer answers lose their end.

    Raises:
        DataError: nothing is left.
    """

    unit = "pairs"

    def __init__(self, dataset: Dataset, split: str, split_index: int, seq_length: int) -> None:
        self._dataset, self._seq_length = dataset, seq_length
        begins = split_documents(dataset, split, split_index)[:-1]
        both = np.stack([dataset.ids.lengths[begins], dataset.ids.lengths[begins + 1]]).max(axis=0)
        longer = np.flatnonzero(both > seq_length)
        useless = [pair for pair in longer if not self._is_useful(int(begins[pair]))]
        kept = np.setdiff1d(np.arange(len(begins)), useless)
        self.num_cut, self.num_dropped = len(longer) - len(useless), len(useless)
        self._begins = begins[kept]
        self.lengths: NDArray[np.int64] = np.minimum(both[kept], seq_length).astype(np.int64)
        if not len(kept):
            raise DataError(
                f"split={split} leaves no {SPLITS[split_index]} pair of {dataset.prefix} "
                f"({len(dataset.ids.documents) - 1} documents) both of whose answers begin in their first {seq_length} "
                f"ids; give {SPLITS[split_index]} a larger share, or a longer --seq-length"
            )

    def _is_useful(self, begin: int) -> bool:
        return all(self._dataset.trained(begin + side)[1 : self._seq_length].any() for side in (0, 1))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> TrainingExample:
        """Read one pair: the chosen sample, and behind it the rejected one."""
        begin = int(self._begins[number])
        parts = [read_sample(self._dataset, begin + side) for side in (0, 1)]
        cut = [(ids[: self._seq_length], labels[: self._seq_length]) for ids, labels in parts]
        ids, labels = (np.concatenate(arrays).astype(np.int64) for arrays in zip(*cut, strict=True))
        return TrainingExample(ids, labels, tuple(len(sample) for sample, _ in cut))


def collate_pairs(pairs: Sequence[TrainingExample], length: int) -> MicroBatch:
    """Make a micro-batch of 2B rows, [2B, S]: rows 2n and 2n + 1 are chosen and rejected of pair n.

    Args:
        pairs: of two samples each, at most `length` ids long.
        length: S.
    """
    rows = []
    for pair in pairs:
        chosen, rejected = pair.lengths
        rows.append(TrainingExample(pair.ids[:chosen], pair.labels[:chosen], (chosen,)))
        rows.append(TrainingExample(pair.ids[chosen:], pair.labels[chosen:], (rejected,)))
    return collate(rows, length)


def _open(prefix: str) -> Dataset:
    dataset = open_dataset(Path(prefix))
    if not dataset.is_pairs:
        kind = "samples with labels" if dataset.is_samples else "plain text"
        raise DataError(
            f"{prefix} holds {kind}, not pairs; make pairs with `asd-data preprocess` and one of its pair handlers"
        )
    return dataset


PREFERENCE_FORMAT = DatasetFormat(_open, PreferenceDataset, collate_pairs)
"""Sets for preference tuning."""
