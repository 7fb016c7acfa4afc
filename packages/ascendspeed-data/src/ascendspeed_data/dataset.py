"""Open a dataset with its manifest: one `.bin`/`.idx` pair for text, three pairs for samples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.encoding import ATTENTION_MASK, INPUT_IDS, LABELS, SAMPLE_ARRAYS
from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers import IGNORED_LABEL
from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.manifest import DatasetManifest, load_manifest, manifest_path


@dataclass(frozen=True)
class Dataset:
    """An open dataset; `arrays` has one entry for text and three for samples.

    Attributes:
        prefix: as the user gave it.
        prefixes: prefix of each `.bin`/`.idx` pair, by array.
        arrays: the arrays; token ids come first.
        manifest: how the dataset was made, if it has a manifest.
    """

    prefix: Path
    prefixes: dict[str, Path]
    arrays: dict[str, IndexedDataset]
    manifest: DatasetManifest | None

    @property
    def ids(self) -> IndexedDataset:
        """The token ids."""
        return next(iter(self.arrays.values()))

    @property
    def is_samples(self) -> bool:
        """Whether tokens have labels of their own."""
        return LABELS in self.arrays

    @property
    def is_pairs(self) -> bool:
        """Whether each document is a chosen and a rejected sample."""
        return self.manifest is not None and self.manifest.kind == "pairs"

    def trained(self, sequence: int) -> NDArray[np.bool_]:
        """Return which tokens of a sequence have a loss, bool [tokens]."""
        if not self.is_samples:
            return np.ones(int(self.ids.lengths[sequence]), bool)
        learned: NDArray[np.bool_] = self.arrays[LABELS][sequence] != IGNORED_LABEL
        return learned

    def attended(self, sequence: int) -> NDArray[Any]:
        """Return the attention mask of a sequence, int32 [tokens].

        Raises:
            DataError: a value is neither 0 nor 1.
        """
        if not self.is_samples:
            return np.ones(int(self.ids.lengths[sequence]), np.int32)
        mask = self.arrays[ATTENTION_MASK][sequence]
        if not ((mask == 0) | (mask == 1)).all():
            raise DataError(
                f"{self.prefix}: the attention mask of sequence {sequence} is not only 0 and 1; preprocess again"
            )
        return mask


def open_dataset(prefix: Path) -> Dataset:
    """Open a dataset.

    Args:
        prefix: path without `.bin`. For samples: with or without `_packed`, or the path of any of the three arrays.

    Raises:
        DataError: the dataset is missing or damaged, or its three arrays do not match.
    """
    base = samples_prefix(prefix)
    if base is None:
        return Dataset(prefix, {"": prefix}, {"": IndexedDataset(prefix)}, load_manifest(prefix))
    prefixes = {array: base.with_name(f"{base.name}_{array}_document") for array in SAMPLE_ARRAYS}
    arrays = {array: IndexedDataset(pair_prefix) for array, pair_prefix in prefixes.items()}
    ids = arrays[INPUT_IDS]
    for array, dataset in arrays.items():
        if not (
            np.array_equal(dataset.lengths, ids.lengths) and np.array_equal(dataset.documents, ids.documents)
        ):
            raise DataError(
                f"{prefixes[array]} and {prefixes[INPUT_IDS]} have sequences of different lengths; they do not belong "
                "together, so preprocess again"
            )
    return Dataset(prefix, prefixes, arrays, load_manifest(prefixes[INPUT_IDS]))


def samples_prefix(prefix: Path) -> Path | None:
    """Return `<prefix>_packed` for a dataset of samples, `None` for a dataset of text."""
    for array in SAMPLE_ARRAYS:
        ending = f"_packed_{array}_document"
        if prefix.name.endswith(ending):
            return prefix.with_name(prefix.name.removesuffix(ending) + "_packed")
    for name in (prefix.name, prefix.name + "_packed"):
        if prefix.with_name(f"{name}_{INPUT_IDS}_document.idx").is_file():
            return prefix.with_name(name)
    return None


def manifest_path_of(dataset: Dataset) -> Path:
    """Return the path of a dataset's manifest, whether it exists or not."""
    return manifest_path(next(iter(dataset.prefixes.values())))
