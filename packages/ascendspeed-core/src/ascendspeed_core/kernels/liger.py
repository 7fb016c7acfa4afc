"""Triton kernels of Liger-Kernel (Hsu et al., 2024), where the package is installed.

No test runs these calls, which need a GPU; `benchmarks/device.py` compares them with the reference there.

Shapes: B batch, S sequence, N query heads, K key-value heads, D head size, V vocabulary, T tokens.
"""

import torch


def liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See `models.norm.rms_norm`."""
    from liger_kernel.ops import LigerRMSNormFunction

    # No offset of the weight, casts as in Hugging Face's LLaMA, the gradient not written over the one that came.
    normed: torch.Tensor = LigerRMSNormFunction.apply(x, weight, epsilon, 0.0, "llama", False)
    return normed


def liger_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """See `models.norm.layer_norm`."""
    from liger_kernel.ops import LigerLayerNormFunction

    # The kernel has no layer norm without a bias.
    bias = torch.zeros_like(weight) if bias is None else bias
    normed: torch.Tensor = LigerLayerNormFunction.apply(x, weight, bias, epsilon)
    return normed


def liger_rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `models.position.rotate_both`: [B, S, N, D] and [B, S, K, D]."""
    from liger_kernel.ops import LigerRopeFunction

    # The kernel wants heads before places, and writes over what it is given if that is in one piece.
    q, k = (x.clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in (q, k))
    q, k = LigerRopeFunction.apply(q, k, cos.squeeze(2), sin.squeeze(2))
    return q.transpose(1, 2), k.transpose(1, 2)


def liger_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `models.mlp.silu_gated`."""
    from liger_kernel.ops import LigerSiLUMulFunction

    gated: torch.Tensor = LigerSiLUMulFunction.apply(gate, up)
    return gated


def liger_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """See `models.lm_head.token_losses`: [T, V] -> [T]."""
    from liger_kernel.ops import LigerCrossEntropyFunction

    # The kernel writes the gradient over the logits.
    losses: torch.Tensor = LigerCrossEntropyFunction.apply(
        logits.clone(), targets, None, -100, 0.0, 0.0, "none"
    )[0]
    return losses
