"""Samples with labels: instruction sets of asd-data, one sample in a row, or packs of several.

In a pack positions start from 0 with each sample, and attention stays inside it.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_core.config.split import SPLITS
from ascendspeed_core.data.padded_dataset import (
    DatasetFormat,
    TrainingExample,
    collate,
    read_sample,
    split_documents,
)
from ascendspeed_core.launch import announce
from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import DataError


def _open(prefix: str) -> Dataset:
    dataset = open_dataset(Path(prefix))
    if dataset.is_pairs:
        raise DataError(
            f"{prefix} holds pairs for preference tuning; train on them with `asd-core dpo`, or give samples of an "
            "instruction handler"
        )
    if not dataset.is_samples:
        raise DataError(
            f"{prefix} holds plain text, not samples with labels; leave --is-instruction-dataset out, or give data of "
            "an instruction handler"
        )
    if dataset.manifest is None:
        announce(f"{prefix}: no manifest beside it; its tokenizer cannot be checked")
    return dataset


class SftDataset:
    """The rows of one split of one dataset, those without anything to learn left out.

    Args:
        dataset: samples with labels.
        split: shares of the documents.
        split_index: which of the splits.
        seq_length: longest row; longer samples lose their end, longer packs are refused.

    Raises:
        DataError: nothing is left, or a pack is too long.
    """

    def __init__(self, dataset: Dataset, split: str, split_index: int, seq_length: int) -> None:
        self._dataset, self._seq_length = dataset, seq_length
        mine = split_documents(dataset, split, split_index)
        self.is_packed = dataset.manifest is not None and dataset.manifest.pack is not None
        self.unit = "packs" if self.is_packed else "samples"
        # Where each row begins in the sequences of the file, and where it ends.
        begins = mine[:-1] if self.is_packed else np.arange(mine[0], mine[-1])
        ends = mine[1:] if self.is_packed else begins + 1
        totals = np.concatenate([[0], np.cumsum(dataset.ids.lengths, dtype=np.int64)])
        lengths = totals[ends] - totals[begins]
        longer = np.flatnonzero(lengths > seq_length)
        if self.is_packed and len(longer):
            raise DataError(
                f"{dataset.prefix} has packs of up to {lengths.max()} ids, more than seq_length={seq_length}; give "
                f"--seq-length {lengths.max()} or more, or pack again"
            )
        useless = [row for row in longer if not dataset.trained(int(begins[row]))[1:seq_length].any()]
        kept = np.setdiff1d(np.flatnonzero(lengths), useless)
        self.num_cut, self.num_dropped = len(longer) - len(useless), len(useless)
        self._begins, self._ends = begins[kept], ends[kept]
        self.lengths: NDArray[np.int64] = np.minimum(lengths[kept], seq_length)
        if not len(kept):
            raise DataError(
                f"split={split} leaves no {SPLITS[split_index]} sample of {dataset.prefix} "
                f"({len(dataset.ids.documents) - 1} documents) that has anything to learn in its first "
                f"{seq_length} ids; give {SPLITS[split_index]} a larger share"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> TrainingExample:
        """Read one row.

        Raises:
            DataError: an attention mask that hides something else than an end.
        """
        parts = [
            read_sample(self._dataset, n) for n in range(int(self._begins[number]), int(self._ends[number]))
        ]
        ids, labels = (np.concatenate(arrays)[: self._seq_length] for arrays in zip(*parts, strict=True))
        lengths = tuple(len(part[0]) for part in parts) if self.is_packed else (len(ids),)
        return TrainingExample(ids.astype(np.int64), labels.astype(np.int64), lengths)


SFT_FORMAT = DatasetFormat(_open, SftDataset, collate)
"""Instruction sets."""
