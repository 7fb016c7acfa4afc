"""Which part of each tensor a device holds: one table for layers, optimizer and checkpoints; pure arithmetic.

Column-parallel weights, [out, in], are cut by rows, row-parallel ones by columns, embedding and head by rows of the
vocabulary; the biases of column-parallel layers are cut like their rows. Everything else is whole on every device.
Keys and values are cut by heads; with more devices than heads, each head is on several devices. Of an adapter's two
matrices the one beside the cut is cut like the weight, B by rows or A by columns, and the other is whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.parallel import Layout
from ascendspeed_data.errors import ConfigError

COLUMN_PARALLEL = ("attention.q_proj", "mlp.gate_proj", "mlp.up_proj")
"""Linear layers of a transformer layer that are cut along their output."""

KEY_VALUE = ("attention.k_proj", "attention.v_proj")
"""Linear layers that are cut along their output by key-value heads."""

ROW_PARALLEL = ("attention.o_proj", "mlp.down_proj")
"""Linear layers that are cut along their input; their results are added up."""

OF_EVERY_HEAD = ("attention.q_norm", "attention.k_norm")
"""Norms inside the cut: whole on every device, but each sees only its own heads."""

VOCABULARY = ("embedding", "output_head")
"""Tensors with a row for each id; the last devices may hold fewer."""


@dataclass(frozen=True)
class Slice:
    """A device's part of one tensor.

    Attributes:
        shape: of the whole tensor.
        index: the part along each dimension.
        copies: how many neighbouring devices of the tensor-parallel group hold this very part.
        copy: which of them this device is, from 0.
        has_partial_gradient: each of them sees a share of the work only, so that their gradients must be added up.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    copies: int = 1
    copy: int = 0
    has_partial_gradient: bool = False

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

    def elements(self, start: int, stop: int) -> tuple["Slice", ...]:
        """Return this part's elements `start` to `stop`, counted row by row, as boxes: rows cut, whole, and cut."""
        first, *inner = self.index
        width = 1
        for part in inner:
            width *= part.stop - part.start
        if len(inner) > 1:
            raise ValueError(f"elements of a tensor of {len(self.shape)} dimensions make no few boxes")
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
    name: str, shape: tuple[int, ...], config: ModelConfig, layout: Layout, tp_rank: int
) -> Slice:
    """Return the part of one tensor that a device holds.

    Args:
        name: of the parameter, for example `layers.17.attention.q_proj.weight`.
        shape: of the whole parameter.
        config: the model.
        layout: of all devices.
        tp_rank: which of the tensor-parallel devices.

    Raises:
        ConfigError: the devices do not divide what is cut; nothing is left over silently.
    """
    tp = layout.tp
    module, _, kind = name.rpartition(".")
    everything = tuple(slice(0, length) for length in shape)
    layer, _, half = module.rpartition(".")
    if half in ("lora_A", "lora_B"):
        is_cut_along_input = layer.endswith(ROW_PARALLEL)
        if is_cut_along_input != (half == "lora_A"):
            # The half that no device cuts meets only the device's own share of the other.
            return Slice(shape, everything, tp, tp_rank, has_partial_gradient=tp > 1)
        module = layer
    if module in VOCABULARY:
        return Slice(shape, (rounded_share(shape[0], tp, tp_rank), *everything[1:]))
    if module.endswith(COLUMN_PARALLEL):
        return Slice(shape, (_share(name, shape[0], tp, tp_rank), *everything[1:]))
    if module.endswith(KEY_VALUE):
        copies = max(tp // config.num_key_value_heads, 1)
        rows = _share(name, shape[0], tp // copies, tp_rank // copies)
        return Slice(
            shape, (rows, *everything[1:]), copies, tp_rank % copies, has_partial_gradient=copies > 1
        )
    if module.endswith(ROW_PARALLEL) and kind == "weight":
        return Slice(shape, (everything[0], _share(name, shape[1], tp, tp_rank)))
    if module.endswith(OF_EVERY_HEAD):
        return Slice(shape, everything, tp, tp_rank, has_partial_gradient=tp > 1)
    return Slice(shape, everything, tp, tp_rank, has_partial_gradient=layout.sequence_parallel)


def query_heads(config: ModelConfig, tp: int, tp_rank: int) -> range:
    """Return which query heads a device holds."""
    mine = _share("num_attention_heads", config.num_attention_heads, tp, tp_rank)
    return range(mine.start, mine.stop)


def rounded_share(length: int, parts: int, part: int) -> slice:
    """Cut a length into shares that are rounded up; the last ones may be shorter or empty."""
    share = -(-length // parts)
    return slice(min(part * share, length), min((part + 1) * share, length))


def assign_writers(parts: Iterable[tuple[str, Slice, int]]) -> dict[str, int]:
    """Choose for each tensor which of the devices that hold the same part writes it, so that all write alike.

    Args:
        parts: name, part, and number of devices that hold it; the same names in the same order on all of them.

    Returns:
        By name the number of the device among its holders.
    """
    written: dict[int, list[int]] = {}
    writers = {}
    for name, part, holders in parts:
        # Sizes of whole tensors, since parts may differ from device to device.
        load = written.setdefault(holders, [0] * holders)
        writers[name] = load.index(min(load))
        size = 1
        for length in part.shape:
            size *= length
        load[writers[name]] += size
    return writers


def _share(name: str, length: int, parts: int, part: int) -> slice:
    if length % parts:
        raise ConfigError(
            f"{name} has {length} rows or columns to cut, which {parts} devices do not divide; "
            "choose a tensor_model_parallel_size that does"
        )
    share = length // parts
    return slice(part * share, (part + 1) * share)
