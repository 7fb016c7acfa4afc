"""One layer, and what it is made of: layers of one model may differ.

`attention_kind`, `attention_class` and `mlp_class` decide by the layer's number, counted over the whole model. An
architecture whose first layers are dense, or whose window is in every other layer, is a case in them; nothing else
in the model, the cache or the parallel layouts assumes that layers are alike.

Shapes: B batch, S sequence, H hidden size.
"""

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.attention import Attention
from ascendspeed_core.models.auxiliary_losses import ModuleOutput, add_losses, split_output
from ascendspeed_core.models.cache import CachedPass
from ascendspeed_core.models.dropout import AFTER_ATTENTION, AFTER_MLP
from ascendspeed_core.models.experts import ExpertsMLP
from ascendspeed_core.models.mlp import GeluMLP, SwiGLU
from ascendspeed_core.models.norm import make_norm
from ascendspeed_core.models.position import AttentionInputs, AttentionKind, RotaryKind


def attention_kind(config: ModelConfig, layer: int) -> AttentionKind:
    """Return the window and the rotary embedding of a layer."""
    rotary = None
    if config.position == "rotary":
        rotary = RotaryKind(config.head_dim, config.rotary_base, config.rotary_scaling)
    return AttentionKind(config.sliding_window, rotary)


def attention_class(config: ModelConfig, layer: int) -> type[Attention]:
    """Return which attention a layer has."""
    return Attention


def mlp_class(config: ModelConfig, layer: int) -> type[SwiGLU | GeluMLP | ExpertsMLP]:
    """Return which MLP a layer has."""
    if config.has_experts(layer):
        return ExpertsMLP
    return SwiGLU if config.mlp == "swiglu" else GeluMLP


def make_attention(config: ModelConfig, layer: int) -> Attention:
    """Return the attention of a layer."""
    return attention_class(config, layer)(config, attention_kind(config, layer))


def make_mlp(config: ModelConfig, layer: int) -> SwiGLU | GeluMLP | ExpertsMLP:
    """Return the MLP of a layer."""
    return mlp_class(config, layer)(config)


def auxiliary_loss_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the names of the auxiliary losses of all layers, sorted; the same on every rank, whatever it holds."""
    names: set[str] = set()
    for layer in range(config.num_layers):
        names.update(attention_class(config, layer).auxiliary_losses)
        names.update(mlp_class(config, layer).auxiliary_losses)
    return tuple(sorted(names))


class TransformerLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual (pre-norm).

    Args:
        config: the model.
        layer: number of this layer in the whole model.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config, layer)

    def forward(
        self, x: torch.Tensor, inputs: AttentionInputs, cache: CachedPass | None = None, cache_index: int = 0
    ) -> ModuleOutput:
        """[B, S, H] -> [B, S, H], with the auxiliary losses if there are any; see `Attention` for the arguments."""
        masks = inputs.dropout_masks
        attended, losses = split_output(self.attention(self.attention_norm(x), inputs, cache, cache_index))
        x = x + (masks.hidden(attended, AFTER_ATTENTION) if masks else attended)
        inner, mlp_losses = split_output(self.mlp(self.mlp_norm(x), masks))
        x = x + (masks.hidden(inner, AFTER_MLP) if masks else inner)
        if losses is None and mlp_losses is None:
            return x
        return x, add_losses(losses, mlp_losses) or {}
