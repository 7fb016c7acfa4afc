"""Memory in large pages: a processor that reads all weights for each token takes long to find pages of 4 kB.

Linux makes pages of 2 MB for memory that asks for them; in a virtual machine they are read up to twice as fast. Where
it does not, the memory is ordinary.
"""

import logging
import mmap

import torch

PAGE = 1 << 21
BLOCK = 1 << 25
"""What is asked of the system at a time, in bytes; what is not written to takes none."""
ALIGNED = 64

logger = logging.getLogger(__name__)


class HugePages:
    """Gives out pieces of memory in large pages; a block is freed with its last piece."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def take(self, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory for some numbers, not yet written, [numbers]."""
        size = numbers * dtype.itemsize
        aligned = -(-size // ALIGNED) * ALIGNED
        if aligned > len(self._block):
            self._block = _block(max(aligned, BLOCK))
        piece, self._block = self._block[:size], self._block[aligned:]
        return piece.view(dtype)


def _block(size: int) -> torch.Tensor:
    """Return memory that begins with a large page: bytes, [size] or a little more."""
    size = -(-size // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        logger.debug("this system has no large pages: %s", error)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE
    return whole[start : start + size]
