"""The files that a run writes, and what it counts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.encoding import Counts, EncodedOutput
from ascendspeed_data.indexed import IndexedDatasetWriter, WriterState, smallest_format
from ascendspeed_data.job import ARRAYS, PreprocessJob
from ascendspeed_data.journal import Commit
from ascendspeed_data.packing import frequencies_in


@dataclass
class Output:
    """What belongs together: the pair of a column, or the three pairs of samples.

    Attributes:
        key: the column; `""` for samples.
        manifest: where the manifest goes.
        writers: by array.
        counts: so far.
        frequencies: how often each id occurs, int64 [vocabulary].
    """

    key: str
    manifest: Path
    writers: dict[str, IndexedDatasetWriter]
    counts: Counts
    frequencies: NDArray[np.int64]

    def add(self, encoded: EncodedOutput) -> None:
        """Append the documents of a shard."""
        for array, writer in self.writers.items():
            writer.add_documents(encoded.lengths, encoded.arrays[array], encoded.sequences)
        self.counts.add(encoded.counts)
        self.frequencies += encoded.frequencies

    @property
    def first(self) -> IndexedDatasetWriter:
        """The writer of the ids."""
        return next(iter(self.writers.values()))


@dataclass(frozen=True)
class OutputPlaces:
    """Where an output goes.

    Attributes:
        manifest: its manifest.
        prefixes: of each pair of files, by array.
    """

    manifest: Path
    prefixes: dict[str, Path]

    @property
    def files(self) -> list[Path]:
        """The files under their names, the manifest last."""
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


def output_places(job: PreprocessJob, of_samples: bool) -> dict[str, OutputPlaces]:
    """Return where the outputs of a job go; samples have one output, named ``""``."""
    if of_samples:
        prefixes = {array: job.packed_prefix(array) for array in ARRAYS}
        return {"": OutputPlaces(job.beside("_packed.manifest.json"), prefixes)}
    return {
        key: OutputPlaces(job.beside(f"_{key}_document.manifest.json"), {key: job.prefix_of(key)})
        for key in job.keys
    }


def unpacked_places(job: PreprocessJob) -> OutputPlaces:
    """Return where samples lie until they are packed."""
    prefixes = {array: job.beside(f"_unpacked_{array}") for array in ARRAYS}
    return OutputPlaces(job.beside("_packed.manifest.json"), prefixes)


def open_outputs(
    job: PreprocessJob, of_samples: bool, vocab_size: int, commit: Commit | None
) -> dict[str, Output]:
    """Open the unfinished files of a run, at their beginning or where `commit` says.

    Samples that are to be packed go into files of their own first.
    """
    places = {"": unpacked_places(job)} if job.pack else output_places(job, of_samples)
    token_format = np.int32 if of_samples else smallest_format(vocab_size)
    outputs = {}
    for key, place in places.items():
        writers = {
            array: IndexedDatasetWriter(
                prefix, token_format, commit.outputs.get(prefix.name) if commit else None, keep=True
            )
            for array, prefix in place.prefixes.items()
        }
        outputs[key] = _output(key, place.manifest, writers, vocab_size, commit)
    return outputs


def _output(
    key: str, manifest: Path, pairs: dict[str, IndexedDatasetWriter], vocab_size: int, commit: Commit | None
) -> Output:
    counts = Counts(**commit.counts.get(key, {})) if commit else Counts()
    first = next(iter(pairs.values()))
    if first.state == WriterState():
        frequencies = np.zeros(vocab_size, np.int64)
    else:
        frequencies = frequencies_in(first.scratch_paths(first.prefix)[0], first.format, vocab_size)
    return Output(key, manifest, pairs, counts, frequencies)
