"""How each tensor is sharded over ranks: one table for layers, optimizer, loading and checkpoints; no torch.

`SHARDING` has one row for each kind of module: how its weight is partitioned over the tensor-parallel ranks, and over
which mesh axes its gradient is summed. Everything else follows: which part a rank holds (`tensor_slice`), where a
model shares its input and sums its results (`parallel.tensor`), how other systems cut the same tensors
(`weights.external.name_maps`), and which weights write into the residual stream (`weights.random_init`).

Of an adapter's two matrices the one beside the cut is cut like the weight, B by rows or A by columns; the other is
whole.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Literal

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import ConfigError


class Partition(Enum):
    """How the tensor-parallel ranks divide a module's weight, [out, in] (Shoeybi et al., 2019, section 3)."""

    COLUMN_PARALLEL = "column-parallel"
    """Weight and bias by rows: each rank computes its share of the output from the whole input."""

    KEY_VALUE_HEADS = "key-value heads"
    """Column-parallel by key-value heads; with more ranks than heads, several ranks hold the same head."""

    ROW_PARALLEL = "row-parallel"
    """Weight by columns: partial outputs are summed over the ranks, and the bias, which is whole, is added once."""

    VOCABULARY = "vocabulary"
    """By rows, one for each token id; the last ranks may hold fewer."""

    REPLICATED = "replicated"
    """Whole on every rank, and outside the partitioned blocks: every rank computes the same."""

    REPLICATED_INSIDE = "replicated inside a block"
    """Whole on every rank, but inside a partitioned block: each rank sees its own heads only, so that its gradient is
    partial. Norms of queries and keys, the down-projections of multi-head latent attention, and routers, which see a
    share of the tokens."""


@dataclass(frozen=True)
class ModuleSharding:
    """One row of the table.

    Attributes:
        partition: over the tensor-parallel ranks.
        replica_axes: mesh axes whose ranks hold the same part and compute other tokens: gradients are summed, and a
            sharded optimizer's state is cut, over them.
        axis: whose ranks divide the weight: those of tensor parallelism, or those that share one expert.
    """

    partition: Partition
    replica_axes: tuple[str, ...] = ("dp", "cp")
    axis: Literal["tp", "etp"] = "tp"


def _expert(partition: Partition) -> ModuleSharding:
    return ModuleSharding(partition, ("edp",), "etp")


SHARDING: Mapping[str, ModuleSharding] = MappingProxyType(
    {
        "embedding": ModuleSharding(Partition.VOCABULARY),
        "embedding_norm": ModuleSharding(Partition.REPLICATED),
        "rotary": ModuleSharding(Partition.REPLICATED),
        "attention_norm": ModuleSharding(Partition.REPLICATED),
        "attention.q_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "attention.q_down_proj": ModuleSharding(Partition.REPLICATED_INSIDE),
        "attention.q_latent_norm": ModuleSharding(Partition.REPLICATED_INSIDE),
        "attention.q_up_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "attention.kv_down_proj": ModuleSharding(Partition.REPLICATED_INSIDE),
        "attention.kv_latent_norm": ModuleSharding(Partition.REPLICATED_INSIDE),
        "attention.kv_up_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "attention.k_proj": ModuleSharding(Partition.KEY_VALUE_HEADS),
        "attention.v_proj": ModuleSharding(Partition.KEY_VALUE_HEADS),
        "attention.q_norm": ModuleSharding(Partition.REPLICATED_INSIDE),
        "attention.k_norm": ModuleSharding(Partition.REPLICATED_INSIDE),
        "attention.q_heads_norm": ModuleSharding(Partition.COLUMN_PARALLEL),
        "attention.k_heads_norm": ModuleSharding(Partition.KEY_VALUE_HEADS),
        "attention.sinks": ModuleSharding(Partition.COLUMN_PARALLEL),
        "attention.o_proj": ModuleSharding(Partition.ROW_PARALLEL),
        "attention_post_norm": ModuleSharding(Partition.REPLICATED),
        "mlp_norm": ModuleSharding(Partition.REPLICATED),
        "mlp.gate_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "mlp.up_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "mlp.down_proj": ModuleSharding(Partition.ROW_PARALLEL),
        "mlp_post_norm": ModuleSharding(Partition.REPLICATED),
        "mlp.router": ModuleSharding(Partition.REPLICATED_INSIDE),
        "mlp.experts.{expert}.gate_proj": _expert(Partition.COLUMN_PARALLEL),
        "mlp.experts.{expert}.up_proj": _expert(Partition.COLUMN_PARALLEL),
        "mlp.experts.{expert}.down_proj": _expert(Partition.ROW_PARALLEL),
        "mlp.shared_expert.gate_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "mlp.shared_expert.up_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
        "mlp.shared_expert.down_proj": ModuleSharding(Partition.ROW_PARALLEL),
        "mlp.shared_expert_gate": ModuleSharding(Partition.REPLICATED),
        "final_norm": ModuleSharding(Partition.REPLICATED),
        "output_head": ModuleSharding(Partition.VOCABULARY),
    }
)
"""By module, within its layer if it is in one, how it is sharded. `{expert}` stands for an expert's number."""

_ADAPTER_HALVES = ("lora_A", "lora_B")


def module_sharding(module: str, sharding: Mapping[str, ModuleSharding] = SHARDING) -> ModuleSharding | None:
    """Return the row of a module; `None` for what holds no parameters of its own, such as a whole layer.

    Args:
        module: its name in the model: `layers.17.attention.q_proj`.
        sharding: the table.
    """
    within_layer = re.sub(r"^layers\.[^.]+\.", "", module)
    return sharding.get(re.sub(r"\.\d+(?=\.|$)", ".{expert}", within_layer))


def tensor_sharding(name: str, sharding: Mapping[str, ModuleSharding] = SHARDING) -> ModuleSharding:
    """Return the row of the module that a tensor belongs to; for an adapter's matrix the one of its linear layer.

    Args:
        name: of the parameter: `layers.17.attention.q_proj.weight`.
        sharding: the table.

    Raises:
        ConfigError: no row names the module.
    """
    module, _, _ = _parts_of(name)
    row = module_sharding(module, sharding)
    if row is None:
        raise ConfigError(
            f"{name} has no row in the sharding table; add its module to SHARDING in config/sharding.py"
        )
    return row


def sharded_dim(name: str, sharding: Mapping[str, ModuleSharding] = SHARDING) -> int | None:
    """Return the dimension of a tensor that tensor parallelism cuts; `None` if every rank holds all of it."""
    _, half, kind = _parts_of(name)
    partition = tensor_sharding(name, sharding).partition
    if partition is Partition.ROW_PARALLEL:
        return 1 if kind == "weight" and half != "lora_B" else None
    if partition in (Partition.COLUMN_PARALLEL, Partition.KEY_VALUE_HEADS, Partition.VOCABULARY):
        return 0 if half != "lora_A" else None
    return None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix, which is decayed and may be adapted; a norm of each head, [N, D], is none."""
    return len(shape) > 1 and not name.endswith("_norm.weight")


def is_output_projection(name: str) -> bool:
    """Whether a tensor is the weight of a projection that writes into the residual stream."""
    return tensor_sharding(name).partition is Partition.ROW_PARALLEL and name.endswith(".weight")


def _parts_of(name: str) -> tuple[str, str, str]:
    """Return the module that a parameter belongs to, which half of an adapter it is, if any, and what it is of it."""
    module, _, kind = name.rpartition(".")
    layer, _, half = module.rpartition(".")
    return (layer, half, kind) if half in _ADAPTER_HALVES else (module, "", kind)


@dataclass(frozen=True)
class Slice:
    """The part of one tensor that a rank holds.

    Attributes:
        shape: of the whole tensor.
        index: the part along each dimension.
        tp_replicas: how many neighbouring tensor-parallel ranks hold this same part.
        tp_replica: which of them this rank is, from 0.
        has_partial_gradient: each of them computes a share of the gradient, so that theirs must be summed.
        replica_axes: mesh axes over which the gradient is summed, see `ModuleSharding`.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    tp_replicas: int = 1
    tp_replica: int = 0
    has_partial_gradient: bool = False
    replica_axes: tuple[str, ...] = ("dp", "cp")

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where the part starts."""
        return tuple(part.start for part in self.index)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(part.stop - part.start for part in self.index)

    def rows(self, rows: slice) -> "Slice":
        """Return the part that is `rows` of this part."""
        first = slice(self.index[0].start + rows.start, self.index[0].start + rows.stop)
        return replace(self, index=(first, *self.index[1:]))

    def flat_range(self, start: int, stop: int) -> tuple["Slice", ...]:
        """Return elements `start` to `stop` of this part, counted row by row, as up to three boxes.

        The boxes are the end of a row, whole rows, and the beginning of a row.
        """
        first, *inner = self.index
        width = 1
        for part in inner:
            width *= part.stop - part.start
        if len(inner) > 1:
            raise ValueError(
                f"a range of elements is not made of boxes in {len(self.shape)} dimensions; give 1 or 2"
            )
        boxes = []
        while start < stop:
            row, column = divmod(start, width)
            count = (stop - start) // width if column == 0 else 0
            end = start + count * width if count else min(stop, (row + 1) * width)
            rows = slice(first.start + row, first.start + row + max(count, 1))
            columns = [
                part if count else slice(part.start + column, part.start + column + end - start)
                for part in inner
            ]
            boxes.append(replace(self, index=(rows, *columns)))
            start = end
        return tuple(boxes)


def tensor_slice(
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    layout: Layout,
    tp_rank: int,
    sharding: Mapping[str, ModuleSharding] = SHARDING,
    etp_rank: int | None = None,
) -> Slice:
    """Return the part of one tensor that a rank holds.

    Args:
        name: of the parameter, for example `layers.17.attention.q_proj.weight`.
        shape: of the whole parameter.
        config: the model.
        layout: of all ranks.
        tp_rank: which of the tensor-parallel ranks.
        sharding: the table.
        etp_rank: which of the ranks that share an expert; `None` is `tp_rank`, where both are the same ranks.

    Raises:
        ConfigError: the ranks do not divide what is cut, or no row names the module.
    """
    row, dim = tensor_sharding(name, sharding), sharded_dim(name, sharding)
    tp, is_expert = layout.tp, row.axis == "etp"
    if is_expert:
        tp, tp_rank = layout.expert_tp, tp_rank if etp_rank is None else etp_rank
    index = [slice(0, length) for length in shape]
    if dim is None:
        # The half of an adapter that is not cut meets only the rank's own share of the other half.
        is_adapter = bool(_parts_of(name)[1]) and row.partition is not Partition.REPLICATED
        is_inside = is_adapter or row.partition is Partition.REPLICATED_INSIDE
        # An expert's gradient is of the tokens of all its ranks: sequence parallelism changes nothing in it.
        is_partial = (layout.sequence_parallel and not is_expert) or (tp > 1 and is_inside)
        return Slice(shape, tuple(index), tp, tp_rank, is_partial, row.replica_axes)
    replicas = 1
    if row.partition is Partition.VOCABULARY:
        index[dim] = chunk_range(shape[dim], tp, tp_rank)
    else:
        if row.partition is Partition.KEY_VALUE_HEADS:
            replicas = max(tp // config.num_key_value_heads, 1)
        index[dim] = _equal_share(name, shape[dim], tp // replicas, tp_rank // replicas)
    return Slice(shape, tuple(index), replicas, tp_rank % replicas, replicas > 1, row.replica_axes)


def query_heads(config: ModelConfig, tp: int, tp_rank: int) -> range:
    """Return which query heads a rank holds."""
    mine = _equal_share("num_attention_heads", config.num_attention_heads, tp, tp_rank)
    return range(mine.start, mine.stop)


def chunk_range(length: int, parts: int, part: int) -> slice:
    """Return one chunk of a length as `torch.chunk` cuts it: rounded up, the last ones shorter or empty."""
    share = -(-length // parts)
    return slice(min(part * share, length), min((part + 1) * share, length))


def assign_writers(parts: Iterable[tuple[str, Slice, int]]) -> dict[str, int]:
    """Choose for each tensor which of the ranks that hold the same part writes it, so that all write about as much.

    Args:
        parts: name, part, and number of ranks that hold it; the same names in the same order on all of them.

    Returns:
        By name the number of the rank among its holders.
    """
    written: dict[tuple[tuple[str, ...], int], list[int]] = {}
    writers = {}
    for name, part, holders in parts:
        # Sizes of whole tensors, since parts may differ from rank to rank. Tensors with other replicas are counted by
        # themselves: not all ranks that share one of them need hold the other.
        load = written.setdefault((part.replica_axes, holders), [0] * holders)
        writers[name] = load.index(min(load))
        size = 1
        for length in part.shape:
            size *= length
        load[writers[name]] += size
    return writers


def _equal_share(name: str, length: int, parts: int, part: int) -> slice:
    if length % parts:
        raise ConfigError(
            f"{name} has {length} rows or columns to cut, which {parts} ranks do not divide; "
            "choose a tensor_model_parallel_size that does"
        )
    share = length // parts
    return slice(part * share, (part + 1) * share)
