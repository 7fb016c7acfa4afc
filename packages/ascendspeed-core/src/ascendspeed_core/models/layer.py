"""One layer, and what it is made of: layers of one model may differ.

`attention_kind`, `attention_class` and `mlp_class` decide by the layer's number, counted over the whole model. An
architecture whose first layers are dense, or whose window is in every other layer, is a case in them; nothing else
in the model, the cache or the parallel layouts assumes that layers are alike.

Shapes: B batch, S sequence, H hidden size.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.attention import Attention
from ascendspeed_core.models.auxiliary_losses import ModuleOutput, add_losses, split_output
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.dropout import AFTER_ATTENTION, AFTER_MLP
from ascendspeed_core.models.experts import ExpertsMLP
from ascendspeed_core.models.latent_attention import LatentAttention
from ascendspeed_core.models.mlp import GeGLU, GeluMLP, SquaredReluMLP, SwiGLU
from ascendspeed_core.models.norm import LayerNorm, RMSNorm, make_norm
from ascendspeed_core.models.position import AttentionInputs, AttentionKind, RotaryKind

DenseMLP = SwiGLU | GeGLU | GeluMLP | SquaredReluMLP
DENSE_MLPS: Mapping[str, type[DenseMLP]] = MappingProxyType(
    {"swiglu": SwiGLU, "geglu": GeGLU, "gelu": GeluMLP, "relu2": SquaredReluMLP}
)
"""MLPs by `ModelConfig.mlp`."""


def attention_kind(config: ModelConfig, layer: int) -> AttentionKind:
    """Return the window and the rotary embedding of a layer."""
    rotary, has_window = None, config.has_window(layer)
    if config.has_rotary(layer):
        base, scaling = config.rotary_base, config.rotary_scaling
        if has_window and config.window_rotary_base is not None:
            base, scaling = config.window_rotary_base, None
        size = config.rotary_dim or config.head_dim
        rotary = RotaryKind(size, base, scaling, config.rotary_interleaved)
    return AttentionKind(config.sliding_window if has_window else None, rotary)


def attention_class(config: ModelConfig, layer: int) -> type[Attention]:
    """Return which attention a layer has."""
    return Attention if config.kv_latent_dim is None else LatentAttention


def mlp_class(config: ModelConfig, layer: int) -> type[DenseMLP] | type[ExpertsMLP]:
    """Return which MLP a layer has."""
    return ExpertsMLP if config.has_experts(layer) else DENSE_MLPS[config.mlp]


def make_attention(config: ModelConfig, layer: int) -> Attention:
    """Return the attention of a layer."""
    return attention_class(config, layer)(config, attention_kind(config, layer))


def make_mlp(config: ModelConfig, layer: int) -> DenseMLP | ExpertsMLP:
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
    """Attention and MLP, each beside a residual.

    Norms stand before them (pre-norm), after them (OLMo 2), or both (Gemma 2); or one norm stands before both, which
    then read the same (Command R). A norm that the model lacks is `None`.

    Args:
        config: the model.
        layer: number of this layer in the whole model.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.residual_multiplier, self.is_parallel = config.residual_multiplier, config.parallel_blocks
        is_before, is_after = config.norm_placement != "after", config.norm_placement != "before"
        self.attention_norm = make_norm(config) if is_before else None
        self.attention = make_attention(config, layer)
        self.attention_post_norm = make_norm(config) if is_after else None
        self.mlp_norm = make_norm(config) if is_before and not config.parallel_blocks else None
        self.mlp = make_mlp(config, layer)
        self.mlp_post_norm = make_norm(config) if is_after else None

    def forward(
        self, x: torch.Tensor, inputs: AttentionInputs, cache: CachedPass | None = None, cache_index: int = 0
    ) -> ModuleOutput:
        """[B, S, H] -> [B, S, H], with the auxiliary losses if there are any; see `Attention` for the arguments."""
        masks = inputs.dropout_masks
        normed = _normed(self.attention_norm, x)
        attended, losses = split_output(self.attention(normed, inputs, cache, cache_index))
        attended = self._added(_normed(self.attention_post_norm, attended))
        x = x + (masks.hidden(attended, AFTER_ATTENTION) if masks else attended)
        inner, mlp_losses = split_output(
            self.mlp(normed if self.is_parallel else _normed(self.mlp_norm, x), masks)
        )
        inner = self._added(_normed(self.mlp_post_norm, inner))
        x = x + (masks.hidden(inner, AFTER_MLP) if masks else inner)
        if losses is None and mlp_losses is None:
            return x
        return x, add_losses(losses, mlp_losses) or {}

    def _added(self, x: torch.Tensor) -> torch.Tensor:
        """Return what is added to the residual stream."""
        return x if self.residual_multiplier == 1 else x * self.residual_multiplier


def _normed(norm: RMSNorm | LayerNorm | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
