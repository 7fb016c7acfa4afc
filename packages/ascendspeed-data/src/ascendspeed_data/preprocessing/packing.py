"""Pack several samples into each sequence of a given length, and keep the boundaries of the samples.

A pack is a document of the indexed dataset; its samples are the sequences of that document, in the order of the input.
So a reader gets a pack as one document, and the index shows where each sample starts.

Samples are packed by best fit decreasing within windows of the input: the longest first, each into the fullest pack
with room for it. The window bounds memory, and packs do not depend on the number of workers or the shard size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.encoding import LABELS
from ascendspeed_data.handlers import IGNORED_LABEL
from ascendspeed_data.indexed import IndexedDatasetWriter

SAMPLES_PER_WINDOW = 1 << 14


@dataclass
class PackCounts:
    """Counts of packing."""

    num_samples: int = 0
    num_packs: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_cut_samples: int = 0
    num_dropped_samples: int = 0
    num_tokens_before: int = 0


def best_fit(lengths: NDArray[Any], capacity: int) -> list[list[int]]:
    """Pack items by best fit decreasing.

    Args:
        lengths: lengths of the items, at most `capacity`.
        capacity: size of a pack.

    Returns:
        The indices of the items in each pack, ascending; packs are sorted by their first item.
    """
    packs: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces = 0
    """Bit s is set if some pack has exactly s tokens of free space."""
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            pack = by_space[space].pop()
            if not by_space[space]:
                spaces &= ~(1 << space)
        else:
            space, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(item)
        left = space - length
        by_space.setdefault(left, []).append(pack)
        spaces |= 1 << left
    return sorted(sorted(pack) for pack in packs)


def pack_samples(
    sources: dict[str, Path], writers: dict[str, IndexedDatasetWriter], capacity: int
) -> PackCounts:
    """Read unpacked samples and write packs.

    Args:
        sources: prefix of the unfinished files (`IndexedDatasetWriter.scratch_paths`) of each array, int32.
        writers: writer of the packs, by array.
        capacity: tokens of a pack.
    """
    counts = PackCounts()
    lengths_path = IndexedDatasetWriter.scratch_paths(next(iter(sources.values())))[1]
    start = 0
    with lengths_path.open("rb") as file:
        while content := file.read(4 * SAMPLES_PER_WINDOW):
            lengths = np.frombuffer(content, np.int32)
            size = int(lengths.sum(dtype=np.int64))
            window = {
                name: np.fromfile(
                    IndexedDatasetWriter.scratch_paths(prefix)[0], np.int32, size, offset=4 * start
                )
                for name, prefix in sources.items()
            }
            _pack_window(window, lengths, writers, capacity, counts)
            start += size
    return counts


def _pack_window(
    window: dict[str, NDArray[np.int32]],
    lengths: NDArray[np.int32],
    writers: dict[str, IndexedDatasetWriter],
    capacity: int,
    counts: PackCounts,
) -> None:
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    kept = np.minimum(lengths, capacity)
    counts.num_tokens_before += int(lengths.sum(dtype=np.int64))
    labels = window[LABELS]
    # The first token of a sample has no loss: the token before it belongs to another sample.
    labels[starts[lengths > 0]] = IGNORED_LABEL
    too_long = lengths > capacity
    counts.num_cut_samples += int(too_long.sum())
    wanted = [
        number
        for number in range(len(lengths))
        if not too_long[number] or np.any(labels[starts[number] : starts[number] + capacity] != IGNORED_LABEL)
    ]
    counts.num_dropped_samples += len(lengths) - len(wanted)
    counts.num_cut_samples -= len(lengths) - len(wanted)
    packs = best_fit(kept[wanted], capacity)
    order = [wanted[item] for pack in packs for item in pack]
    sequences = np.fromiter(map(len, packs), np.int32, len(packs))
    for name, array in window.items():
        parts = [array[starts[number] : starts[number] + kept[number]] for number in order]
        tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
        writers[name].add_documents(kept[order], tokens, sequences)
        if name == LABELS:
            counts.num_trained_tokens += int((tokens != IGNORED_LABEL).sum())
    counts.num_samples += len(order)
    counts.num_packs += len(packs)
    counts.num_tokens += int(kept[order].sum(dtype=np.int64))
