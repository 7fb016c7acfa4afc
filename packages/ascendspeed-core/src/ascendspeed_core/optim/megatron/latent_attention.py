"""Multi-head latent attention in megatron-core's layers: its products and heads, with this project's positions.

megatron-core makes the rotary embedding inside the layer, of positions from 0 on, and its own down-projections are cut
over tensor-parallel ranks, so that the gradient of the numbers that all keys share is each rank's own only. Here
positions come with the mask, because a layer that is recomputed gets nothing but tensors, and the down-projections are
whole on every rank, as those of Transformer Engine are. The norms of latents are put in here too: from 0.19 on
megatron-core takes none from a spec beside queries without a latent.

Shapes: S sequence, B batch, R the turned end of a head.
"""

from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.latent_attention import LATENT_EPSILON, score_scale
from ascendspeed_core.models.position import RotaryKind, magnitude_of
from ascendspeed_core.optim.megatron.core import latent_attention
from ascendspeed_core.optim.megatron.layers import Rotary, mark_partial, norm_class, rotary_angles


def with_positions(positions: torch.Tensor, segments: torch.Tensor | None, parts: int) -> torch.Tensor:
    """Return what the layers get as their mask: positions, and segments where there are any.

    Args:
        positions: of this rank's tokens, [B or 1, S/cp].
        segments: of whole rows, [B, S].
        parts: cp.

    Returns:
        [1, B or 1, S/cp] without segments; else [2, B, S], positions over and over.
    """
    if segments is None:
        return positions.unsqueeze(0)
    return torch.stack([positions.repeat(1, parts).expand_as(segments), segments])


def latent_attention_class(model: ModelConfig, kind: RotaryKind) -> type:
    """Return what makes the attention of a layer, called as `MLASelfAttention` is.

    Args:
        model: the architecture.
        kind: its rotary embedding.
    """
    base: Any = latent_attention()
    norm: Any = norm_class(model, True, LATENT_EPSILON)
    has_bias, magnitude = model.qkv_bias, magnitude_of(kind.scaling)

    class LatentAttention(base):
        """megatron-core's, with whole down-projections, this project's norms and the positions of the tokens."""

        def __init__(self, config: Any, *args: Any, **options: Any) -> None:
            super().__init__(config, *args, **options)
            self.rotary_pos_emb = Rotary(None if magnitude == 1 else magnitude)
            if magnitude != 1:
                # Made as plain, whose embedding is taken out again; computed with a magnitude.
                self.config = copy(config)
                self.config.rope_type = "yarn"
            self.core_attention.options = {"scale": score_scale(model)}
            latents = {
                "q": (config.q_lora_rank, config.q_lora_rank),
                "kv": (config.kv_lora_rank, config.kv_lora_rank + config.qk_pos_emb_head_dim),
            }
            for name, (latent, width) in latents.items():
                if latent is not None:
                    down = WholeLinear(model.hidden_size, width, has_bias)
                    mark_partial(down, config)
                    setattr(self, f"linear_{name}_down_proj", down)
                    setattr(self, f"{name}_layernorm", norm(config, latent, config.layernorm_epsilon))

        def forward(
            self, hidden: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **options: Any
        ) -> Any:
            """Attend: [S, B, H] -> [S, B, H]; the mask is that of `with_positions`."""
            positions, *segments = attention_mask
            if segments:
                positions = positions[:, : positions.shape[1] // self.config.context_parallel_size]
            self.rotary_pos_emb.angles = rotary_angles(positions, kind)
            return super().forward(hidden, segments[0] if segments else None, *args, **options)

    return LatentAttention


class WholeLinear(nn.Module):
    """A linear layer that each tensor-parallel rank has all of; called as megatron-core's are."""

    def __init__(self, inputs: int, outputs: int, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if has_bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[S, B, I] -> [S, B, O], and no bias to be added later."""
        return F.linear(x, self.weight, self.bias), None
