"""Logical tensors put together from shards, which may lie in several files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ascendspeed_core.weights.external.packing import PackedTensor
from ascendspeed_core.weights.source import WEIGHT_DTYPES, CheckpointError, Index, ReadableTensor, TensorInfo
from ascendspeed_core.weights.stream import SLAB_BYTES


@dataclass(frozen=True)
class TensorShard:
    """A part of a logical tensor, inside a stored tensor.

    Attributes:
        where: file and name, for messages.
        tensor: the stored tensor.
        row: its first row there; in a fused tensor, within its matrix.
        index: which part of the logical tensor it is.
        position: of its matrix in the leading dimensions of a fused tensor.
        depth: how many leading dimensions of the logical tensor the matrix lacks.
        is_swapped: the matrix is stored transposed.
    """

    where: str
    tensor: ReadableTensor
    row: int
    index: Index
    position: tuple[int, ...] = ()
    depth: int = 0
    is_swapped: bool = False

    def read(self, wanted: Index) -> torch.Tensor:
        """Read a slice of the logical tensor that lies within this shard."""
        pairs = list(zip(wanted, self.index, strict=True))[self.depth :]
        local = [slice(part.start - own.start, part.stop - own.start) for part, own in pairs]
        local[0] = slice(local[0].start + self.row, local[0].stop + self.row)
        if not (self.position or self.depth or self.is_swapped):
            return self.tensor.read(tuple(local))
        if self.is_swapped:
            local.reverse()
        found = self.tensor.read((*(slice(at, at + 1) for at in self.position), *local))
        found = found.reshape(found.shape[len(self.position) :])
        return (found.T if self.is_swapped else found).reshape([part.stop - part.start for part in wanted])


class ShardedTensors:
    """Logical tensors by name, whose shards lie in stored tensors."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._shards: dict[str, list[TensorShard]] = {}
        self._seen: dict[tuple[str, tuple[tuple[int, int], ...]], TensorShard] = {}
        self.replicas: list[tuple[str, TensorShard, TensorShard]] = []
        """Name of a tensor, its first shard, and another shard that holds the same part."""

    def add(self, where: str, packed: PackedTensor, stored: ReadableTensor) -> None:
        """Add a stored tensor.

        Raises:
            CheckpointError: it has another shape or dtype than the others of its kind.
        """
        if stored.info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{where} is stored as {_name(stored.info.dtype)}, which is not a format of weights; quantised weights "
                "are not read, use the checkpoint that they were made from"
            )
        if stored.info.shape != packed.shape:
            raise CheckpointError(
                f"{where} has shape {list(stored.info.shape)}, the model's is {list(packed.shape)}; "
                "its arguments and its weights disagree, or it is a file of another checkpoint"
            )
        row = 0
        for piece in packed.slices:
            if not piece.repeats:
                position = packed.position(row) if packed.leading else ()
                first_row = row % packed.matrix_rows if packed.leading else row
                shard = TensorShard(
                    where,
                    stored,
                    first_row,
                    piece.logical_index,
                    position,
                    len(piece.stack),
                    packed.is_swapped,
                )
                self._add_shard(piece.name, shard)
            row += piece.rows

    def _add_shard(self, name: str, shard: TensorShard) -> None:
        where, stored = shard.where, shard.tensor
        others = self._shards.setdefault(name, [])
        if others and others[0].tensor.info.dtype != stored.info.dtype:
            raise CheckpointError(
                f"{where} is stored as {_name(stored.info.dtype)}, {others[0].where} of the same tensor as "
                f"{_name(others[0].tensor.info.dtype)}; one of them is of another checkpoint"
            )
        key = (name, tuple((part.start, part.stop) for part in shard.index))
        if key in self._seen:
            self.replicas.append((name, self._seen[key], shard))
        else:
            self._seen[key] = shard
            others.append(shard)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of a logical tensor."""
        return TensorInfo(self._shapes[name], self._shards[name][0].tensor.info.dtype)

    def names(self) -> Iterator[str]:
        """Yield the names of all logical tensors of which a shard was added."""
        yield from self._shards

    def check_complete(self, where: object, names: Iterable[str]) -> None:
        """Raise `CheckpointError` unless the shards hold every element of these tensors."""
        for name in names:
            shards = self._shards.get(name, [])
            stored = sum(_size(shard.index) for shard in shards)
            if stored != _size(tuple(slice(0, length) for length in self._shapes[name])):
                raise CheckpointError(
                    f"{where} lacks {'part of ' if shards else ''}{name}; the copy is incomplete"
                )

    def shard(self, name: str) -> TensorShard:
        """Return the first shard of a tensor."""
        return self._shards[name][0]

    def copies(self, name: str) -> list[str]:
        """Return under which other names a tensor is stored again, such as the embedding for a tied head."""
        names = {other.where.rpartition(": ")[2] for copied, _, other in self.replicas if copied == name}
        return sorted(names - {self.shard(name).where.rpartition(": ")[2]})

    def check_replicas(self, max_bytes: int | None = None, whole: Sequence[str] = ()) -> None:
        """Compare shards that hold the same part, except those larger than `max_bytes`.

        Args:
            max_bytes: of what is compared; `None` for all.
            whole: tensors whose shards are compared whatever their size.

        Raises:
            CheckpointError: two differ.
        """
        for name, first, other in self.replicas:
            size = _size(first.index) * first.tensor.info.dtype.itemsize
            if max_bytes is not None and size > max_bytes and name not in whole:
                continue
            if not _are_equal(first, other):
                raise CheckpointError(
                    f"{name} should be the same in {first.where} and {other.where}, but is not; they are files of "
                    "different checkpoints, or a head of its own under a config with tie_word_embeddings=true"
                    if name in whole
                    else f"{name} should be the same in {first.where} and {other.where}, but is not; "
                    "they are files of different checkpoints"
                )

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice, put together from the shards that it touches."""
        shape = self._shapes[name]
        wanted = index or tuple(slice(0, length) for length in shape)
        result: torch.Tensor | None = None
        for shard in self._shards[name]:
            overlap = tuple(
                slice(max(part.start, own.start), min(part.stop, own.stop))
                for part, own in zip(wanted, shard.index, strict=True)
            )
            if any(part.start >= part.stop for part in overlap):
                continue
            if overlap == tuple(slice(part.start, part.stop) for part in wanted):
                return shard.read(wanted)
            if result is None:
                sizes = [part.stop - part.start for part in wanted]
                result = torch.empty(sizes, dtype=shard.tensor.info.dtype)
            target = tuple(
                slice(part.start - start.start, part.stop - start.start)
                for part, start in zip(overlap, wanted, strict=True)
            )
            result[target] = shard.read(overlap)
        if result is None:
            sizes = [max(part.stop - part.start, 0) for part in wanted]
            return torch.empty(sizes, dtype=self.info(name).dtype)
        return result


def _are_equal(first: TensorShard, other: TensorShard) -> bool:
    """Compare two shards of the same part, a few rows at a time; NaN equals NaN."""
    rows, *rest = first.index
    width = _size(tuple(rest)) * first.tensor.info.dtype.itemsize
    step = max(SLAB_BYTES // max(width, 1), 1)
    for start in range(rows.start, rows.stop, step):
        part = (slice(start, min(start + step, rows.stop)), *rest)
        a, b = first.read(part), other.read(part)
        if not torch.equal(a, b) and not ((a == b) | (a.isnan() & b.isnan())).all():
            return False
    return True


def _size(index: Index) -> int:
    size = 1
    for part in index:
        size *= part.stop - part.start
    return size


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
