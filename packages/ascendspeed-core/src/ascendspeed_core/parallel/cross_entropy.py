"""Cross entropy over a vocabulary that is cut over ranks (Shoeybi et al., 2019, Megatron-LM, section 3).

Only three numbers per token cross ranks: the largest logit, the sum of exponentials, the target's logit.

Shapes: `...` batch and sequence, V vocabulary, V/tp this rank's part.
"""

from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.config.sharding import chunk_range
from ascendspeed_core.kernels import compiled
from ascendspeed_core.kernels.reference import LossFunction, token_losses
from ascendspeed_core.parallel.collectives import all_reduce_max, all_reduce_sum


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    whole: LossFunction = token_losses,
) -> torch.Tensor:
    """Return the loss of each token, in fp32 (float64 for float64 logits).

    Args:
        logits: this rank's part of the vocabulary, [..., V/tp].
        targets: ids in the whole vocabulary, [...].
        vocab_size: V.
        group: the ranks that share the vocabulary, or `None` when it is whole here.
        whole: what computes it when the vocabulary is whole.

    Returns:
        Negative log-likelihood of each target in nats, [...].
    """
    if group is None and whole is compiled.token_losses:
        return whole(logits.flatten(0, -2), targets.flatten()).view_as(targets)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if group is None:
        return whole(wide.flatten(0, -2), targets.flatten()).view_as(targets)
    loss: torch.Tensor = _VocabularyParallelCrossEntropy.apply(wide, targets, vocab_size, group)
    return loss


class _VocabularyParallelCrossEntropy(torch.autograd.Function):
    """`log(sum(exp(logits))) - logits[target]`; the gradient is `softmax(logits) - onehot(target)`."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        mine = chunk_range(vocab_size, dist.get_world_size(group), dist.get_rank(group))
        here = (targets >= mine.start) & (targets < mine.stop)
        local_targets = torch.where(here, targets - mine.start, 0).unsqueeze(-1)

        if logits.shape[-1]:
            largest = logits.amax(dim=-1)
        else:
            largest = torch.full(targets.shape, -torch.inf, dtype=logits.dtype, device=logits.device)
        all_reduce_max(largest, group)
        shifted = logits - largest.unsqueeze(-1)
        target_logit = torch.zeros_like(largest)
        if logits.shape[-1]:
            target_logit = torch.where(here, shifted.gather(-1, local_targets).squeeze(-1), 0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(dim=-1), target_logit])
        all_reduce_sum(sums, group)
        normaliser, target_logit = sums

        ctx.save_for_backward(exponentials.div_(normaliser.unsqueeze(-1)), here, local_targets)
        loss: torch.Tensor = normaliser.log() - target_logit
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        softmax, here, local_targets = ctx.saved_tensors
        gradient = softmax.clone()
        if gradient.shape[-1]:
            gradient.scatter_add_(-1, local_targets, -here.unsqueeze(-1).to(gradient.dtype))
        return gradient.mul_(gradients[0].unsqueeze(-1)), None, None, None
