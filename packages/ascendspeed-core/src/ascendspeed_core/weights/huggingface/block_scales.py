"""Read weights that are stored in few bits with a scale for each block, as the plain weights that they stand for.

Two published rules, both giving bf16 as the makers' own conversions do:

- FP8 (DeepSeek-V3, `inference/kernel.py`, `weight_dequant`): an element in e4m3 times the fp32 scale of its block of
  rows and columns, in `weight_scale_inv`; the last blocks may be smaller.
- MXFP4 (Open Compute Project, 2023, Microscaling Formats, section 5; gpt-oss): 32 numbers of e2m1 along the input of a
  matrix share a power of two; two lie in a byte, the first in its lower half. `_blocks` is [experts, out, blocks, 16],
  and stands for [experts, in, out].

Only the blocks that a slice touches are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.weights.huggingface.quantised import CONFIG_KEYS, method_of_config
from ascendspeed_core.weights.source import CheckpointError, Index, ReadableTensor, TensorInfo
from ascendspeed_data.command_line import log

FP8, MXFP4 = "fp8", "mxfp4"
SCALE_SUFFIX, BLOCKS_SUFFIX, SCALES_SUFFIX = "_scale_inv", "_blocks", "_scales"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Numbers of four bits: a sign, two of exponent, one of mantissa."""
BLOCK_BYTES, BLOCK_NUMBERS, BIAS = 16, 32, 127


@dataclass(frozen=True)
class Fp8Tensor:
    """A matrix in e4m3 with a scale for each block.

    Attributes:
        elements: [rows, columns].
        scales: [blocks of rows, blocks of columns].
        block: rows and columns of a block.
    """

    elements: ReadableTensor
    scales: ReadableTensor
    block: tuple[int, int]

    @property
    def info(self) -> TensorInfo:
        """Shape and format of what it stands for."""
        return TensorInfo(self.elements.info.shape, torch.bfloat16)

    def read(self, index: Index = ()) -> torch.Tensor:
        """Read a slice."""
        shape = self.info.shape
        index = (*index, *(slice(0, length) for length in shape[len(index) :]))
        blocks = tuple(
            slice(part.start // size, -(-part.stop // size))
            for part, size in zip(index, self.block, strict=True)
        )
        scales = self.scales.read(blocks).float()
        for dim, (part, size) in enumerate(zip(index, self.block, strict=True)):
            numbers = torch.arange(part.start, part.stop) // size - blocks[dim].start
            scales = scales.index_select(dim, numbers)
        return (self.elements.read(index).float() * scales).to(torch.bfloat16)


@dataclass(frozen=True)
class MxFp4Tensor:
    """Matrices in e2m1, 32 numbers of an output's row to a scale, as [experts, in, out].

    Attributes:
        blocks: [experts, out, blocks, 16], uint8.
        scales: powers of two, [experts, out, blocks], uint8.
    """

    blocks: ReadableTensor
    scales: ReadableTensor

    @property
    def info(self) -> TensorInfo:
        """Shape and format of what it stands for."""
        experts, rows, blocks, _ = self.blocks.info.shape
        return TensorInfo((experts, blocks * BLOCK_NUMBERS, rows), torch.bfloat16)

    def read(self, index: Index = ()) -> torch.Tensor:
        """Read a slice."""
        parts = [*index, *(slice(0, length) for length in self.info.shape[len(index) :])]
        experts, columns, rows = parts
        blocks = slice(columns.start // BLOCK_NUMBERS, -(-columns.stop // BLOCK_NUMBERS))
        packed = self.blocks.read((experts, rows, blocks, slice(0, BLOCK_BYTES)))
        powers = self.scales.read((experts, rows, blocks)).to(torch.int32) - BIAS
        table = torch.tensor(E2M1)
        halves = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        numbers = torch.ldexp(table[halves.int()], powers.unsqueeze(-1)).flatten(-2)
        first = columns.start - blocks.start * BLOCK_NUMBERS
        part = numbers[..., first : first + columns.stop - columns.start]
        return part.transpose(1, 2).to(torch.bfloat16).contiguous()


def plain_tensors(
    folder: Path, hf_config: Mapping[str, Any], stored: Mapping[str, ReadableTensor]
) -> tuple[Mapping[str, ReadableTensor], Mapping[str, Any]]:
    """Return the tensors of a folder as plain ones where a published rule says how, and the config without that.

    Args:
        folder: for messages.
        hf_config: content of its config.json.
        stored: all tensors by name.

    Raises:
        CheckpointError: elements and scales do not fit each other.
    """
    key = next((key for key in CONFIG_KEYS if hf_config.get(key)), None)
    said = hf_config.get(key) if key is not None else None
    method = method_of_config(said)
    rest = {name: value for name, value in hf_config.items() if name != key}
    if method == FP8 and isinstance(said, Mapping) and said.get("weight_block_size") is not None:
        plain = _of_fp8(folder, said["weight_block_size"], stored)
    elif method == MXFP4:
        plain = _of_mxfp4(folder, stored)
    else:
        return stored, hf_config
    # A config that says quantised over plain weights is refused as before.
    if plain.keys() == stored.keys():
        return stored, hf_config
    count = sum(isinstance(tensor, Fp8Tensor | MxFp4Tensor) for tensor in plain.values())
    log(f"{folder}: {count} weights in {method} are dequantised to bf16 as they are read")
    return plain, rest


def _of_fp8(folder: Path, block_size: Any, stored: Mapping[str, ReadableTensor]) -> dict[str, ReadableTensor]:
    is_pair = isinstance(block_size, list | tuple) and len(block_size) == 2
    if not is_pair or any(type(size) is not int or size < 1 for size in block_size):
        raise CheckpointError(
            f"{folder}: weight_block_size={block_size!r} is not the rows and columns of a block; correct config.json"
        )
    block = (block_size[0], block_size[1])
    plain: dict[str, ReadableTensor] = {
        name: tensor for name, tensor in stored.items() if not name.endswith(SCALE_SUFFIX)
    }
    for name in stored:
        if not name.endswith(SCALE_SUFFIX):
            continue
        weight, scales = name.removesuffix(SCALE_SUFFIX), stored[name]
        if weight not in stored or stored[weight].info.dtype != torch.float8_e4m3fn:
            raise CheckpointError(
                f"{folder}: {name} is the scale of {weight}, which is not there in float8_e4m3fn; copy the folder again"
            )
        shape = stored[weight].info.shape
        wanted = tuple(-(-length // size) for length, size in zip(shape, block, strict=False))
        if len(shape) != 2 or scales.info.shape != wanted:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(scales.info.shape)}, blocks of {block[0]} x {block[1]} make it "
                f"{list(wanted)}; its config and its weights disagree"
            )
        plain[weight] = Fp8Tensor(stored[weight], scales, block)
    return plain


def _of_mxfp4(folder: Path, stored: Mapping[str, ReadableTensor]) -> dict[str, ReadableTensor]:
    plain = dict(stored)
    if any(len(t.info.shape) != 4 for name, t in stored.items() if name.endswith(BLOCKS_SUFFIX)):
        # Not the layout of gpt-oss; refused as quantised.
        return plain
    for name in stored:
        if not name.endswith(BLOCKS_SUFFIX):
            continue
        whole = name.removesuffix(BLOCKS_SUFFIX)
        blocks, scales = stored[name], stored.get(f"{whole}{SCALES_SUFFIX}")
        shape = blocks.info.shape
        is_right = len(shape) == 4 and shape[3] == BLOCK_BYTES and scales is not None
        if scales is None or not is_right or scales.info.shape != shape[:3]:
            beside = None if scales is None else list(scales.info.shape)
            raise CheckpointError(
                f"{folder}: {name} has shape {list(shape)} beside scales of {beside}; blocks are [experts, out, "
                f"blocks, {BLOCK_BYTES}] with a scale each, so copy the folder again"
            )
        if any(tensor.info.dtype != torch.uint8 for tensor in (blocks, scales)):
            raise CheckpointError(
                f"{folder}: {name} and its scales are not both uint8; copy the folder again"
            )
        del plain[name], plain[f"{whole}{SCALES_SUFFIX}"]
        plain[whole] = MxFp4Tensor(blocks, scales)
    return plain
