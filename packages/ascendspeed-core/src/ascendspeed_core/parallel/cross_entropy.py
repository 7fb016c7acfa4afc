"""Cross entropy, over a vocabulary that may be cut over ranks (Shoeybi et al., 2019, Megatron-LM, section 3).

Only three numbers per token cross ranks: the largest logit, the sum of exponentials, the target's logit.

Logits of all tokens and the whole vocabulary are the largest tensor of a step, several times over. Made of hidden
states (`hidden_cross_entropy`), the loss needs those of a part of the vocabulary at a time: the forward keeps the
logarithm of each token's sum of exponentials, and the backward makes the logits again, without a message (Wijmans et
al., 2025, Cut Your Losses). Parts of the vocabulary, not of the sequence: so each row of the head's gradient is one
product over all tokens, rounded once.

Shapes: `...` batch and sequence, T tokens, H hidden size, V vocabulary, V/tp this rank's part.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ascendspeed_core.config.sharding import chunk_range
from ascendspeed_core.kernels import compiled
from ascendspeed_core.kernels.reference import LossFunction, token_losses
from ascendspeed_core.models.lm_head import head_matrix
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.collectives import all_reduce_max, all_reduce_sum

PART_ELEMENTS = 1 << 24
"""Logits that exist at a time."""

LEAST_WIDTH = 512
"""Ids of the vocabulary whose logits are made at a time, at least: products of fewer are slow."""


def losses_of(
    model: Transformer, output: torch.Tensor, targets: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Return the loss of each token of what a model gives for it, see `ModelInput.for_loss`.

    Args:
        model: that gave it.
        output: hidden states, or logits of this rank's part of the vocabulary.
        targets: ids in the whole vocabulary, [...].
        group: the ranks that share the vocabulary, or `None` when it is whole here.

    Returns:
        Negative log-likelihood of each target in nats, [...].
    """
    config = model.config
    if not model.loss_from_hidden:
        return cross_entropy(output, targets, config.vocab_size, group, model.token_losses)
    assert model.output_head is not None
    hidden = model.enter_head(output)
    weight, divisor = head_matrix(model.output_head)
    rule = LogitsRule(config.logits_multiplier, config.logits_softcap)
    return hidden_cross_entropy(hidden, weight, divisor, targets, config.vocab_size, group, rule)


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


class LogitsRule(NamedTuple):
    """What makes logits of products.

    Attributes:
        multiplier: of the products.
        softcap: c of c tanh(x / c), which they become then; `None` without.
    """

    multiplier: float = 1.0
    softcap: float | None = None


def hidden_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    divisor: torch.Tensor | None,
    targets: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    rule: LogitsRule,
    part_elements: int = PART_ELEMENTS,
) -> torch.Tensor:
    """Return the loss of each token, in fp32 (float64 for float64), without all logits at a time.

    Args:
        hidden: what the head reads, [..., H].
        weight: this rank's rows of the head's, [V/tp, H].
        divisor: of the products, [V/tp], or nothing.
        targets: ids in the whole vocabulary, [...].
        vocab_size: V.
        group: the ranks that share the vocabulary, or `None` when it is whole here.
        rule: what else is done to logits.
        part_elements: logits that exist at a time.

    Returns:
        Negative log-likelihood of each target in nats, [...].
    """
    losses: torch.Tensor = _HiddenCrossEntropy.apply(
        hidden.flatten(0, -2), weight, divisor, targets.flatten(), vocab_size, group, rule, part_elements
    )
    return losses.view_as(targets)


class _HiddenCrossEntropy(torch.autograd.Function):
    """`log(sum(exp(logits))) - logits[target]`; the gradient is `softmax(logits) - onehot(target)`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        divisor: torch.Tensor | None,
        targets: torch.Tensor,
        vocab_size: int,
        group: dist.ProcessGroup | None,
        rule: LogitsRule,
        part_elements: int,
    ) -> torch.Tensor:
        if group is not None:
            mine = chunk_range(vocab_size, dist.get_world_size(group), dist.get_rank(group))
            targets = targets - mine.start
        ctx.rule, ctx.width = rule, max(part_elements // max(len(targets), 1), LEAST_WIDTH)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_sum = torch.full(targets.shape, -torch.inf, dtype=wide, device=hidden.device)
        of_target = torch.zeros_like(log_sum)
        for rows in _parts(len(weight), ctx.width):
            _, logits = _logits(hidden, weight[rows], None if divisor is None else divisor[rows], rule)
            inside, index = _targets_inside(targets, rows)
            of_target += logits.gather(1, index).squeeze(1) * inside
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(1))
        if group is not None:
            largest = log_sum.clone()
            all_reduce_max(largest, group)
            sums = torch.stack([(log_sum - largest).exp_(), of_target])
            all_reduce_sum(sums, group)
            log_sum, of_target = sums[0].log_() + largest, sums[1]
        ctx.save_for_backward(hidden, weight, divisor, targets, log_sum)
        return log_sum - of_target

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, divisor, targets, log_sum = ctx.saved_tensors
        needs_hidden, needs_weight, needs_divisor = ctx.needs_input_grad[:3]
        factor = gradients[0].unsqueeze(1)
        of_hidden = torch.zeros_like(hidden, dtype=log_sum.dtype) if needs_hidden else None
        of_weight = torch.empty_like(weight) if needs_weight else None
        of_divisor = torch.empty_like(divisor) if needs_divisor else None
        for rows in _parts(len(weight), ctx.width):
            by = None if divisor is None else divisor[rows]
            products, logits = _logits(hidden, weight[rows], by, ctx.rule)
            slope = None
            if ctx.rule.softcap is not None:
                slope = 1 - (logits / ctx.rule.softcap).square_()
            inside, index = _targets_inside(targets, rows)
            of_logits = logits.sub_(log_sum.unsqueeze(1)).exp_()
            of_logits.scatter_add_(1, index, -inside.unsqueeze(1).to(of_logits.dtype))
            of_logits.mul_(factor * ctx.rule.multiplier)
            if slope is not None:
                of_logits.mul_(slope)
            if by is not None:
                of_logits.div_(by)
                if of_divisor is not None:
                    of_divisor[rows] = -(of_logits * products).sum(0)
            narrow = of_logits.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden += narrow @ weight[rows]
            if of_weight is not None:
                torch.mm(narrow.T, hidden, out=of_weight[rows])
        of_hidden = None if of_hidden is None else of_hidden.to(hidden.dtype)
        return of_hidden, of_weight, of_divisor, None, None, None, None, None


def _parts(count: int, width: int) -> Iterator[slice]:
    return (slice(start, min(start + width, count)) for start in range(0, count, width))


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, divisor: torch.Tensor | None, rule: LogitsRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return products, by the divisor, and the logits that they become, [T, rows], in fp32 or float64."""
    products = hidden @ weight.T
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    if divisor is not None:
        products = products / divisor
    # The divisor's gradient needs both, and logits are computed in.
    logits = products if rule.multiplier == 1 and divisor is None else products * rule.multiplier
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    return products, logits


def _targets_inside(targets: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which targets are among some rows, [T], and their number there, [T, 1]."""
    inside = (targets >= rows.start) & (targets < rows.stop)
    return inside, torch.where(inside, targets - rows.start, 0).unsqueeze(1)
