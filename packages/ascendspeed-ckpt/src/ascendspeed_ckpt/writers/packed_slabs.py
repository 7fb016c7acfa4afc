"""Read the tensors of an external checkpoint from logical tensors, slab by slab, from the first row to the last."""

from collections.abc import Iterator

import torch

from ascendspeed_core.weights.external.mp_rank import rotary_frequencies
from ascendspeed_core.weights.external.name_maps import ROTARY
from ascendspeed_core.weights.external.packing import PackedSlice, PackedTensor
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_core.weights.stream import SLAB_BYTES, as_format, slabs


def packed_slabs(
    source: WeightSource, packed: PackedTensor, dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """Yield a stored tensor as contiguous slabs, whose bytes one after the other are the tensor's.

    Args:
        source: the logical tensors.
        packed: the stored tensor.
        dtype: of the slabs; by default the stored one.
    """
    if packed.is_swapped:
        yield from _transposed_slabs(source, packed, dtype)
        return
    for piece in packed.slices:
        yield from _slice_slabs(source, piece, dtype)


def _slice_slabs(
    source: WeightSource, piece: PackedSlice, dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    if piece.name == ROTARY:
        yield rotary_frequencies(source.config)
    elif piece.repeats:
        row = as_format(source.read(piece.name, piece.logical_index), dtype, piece.name)
        at_once = max(SLAB_BYTES // max(row.nbytes, 1), 1)
        for start in range(0, piece.repeats, at_once):
            rows = min(at_once, piece.repeats - start)
            yield row.expand(rows, *row.shape[1:]).contiguous()
    else:
        yield from slabs(source, piece.name, piece.logical_index, dtype)


def _transposed_slabs(
    source: WeightSource, packed: PackedTensor, dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """Yield the transposes of its matrices, a run of our columns at once."""
    itemsize = source.tensors()[packed.slices[0].name].dtype.itemsize
    at_once = max(SLAB_BYTES // (packed.matrix_rows * itemsize), 1)
    for pieces in _matrices(packed):
        columns = pieces[0].index[1]
        for start in range(0, columns.stop - columns.start, at_once):
            parts = []
            for piece in pieces:
                rows, own = piece.index
                stop = min(own.start + start + at_once, own.stop)
                index = (*piece.logical_index[:-2], rows, slice(own.start + start, stop))
                found = source.read(piece.name, index)
                parts.append(as_format(found.reshape(found.shape[-2:]), dtype, piece.name))
            yield torch.cat(parts).T.contiguous()


def _matrices(packed: PackedTensor) -> Iterator[list[PackedSlice]]:
    """Yield the slices of each matrix of a stored tensor."""
    pieces: list[PackedSlice] = []
    rows, matrix_rows = 0, packed.matrix_rows
    for piece in packed.slices:
        pieces.append(piece)
        rows += piece.rows
        if rows == matrix_rows:
            yield pieces
            pieces, rows = [], 0
