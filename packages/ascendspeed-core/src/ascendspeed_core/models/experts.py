"""An MLP of experts: each token goes through a few of many small MLPs, and through a shared one if there is any.

Experts are keyed by their number in the layer, so that a rank that has some of them only knows them by the same names:
`layers.3.mlp.experts.17.up_proj.weight`.

Shapes: B batch, S sequence, H hidden size, T = B S tokens, K experts of each, N = T K rows, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.experts import (
    GroupedProduct,
    PermuteFunction,
    UnpermuteFunction,
    pad_groups,
    permute_tokens,
    unpermute_tokens,
)
from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses, ModuleOutput
from ascendspeed_core.models.dropout import DropoutMasks
from ascendspeed_core.models.mlp import ClampedSwiGLU, SwiGLU
from ascendspeed_core.models.router import Router, TokenRows, in_tiles

ApplyExperts = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Applies the experts of this rank to rows, [N, H] -> [N, H], given how many rows each has, in order of the experts."""

ExchangeRows = Callable[[torch.Tensor, torch.Tensor, ApplyExperts], torch.Tensor]
"""Has rows, sorted by their experts, computed where these are: rows, [N, H], rows of each expert, [E] -> [N, H]."""


@contextmanager
def tiled_experts(model: nn.Module, tile_rows: int) -> Iterator[None]:
    """Let routers and experts multiply `tile_rows` rows at once for a while, see `models.router.in_tiles`."""
    routers = [module.router for module in model.modules() if isinstance(module, ExpertsMLP)]
    try:
        for router in routers:
            router.tile_rows = tile_rows
        yield
    finally:
        for router in routers:
            router.tile_rows = None


class TokenShare(Protocol):
    """Which tokens a rank sends to experts, when others have the same."""

    def enter(self, x: torch.Tensor) -> TokenRows:
        """Return this rank's tokens of all, [B, S, H]."""
        ...

    def leave(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return what all ranks have for tokens, in the shape of `x`: [B, S, H]."""
        ...


def rows_of_sequences(x: torch.Tensor) -> TokenRows:
    """Return the tokens of hidden states, [B, S, H]."""
    index = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    return TokenRows(x.flatten(0, 1), index // x.shape[1], index % x.shape[1], x.shape[0])


class WholeTokens:
    """All tokens of this rank are its own."""

    def enter(self, x: torch.Tensor) -> TokenRows:
        """[B, S, H] -> [T, H]."""
        return rows_of_sequences(x)

    def leave(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [B, S, H]."""
        return tokens.view(x.shape)


def _make_expert(config: ModelConfig) -> SwiGLU | ClampedSwiGLU:
    experts = config.experts
    assert experts is not None
    if experts.clamp is None:
        return SwiGLU(config, experts.ffn_hidden_size, experts.biases)
    return ClampedSwiGLU(config, experts.ffn_hidden_size, experts.clamp, experts.biases)


class ExpertsMLP(nn.Module):
    """Router, experts, and what all tokens use besides.

    Args:
        config: the model.

    Attributes:
        share: which tokens are this rank's.
        exchange: has rows computed on the ranks of their experts; `None` where all experts are here.
        permute: sorts tokens by experts.
        unpermute: the way back.
        product: with the weights of all experts at once; `None` takes one expert after the other.
    """

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.experts
        assert experts is not None
        hidden = config.hidden_size
        self.router = Router(experts, hidden)
        self.experts = nn.ModuleDict({str(number): _make_expert(config) for number in range(experts.count)})
        self.shared_expert: SwiGLU | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if experts.shared_ffn_hidden_size is not None:
            self.shared_expert = SwiGLU(config, experts.shared_ffn_hidden_size)
        if experts.shared_gate:
            self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)
        self.share: TokenShare = WholeTokens()
        self.exchange: ExchangeRows | None = None
        self.permute: PermuteFunction = permute_tokens
        self.unpermute: UnpermuteFunction = unpermute_tokens
        self.product: GroupedProduct | None = None

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> ModuleOutput:
        """[B, S, H] -> [B, S, H], with the router's losses in training; `dropout_masks` reach the shared expert."""
        routed, losses = self._routed(x)
        if self.shared_expert is not None:
            shared = self.shared_expert(x, dropout_masks)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(x).sigmoid() * shared
            routed = routed + shared
        return (routed, losses) if losses else routed

    def _routed(self, x: torch.Tensor) -> tuple[torch.Tensor, AuxiliaryLosses]:
        given = self.share.enter(x)
        routing = self.router(given)
        # What no expert takes comes last, as if there were one expert more.
        count = self.router.experts.count
        permute, unpermute = self.permute, self.unpermute
        if routing.may_refuse:
            permute, unpermute = permute_tokens, unpermute_tokens
        rows, order = permute(given.tokens, routing.chosen, count + routing.may_refuse)
        taken, refused = order.counts[:count], rows[:0]
        if routing.may_refuse:
            rows, refused = rows.split([int(taken.sum()), int(order.counts[count])])
        positions = None
        if routing.padded_rows is not None:
            rows, positions = pad_groups(rows, taken, routing.padded_rows)
            taken = torch.full_like(taken, routing.padded_rows)
        if self.exchange is not None:
            rows = self.exchange(rows, taken, self.apply_experts)
        else:
            rows = self.apply_experts(rows, taken.tolist())
        if positions is not None:
            rows = rows[positions]
        if routing.may_refuse:
            rows = torch.cat([rows, torch.zeros_like(refused)])
        return self.share.leave(unpermute(rows, routing.weights, order), x), routing.losses

    def apply_experts(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Apply the experts of this rank to their rows: [N, H] -> [N, H]."""
        experts: list[SwiGLU | ClampedSwiGLU] = list(self.experts.values())  # type: ignore[arg-type]
        if self.product is None or self.router.tile_rows is not None:
            # Where gradients are wanted, experts without rows have some too: zeros.
            parts = [
                in_tiles(part, self.router.tile_rows, expert)
                for expert, part in zip(experts, rows.split(list(counts)), strict=True)
                if len(part) or torch.is_grad_enabled()
            ]
            return torch.cat(parts) if parts else rows
        gate, up, down = (
            [getattr(expert, name).weight for expert in experts]
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        inner = experts[0].gated(self.product(rows, gate, counts), self.product(rows, up, counts))
        return self.product(inner, down, counts)
