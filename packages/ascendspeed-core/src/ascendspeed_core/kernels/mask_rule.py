"""Which keys a query sees and what is added to its scores, as a rule: nothing whose size is that of all scores.

Implementations of attention make of it what they need: lengths of texts, blocks, or the whole mask where it is small.

Shapes: B batch, S tokens of a row, N query heads of this rank, T keys.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

DENSE_BYTES = 1 << 25
"""Largest mask that is made whole for a fused kernel; attention to longer rows is computed by blocks."""


@dataclass(frozen=True, eq=False)
class MaskRule:
    """Causal attention of whole rows to themselves: within a window, inside texts, with ALiBi.

    Attributes:
        length: S, of queries and keys.
        device: of both.
        window: keys that a query sees, its own included; `None` for all.
        slopes: of ALiBi, which adds `slope * (key - query)`, [N]; `None` without.
        dtype: of ALiBi's mask where it is made whole.
        segments: number of the text of each token, [B, S], if rows hold several; a text's tokens stand together.
    """

    length: int
    device: torch.device
    window: int | None = None
    slopes: torch.Tensor | None = None
    dtype: torch.dtype = torch.float32
    segments: torch.Tensor | None = None

    @cached_property
    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each text of each row; nothing where every row is one text. It waits for the device, once."""
        if self.segments is None:
            return ()
        begins = torch.nn.functional.pad(self.segments[:, 1:] != self.segments[:, :-1], (1, 0), value=True)
        starts: list[list[int]] = [[] for _ in range(len(begins))]
        for row, start in begins.nonzero().tolist():
            starts[row].append(start)
        return tuple(
            tuple(end - start for start, end in zip(own, [*own[1:], self.length], strict=True))
            for own in starts
        )

    @property
    def dense_bytes(self) -> int:
        """Bytes of the whole mask."""
        rows = 1 if self.segments is None else len(self.segments)
        each = 1 if self.slopes is None else len(self.slopes) * self.dtype.itemsize
        return rows * each * self.length**2

    @cached_property
    def dense(self) -> torch.Tensor:
        """The whole mask, see `attention_mask`; made once for all layers."""
        mask = attention_mask(
            self.length, self.length, self.window, self.slopes, self.dtype, self.device, self.segments
        )
        if mask is None:
            mask = torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril_()
        return mask

    def within(self, window: int | None) -> "MaskRule | None":
        """Return the rule with a window; `None` where it is causal and no more."""
        if window is not None and window >= self.length:
            window = None
        if window is None and self.slopes is None and self.segments is None:
            return None
        found = replace(self, window=window)
        if self.segments is not None:
            vars(found)["lengths"] = self.lengths
        return found

    def of_text(self, length: int) -> "MaskRule | None":
        """Return the rule of one text of a row; `None` where it is causal and no more."""
        if length not in self._of_texts:
            self._of_texts[length] = replace(self, length=length, segments=None).within(self.window)
        return self._of_texts[length]

    @cached_property
    def _of_texts(self) -> "dict[int, MaskRule | None]":
        return {}


def attend_to_texts(
    attend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rule: MaskRule,
) -> torch.Tensor:
    """Attend to each text of each row on its own: no score of two texts is ever computed.

    Args:
        attend: attention of one row that is one text, called with its queries, keys, values and rule.
        q: [B, N, S, D].
        k: [B, K, S, D].
        v: [B, K, S, D].
        rule: with segments.

    Returns:
        [B, N, S, D].
    """
    rows = []
    for *row, lengths in zip(q.split(1), k.split(1), v.split(1), rule.lengths, strict=True):
        texts = zip(*(part.split(lengths, dim=2) for part in row), strict=True)
        parts = [attend(*text, rule.of_text(text[0].shape[2])) for text in texts]
        rows.append(torch.cat(parts, dim=2) if len(parts) > 1 else parts[0])
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def attention_mask(
    queries: int,
    keys: int,
    window: int | None,
    slopes: torch.Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    segments: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return the whole mask: causal, within a window, with ALiBi's `slope * (key - query)`.

    Args:
        queries: S.
        keys: T; the last S of them belong to the queries.
        window: keys that a query sees, its own included.
        slopes: of ALiBi, one for each head, [N].
        dtype: of ALiBi's mask; distances to near keys, which weigh most, lose least when it is narrow.
        device: where.
        segments: see `MaskRule`; as many queries as keys.

    Returns:
        Which keys are seen (bool), [S, T], or what is added, [N, S, T]; with segments [B, 1, S, S] or [B, N, S, S].
        `None` when a query sees all keys up to its own, and there are as many queries as keys or a single last one.
    """
    is_windowed = window is not None and keys > window
    if slopes is None and segments is None and not is_windowed and queries in (1, keys):
        return None
    own = torch.arange(keys - queries, keys, device=device)
    distance = torch.arange(keys, device=device) - own.unsqueeze(-1)
    seen = distance <= 0
    if window is not None and is_windowed:
        seen &= distance > -window
    if segments is not None:
        seen = (seen & (segments.unsqueeze(2) == segments.unsqueeze(1))).unsqueeze(1)
    if slopes is None:
        return seen
    if segments is not None:
        added = (slopes[:, None, None] * distance).to(dtype).expand(seen.shape[0], -1, -1, -1)
        return added.masked_fill(~seen, -torch.inf)
    return (slopes[:, None, None] * distance).to(dtype).masked_fill_(~seen, -torch.inf)
