"""Training samples by megatron-core's `GPTDataset`: the same files, seed and split give the same samples as there.

Documents are joined, shuffled and cut into samples of S + 1 tokens. Sample number n of a run goes to the
data-parallel rank and micro-batch that Megatron-LM's sequential sampler gives it to.
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.shared_filesystem import sees_folder_of_rank_0
from ascendspeed_core.launch import announce, world_of_environment
from ascendspeed_core.megatron import group_for_megatron, megatron
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.command_line import log
from ascendspeed_data.dataset import open_dataset, samples_prefix
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.manifest import DatasetManifest, load_manifest

DIGEST_ENTRIES = 1_000_000
"""Entries of an index that go into the digest of the sample order."""

DIGEST_SAMPLES = 64
"""Samples whose tokens are compared between machines."""


SPLITS = ("training", "validation", "test")


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
    for prefix in config.blend()[0]:
        _refuse_labels(Path(prefix))
    check_splits(config, num_samples)
    manifests = []
    for prefix in config.blend()[0]:
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
    shares = [float(part) for part in config.split.replace("/", ",").split(",")]
    edges = [sum(shares[:n]) / sum(shares) for n in range(4)]
    for prefix in config.blend()[0]:
        dataset = IndexedDataset(Path(prefix))
        bounds = [round(edge * len(dataset)) for edge in edges]
        for split_index, split in enumerate(SPLITS):
            if (
                num_samples[split_index]
                and not dataset.lengths[bounds[split_index] : bounds[split_index + 1]].any()
            ):
                raise DataError(
                    f"split={config.split} leaves no {split} document of {prefix} ({len(dataset)} documents); give "
                    f"{split} a larger share"
                )


class GPTBatchLoader:
    """Training and validation samples of one run.

    Args:
        config: files, split, length of a sample.
        seed: of the order.
        num_samples: samples of the whole run: (training, validation, test).
        vocab_size: ids must be below.
        end_of_document: id at which `eod_mask_loss` masks.
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
            for cache in _cache_folders(config):
                refuse_pickled_indices(cache)
        mesh.barrier()
        self._build_on_other_machines(
            config=config,
            seed=seed,
            num_samples=num_samples,
            vocab_size=vocab_size,
            end_of_document=end_of_document,
        )
        self.train, self.validation, _ = _build_datasets(
            config, seed, num_samples, vocab_size, end_of_document
        )

    def _build_on_other_machines(self, **arguments: Any) -> None:
        """Build the index on machines that do not see the first one's cache: once on each."""
        seen = [sees_folder_of_rank_0(folder, self._mesh) for folder in _cache_folders(arguments["config"])]
        if not all(seen) and world_of_environment().local_rank == 0:
            log(f"rank {self._mesh.rank}: the cache of sample indices is not shared; building it here too")
            build_index_alone(**arguments)
        self._mesh.barrier()

    def order_digest(self, consumed: int) -> str:
        """Return a digest of which samples the first `consumed` ones are; equal digests continue each other."""
        digest = hashlib.sha256()
        _digest_order(self.train, consumed, digest)
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

    def sample_numbers(self, consumed: int, sizes: Sequence[int]) -> list[range]:
        """Return the sample numbers of this rank's micro-batches, see `numbers_of_rank`."""
        return numbers_of_rank(consumed, sizes, self._mesh)

    def _take(self, dataset: Any, consumed: int, sizes: Sequence[int]) -> Iterator[MicroBatch]:
        for numbers in self.sample_numbers(consumed, sizes):
            samples = [dataset[number] for number in numbers]
            tokens, labels, loss_mask = (
                torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "loss_mask")
            )
            batch = MicroBatch(tokens, labels, loss_mask, samples=torch.tensor(list(numbers)))
            refuse_unknown_ids(batch, self._vocab_size)
            yield batch.part_of_sequence(self._mesh).to(self._mesh.device.torch)


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


def _build_datasets(
    config: DataConfig,
    seed: int,
    num_samples: tuple[int, int, int],
    vocab_size: int,
    end_of_document: int | None,
) -> list[Any]:
    gpt = megatron("datasets.gpt_dataset")
    blended = megatron("datasets.blended_megatron_dataset_builder")
    prefixes, weights = config.blend()
    # Only the ids of the tokenizer matter here: no padding occurs, and the end of a document may mask the loss.
    # The identifiers name the cached index; they are those of a tokenizer without a class of its own.
    tokenizer = SimpleNamespace(
        eod=-1 if end_of_document is None else end_of_document,
        pad=-2,
        vocab_size=None,
        unique_identifiers={"class": "ids", "vocab_size": vocab_size},
    )
    dataset_config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=config.seq_length,
        blend=(prefixes, weights),
        split=config.split,
        path_to_cache=str(config.data_cache_path) if config.data_cache_path else None,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )
    # A split that nothing is drawn from is not built.
    dataset_config.split_matrix = [
        part if wanted else None
        for part, wanted in zip(dataset_config.split_matrix, num_samples, strict=True)
    ]
    with warnings.catch_warnings(), group_for_megatron():
        warnings.simplefilter("ignore")
        builder = blended.BlendedMegatronDatasetBuilder(
            gpt.GPTDataset, list(num_samples), lambda: True, dataset_config
        )
        built: list[Any] = builder.build()
    return built


def _digest_order(dataset: Any, consumed: int, digest: Any) -> None:
    """Feed the parts of a dataset that decide its first samples; of long tables, a regular selection of entries."""
    if hasattr(dataset, "datasets"):
        tables = [dataset.dataset_index[:consumed], dataset.dataset_sample_index[:consumed]]
        for part in dataset.datasets:
            _digest_order(part, min(consumed, len(part)), digest)
    else:
        tables = [dataset.document_index, dataset.shuffle_index[:consumed]]
    for table in tables:
        digest.update(str(table.shape).encode())
        digest.update(table[:: len(table) // DIGEST_ENTRIES + 1].astype(np.int64).tobytes())


def _cache_folders(config: DataConfig) -> list[Path]:
    """Return where megatron-core keeps the sample index: the folder given, or one beside each prefix."""
    if config.data_cache_path:
        return [config.data_cache_path]
    return [Path(prefix) / "cache" / "GPTDataset_indices" for prefix in config.blend()[0]]


def refuse_pickled_indices(cache: Path) -> None:
    """Look at every cached index before megatron-core opens it, which would unpickle; damaged ones are removed.

    Raises:
        DataError: a file holds Python objects instead of numbers.
    """
    for path in sorted(cache.glob("*.npy")):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            if any(words in str(error) for words in ("Object arrays", "Python objects", "pickle")):
                raise DataError(
                    f"{path} holds pickled objects, which an index never does; delete it"
                ) from None
            log(f"{path} is damaged ({error}); it is built again")
            path.unlink()
        except (EOFError, OSError, SyntaxError, TypeError) as error:
            log(f"{path} is damaged ({error}); it is built again")
            path.unlink()


def build_index_alone(**arguments: Any) -> None:
    """Start a process that builds the index, and wait for it.

    Args:
        **arguments: those of `GPTBatchLoader` but `mesh`.

    Raises:
        DataError: it failed; the message is its own.
    """
    clean = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    wanted = arguments | {"config": arguments["config"].model_dump(mode="json")}
    done = subprocess.run(
        [sys.executable, "-m", "ascendspeed_core.data.build_index"],
        input=json.dumps(wanted),
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise DataError(f"the sample index could not be built on this machine: {lines[-1]}")
