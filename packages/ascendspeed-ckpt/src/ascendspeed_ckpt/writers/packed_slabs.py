"""Read the tensors of an external checkpoint from logical tensors, slab by slab, from the first row to the last."""

from collections.abc import Iterable, Iterator

import torch

from ascendspeed_core.weights.external.mp_rank import rotary_frequencies
from ascendspeed_core.weights.external.name_maps import ROTARY
from ascendspeed_core.weights.external.packing import PackedSlice
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_core.weights.stream import SLAB_BYTES, as_format, slabs


def slice_slabs(
    source: WeightSource, block: PackedSlice, dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """Yield the rows of a block as contiguous slabs."""
    if block.name == ROTARY:
        yield rotary_frequencies(source.config)
    elif block.repeats:
        row = as_format(source.read(block.name, block.index), dtype, block.name)
        at_once = max(SLAB_BYTES // max(row.nbytes, 1), 1)
        for start in range(0, block.repeats, at_once):
            rows = min(at_once, block.repeats - start)
            yield row.expand(rows, *row.shape[1:]).contiguous()
    else:
        yield from slabs(source, block.name, block.index, dtype)


def packed_slabs(
    source: WeightSource, slices: Iterable[PackedSlice], dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """Yield a stored tensor from its first row to its last."""
    for block in slices:
        yield from slice_slabs(source, block, dtype)
