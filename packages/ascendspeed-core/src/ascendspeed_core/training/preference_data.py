"""Pairs for preference tuning: a chosen and a rejected answer to one prompt, each a row of its own.

Both rows of a pair are in one micro-batch, the chosen one first, padded on the right to one length. What is compared
is in the labels: the answers' tokens alone.

Shapes: B pairs of a micro-batch, S padded length of the step.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_core.config.preference import PreferenceDataConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.batches import SPLITS
from ascendspeed_core.training.instruction import (
    Row,
    RowData,
    collate,
    documents_of_split,
    orders_of,
    read_sample,
)
from ascendspeed_core.training.step import MicroBatch
from ascendspeed_data.blend import check_same_tokenizer
from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.manifest import DatasetManifest


class PairRows:
    """The pairs of one split of one dataset, those with nothing to learn in one of their answers left out.

    Args:
        dataset: pairs; each document is the chosen and the rejected sequence.
        split: shares of the documents.
        place: which of the splits.
        seq_length: longest row; longer answers lose their end.

    Raises:
        DataError: nothing is left.
    """

    def __init__(self, dataset: Dataset, split: str, place: int, seq_length: int) -> None:
        self._dataset, self._seq_length = dataset, seq_length
        begins = documents_of_split(dataset, split, place)[:-1]
        both = np.stack([dataset.ids.lengths[begins], dataset.ids.lengths[begins + 1]]).max(axis=0)
        longer = np.flatnonzero(both > seq_length)
        useless = [pair for pair in longer if not self._is_useful(int(begins[pair]))]
        kept = np.setdiff1d(np.arange(len(begins)), useless)
        self.num_cut, self.num_dropped = len(longer) - len(useless), len(useless)
        self._begins = begins[kept]
        self.lengths: NDArray[np.int64] = np.minimum(both[kept], seq_length).astype(np.int64)
        if not len(kept):
            raise DataError(
                f"split={split} leaves no {SPLITS[place]} pair of {dataset.prefix} "
                f"({len(dataset.ids.documents) - 1} documents) both of whose answers begin in their first {seq_length} "
                f"ids; give {SPLITS[place]} a larger share, or a longer --seq-length"
            )

    def _is_useful(self, begin: int) -> bool:
        return all(self._dataset.trained(begin + side)[1 : self._seq_length].any() for side in (0, 1))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> Row:
        """Read one pair: the chosen sample, and behind it the rejected one."""
        begin = int(self._begins[number])
        parts = [read_sample(self._dataset, begin + side) for side in (0, 1)]
        cut = [(ids[: self._seq_length], labels[: self._seq_length]) for ids, labels in parts]
        ids, labels = (np.concatenate(arrays).astype(np.int64) for arrays in zip(*cut, strict=True))
        return Row(ids, labels, tuple(len(sample) for sample, _ in cut))

    def describe(self, split: str, wanted: int | None) -> str:
        """Say what there is, and how often a run sees it that wants `wanted` pairs."""
        seen = f", seen {wanted / len(self):.2f} times" if wanted is not None else ""
        cut = (
            f"; {self.num_cut:,} lose the end of an answer at seq_length={self._seq_length}, {self.num_dropped:,} "
            "longer ones are left out, as nothing of an answer would remain"
            if self.num_cut or self.num_dropped
            else ""
        )
        return f"{self._dataset.prefix}: {len(self):,} {split} pairs{seen}{cut}"


class PairData(RowData):
    """Training and validation pairs of one run.

    Args:
        config: files, split, length of a row.
        seed: of the order.
        num_samples: pairs of the whole run: (training, validation, test).
        vocab_size: ids must be below.
        mesh: this process's place.
    """

    def __init__(
        self,
        config: PreferenceDataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        mesh: ParallelMesh,
    ) -> None:
        prefixes, weights = config.blend()
        datasets = [_open(prefix) for prefix in prefixes]

        def pairs_of(place: int) -> list[PairRows]:
            return [PairRows(dataset, config.split, place, config.seq_length) for dataset in datasets]

        train, validation = orders_of(pairs_of, weights, seed, num_samples)
        super().__init__(config, train, validation, vocab_size, mesh, collate_pairs)


def collate_pairs(pairs: Sequence[Row], length: int) -> MicroBatch:
    """Make a micro-batch of 2B rows, [2B, S]: rows 2n and 2n + 1 are chosen and rejected of pair n.

    Args:
        pairs: of two samples each, at most `length` ids long.
        length: S.
    """
    rows = []
    for pair in pairs:
        chosen, rejected = pair.lengths
        rows.append(Row(pair.ids[:chosen], pair.labels[:chosen], (chosen,)))
        rows.append(Row(pair.ids[chosen:], pair.labels[chosen:], (rejected,)))
    return collate(rows, length)


def check_preference_data(
    config: PreferenceDataConfig, num_samples: tuple[int, int, int]
) -> DatasetManifest | None:
    """Prove every set whole, all of one tokenizer, and no wanted split empty; needs no processes.

    Args:
        config: files and split.
        num_samples: pairs of the whole run: (training, validation, test).

    Returns:
        The manifest of the first prefix.

    Raises:
        DataError: a file is missing or damaged, holds something else, or a split has no pair to learn from.
    """
    datasets = [_open(prefix) for prefix in config.blend()[0]]
    for dataset in datasets:
        check_same_tokenizer(datasets[0], dataset)
        for place, split in enumerate(SPLITS[:2]):
            if num_samples[place]:
                pairs = PairRows(dataset, config.split, place, config.seq_length)
                announce(pairs.describe(split, num_samples[place] if len(datasets) == 1 else None))
    return datasets[0].manifest


def _open(prefix: str) -> Dataset:
    dataset = open_dataset(Path(prefix))
    if not dataset.is_pairs:
        kind = "samples with labels" if dataset.is_samples else "plain text"
        raise DataError(
            f"{prefix} holds {kind}, not pairs; make pairs with `asd-data preprocess` and one of its pair handlers"
        )
    return dataset
