"""The largest number of each row, and where it stands.

Shapes: R rows, V numbers of a row.
"""

import torch

BLOCK = 128
"""torch's argmax on a CPU looks at one number after the other, its amax at a vector of them: of 64 rows of 32,000 in
bf16 argmax takes 7 ms, the amax of blocks and the argmax of one block 1 ms."""


def largest(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest number of each row and the first position where it stands; a NaN is larger than all numbers.

    Args:
        rows: [R, V].

    Returns:
        Numbers and positions, [R] each.
    """
    count = rows.shape[1] // BLOCK * BLOCK
    if rows.device.type != "cpu" or not count:
        return rows.max(-1)
    blocks = rows[:, :count].unflatten(1, (-1, BLOCK))
    most = blocks.amax(-1)
    block = most.argmax(-1, keepdim=True)
    number = most.gather(1, block).squeeze(1)
    of_block = blocks.take_along_dim(block.unsqueeze(-1), 1).squeeze(1).argmax(-1)
    position = block.squeeze(1) * BLOCK + of_block
    if count == rows.shape[1]:
        return number, position
    other, at = rows[:, count:].max(-1)
    is_other = (other > number) | (other.isnan() & ~number.isnan())
    return torch.where(is_other, other, number), torch.where(is_other, at + count, position)
