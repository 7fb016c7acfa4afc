"""The files that a run writes, and what it counts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.encoding import Counts, EncodedOutput
from ascendspeed_data.indexed import IndexedDatasetWriter, WriterState, smallest_format
from ascendspeed_data.job import ARRAYS, PreprocessJob
from ascendspeed_data.journal import Commit
from ascendspeed_data.packing import frequencies_of


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


def open_outputs(
    job: PreprocessJob, of_samples: bool, vocab_size: int, commit: Commit | None
) -> dict[str, Output]:
    """Open the unfinished files of a run, at their beginning or where `commit` says.

    Samples that are to be packed go into files of their own first.
    """

    def writer(prefix: Path, token_format: type) -> IndexedDatasetWriter:
        state = commit.outputs.get(prefix.name) if commit else None
        return IndexedDatasetWriter(prefix, token_format, state, keep=True)

    outputs = {}
    if of_samples:
        where: Callable[[str], Path] = unpacked_prefix(job) if job.pack else job.packed_prefix
        pairs = {array: writer(where(array), np.int32) for array in ARRAYS}
        outputs[""] = _output("", job.beside("_packed.manifest.json"), pairs, vocab_size, commit)
    else:
        for key in job.keys:
            prefix = job.prefix_of(key)
            pairs = {key: writer(prefix, smallest_format(vocab_size))}
            manifest = prefix.with_name(prefix.name + ".manifest.json")
            outputs[key] = _output(key, manifest, pairs, vocab_size, commit)
    return outputs


def unpacked_prefix(job: PreprocessJob) -> Callable[[str], Path]:
    """Return where the arrays of samples lie until they are packed."""
    return lambda array: job.beside(f"_unpacked_{array}")


def _output(
    key: str, manifest: Path, pairs: dict[str, IndexedDatasetWriter], vocab_size: int, commit: Commit | None
) -> Output:
    counts = Counts(**commit.counts.get(key, {})) if commit else Counts()
    first = next(iter(pairs.values()))
    if first.state == WriterState():
        frequencies = np.zeros(vocab_size, np.int64)
    else:
        frequencies = frequencies_of(first.scratch_paths(first.prefix)[0], first.format, vocab_size)
    return Output(key, manifest, pairs, counts, frequencies)
