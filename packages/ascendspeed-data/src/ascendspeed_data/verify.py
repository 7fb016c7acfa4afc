"""Check that a dataset is complete and undamaged."""

from typing import Any

import numpy as np

from ascendspeed_data.dataset import Dataset
from ascendspeed_data.encoding import LABELS
from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers import IGNORED_LABEL
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.reading.inputs import sha256_of


def verify_dataset(dataset: Dataset, quick: bool = False) -> None:
    """Check a dataset against its manifest, and its arrays against each other.

    Args:
        dataset: an open dataset; opening it checks the index.
        quick: skip checks that read every token.

    Raises:
        DataError: a check failed; the message says where.
    """
    manifest = dataset.manifest
    if dataset.is_pairs:
        _check_pairs(dataset, quick)
    if manifest is not None:
        _check_counts(dataset, manifest)
        if not quick:
            _check_hashes(dataset, manifest)
    if not quick:
        _check_ids(dataset, manifest.tokenizer.vocab_size if manifest else None)


def _check_counts(dataset: Dataset, manifest: DatasetManifest) -> None:
    info = dataset.ids.info
    for name in ("num_documents", "num_sequences", "num_tokens"):
        have, said = getattr(info, name), getattr(manifest, name)
        if have != said:
            raise DataError(
                f"{dataset.prefix}: {name}={have}, but its manifest has {name}={said}; the files do not belong together"
            )
    if manifest.pack is not None and len(dataset.ids):
        starts = np.asarray(dataset.ids.documents[:-1])
        tokens = np.add.reduceat(np.asarray(dataset.ids.lengths, np.int64), starts)
        if int(tokens.max()) > manifest.pack.seq_length:
            raise DataError(
                f"{dataset.prefix}: pack {int(tokens.argmax())} has {int(tokens.max())} tokens, more than "
                f"seq_length={manifest.pack.seq_length}; preprocess again"
            )


def _check_pairs(dataset: Dataset, quick: bool) -> None:
    """Check that every document has two samples, and that both have trained tokens."""
    counts = np.diff(np.asarray(dataset.ids.documents))
    if (counts != 2).any():
        number = int((counts != 2).argmax())
        raise DataError(
            f"{dataset.prefix}: document {number} has {counts[number]} samples, but a pair has two; preprocess again"
        )
    for number in () if quick else range(len(dataset.ids)):
        if not dataset.trained(number).any():
            which = "rejected" if number % 2 else "chosen"
            raise DataError(
                f"{dataset.prefix}: the {which} answer of pair {number // 2} is empty; preprocess again"
            )


def _check_hashes(dataset: Dataset, manifest: DatasetManifest) -> None:
    known = {record.name: record for record in manifest.files}
    for prefix in dataset.prefixes.values():
        for suffix in (".bin", ".idx"):
            path = prefix.with_name(prefix.name + suffix)
            # Users may rename a dataset; then compare the files by suffix.
            record = known.get(path.name) or next(
                (r for n, r in known.items() if len(known) == 2 and n.endswith(suffix)), None
            )
            if record is not None and record.sha256 != sha256_of(path):
                raise DataError(
                    f"{path} has changed since it was written: its SHA-256 differs; preprocess again"
                )


def _check_ids(dataset: Dataset, limit: int | None) -> None:
    for number in range(len(dataset.ids)):
        ids = dataset.ids[number]
        if not len(ids):
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (limit is not None and high >= limit):
            raise DataError(
                f"{dataset.prefix}: sequence {number} has id {low if low < 0 else high}, but vocab_size={limit}; "
                "preprocess again"
            )
        if dataset.is_samples:
            _check_labels(dataset, number, ids, limit)


def _check_labels(dataset: Dataset, number: int, ids: Any, limit: int | None) -> None:
    labels = dataset.arrays[LABELS][number]
    learned = labels[labels != IGNORED_LABEL]
    if len(learned) and (int(learned.min()) < 0 or (limit is not None and int(learned.max()) >= limit)):
        raise DataError(
            f"{dataset.prefix}: sequence {number} has a label outside the vocabulary; preprocess again"
        )
    dataset.attended(number)
