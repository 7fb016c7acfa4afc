"""Training samples by megatron-core's `GPTDataset`: the same files, seed and split give the same samples as there.

Documents are joined, shuffled and cut into samples of S + 1 tokens. Sample number n of a run goes to the
data-parallel rank and micro-batch that Megatron-LM's sequential sampler gives it to.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.data import DataConfig
from ascendspeed_core.config.split import SPLITS
from ascendspeed_core.data.documents import document_positions
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.sample_index import (
    build_datasets,
    build_index_alone,
    cache_folders,
    digest_order,
    refuse_pickled_indices,
    tokens_of_split,
)
from ascendspeed_core.data.shared_filesystem import sees_folder_of_rank_0
from ascendspeed_core.launch import announce, world_of_environment
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.command_line import log
from ascendspeed_data.dataset import open_dataset, samples_prefix
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.manifest import DatasetManifest, load_manifest

DIGEST_SAMPLES = 64
"""Samples whose tokens are compared between machines."""


def check_data(config: DataConfig, num_samples: tuple[int, int, int]) -> DatasetManifest | None:
    """Prove every .bin/.idx pair whole, all of one tokenizer, and no wanted split empty; needs no processes.

    Args:
        config: files and split.
        num_samples: samples of the whole run: (training, validation, test).

    Returns:
        The manifest of the first prefix, or `None` if it has none (data made by other tools).

    Raises:
        DataError: a file is missing or damaged, a split has no tokens, or two tokenizers made the parts of a blend.
    """
    prefixes = config.prefixes()
    for prefix in prefixes:
        _refuse_labels(Path(prefix))
    check_splits(config, num_samples)
    _announce_short_splits(config, num_samples)
    manifests = []
    for prefix in prefixes:
        manifest = load_manifest(Path(prefix))
        if manifest is None:
            announce(f"{prefix}: no manifest beside it; its tokenizer cannot be checked")
        else:
            manifests.append((prefix, manifest))
    for prefix, manifest in manifests[1:]:
        if manifest.tokenizer.fingerprint != manifests[0][1].tokenizer.fingerprint:
            raise DataError(
                f"{prefix} and {manifests[0][0]} were made with different tokenizers; tokenize both with one"
            )
    return manifests[0][1] if manifests else None


def _refuse_labels(prefix: Path) -> None:
    """Raise `DataError` when a prefix names data in which not every token is learned."""
    if samples_prefix(prefix) is not None:
        manifest = open_dataset(prefix).manifest
        kind = manifest.kind if manifest else "samples"
        command = "dpo" if kind == "pairs" else "finetune --is-instruction-dataset"
        raise DataError(
            f"{prefix} holds {kind} with labels, not plain text; train on them with `asd-core {command}`, or give "
            "plain text"
        )


def check_splits(config: DataConfig, num_samples: tuple[int, int, int]) -> None:
    """Raise `DataError` when a split from which samples are wanted holds no token of one of the files.

    megatron-core would count epochs of nothing for ever.
    """
    for split_index, wanted in enumerate(num_samples):
        for prefix in config.blend(split_index)[0] if wanted else ():
            tokens = tokens_of_split(config, prefix, split_index)
            if not tokens:
                _refuse_empty(config, prefix, split_index)


def _announce_short_splits(config: DataConfig, num_samples: tuple[int, int, int]) -> None:
    """Say of each file where a split has less than one sample, which megatron-core fills by repeating it."""
    for split_index, wanted in enumerate(num_samples):
        for prefix in config.blend(split_index)[0] if wanted else ():
            tokens = tokens_of_split(config, prefix, split_index)
            if tokens <= config.seq_length:
                announce(
                    f"{prefix}: its {tokens:,} {SPLITS[split_index]} tokens are less than one sample "
                    f"(seq_length={config.seq_length} and the token after it); each sample repeats them"
                )


def _refuse_empty(config: DataConfig, prefix: str, split_index: int) -> None:
    split, count = SPLITS[split_index], len(IndexedDataset(Path(prefix)))
    if not count:
        raise DataError(
            f"{prefix} holds no document, so nothing for {split}; preprocess again, or leave it out"
        )
    remedy = "give data with tokens" if config.has_own_paths else f"give {split} a larger share"
    raise DataError(
        f"{config.describe_split(split_index)} leaves no {split} document of {prefix} ({count} documents) with any "
        f"token; {remedy}"
    )


def samples_of_epochs(config: DataConfig, epochs: float) -> int:
    """Return how many samples passes over the training documents have, all files of a blend together.

    Raises:
        DataError: a file has no token for training, or all have less than one sample.
    """
    check_splits(config, (1, 0, 0))
    tokens = [tokens_of_split(config, prefix, 0) for prefix in config.blend()[0]]
    # A sample needs one token more, to predict its last.
    samples = sum(max(int(epochs * own) - 1, 0) // config.seq_length for own in tokens)
    if not samples:
        raise DataError(
            f"num_train_epochs={epochs:g} of {sum(tokens):,} training tokens fill no sample of "
            f"seq_length={config.seq_length} and the token after it; give more data, more epochs or a shorter "
            "--seq-length"
        )
    return samples


def held_out_samples(config: DataConfig) -> int:
    """Return how many whole samples the validation documents have; a file with less than one counts as one."""
    tokens = [tokens_of_split(config, prefix, 1) for prefix in config.blend(1)[0]]
    return sum(max((own - 1) // config.seq_length, 1) for own in tokens if own)


class GPTBatchLoader:
    """Training and validation samples of one run.

    Args:
        config: files, split, length of a sample.
        seed: of the order.
        num_samples: samples of the whole run: (training, validation, test).
        vocab_size: ids must be below.
        end_of_document: id of the token that ends documents; `None` where no option needs it.
        mesh: of this rank; all ranks build together, and rank 0 writes the index to the cache.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        end_of_document: int | None,
        mesh: ParallelMesh,
    ) -> None:
        check_splits(config, num_samples)
        self._mesh = mesh
        self._vocab_size = vocab_size
        if mesh.rank == 0:
            for cache in cache_folders(config):
                refuse_pickled_indices(cache)
        mesh.barrier()
        self._build_on_other_machines(
            config=config,
            seed=seed,
            num_samples=num_samples,
            vocab_size=vocab_size,
            end_of_document=end_of_document,
        )
        self._config, self._end_of_document = config, end_of_document
        self.train, self.validation, self.test = build_datasets(
            config, seed, num_samples, vocab_size, end_of_document
        )

    def _build_on_other_machines(self, **arguments: Any) -> None:
        """Build the index on machines that do not see the first one's cache: once on each."""
        seen = [sees_folder_of_rank_0(folder, self._mesh) for folder in cache_folders(arguments["config"])]
        if not all(seen) and world_of_environment().local_rank == 0:
            log(f"rank {self._mesh.rank}: the cache of sample indices is not shared; building it here too")
            build_index_alone(**arguments)
        self._mesh.barrier()

    def order_digest(self, consumed: int) -> str:
        """Return a digest of which samples the first `consumed` ones are; equal digests continue each other."""
        digest = hashlib.sha256()
        digest_order(self.train, consumed, digest)
        return digest.hexdigest()

    def content_digest(self, num_samples: int) -> str:
        """Return a digest of the order of all samples and of the tokens of some of them, to compare machines."""
        digest = hashlib.sha256(self.order_digest(num_samples).encode())
        for number in range(0, num_samples, num_samples // DIGEST_SAMPLES + 1):
            digest.update(self.train[number]["tokens"].numpy().tobytes())
        return digest.hexdigest()

    def micro_batches(self, consumed: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches, of those sizes, of the step that follows `consumed` samples."""
        return list(self._take(self.train, consumed, sizes))

    def validation_batches(self, evaluated: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the evaluation that follows `evaluated` samples."""
        return list(self._take(self.validation, evaluated, sizes))

    def test_batches(self, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the test data."""
        return list(self._take(self.test, 0, sizes))

    def sample_numbers(self, consumed: int, sizes: Sequence[int]) -> list[range]:
        """Return the sample numbers of this rank's micro-batches, see `numbers_of_rank`."""
        return numbers_of_rank(consumed, sizes, self._mesh)

    def _take(self, dataset: Any, consumed: int, sizes: Sequence[int]) -> Iterator[MicroBatch]:
        for numbers in self.sample_numbers(consumed, sizes):
            samples = [dataset[number] for number in numbers]
            tokens, labels, loss_mask = (
                torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "loss_mask")
            )
            batch = MicroBatch(
                tokens, labels, loss_mask, *self._documents(tokens), samples=torch.tensor(list(numbers))
            )
            refuse_unknown_ids(batch, self._vocab_size)
            yield batch.part_of_sequence(self._mesh).to(self._mesh.device.torch)

    def _documents(self, tokens: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return positions and segments of tokens, [B, S] each, where they follow documents."""
        config = self._config
        if self._end_of_document is None or not (config.reset_position_ids or config.reset_attention_mask):
            return None, None
        found = document_positions(tokens, self._end_of_document)
        return (
            found.positions if config.reset_position_ids else None,
            found.segments if config.reset_attention_mask else None,
        )


def numbers_of_rank(consumed: int, sizes: Sequence[int], mesh: ParallelMesh) -> list[range]:
    """Return the sample numbers of this rank's micro-batches: rank after rank within each micro-step.

    Args:
        consumed: samples of the steps before.
        sizes: of the micro-batches of one rank.
        mesh: which rank.
    """
    numbers, first = [], consumed
    for size in sizes:
        mine = first + mesh.dp_rank * size
        numbers.append(range(mine, mine + size))
        first += size * mesh.layout.dp
    return numbers


def refuse_unknown_ids(batch: MicroBatch, vocab_size: int) -> None:
    """Raise `DataError` when a token or a label is not below `vocab_size`."""
    highest = max(int(batch.tokens.max()), int(batch.labels.max()))
    if highest >= vocab_size:
        raise DataError(
            f"the data holds token id {highest}, the model's vocabulary ends at {vocab_size - 1}; "
            "tokenize with the model's tokenizer"
        )
