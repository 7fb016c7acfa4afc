"""Examples that training reads whole: samples with labels (`sft_dataset`) and pairs of answers (`preference_dataset`).

Rows are padded on the right, which causal attention never looks at. What is learned is in the labels; every learned
token of the global batch weighs the same, however rows fall into micro-batches and ranks.

The order is drawn anew for each epoch from the seed and the number of the epoch, so it depends neither on the layout
nor on the length of the run.

Shapes: B rows of a micro-batch, S padded length of the step.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ascendspeed_core.config.finetune import PaddedDataConfig
from ascendspeed_core.config.split import SPLITS, parse_split
from ascendspeed_core.data.gpt_dataset import DIGEST_SAMPLES, numbers_of_rank, refuse_unknown_ids
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.launch import announce
from ascendspeed_core.megatron import megatron
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.blend import check_same_tokenizer
from ascendspeed_data.dataset import Dataset
from ascendspeed_data.encoding import LABELS
from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers import IGNORED_LABEL
from ascendspeed_data.manifest import DatasetManifest


@dataclass(frozen=True)
class TrainingExample:
    """Token ids and labels of one sample, or of the samples of a pack or of a pair, concatenated.

    Attributes:
        ids: of all of them, [n].
        labels: what is learned, -100 elsewhere; not shifted, [n].
        lengths: of each sample.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: tuple[int, ...]


class ExampleDataset(Protocol):
    """The examples of one split of one dataset.

    Attributes:
        lengths: least length that each example is padded to.
        num_cut: examples that are truncated.
        num_dropped: examples that are left out, as nothing to learn would remain of them.
        unit: what the log calls them, in the plural.
    """

    lengths: NDArray[np.int64]
    num_cut: int
    num_dropped: int
    unit: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> TrainingExample:
        """Read one example."""
        ...


class BlendedExamples:
    """Examples of several datasets, blended and shuffled, in the order of a run.

    Args:
        parts: the datasets.
        weights: of each, or `None` for a single one.
        seed: of the order.
        count: examples that will be read.
        is_shuffled: a new order in each epoch; else that of the files.
    """

    def __init__(
        self,
        parts: Sequence[ExampleDataset],
        weights: list[float] | None,
        seed: int,
        count: int,
        is_shuffled: bool,
    ) -> None:
        self._parts, self._seed, self._is_shuffled = parts, seed, is_shuffled
        self._orders: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._of_part = self._in_part = None
        self._weights = weights
        if weights is not None and len(parts) > 1:
            shares = np.asarray(weights, np.float64) / sum(weights)
            self._of_part, self._in_part = np.zeros(count, np.int16), np.zeros(count, np.int64)
            megatron("datasets.helpers").build_blending_indices(
                self._of_part, self._in_part, shares, len(parts), count, False
            )

    def locate(self, number: int) -> tuple[int, int]:
        """Return dataset and example of the `number`th example of the run."""
        part = int(self._of_part[number]) if self._of_part is not None else 0
        within = int(self._in_part[number]) if self._in_part is not None else number
        epoch, position = divmod(within, len(self._parts[part]))
        if not self._is_shuffled:
            return part, position
        known = self._orders.get(part)
        if known is None or known[0] != epoch:
            # RandomState: its stream is the same in every version of numpy, so that a resumed run finds its order.
            draw = np.random.RandomState([self._seed, epoch])
            known = self._orders[part] = (epoch, draw.permutation(len(self._parts[part])))
        return part, int(known[1][position])

    def length(self, number: int) -> int:
        """Return how many ids an example has."""
        part, example = self.locate(number)
        return int(self._parts[part].lengths[example])

    def __getitem__(self, number: int) -> TrainingExample:
        part, example = self.locate(number)
        return self._parts[part][example]

    def digest(self) -> str:
        """Return a digest of everything that decides the order."""
        digest = hashlib.sha256(f"{self._seed}:{self._weights}".encode())
        for part in self._parts:
            digest.update(np.ascontiguousarray(part.lengths).tobytes())
        return digest.hexdigest()


def split_documents(dataset: Dataset, split: str, split_index: int) -> NDArray[np.int64]:
    """Return where the documents of one split begin in the sequences of the file, and where the last ends."""
    documents: NDArray[np.int64] = dataset.ids.documents
    shares = parse_split(split)
    edges = [round(sum(shares[:n]) / sum(shares) * (len(documents) - 1)) for n in range(4)]
    return documents[edges[split_index] : edges[split_index + 1] + 1]


def read_sample(dataset: Dataset, sequence: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return ids and labels of a sequence, without the padding that files of other tools may have.

    Raises:
        DataError: an attention mask that hides something else than an end.
    """
    attended = dataset.attended(sequence) != 0
    end = int(attended.sum())
    if not attended[:end].all():
        raise DataError(
            f"{dataset.prefix}: the attention mask of sequence {sequence} hides ids before its end; only "
            "padding at the end can be hidden"
        )
    labels = dataset.arrays[LABELS][sequence][:end].copy()
    # Nothing is learned of a sample's first id: what stands before it in a pack is another sample.
    labels[:1] = IGNORED_LABEL
    return dataset.ids[sequence][:end], labels


@dataclass(frozen=True)
class DatasetFormat:
    """What differs between datasets of samples and of pairs.

    Attributes:
        open: opens the dataset of a prefix, and refuses one of another kind.
        open_split: takes a dataset, the shares of the splits, the index of one, and the longest example.
        collate: makes a micro-batch of examples and the length to pad to.
    """

    open: Callable[[str], Dataset]
    open_split: Callable[[Dataset, str, int, int], ExampleDataset]
    collate: Callable[[Sequence[TrainingExample], int], MicroBatch]


def check_padded_data(
    dataset_format: DatasetFormat, config: PaddedDataConfig, num_samples: tuple[int, int, int]
) -> DatasetManifest | None:
    """Prove every set whole, all of one tokenizer, and no wanted split empty; needs no processes.

    Args:
        dataset_format: of samples or of pairs.
        config: files and split.
        num_samples: rows of the whole run: (training, validation, test).

    Returns:
        The manifest of the first prefix, or `None` if it has none (data made by other tools).

    Raises:
        DataError: a file is missing or damaged, holds something else, or has nothing to learn in a split.
    """
    opened = {prefix: dataset_format.open(prefix) for prefix in config.prefixes()}
    datasets = list(opened.values())
    for prefix, dataset in opened.items():
        check_same_tokenizer(datasets[0], dataset)
        for split_index, split in enumerate(SPLITS):
            parts = config.blend(split_index)[0]
            if num_samples[split_index] and prefix in parts:
                examples = dataset_format.open_split(
                    dataset, config.shares(split_index), split_index, config.seq_length
                )
                seen = (
                    f", seen {num_samples[split_index] / len(examples):.2f} times" if len(parts) == 1 else ""
                )
                announce(
                    f"{dataset.prefix}: {len(examples):,} {split} {examples.unit}{seen}{_shortened(examples, config)}"
                )
    return datasets[0].manifest


def count_examples(dataset_format: DatasetFormat, config: PaddedDataConfig, split_index: int = 0) -> int:
    """Return how many examples all datasets have together, for training or another split."""
    shares = config.shares(split_index)
    return sum(
        len(dataset_format.open_split(dataset_format.open(prefix), shares, split_index, config.seq_length))
        for prefix in config.blend(split_index)[0]
    )


def _shortened(examples: ExampleDataset, config: PaddedDataConfig) -> str:
    if not examples.num_cut and not examples.num_dropped:
        return ""
    return (
        f"; {examples.num_cut:,} lose an end at seq_length={config.seq_length}, {examples.num_dropped:,} longer ones "
        "are left out, as nothing to learn would remain"
    )


class PaddedBatchLoader:
    """Training and validation rows of one run, see `data.loader.BatchLoader`.

    Args:
        dataset_format: of samples or of pairs.
        config: files, split, length of a row.
        seed: of the order of training rows; held-out ones come as they lie.
        num_samples: rows of the whole run: (training, validation, test).
        vocab_size: ids must be below.
        mesh: of this rank.
    """

    def __init__(
        self,
        dataset_format: DatasetFormat,
        config: PaddedDataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        mesh: ParallelMesh,
    ) -> None:
        self._config, self._mesh, self._vocab_size = config, mesh, vocab_size
        self._collate = dataset_format.collate

        def order(split_index: int) -> BlendedExamples | None:
            if not num_samples[split_index]:
                return None
            prefixes, weights = config.blend(split_index)
            parts = [
                dataset_format.open_split(
                    dataset_format.open(prefix), config.shares(split_index), split_index, config.seq_length
                )
                for prefix in prefixes
            ]
            is_shuffled = split_index == 0 and not config.no_shuffle
            return BlendedExamples(parts, weights, seed, num_samples[split_index], is_shuffled)

        self.train, self.validation, self.test = order(0), order(1), order(2)

    def order_digest(self, consumed: int) -> str:
        """Return a digest of the order, of whose beginning the first `consumed` rows are."""
        return self.train.digest() if self.train is not None else ""

    def content_digest(self, num_samples: int) -> str:
        """Return a digest of the order and of the ids of some rows, to compare machines."""
        digest = hashlib.sha256(self.order_digest(num_samples).encode())
        for number in range(0, num_samples, num_samples // DIGEST_SAMPLES + 1):
            assert self.train is not None
            digest.update(self.train[number].ids.tobytes())
        return digest.hexdigest()

    def micro_batches(self, consumed: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches, of those sizes, of the step that follows `consumed` rows."""
        return list(self._take(self.train, consumed, sizes))

    def validation_batches(self, evaluated: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the evaluation that follows `evaluated` rows."""
        return list(self._take(self.validation, evaluated, sizes))

    def test_batches(self, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the test data."""
        return list(self._take(self.test, 0, sizes))

    def _take(
        self, order: BlendedExamples | None, consumed: int, sizes: Sequence[int]
    ) -> Iterator[MicroBatch]:
        assert order is not None
        length = self._length(order, range(consumed, consumed + sum(sizes) * self._mesh.layout.dp))
        for numbers in numbers_of_rank(consumed, sizes, self._mesh):
            batch = self._collate([order[number] for number in numbers], length)
            # A pair has two rows, which drop the same.
            rows = torch.tensor(list(numbers)).repeat_interleave(len(batch.tokens) // len(numbers))
            batch = replace(batch, samples=rows)
            refuse_unknown_ids(batch, self._vocab_size)
            yield batch.part_of_sequence(self._mesh).to(self._mesh.device.torch)

    def _length(self, order: BlendedExamples, numbers: range) -> int:
        """Return the length that the rows of a step are padded to, the same on all ranks."""
        longest = self._config.seq_length
        if not self._config.variable_seq_lengths:
            return longest
        layout = self._mesh.layout
        parts = layout.cp * (layout.tp if layout.sequence_parallel else 1)
        multiple = lcm(self._config.pad_to_multiple_of, parts)
        needed = max(order.length(number) for number in numbers)
        return min(-(-needed // multiple) * multiple, longest)


def collate(rows: Sequence[TrainingExample], length: int) -> MicroBatch:
    """Pad rows on the right to one length, and shift the labels: the target at a position is the next id.

    Args:
        rows: at most `length` ids each.
        length: S.

    Returns:
        Tokens, labels and mask, [B, S]; positions and segments where a row holds several samples. Padding is a
        segment of its own, with the id 0.
    """
    shape = (len(rows), length)
    tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED_LABEL, np.int64)
    positions, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for number, row in enumerate(rows):
        end = len(row.ids)
        tokens[number, :end] = row.ids
        labels[number, : end - 1] = row.labels[1:]
        lengths = [*row.lengths, length - end]
        positions[number] = np.concatenate([np.arange(part) for part in lengths])
        segments[number] = np.repeat(np.arange(len(lengths)), lengths)
    learned = labels != IGNORED_LABEL
    several = any(len(row.lengths) > 1 for row in rows)
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(np.where(learned, labels, 0)),
        torch.from_numpy(learned.astype(np.float32)),
        torch.from_numpy(positions) if several else None,
        torch.from_numpy(segments) if several else None,
    )
