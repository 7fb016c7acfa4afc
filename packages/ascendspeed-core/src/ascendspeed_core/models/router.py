"""The router of a layer with experts: which experts each token uses, with which weights, and its losses.

All of it is computed in fp32, in float64 for a model in that. The losses are sums over tokens, see
`models.auxiliary_losses`: of a load that is a constant, the balancing loss is linear in each token's scores. So it is
exact under every layout, if only the load is that of all tokens that it speaks of.

Shapes: T tokens of this rank, R sequences that they belong to, E experts, K experts of each token, G groups of experts,
H hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.experts import Experts, ExpertsConfig
from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses

BALANCE, ROUTER_Z = "balance", "router_z"
"""Names of the losses."""


@dataclass(frozen=True)
class TokenRows:
    """Tokens that a router reads.

    Attributes:
        tokens: [T, H].
        sequences: number of the sequence of each, [T].
        positions: of each in its sequence, as far as this rank's part of it goes, [T].
        num_sequences: R.
    """

    tokens: torch.Tensor
    sequences: torch.Tensor
    positions: torch.Tensor
    num_sequences: int


@dataclass(frozen=True)
class Routing:
    """What a router decides.

    Attributes:
        chosen: experts of each token, best first, [T, K]; E where none takes it, see `moe_expert_capacity_factor`.
        weights: of each, fp32 or float64, [T, K].
        losses: by name; empty outside of training.
        may_refuse: experts have a capacity.
        padded_rows: rows to which those of each expert are filled up; `None` leaves them as they are.
    """

    chosen: torch.Tensor
    weights: torch.Tensor
    losses: AuxiliaryLosses
    may_refuse: bool = False
    padded_rows: int | None = None


@dataclass
class RouterStep:
    """What a router knows of the training step that it is in; whoever runs the step sets it.

    Attributes:
        token_weight: factor of a token's losses, so that divided by what the main loss is divided by they give a mean
            over the tokens of the global batch.
        batch_load: tokens that chose each expert in the global batch, [E]; `None` while they are being counted.
        sums_batch: the micro-batches that run at the same time on all ranks are the global batch.
        load: tokens that chose each expert so far, on this rank, [E].
        dropped: choices that a capacity refused so far, on this rank.
    """

    token_weight: float = 1.0
    batch_load: torch.Tensor | None = None
    sums_batch: bool = False
    load: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


class Router(nn.Module):
    """Scores experts and chooses some for each token.

    Args:
        experts: of the model.
        hidden_size: H.

    Attributes:
        bias: takes part in the choice only; always in fp32, no gradient; see `ExpertsConfig`.
        logits_bias: added to the logits, a weight like others.
        training_config: losses and capacity, which are of training steps only.
        step: of the training step; `None` outside of one.
        in_turn: tokens are given to experts in turn, whatever their scores say: a balanced load, to measure with.
        tile_rows: rows that are multiplied at once, here and by the experts; `None` for all.
        sum_load: adds up a count over the ranks that have other tokens of the same sequences.
        sum_batch: adds up a count over the ranks that have other sequences.
        sum_loss: makes of this rank's share of a loss what it reports.
        gather: puts together the rows that these ranks have, and says which are this rank's.
    """

    def __init__(self, experts: Experts, hidden_size: int) -> None:
        super().__init__()
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts.count, hidden_size))
        self.bias: nn.Parameter | None = None
        if experts.score_bias:
            self.bias = nn.Parameter(torch.zeros(experts.count), requires_grad=False)
        self.logits_bias = nn.Parameter(torch.zeros(experts.count)) if experts.biases else None
        self.training_config: ExpertsConfig | None = None
        self.step: RouterStep | None = None
        self.in_turn = False
        self.tile_rows: int | None = None
        self.sum_load: Callable[[torch.Tensor], torch.Tensor] = _alone
        self.sum_batch: Callable[[torch.Tensor], torch.Tensor] = _alone
        self.sum_loss: Callable[[torch.Tensor], torch.Tensor] = _alone
        self.gather: Callable[[torch.Tensor], tuple[torch.Tensor, slice]] = _all_mine

    def forward(self, given: TokenRows) -> Routing:
        """Choose experts for tokens."""
        tokens = given.tokens
        wide = torch.promote_types(tokens.dtype, torch.float32)
        weight = self.weight.to(wide)
        bias = None if self.logits_bias is None else self.logits_bias.to(wide)
        logits = in_tiles(tokens.to(wide), self.tile_rows, lambda rows: F.linear(rows, weight, bias))
        scores = logits.sigmoid() if self.experts.score == "sigmoid" else logits.softmax(-1)
        ranked = logits if self.experts.score_after_choice else scores
        chosen = self._within_groups(ranked.detach()).topk(self.experts.per_token, dim=-1).indices
        if self.in_turn:
            chosen = torch.arange(chosen.numel(), device=chosen.device).view_as(chosen) % self.experts.count
        weights = self._weights(ranked.gather(1, chosen))
        config, step = self.training_config, self.step
        if config is None or step is None:
            return Routing(chosen, weights, {})
        marks = torch.zeros_like(logits).scatter_(1, chosen, 1.0)
        _count(marks, step)
        # The pass that counts the load of the batch needs no losses.
        losses = self._losses(logits, scores, marks, given, config, step) if torch.is_grad_enabled() else {}
        if config.moe_expert_capacity_factor is None:
            return Routing(chosen, weights, losses)
        chosen, capacity = self._within_capacity(chosen, weights, given, config, step)
        # An expert has no more of this rank's rows than its capacity of all sequences, nor than there are tokens.
        padded = min(given.num_sequences * capacity, len(tokens))
        return Routing(
            chosen, weights, losses, True, padded if config.moe_pad_expert_input_to_capacity else None
        )

    def _within_groups(self, ranked: torch.Tensor) -> torch.Tensor:
        """Return by what experts are chosen: with their biases, and of the best groups only; [T, E] -> [T, E]."""
        experts = self.experts
        if self.bias is not None:
            ranked = ranked + self.bias
        if experts.groups == 1:
            return ranked
        by_group = ranked.unflatten(1, (experts.groups, -1))
        best: torch.Tensor = by_group.topk(2 if experts.group_score == "top2" else 1, dim=-1).values.sum(-1)
        groups = best.topk(experts.groups_per_token, dim=-1).indices
        is_open = torch.zeros_like(best, dtype=torch.bool).scatter_(1, groups, True)
        allowed: torch.Tensor = by_group.masked_fill(~is_open.unsqueeze(-1), -torch.inf)
        return allowed.flatten(1)

    def _weights(self, ranked: torch.Tensor) -> torch.Tensor:
        """Return the weights of what was chosen: [T, K] -> [T, K]."""
        if self.experts.score_after_choice:
            weights = ranked.softmax(-1)
        else:
            weights = ranked / ranked.sum(-1, keepdim=True) if self.experts.normalised else ranked
        return weights * self.experts.scaling

    def _losses(
        self,
        logits: torch.Tensor,
        scores: torch.Tensor,
        marks: torch.Tensor,
        given: TokenRows,
        config: ExpertsConfig,
        step: RouterStep,
    ) -> AuxiliaryLosses:
        losses = {}
        if config.moe_aux_loss_coeff:
            share = self._load_shares(marks, given, config, step)
            likely = scores if self.experts.score == "softmax" else scores / scores.sum(-1, keepdim=True)
            balance = (likely * share).sum() * (self.experts.count * config.moe_aux_loss_coeff)
            losses[BALANCE] = balance
        if config.moe_z_loss_coeff:
            losses[ROUTER_Z] = logits.logsumexp(-1).square().sum() * config.moe_z_loss_coeff
        return {name: self.sum_loss(loss * step.token_weight) for name, loss in losses.items()}

    @torch.no_grad()
    def _load_shares(
        self, marks: torch.Tensor, given: TokenRows, config: ExpertsConfig, step: RouterStep
    ) -> torch.Tensor:
        """Return which share of all choices fell on each expert, [E]; for each token's sequence, [T, E]."""
        kind = config.moe_router_load_balancing_type
        if kind == "seq_aux_loss":
            load = marks.new_zeros(given.num_sequences, marks.shape[1]).index_add_(0, given.sequences, marks)
            load = self.sum_load(load)
            return (load / load.sum(-1, keepdim=True))[given.sequences]
        if step.batch_load is not None:
            load = step.batch_load
        else:
            load = self.sum_load(marks.sum(0))
            load = self.sum_batch(load) if step.sums_batch else load
        return (load / load.sum()).to(marks.dtype)

    @torch.no_grad()
    def _within_capacity(
        self,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        given: TokenRows,
        config: ExpertsConfig,
        step: RouterStep,
    ) -> tuple[torch.Tensor, int]:
        """Return the choices, those that experts beyond their capacity refuse replaced by E, and the capacity.

        [T, K] -> [T, K]; tokens that an expert takes of one sequence.
        """
        factor, experts = config.moe_expert_capacity_factor, self.experts.count
        assert factor is not None
        queue = (given.sequences.unsqueeze(1) * experts + chosen).flatten()
        position = given.positions.repeat_interleave(chosen.shape[1])
        refused_last = weights.flatten() if config.moe_token_drop_policy == "probs" else -position
        ranked, mine = self.gather(torch.stack([queue, -refused_last, position], 1).double())
        # Sorted by the last key first: stable sorts keep the order of the others.
        order = torch.arange(len(ranked), device=ranked.device)
        for key in (2, 1, 0):
            order = order[ranked[order, key].argsort(stable=True)]
        queues = ranked[order, 0].long()
        starts = torch.searchsorted(queues, queues)
        rank_in_queue = torch.empty_like(order)
        rank_in_queue[order] = torch.arange(len(order), device=order.device) - starts
        tokens = len(ranked) / (given.num_sequences * chosen.shape[1])
        capacity = math.ceil(factor * tokens * chosen.shape[1] / experts)
        is_refused = (rank_in_queue[mine] >= capacity).view(chosen.shape)
        if not _is_recomputing():
            dropped = is_refused.sum(dtype=torch.float64)
            step.dropped = dropped if step.dropped is None else step.dropped + dropped
        return chosen.masked_fill(is_refused, experts), capacity


def in_tiles(
    rows: torch.Tensor, tile_rows: int | None, apply: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Apply a function to rows, [N, I] -> [N, O], in tiles of which the last is filled up with zeros.

    How a matrix product rounds may depend on its number of rows. How many tokens an expert has depends on what else is
    computed, so results that must not depend on that are computed in products of one shape.

    Args:
        rows: [N, I].
        tile_rows: rows of a tile; `None` for all at once.
        apply: works on each row alone.
    """
    if tile_rows is None:
        return apply(rows)
    padded = F.pad(rows, (0, 0, 0, -len(rows) % tile_rows or (0 if len(rows) else tile_rows)))
    return torch.cat([apply(tile) for tile in padded.split(tile_rows)])[: len(rows)]


@torch.no_grad()
def _count(marks: torch.Tensor, step: RouterStep) -> None:
    """Note which experts were chosen; a layer that is recomputed in a backward counts no token again."""
    if not _is_recomputing():
        load = marks.sum(0, dtype=torch.float64)
        step.load = load if step.load is None else step.load + load


def _is_recomputing() -> bool:
    """Whether a backward runs: a forward inside it computes again what an earlier one computed."""
    return torch._C._current_graph_task_id() != -1


def _alone(x: torch.Tensor) -> torch.Tensor:
    return x


def _all_mine(rows: torch.Tensor) -> tuple[torch.Tensor, slice]:
    return rows, slice(None)
