"""Attention of several texts in one call: their queries lie one after the other, their keys anywhere in one cache.

Where each text's queries and keys begin and how many there are stands in tensors on the device. So one kernel reads
all texts, and a recorded pass can be replayed for other places and lengths.

Shapes: M queries of all texts, N query heads, K key-value heads, C tokens of the cache, D head size, T texts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ascendspeed_core.device import Device
from ascendspeed_core.kernels.reference import reference_attention

LARGEST_HEAD, HEAD_MULTIPLE = 256, 8
"""Head sizes that the kernel takes: multiples up to the largest."""


@dataclass(frozen=True)
class TextLengths:
    """Where texts lie.

    Attributes:
        first_queries: of each text, then the number of all queries, int32, [T + 1].
        first_keys: of each text in the cache, then any number, int32, [T + 1].
        num_keys: of each text; the last of them belong to its queries, int32, [T].
        most_queries: of any text.
        most_keys: at least those of any text; to name many more costs time.
    """

    first_queries: torch.Tensor
    first_keys: torch.Tensor
    num_keys: torch.Tensor
    most_queries: int
    most_keys: int


LengthsAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, TextLengths, int | None], torch.Tensor]
"""An implementation of `attend_text_by_text`."""


def lengths_attention(
    device: Device,
    dtype: torch.dtype,
    head_dim: int,
    changes_scores: bool,
    scale: float | None = None,
) -> LengthsAttention | None:
    """Return what attends to all texts in one call on a device; `None` where each needs a call of its own.

    Args:
        device: of the cache.
        dtype: of what is kept there.
        head_dim: D.
        changes_scores: scores are more than products and their scale, as with ALiBi, soft-capping or sinks.
        scale: factor of the scores, by default 1 / sqrt(D).
    """
    if device.kind != "cuda" or changes_scores or not _is_taken(dtype, head_dim):
        return None
    return flash_attention if scale is None else partial(flash_attention, scale=scale)


def takes_lengths(x: torch.Tensor) -> bool:
    """Whether FlashAttention takes queries like these, [..., D], with lengths of texts."""
    return x.is_cuda and _is_taken(x.dtype, x.shape[-1])


def _is_taken(dtype: torch.dtype, head_dim: int) -> bool:
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    return is_narrow and head_dim % HEAD_MULTIPLE == 0 and head_dim <= LARGEST_HEAD


def attend_text_by_text(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: TextLengths, window: int | None
) -> torch.Tensor:
    """Causal attention of every text to its own keys, one after the other: what is right.

    Args:
        q: of all texts, [M, N, D].
        keys: the cache, [K, C, D].
        values: likewise.
        lengths: which queries and keys are whose.
        window: keys that a query sees, its own included; `None` for all.

    Returns:
        [M, N, D].
    """
    parts = []
    starts, firsts = lengths.first_queries.tolist(), lengths.first_keys.tolist()
    for text, count in enumerate(lengths.num_keys.tolist()):
        own = q[starts[text] : starts[text + 1]].transpose(0, 1)
        kept = slice(firsts[text], firsts[text] + count)
        seen = torch.ones(own.shape[1], count, dtype=torch.bool, device=q.device).tril(count - own.shape[1])
        if window is not None:
            seen = seen.triu(count - own.shape[1] - window + 1)
        attended = reference_attention(own[None], keys[None, :, kept], values[None, :, kept], seen)
        parts.append(attended[0].transpose(0, 1))
    return torch.cat(parts)


def flash_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: TextLengths,
    window: int | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Do what `attend_text_by_text` does in one kernel (Dao, 2023, FlashAttention-2), in 16 bits on CUDA.

    torch's `varlen_attn` calls the same operator; that of torch 2.11 does not hand on how many keys there are.
    """
    left, right = (-1, -1) if window is None else (window - 1, 0)
    attended: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q,
        keys.transpose(0, 1),
        values.transpose(0, 1),
        lengths.first_queries,
        lengths.first_keys,
        lengths.most_queries,
        lengths.most_keys,
        0.0,
        # A single query sees all keys; said so, the kernel reads the keys of a group of heads once.
        lengths.most_queries > 1,
        False,
        scale=scale,
        window_size_left=left,
        window_size_right=right,
        seqused_k=lengths.num_keys,
    )[0]
    return attended
