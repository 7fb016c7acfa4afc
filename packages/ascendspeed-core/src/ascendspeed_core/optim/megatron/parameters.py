"""Which parts of this project's tensors the parameters of a `GPTModel` are made of.

Its tensors are packed (queries, keys and values of each key-value head in one) and cut over ranks. The name map that
reads and writes its checkpoints says how, so that a rank fills its parameters from any source, slice by slice, and a
checkpoint holds them under the names that no engine changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import Slice, sharded_dim
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights.external.name_maps import (
    EMBEDDING_NORM,
    NameMap,
    NameRule,
    expert_indices,
    megatron,
)
from ascendspeed_core.weights.external.packing import PackedTensor
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import PipelineChunk, shard_layout
from ascendspeed_core.weights.source import CheckpointError, WeightSource
from ascendspeed_core.weights.stream import slabs


@dataclass(frozen=True)
class HeldPart:
    """Consecutive elements of a parameter that are a part of one of our tensors.

    Attributes:
        name: of our tensor.
        part: which part of it.
        start: first element, counted row by row.
    """

    name: str
    part: Slice
    start: int

    @property
    def stop(self) -> int:
        """The element after the last."""
        return self.start + elements(self.part)


@dataclass(frozen=True)
class HeldParameter:
    """A parameter of a `GPTModel` on this rank.

    Attributes:
        parameter: it.
        parts: what it is made of; elements that are none of them are padding.
        dim: that tensor-parallel ranks divide; `None` where each has all of it.
        is_written: this rank writes it to checkpoints, unless a replica does.
        is_expert: it is of one expert.
    """

    parameter: torch.Tensor
    parts: tuple[HeldPart, ...]
    dim: int | None
    is_written: bool
    is_expert: bool

    def within(self, start: int, stop: int) -> Iterator[tuple[str, Slice, int]]:
        """Yield name, part and first element of everything between two elements, as boxes."""
        for held in self.parts:
            first, last = max(start, held.start), min(stop, held.stop)
            if first < last:
                offset = first
                for box in held.part.flat_range(first - held.start, last - held.start):
                    yield held.name, box, offset
                    offset += elements(box)


def elements(part: Slice) -> int:
    """Return how many elements a part has."""
    total = 1
    for length in part.sizes:
        total *= length
    return total


def vocabulary_rows(vocab_size: int, tp: int) -> int:
    """Return the rows of embedding and head with padding: as few as let each rank have equally many."""
    return -(-vocab_size // tp) * tp


def held_parameters(
    chunk: nn.Module, stage: Stage, config: ModelConfig, mesh: ParallelMesh
) -> Iterator[HeldParameter]:
    """Yield what a stage of this rank is made of; all of it, or an error.

    Args:
        chunk: the `GPTModel`, not wrapped.
        stage: which stage it is.
        config: the model.
        mesh: of this rank.
    """
    layout, shapes = mesh.layout, parameter_shapes(config)
    named: dict[str, torch.Tensor] = dict(chunk.named_parameters())
    experts = expert_indices(config, shard_layout(config.num_layers, ep=layout.ep), mesh.index("ep"))
    where = PipelineChunk(stage.layers, stage.is_first, stage.is_last)
    rows = vocabulary_rows(config.vocab_size, layout.tp)
    for packed in _names().of_chunk(shapes, config, where, rows, experts):
        is_expert = ".experts." in packed.key
        tp, index = (layout.expert_tp, mesh.index("etp")) if is_expert else (layout.tp, mesh.tp_rank)
        found = named.pop(packed.key, None)
        if found is None:
            raise CheckpointError(
                f"{packed.slices[0].name} has no tensor {packed.key} in this model of megatron-core; give --engine "
                "ascendspeed, which has all families"
            )
        dim = sharded_dim(packed.slices[0].name)
        borrowed = packed.key == "output_layer.weight" and config.tie_word_embeddings
        parts = tuple(_parts(packed.of_rank(index, tp), shapes))
        is_written = not borrowed and (dim is not None or index == 0)
        yield HeldParameter(found, parts, dim, is_written, is_expert)
    if named:
        raise CheckpointError(
            f"{next(iter(named))} of this model of megatron-core has no counterpart in "
            f"{config.family}; give --engine ascendspeed"
        )


def _names() -> NameMap:
    """Return the names of its own layers, and of what `layers` and `routers` put into them."""
    names = megatron(transformer_engine=False)
    layer = tuple(replace(rule, theirs=_in_router(rule.theirs)) for rule in names.layer)
    return replace(
        names, first=(*names.first, NameRule("embedding.norm.{kind}", EMBEDDING_NORM)), layer=layer
    )


def _in_router(name: str) -> str:
    """Return how a tensor of a router is called where it is this project's."""
    return name.replace("router.expert_bias", "router.choose.bias").replace(
        "router.weight", "router.choose.weight"
    )


def _parts(packed: PackedTensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[HeldPart]:
    start = 0
    for piece in packed.slices:
        length = piece.rows
        for size in piece.shape[1:]:
            length *= size
        if not piece.repeats:
            yield HeldPart(piece.name, Slice(shapes[piece.name], piece.logical_index), start)
        start += length


@torch.no_grad()
def fill(held: HeldParameter, source: WeightSource) -> None:
    """Copy the weights of a parameter, slab by slab; dtypes are converted, and padding is zero."""
    flat = held.parameter.data.view(-1)
    if sum(elements(part.part) for part in held.parts) < len(flat):
        flat.zero_()
    for part in held.parts:
        start = part.start
        for slab in slabs(source, part.name, part.part.index):
            flat[start : start + slab.numel()].copy_(slab.reshape(-1))
            start += slab.numel()
