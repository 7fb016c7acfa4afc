"""A model whose layers differ in all that layers may differ in: a user of the joints that no family needs yet.

Of four layers the first has a window and a GELU, the second keeps one latent of each token in place of key and value
and turns nothing, the third turns half of each head, and the last is a plain one. Attention of the second and MLPs of
the last two have losses of their own. Parameters have the names that they have elsewhere, so that every layout knows
how to cut them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import ClassVar
from unittest.mock import patch

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models import layer as layers
from ascendspeed_core.models.attention import Attention
from ascendspeed_core.models.auxiliary_losses import ModuleOutput
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.dropout import DropoutMasks
from ascendspeed_core.models.linear import apply_linear
from ascendspeed_core.models.mlp import GeluMLP, SwiGLU
from ascendspeed_core.models.position import AttentionInputs, AttentionKind, RotaryKind

WINDOW = 7


class LatentAttention(Attention):
    """Keeps the sum of key and value, all heads in one vector, and reads it as both; has a loss of its input."""

    auxiliary_losses: ClassVar[tuple[str, ...]] = ("router_z",)

    def cache_shapes(self, tp: int) -> tuple[tuple[int, ...], ...]:
        return ((max(self.num_key_value_heads // tp, 1) * self.head_dim,),)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, inputs: AttentionInputs, cache: CachedPass | None = None, cache_index: int = 0
    ) -> ModuleOutput:
        assert inputs.rotary is None
        q, k, v = self.projections(x, inputs.dropout_masks)
        assert self.q_norm is not None
        assert self.k_norm is not None
        q, latent = self.q_norm(q.view(*q.shape[:-1], -1, self.head_dim)), k + v
        if cache is not None:
            attended = cache.attend(cache_index, q, (latent,), self._attend_latent, inputs.chunk_masks)
        else:
            both = latent.view(*latent.shape[:-1], -1, self.head_dim).transpose(1, 2)
            attend = self.attend
            if self.attention_wrapper is not None:
                attend = partial(self.attention_wrapper, attend)
            attended = attend(q.transpose(1, 2), both, both, inputs.mask).transpose(1, 2)
        result = apply_linear(self.o_proj, attended.flatten(2), inputs.dropout_masks)
        # A weight that is whole on every rank, as a router's is.
        scores = x[..., : self.head_dim] * self.k_norm.weight
        return result, {"router_z": router_z(scores)}

    def _attend_latent(
        self, q: torch.Tensor, latent: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        both = latent.view(*latent.shape[:-1], -1, self.head_dim).transpose(1, 2)
        return self.attend(q, both, both, mask)


class BalancedMLP(SwiGLU):
    """A SwiGLU with two losses of its input, one of which the attention of another layer has too."""

    auxiliary_losses: ClassVar[tuple[str, ...]] = ("balance", "router_z")

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> ModuleOutput:  # type: ignore[override]
        return super().forward(x, dropout_masks), {"balance": balance(x), "router_z": router_z(x)}


def balance(x: torch.Tensor) -> torch.Tensor:
    """How unequal the parts of tokens are: [..., H] -> scalar."""
    return 0.1 * wide(x).softmax(-1).square().sum()


def router_z(x: torch.Tensor) -> torch.Tensor:
    """As the z-loss of a router, over tokens: [..., H] -> scalar."""
    return 0.05 * wide(x).logsumexp(-1).square().sum()


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_kind(config: ModelConfig, layer: int) -> AttentionKind:
    return (
        AttentionKind(WINDOW, RotaryKind(config.head_dim, 10000.0)),
        AttentionKind(),
        AttentionKind(None, RotaryKind(config.head_dim // 2, 500.0)),
        AttentionKind(None, RotaryKind(config.head_dim, 10000.0)),
    )[layer]


def attention_class(config: ModelConfig, layer: int) -> type[Attention]:
    return LatentAttention if layer == 1 else Attention


def mlp_class(config: ModelConfig, layer: int) -> type[SwiGLU | GeluMLP]:
    return (GeluMLP, SwiGLU, BalancedMLP, BalancedMLP)[layer]


@contextmanager
def made_up_layers() -> Iterator[None]:
    """Let models of four layers be made of these."""
    with patch.multiple(
        layers, attention_kind=attention_kind, attention_class=attention_class, mlp_class=mlp_class
    ):
        yield
