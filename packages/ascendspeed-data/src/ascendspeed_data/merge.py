"""Merge datasets that have the same tokenizer."""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ascendspeed_data import __version__
from ascendspeed_data.blend import check_same_tokenizer
from ascendspeed_data.dataset import Dataset, manifest_path_of, open_dataset
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_data.files import full_disk_named, write_durably
from ascendspeed_data.indexed import IndexedDatasetWriter
from ascendspeed_data.lock import output_lock
from ascendspeed_data.manifest import DatasetManifest, FileRecord, PackRecord
from ascendspeed_data.reading.inputs import sha256_of
from ascendspeed_data.token_frequencies import count_ids_in_file, unigram_entropy_nats

SEQUENCES_PER_COPY = 4096


def merge_datasets(prefixes: Sequence[Path], output_prefix: Path, overwrite: bool = False) -> Dataset:
    """Write the documents of several datasets, in the given order, as one dataset.

    Args:
        prefixes: prefixes of the datasets.
        output_prefix: prefix of the merged dataset; for samples, without `_packed`.
        overwrite: replace an existing output.

    Raises:
        ConfigError: there are fewer than two datasets, or the output is one of them.
        DataError: the datasets differ in tokenizer, kind, token format or packing.
        AscendSpeedError: the output exists or is in use, or the disk is full.
    """
    if len(prefixes) < 2:
        raise ConfigError("merge needs at least two datasets; give two or more prefixes")
    datasets = [open_dataset(prefix) for prefix in prefixes]
    first = datasets[0]
    for dataset in datasets:
        check_same_tokenizer(first, dataset)
        _check_format(first, dataset)
    targets = {
        array: output_prefix.with_name(f"{output_prefix.name}_packed_{array}_document")
        if array
        else output_prefix
        for array in first.arrays
    }
    sources = {prefix.resolve() for dataset in datasets for prefix in dataset.prefixes.values()}
    if sources & {target.resolve() for target in targets.values()}:
        raise ConfigError(f"output_prefix={output_prefix} is one of the datasets to merge; choose another")
    with (
        output_lock(
            output_prefix.with_name(output_prefix.name + ".lock"), f"--output-prefix {output_prefix}"
        ),
        full_disk_named(output_prefix, "free some space and run the same command again"),
    ):
        _refuse_existing(targets, overwrite)
        with ExitStack() as stack:
            writers = {
                array: stack.enter_context(IndexedDatasetWriter(target, first.arrays[array].info.format))
                for array, target in targets.items()
            }
            for dataset in datasets:
                for array, writer in writers.items():
                    _copy(dataset, array, writer)
            renames = [pair for writer in writers.values() for pair in writer.prepare()]
            files = [
                FileRecord(name=target.name, num_bytes=source.stat().st_size, sha256=sha256_of(source))
                for source, target in renames
            ]
            manifest = _manifest(datasets, files, renames[0][0])
            target = manifest_path_of(Dataset(output_prefix, targets, {}, None))
            target.unlink(missing_ok=True)
            for source, path in renames:
                source.replace(path)
            if manifest is not None:
                write_durably(target, manifest.model_dump_json(indent=2) + "\n")
    return open_dataset(output_prefix)


def _check_format(first: Dataset, other: Dataset) -> None:
    for array, dataset in other.arrays.items():
        wanted = first.arrays[array].info.format
        if dataset.info.format != wanted:
            raise DataError(
                f"{other.prefix} has {dataset.info.format} tokens, {first.prefix} {wanted} tokens; tokenize both with "
                "the same tokenizer"
            )
    packs = [d.manifest.pack.seq_length if d.manifest and d.manifest.pack else None for d in (first, other)]
    if packs[0] != packs[1]:
        raise DataError(
            f"{other.prefix} has seq_length={packs[1]}, {first.prefix} has {packs[0]}; pack both alike"
        )


def _refuse_existing(targets: dict[str, Path], overwrite: bool) -> None:
    for target in targets.values():
        path = target.with_name(target.name + ".bin")
        if path.exists() and not overwrite:
            raise AscendSpeedError(
                f"{path} already exists; give --overwrite to replace it, or another --output-prefix"
            )


def _copy(dataset: Dataset, array: str, writer: IndexedDatasetWriter) -> None:
    """Append the documents of a dataset, a few thousand sequences at a time."""
    source = dataset.arrays[array]
    documents = np.asarray(source.documents)
    start = 0
    while start < len(documents) - 1:
        end = max(
            start + 1, int(np.searchsorted(documents, documents[start] + SEQUENCES_PER_COPY, "right")) - 1
        )
        sequences = range(int(documents[start]), int(documents[end]))
        tokens = [source[number] for number in sequences]
        joined = np.concatenate(tokens) if tokens else np.empty(0, source.info.format)
        writer.add_documents(
            np.asarray(source.lengths[sequences.start : sequences.stop]),
            joined,
            np.diff(documents[start : end + 1]),
        )
        start = end


def _manifest(
    datasets: Sequence[Dataset], files: Sequence[FileRecord], ids_path: Path
) -> DatasetManifest | None:
    """Return the manifest of the merged dataset; `None` if an input has no manifest."""
    known = [dataset.manifest for dataset in datasets if dataset.manifest is not None]
    if len(known) < len(datasets):
        return None
    first = known[0]
    frequencies = count_ids_in_file(ids_path, datasets[0].ids.info.format, first.tokenizer.vocab_size)
    counted = (
        "num_documents", "num_sequences", "num_empty_documents", "num_tokens", "num_trained_tokens", "num_text_bytes",
        "num_spelling_records", "num_other_prompts",
    )  # fmt: skip
    sums = {name: sum(getattr(manifest, name) for manifest in known) for name in counted}
    unused, split = Counter[str](), Counter[str]()
    for manifest in known:
        unused.update(manifest.unused_columns)
        split.update(manifest.split_conversations)
    handlers = list(dict.fromkeys(manifest.handler for manifest in known))
    pack = None
    if first.pack is not None:
        packs = [manifest.pack for manifest in known if manifest.pack is not None]
        tokens = first.pack.seq_length
        pack = PackRecord(
            seq_length=tokens,
            padding_share=1 - sums["num_tokens"] / (tokens * max(sums["num_documents"], 1)),
            padding_share_unpacked=1 - sums["num_tokens"] / (tokens * max(sums["num_sequences"], 1)),
            num_cut_samples=sum(pack.num_cut_samples for pack in packs),
            num_dropped_samples=sum(pack.num_dropped_samples for pack in packs),
        )
    return first.model_copy(
        update={
            **sums,
            "unused_columns": dict(unused),
            "split_conversations": dict(split),
            "handler": " + ".join(handlers),
            "pack": pack,
            "unigram_entropy_nats": unigram_entropy_nats(frequencies),
            "inputs": tuple(record for manifest in known for record in manifest.inputs),
            "files": tuple(files),
            "versions": {**first.versions, "ascendspeed-data": __version__},
            "command": " ".join(["asd-data", *sys.argv[1:]]),
        }
    )
