"""Operators that torch_npu has fused; their names and parameters are those of its schemas.

They are called as `torch.ops.npu.*`, which exist once torch has loaded torch_npu. Nothing here has run on an NPU yet:
the tests check each call against torch_npu's schemas and run it with CPU kernels written from its documentation.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys, D head size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch

from ascendspeed_core.kernels.experts import RowOrder
from ascendspeed_core.kernels.mask_rule import MaskRule, attend_to_texts
from ascendspeed_core.kernels.reference import Mask

CAUSAL_MASK_SIZE = 2048
"""Side of the mask from which the kernel makes a causal one of any size (`sparse_mode` 2, 3 and 4)."""

LAST_QUERY_SEES_ALL = 3
"""`sparse_mode` of causal attention whose corner is that of the last query and the last key."""

BAND = 4
"""`sparse_mode` of a window: no key after the query, and no more than `pre_tokens` before it."""

MOST_TEXTS = 1024
"""Lengths that layout TND takes."""

SLOPES = 2
"""`pse_type` of ALiBi's slopes, fp32, [N]: what is added to scaled scores is `-slope * |key - query|`."""

SCALE_THEN_ADD = 0
"""`pse_type` of what is added to scores that are already scaled, as ALiBi is."""


ONE_RESULT, GROUPED_ROWS, ENDS_OF_GROUPS = 3, 0, 0
"""`split_item`, `group_type` and `group_list_type` of `npu_grouped_matmul`: rows of one tensor, cut at these ends."""

INT8_ROWS = 65_535
"""Most output rows that `npu_weight_quant_batchmatmul` takes at once; a head may have more."""


def npu_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """Causal attention by `npu_fusion_attention`, see `kernels.fused_attention.causal_attention`.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: which keys are seen, or what is added.
        scale: factor of the scores, by default 1 / sqrt(D).

    Returns:
        [B, N, S, D].
    """
    heads, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    attended: torch.Tensor
    if isinstance(mask, MaskRule):
        return _attend_by_rule(q, k, v, mask, scale)
    if mask is not None and mask.is_floating_point():
        added = mask if mask.dim() == 4 else mask.unsqueeze(0)
        unseen = added == -torch.inf
        attended = torch.ops.npu.npu_fusion_attention_v2(
            q,
            k,
            v,
            heads,
            "BNSD",
            pse=added.masked_fill(unseen, 0).to(q.dtype),
            # All heads see the same keys.
            atten_mask=unseen[:, :1],
            scale=scale,
            pse_type=SCALE_THEN_ADD,
        )[0]
    elif mask is not None:
        attended = torch.ops.npu.npu_fusion_attention(q, k, v, heads, "BNSD", atten_mask=~mask, scale=scale)[
            0
        ]
    elif q.shape[2] == 1:
        attended = torch.ops.npu.npu_fusion_attention(q, k, v, heads, "BNSD", scale=scale)[0]
    else:
        attended = torch.ops.npu.npu_fusion_attention(
            q, k, v, heads, "BNSD", atten_mask=_later(q), scale=scale, sparse_mode=LAST_QUERY_SEES_ALL
        )[0]
    return attended


def _attend_by_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: MaskRule, scale: float
) -> torch.Tensor:
    """Attend to whole rows: texts by their lengths (layout TND), windows as a band, ALiBi from its slopes."""
    batch, heads = q.shape[:2]
    ends = list(accumulate(length for row in rule.lengths for length in row))
    if len(ends) > MOST_TEXTS:
        return attend_to_texts(partial(npu_attention, scale=scale), q, k, v, rule)
    options: dict[str, Any] = {"atten_mask": _later(q), "scale": scale, "sparse_mode": LAST_QUERY_SEES_ALL}
    if rule.window is not None:
        options["sparse_mode"] = BAND
    if ends:
        # [B, N, S, D] -> [B S, N, D].
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        options |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
    layout = "TND" if ends else "BNSD"
    if rule.slopes is None:
        if rule.window is not None:
            options |= {"pre_tockens": rule.window - 1, "next_tockens": 0}
        attended: torch.Tensor = torch.ops.npu.npu_fusion_attention(q, k, v, heads, layout, **options)[0]
    else:
        if rule.window is not None:
            options |= {"pre_tokens": rule.window - 1, "next_tokens": 0}
        attended = torch.ops.npu.npu_fusion_attention_v2(
            q, k, v, heads, layout, pse=rule.slopes.float(), pse_type=SLOPES, **options
        )[0]
    return attended.unflatten(0, (batch, -1)).transpose(1, 2) if ends else attended


def _later(q: torch.Tensor) -> torch.Tensor:
    """Return the mask from which the kernel makes those of `sparse_mode` 3 and 4."""
    return torch.ones(CAUSAL_MASK_SIZE, CAUSAL_MASK_SIZE, dtype=torch.bool, device=q.device).triu(1)


def npu_softmax(scores: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """`npu_scaled_masked_softmax`, see `kernels.reference.scaled_masked_softmax`; the mask is bool."""
    weights: torch.Tensor = torch.ops.npu.npu_scaled_masked_softmax(scores, ~mask, scale, False)
    return weights


def npu_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`npu_rms_norm`, see `models.norm.rms_norm`."""
    normed: torch.Tensor = torch.ops.npu.npu_rms_norm(x, weight, epsilon)[0]
    return normed


def npu_rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`npu_rotary_mul`, see `models.position.rotate_both`."""
    return torch.ops.npu.npu_rotary_mul(q, cos, sin), torch.ops.npu.npu_rotary_mul(k, cos, sin)


def npu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`npu_swiglu`, see `models.mlp.silu_gated`; the kernel wants both in one tensor."""
    return npu_gated_joined(torch.cat([gate, up], dim=-1))


def npu_gated_joined(joined: torch.Tensor) -> torch.Tensor:
    """`npu_swiglu` of the two halves of the last dimension: [B, S, 2F] -> [B, S, F]."""
    gated: torch.Tensor = torch.ops.npu.npu_swiglu(joined, -1)
    return gated


def npu_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`npu_cross_entropy_loss`, see `models.lm_head.token_losses`."""
    losses: torch.Tensor = torch.ops.npu.npu_cross_entropy_loss(logits, targets, None, "none")[0]
    return losses


def npu_int8_linear(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`npu_weight_quant_batchmatmul`, see `kernels.reference.int8_linear`: [M, K] -> [M, N]."""
    parts = [
        torch.ops.npu.npu_weight_quant_batchmatmul(x, part.T, of_part)
        for part, of_part in zip(integers.split(INT8_ROWS), scale.split(INT8_ROWS), strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def npu_grouped_product(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]
) -> torch.Tensor:
    """`npu_grouped_matmul` of the rows of each expert, see `kernels.experts.grouped_product`; no expert is skipped."""
    product: torch.Tensor = _GroupedProduct.apply(rows, list(counts), *weights)
    return product


class _GroupedProduct(torch.autograd.Function):
    """The gradient of the rows is a grouped product too; those of the weights are one product for each expert."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: list[int], *weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, *weights)
        ctx.counts = counts
        return _grouped_matmul(rows, [weight.T for weight in weights], counts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        (gradient,) = gradients
        of_rows = _grouped_matmul(gradient, weights, ctx.counts) if ctx.needs_input_grad[0] else None
        parts = zip(gradient.split(ctx.counts), rows.split(ctx.counts), ctx.needs_input_grad[2:], strict=True)
        return of_rows, None, *(g.T @ part if wanted else None for g, part, wanted in parts)


def _grouped_matmul(
    rows: torch.Tensor, matrices: Sequence[torch.Tensor], counts: Sequence[int]
) -> torch.Tensor:
    """Multiply the rows of each group, [N, I], with its matrix, [I, O]."""
    ends = torch.tensor(counts, device=rows.device).cumsum(0)
    product: torch.Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [torch.stack(list(matrices))],
        group_list=ends,
        split_item=ONE_RESULT,
        group_type=GROUPED_ROWS,
        group_list_type=ENDS_OF_GROUPS,
    )[0]
    return product


def npu_permute_tokens(
    tokens: torch.Tensor, chosen: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, RowOrder]:
    """`npu_moe_init_routing`, see `kernels.experts.permute_tokens`.

    The operator numbers a token's copies by columns: copy k of token t is k T + t.
    """
    count, copies = chosen.shape
    numbers = torch.arange(count * copies, dtype=torch.int32, device=chosen.device).view(copies, count).T
    with torch.no_grad():
        rows, positions, _ = torch.ops.npu.npu_moe_init_routing(
            tokens.detach(), numbers.contiguous(), chosen.to(torch.int32), count
        )
    inverse = positions.long().view(copies, count).T.flatten()
    order = torch.empty_like(inverse)
    order[inverse] = torch.arange(inverse.numel(), device=inverse.device)
    found: torch.Tensor = _Permuted.apply(tokens, rows, inverse, copies)
    return found, RowOrder(order, inverse, chosen.flatten().bincount(minlength=num_experts))


def npu_unpermute_tokens(rows: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """`npu_moe_finalize_routing`, see `kernels.experts.unpermute_tokens`; weights are in the format of the rows."""
    found: torch.Tensor = _Unpermuted.apply(rows, weights, order.inverse)
    return found


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, rows: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


class _Unpermuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weights, inverse)
        by_columns = inverse.view(weights.shape).T.flatten().to(torch.int32)
        summed: torch.Tensor = torch.ops.npu.npu_moe_finalize_routing(
            rows, None, None, None, weights.to(rows.dtype), by_columns, None
        )
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, weights, inverse = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(1)
        of_rows = torch.empty_like(rows)
        of_rows[inverse] = (gradient * weights.unsqueeze(-1)).to(rows.dtype).flatten(0, 1)
        of_weights = (gradient * rows[inverse].unflatten(0, weights.shape)).sum(-1, dtype=weights.dtype)
        return of_rows, of_weights, None


class NpuAdamW(torch.optim.Optimizer):
    """AdamW by `npu_apply_adam_w`: one tensor at a time, weight and moments in place, no temporaries.

    The state is that of `torch.optim.AdamW`.

    Args:
        params: groups of fp32 tensors.
        lr: learning rate.
        betas: memory of the gradient and of its square.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        # The kernel takes the powers before this step, and multiplies them once more.
        done = int(state["step"])
        torch.ops.npu.npu_apply_adam_w.out(
            beta1**done,
            beta2**done,
            group["lr"],
            group["weight_decay"],
            beta1,
            beta2,
            group["eps"],
            weight.grad,
            None,
            False,
            False,
            var=weight,
            m=state["exp_avg"],
            v=state["exp_avg_sq"],
        )
        state["step"] += 1
