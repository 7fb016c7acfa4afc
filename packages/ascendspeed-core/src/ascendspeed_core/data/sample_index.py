"""The sample index of a run: megatron-core makes it; what is cached belongs to the content of the files."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ascendspeed_core.config.data import DataConfig
from ascendspeed_core.config.split import split_edges
from ascendspeed_core.data.content import index_digest
from ascendspeed_core.megatron import group_for_megatron, megatron
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDataset

DIGEST_ENTRIES = 1_000_000
"""Entries of an index that go into the digest of the sample order."""


FIXED_SURPLUS = 0.005
"""By how much more samples of each file of a blend megatron-core before 0.13 builds; later it is a field."""


def tokens_of_split(config: DataConfig, prefix: str, split_index: int) -> int:
    """Return how many tokens a split has of one of its files, as megatron-core shares the documents out."""
    dataset = IndexedDataset(Path(prefix))
    edges = split_edges(config.shares(split_index), len(dataset))
    return int(dataset.lengths[edges[split_index] : edges[split_index + 1]].sum(dtype=np.int64))


def build_datasets(
    config: DataConfig,
    seed: int,
    num_samples: tuple[int, int, int],
    vocab_size: int,
    end_of_document: int | None,
) -> list[Any]:
    """Return megatron-core's datasets for training, validation and test; `None` where nothing is wanted.

    Args:
        config: files, split, length of a sample.
        seed: of the order.
        num_samples: samples of the whole run, by split.
        vocab_size: ids must be below.
        end_of_document: id of the token that ends documents.
    """
    gpt = megatron("datasets.gpt_dataset")
    blended = megatron("datasets.blended_megatron_dataset_builder")
    tokenizer = _tokenizer(config, vocab_size, end_of_document)
    blends = [config.blend(number) if wanted else None for number, wanted in enumerate(num_samples)]
    files: dict[str, Any] = {"blend": config.blend(), "split": config.split}
    dataset_config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=config.seq_length,
        **({"blend_per_split": blends} if config.has_own_paths else files),
        path_to_cache=str(config.data_cache_path) if config.data_cache_path else None,
        tokenizer=tokenizer,
        # Positions and masks of documents are made for whole micro-batches, see `documents`.
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=config.eod_mask_loss,
        create_attention_mask=False,
    )
    usual = getattr(dataset_config, "mid_level_dataset_surplus", FIXED_SURPLUS)
    surplus = max(
        blend_surplus(config, split_index, wanted, usual) for split_index, wanted in enumerate(num_samples)
    )
    if hasattr(dataset_config, "mid_level_dataset_surplus"):
        dataset_config.mid_level_dataset_surplus = surplus
    elif surplus > usual:
        raise DataError(
            f"data_path: a blend of few samples of many files needs a surplus of {surplus:g} in each, where "
            f"megatron-core {megatron('package_info').__version__} always takes {usual:g}; install megatron-core 0.16 "
            "or newer, or train on more samples"
        )
    if not config.has_own_paths:
        # A split that nothing is drawn from is not built.
        dataset_config.split_matrix = [
            part if wanted else None
            for part, wanted in zip(dataset_config.split_matrix, num_samples, strict=True)
        ]
    kind = _unshuffled(gpt.GPTDataset) if config.no_shuffle else gpt.GPTDataset
    with warnings.catch_warnings(), group_for_megatron():
        warnings.simplefilter("ignore")
        builder = blended.BlendedMegatronDatasetBuilder(kind, list(num_samples), lambda: True, dataset_config)
        built: list[Any] = builder.build()
    return built


def _unshuffled(gpt_dataset: Any) -> Any:
    """Return megatron-core's class of datasets with documents and samples in the sequence of the file; never cached."""

    class UnshuffledDataset(gpt_dataset):
        def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
            tokens = self._get_num_tokens_per_epoch()
            epochs = self._get_num_epochs(tokens)
            documents = np.tile(self.indices, epochs).astype(np.int32)
            samples = megatron("datasets.helpers").build_sample_idx(
                self.dataset.sequence_lengths, documents, self.config.sequence_length, epochs, tokens
            )
            return documents, samples, np.arange(len(samples) - 1)

    return UnshuffledDataset


def _tokenizer(config: DataConfig, vocab_size: int, end_of_document: int | None) -> SimpleNamespace:
    """Return what megatron-core asks of a tokenizer: ids, and identifiers that name the cached index.

    No padding occurs, and the end of a document may mask the loss. Beside the identifiers of a tokenizer without a
    class of its own stands what the index is made from, as files made anew under the same name need another one.
    """
    return SimpleNamespace(
        eod=-1 if end_of_document is None else end_of_document,
        pad=-2,
        vocab_size=None,
        unique_identifiers={
            "class": "ids",
            "vocab_size": vocab_size,
            "documents": [index_digest(prefix) for prefix in config.prefixes()],
        },
    )


def blend_surplus(config: DataConfig, split_index: int, num_samples: int, usual: float) -> float:
    """Return by how much more samples each part of a blend is built than its share of a split.

    With few samples and many parts the usual surplus of megatron-core is less than what its blend draws, which it ends
    with an IndexError; more is asked for only then, so that all other runs have the samples of Megatron-LM.

    Args:
        config: files and split.
        split_index: which split.
        num_samples: wanted of it.
        usual: surplus of megatron-core.
    """
    prefixes, weights = config.blend(split_index)
    if not num_samples or weights is None or len(prefixes) == 1:
        return usual
    shares = np.asarray(weights, np.float64) / np.sum(np.asarray(weights, np.float64))
    targets = np.ceil(num_samples * shares).astype(np.int64)
    built = np.ceil(targets * (1 + usual)).astype(np.int64)
    tokens = np.asarray([tokens_of_split(config, prefix, split_index) for prefix in prefixes], np.int64)
    epochs = -(-(built * config.seq_length + 1) // tokens)
    lengths = (epochs * tokens - 1) // config.seq_length
    size = int(targets.sum())
    # The blend takes next what lags behind most, so that nothing gets ahead of its share by a whole sample.
    if np.all(shares * size + 1 <= lengths):
        return usual
    part_of, number_in = np.zeros(size, np.int16), np.zeros(size, np.int64)
    megatron("datasets.helpers").build_blending_indices(
        part_of, number_in, shares, len(prefixes), size, False
    )
    drawn = np.bincount(part_of, minlength=len(prefixes))
    if np.all(drawn <= lengths):
        return usual
    return float(np.max(drawn / targets))


def digest_order(dataset: Any, consumed: int, digest: Any) -> None:
    """Feed the parts of a dataset that decide its first samples; of long tables, a regular selection of entries."""
    if hasattr(dataset, "datasets"):
        tables = [dataset.dataset_index[:consumed], dataset.dataset_sample_index[:consumed]]
        for part in dataset.datasets:
            digest_order(part, min(consumed, len(part)), digest)
    else:
        tables = [dataset.document_index, dataset.shuffle_index[:consumed]]
    for table in tables:
        digest.update(str(table.shape).encode())
        digest.update(table[:: len(table) // DIGEST_ENTRIES + 1].astype(np.int64).tobytes())


def cache_folders(config: DataConfig) -> list[Path]:
    """Return where megatron-core keeps the sample index: the folder given, or one beside each prefix."""
    if config.data_cache_path:
        return [config.data_cache_path]
    return [Path(prefix) / "cache" / "GPTDataset_indices" for prefix in config.prefixes()]


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
