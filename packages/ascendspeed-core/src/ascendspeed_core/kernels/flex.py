"""Attention by torch's flex_attention, which makes one kernel of rules for scores and masks (Dong et al., 2024).

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ascendspeed_core.kernels.mask_rule import MaskRule
from ascendspeed_core.kernels.reference import Mask, reference_attention


def flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, see `kernels.reference.reference_attention`, of whole rows to themselves.

    Masks that are no rule, as in decoding, go to `reference_attention`.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        mask: rule of whole rows; `None` is causal.
        scale: factor of the scores, by default 1 / sqrt(D).
        softcap: see `reference_attention`.
        sinks: likewise, [N].

    Returns:
        [B, N, S, D].
    """
    if isinstance(mask, torch.Tensor) or q.shape[2] != k.shape[2]:
        return reference_attention(q, k, v, mask, scale=scale, softcap=softcap, sinks=sinks)
    rule = MaskRule(q.shape[2], q.device) if mask is None else mask
    from torch.nn.attention.flex_attention import AuxRequest

    attended, auxiliary = _kernel(q.is_cuda)(
        q, k, v, score_mod=score_rule(rule, softcap), block_mask=block_mask(rule), scale=scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:
        # The softmax with a sink is the one without, times the share that the sink leaves.
        left = torch.sigmoid(auxiliary.lse - sinks.to(auxiliary.lse.dtype)[:, None]).unsqueeze(-1)
        attended = (attended * left).to(attended.dtype)
    found: torch.Tensor = attended
    return found


@cache
def _kernel(is_compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    run: Callable[..., Any] = flex_attention
    return torch.compile(run) if is_compiled else run


def score_rule(rule: MaskRule, softcap: float | None) -> Callable[..., torch.Tensor] | None:
    """Return what changes a scaled score; `None` if nothing does."""
    slopes = rule.slopes
    if slopes is None and softcap is None:
        return None

    def changed(
        score: torch.Tensor, _: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes is None else score + slopes[head] * (key - query)

    return changed


def block_mask(rule: MaskRule) -> Any:
    """Return which keys are seen, with the blocks of which all or nothing is; kept with the rule for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    kept = vars(rule)
    if "block_mask" not in kept:
        window, segments = rule.window, rule.segments

        def seen(row: torch.Tensor, _: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            found = key <= query
            if window is not None:
                found &= key > query - window
            return found if segments is None else found & (segments[row, query] == segments[row, key])

        rows = None if segments is None else len(segments)
        # Compiled, it makes no mask of all scores on the way.
        kept["block_mask"] = create_block_mask(
            seen,
            rows,
            None,
            rule.length,
            rule.length,
            device=rule.device,
            _compile=rule.device.type == "cuda",
        )
    return kept["block_mask"]
