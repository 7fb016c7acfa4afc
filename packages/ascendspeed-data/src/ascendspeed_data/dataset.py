"""A dataset as its users name it: a pair of files, or the three pairs of samples, with the manifest of what made it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.encoding import ATTENTION_MASK, INPUT_IDS, LABELS
from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers import IGNORED_LABEL
from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.job import ARRAYS
from ascendspeed_data.manifest import DatasetManifest, load_manifest, manifest_path


@dataclass(frozen=True)
class Dataset:
    """A dataset that was opened; `arrays` has one entry for text, three for samples.

    Attributes:
        prefix: as the user gave it.
        prefixes: of each pair of files.
        arrays: the pairs; the ids come first.
        manifest: of what made it, if it has one.
    """

    prefix: Path
    prefixes: dict[str, Path]
    arrays: dict[str, IndexedDataset]
    manifest: DatasetManifest | None

    @property
    def ids(self) -> IndexedDataset:
        """The ids."""
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
        """Return which tokens of a sequence are learned."""
        if not self.is_samples:
            return np.ones(int(self.ids.lengths[sequence]), bool)
        learned: NDArray[np.bool_] = self.arrays[LABELS][sequence] != IGNORED_LABEL
        return learned

    def attended(self, sequence: int) -> NDArray[Any]:
        """Return the attention mask of a sequence."""
        if not self.is_samples:
            return np.ones(int(self.ids.lengths[sequence]), np.int32)
        return self.arrays[ATTENTION_MASK][sequence]


def open_dataset(prefix: Path) -> Dataset:
    """Open the pair `prefix`, or the samples that `prefix` names (with or without `_packed`, or any of the three).

    Raises:
        DataError: nothing there, damaged, or three arrays that do not fit each other.
    """
    base = samples_prefix(prefix)
    if base is None:
        return Dataset(prefix, {"": prefix}, {"": IndexedDataset(prefix)}, load_manifest(prefix))
    prefixes = {array: base.with_name(f"{base.name}_{array}_document") for array in ARRAYS}
    arrays = {array: IndexedDataset(place) for array, place in prefixes.items()}
    ids = arrays[INPUT_IDS]
    for array, dataset in arrays.items():
        if not (
            np.array_equal(dataset.lengths, ids.lengths) and np.array_equal(dataset.documents, ids.documents)
        ):
            raise DataError(
                f"{prefixes[array]} and {prefixes[INPUT_IDS]} hold sequences of other lengths; they do not belong "
                "together"
            )
    return Dataset(prefix, prefixes, arrays, load_manifest(prefixes[INPUT_IDS]))


def samples_prefix(prefix: Path) -> Path | None:
    """Return `<prefix>_packed` if samples are meant, `None` if `prefix` is that of one pair."""
    for array in ARRAYS:
        ending = f"_packed_{array}_document"
        if prefix.name.endswith(ending):
            return prefix.with_name(prefix.name.removesuffix(ending) + "_packed")
    for name in (prefix.name, prefix.name + "_packed"):
        if prefix.with_name(f"{name}_{INPUT_IDS}_document.idx").is_file():
            return prefix.with_name(name)
    return None


def manifest_of(dataset: Dataset) -> Path:
    """Return where the manifest of a dataset lies or would lie."""
    return manifest_path(next(iter(dataset.prefixes.values())))
