"""What is in the files of a dataset, as a few digests: data made anew under the same name is other data.

Of an `.idx` every byte counts, as the sample index is made from it. A `.bin` may have terabytes: a short one is read
whole, of a longer one blocks at regular places, and the SHA-256 that the manifest recorded for it counts beside.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ascendspeed_data.dataset import Dataset, open_dataset

BLOCK_BYTES = 1 << 16
"""Of one block of a `.bin` that is looked at."""

BLOCKS = 256
"""Blocks of a `.bin` that are looked at; one of as many blocks is read whole."""

Content = Mapping[str, Mapping[str, str]]
"""By array of a dataset: `documents`, `size` and `tokens`, and `sha256` where the manifest recorded it."""

WORDS: Mapping[str, str] = {
    "documents": "other documents or lengths",
    "size": "another number of bytes",
    "tokens": "other tokens",
    "sha256": "another checksum in its manifest",
}
"""What a difference in each digest means."""


def dataset_content(prefix: str) -> Content:
    """Return digests of the files of a dataset; equal ones are the same data, wherever the files lie.

    Raises:
        DataError: a file is missing or damaged.
    """
    dataset = open_dataset(Path(prefix))
    return {name: _pair_content(path, dataset) for name, path in dataset.prefixes.items()}


def index_digest(prefix: str) -> str:
    """Return the SHA-256 of the `.idx` of plain text, from which the sample index is made."""
    return _file_digest(Path(f"{prefix}.idx"))


def describe_change(before: Content, now: Content) -> str | None:
    """Say how data differs from what it was; `None` if it is the same.

    Args:
        before: of the data of an earlier run.
        now: of the data that is there.
    """
    if before.keys() != now.keys():
        return "data of another kind"
    for name, digests in now.items():
        known = before[name]
        changed = [key for key in WORDS if key in known and key in digests and known[key] != digests[key]]
        if changed:
            return WORDS[changed[0]] + (f" in its {name}" if name else "")
    return None


def _pair_content(prefix: Path, dataset: Dataset) -> dict[str, str]:
    path = Path(f"{prefix}.bin")
    size = path.stat().st_size
    found = {
        "documents": _file_digest(Path(f"{prefix}.idx")),
        "size": str(size),
        "tokens": _sampled_digest(path, size),
    }
    files = dataset.manifest.files if dataset.manifest else ()
    recorded = {file.name: file for file in files}.get(path.name)
    # A manifest of other files than those beside it says nothing of these.
    if recorded is not None and recorded.num_bytes == size:
        found["sha256"] = recorded.sha256
    return found


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_digest(path: Path, size: int) -> str:
    """Return a digest of all of a short file, or of blocks at regular places, first and last included."""
    if size <= BLOCKS * BLOCK_BYTES:
        return _file_digest(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
