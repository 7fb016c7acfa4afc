"""The output files of a preprocessing run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.encoding import SAMPLE_ARRAYS, Counts, EncodedOutput
from ascendspeed_data.indexed import IndexedDatasetWriter, WriterState, optimal_token_format
from ascendspeed_data.preprocessing.job import PreprocessJob
from ascendspeed_data.preprocessing.journal import Commit
from ascendspeed_data.token_frequencies import count_ids_in_file


@dataclass
class DatasetWriter:
    """Writes one output dataset: one `.bin`/`.idx` pair for a column, three pairs for samples.

    Attributes:
        key: the column; `""` for samples.
        manifest: path of the manifest.
        writers: writer of each pair, by array.
        counts: counts so far.
        frequencies: how often each id occurs, int64 [vocab_size].
    """

    key: str
    manifest: Path
    writers: dict[str, IndexedDatasetWriter]
    counts: Counts
    frequencies: NDArray[np.int64]

    def add(self, encoded: EncodedOutput) -> None:
        """Append encoded documents."""
        for array, writer in self.writers.items():
            writer.add_documents(encoded.lengths, encoded.arrays[array], encoded.sequences)
        self.counts.add(encoded.counts)
        self.frequencies += encoded.frequencies

    @property
    def first(self) -> IndexedDatasetWriter:
        """The writer of the token ids."""
        return next(iter(self.writers.values()))


@dataclass(frozen=True)
class OutputPaths:
    """Paths of an output dataset.

    Attributes:
        manifest: path of the manifest.
        prefixes: prefix of each `.bin`/`.idx` pair, by array.
    """

    manifest: Path
    prefixes: dict[str, Path]

    @property
    def files(self) -> list[Path]:
        """The final paths; the manifest comes last."""
        pairs = [
            prefix.with_name(prefix.name + suffix)
            for prefix in self.prefixes.values()
            for suffix in (".bin", ".idx")
        ]
        return [*pairs, self.manifest]

    @property
    def scratch(self) -> list[Path]:
        """The unfinished files."""
        return [
            path for prefix in self.prefixes.values() for path in IndexedDatasetWriter.scratch_paths(prefix)
        ]


def output_paths(job: PreprocessJob, is_samples: bool) -> dict[str, OutputPaths]:
    """Return the paths of each output dataset of a job, by column; samples have the key ``""``."""
    if is_samples:
        prefixes = {array: job.packed_prefix(array) for array in SAMPLE_ARRAYS}
        return {"": OutputPaths(job.path_with_suffix("_packed.manifest.json"), prefixes)}
    return {
        key: OutputPaths(
            job.path_with_suffix(f"_{key}_document.manifest.json"), {key: job.column_prefix(key)}
        )
        for key in job.keys
    }


def unpacked_paths(job: PreprocessJob) -> OutputPaths:
    """Return the paths of samples before packing."""
    prefixes = {array: job.path_with_suffix(f"_unpacked_{array}") for array in SAMPLE_ARRAYS}
    return OutputPaths(job.path_with_suffix("_packed.manifest.json"), prefixes)


def open_outputs(
    job: PreprocessJob, is_samples: bool, vocab_size: int, commit: Commit | None
) -> dict[str, DatasetWriter]:
    """Open the unfinished files of a run, empty or truncated to `commit`.

    With `--pack`, samples first go to separate files.
    """
    all_paths = {"": unpacked_paths(job)} if job.pack else output_paths(job, is_samples)
    token_format = np.int32 if is_samples else optimal_token_format(vocab_size)
    outputs = {}
    for key, paths in all_paths.items():
        writers = {
            array: IndexedDatasetWriter(
                prefix, token_format, commit.outputs.get(prefix.name) if commit else None, keep=True
            )
            for array, prefix in paths.prefixes.items()
        }
        outputs[key] = _output(key, paths.manifest, writers, vocab_size, commit)
    return outputs


def _output(
    key: str, manifest: Path, pairs: dict[str, IndexedDatasetWriter], vocab_size: int, commit: Commit | None
) -> DatasetWriter:
    counts = Counts(**commit.counts.get(key, {})) if commit else Counts()
    first = next(iter(pairs.values()))
    if first.state == WriterState():
        frequencies = np.zeros(vocab_size, np.int64)
    else:
        frequencies = count_ids_in_file(first.scratch_paths(first.prefix)[0], first.format, vocab_size)
    return DatasetWriter(key, manifest, pairs, counts, frequencies)
