"""Multi-head latent attention (DeepSeek-AI, 2024, DeepSeek-V2, section 2.1).

Keys and values of all heads are made from one narrow latent of each token, and every key ends with the same few turned
numbers. Training makes them and attends as usual. Decoding keeps the latent and the turned numbers alone, and moves the
matrices that would make keys and values to the side of the query and of the result (section 2.1.2): with
`k = W_k c` and `v = W_v c`, `q k = (W_k^T q) c`, and a weighted sum of values is `W_v` of that of latents.

Shapes: B batch, S sequence, H hidden size, D head size, R its turned end, V size of a value, C latent, N heads of this
rank, T tokens attended to.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.reference import AttentionFunction
from ascendspeed_core.models.attention import Attention, halves_of_pairs
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.linear import LoraLinear, apply_linear
from ascendspeed_core.models.norm import RMSNorm
from ascendspeed_core.models.position import AttentionInputs, AttentionKind, yarn_mscale
from ascendspeed_core.models.projections import Projections

LATENT_EPSILON = 1e-6
"""Of the norms of latents, whatever a config says, as in the published code."""

MOVED_LAYERS = ("kv_up_proj",)
"""Layers whose weight decoding multiplies with something else than their input, so that it stays as torch lays it."""


class LatentAttention(Attention):
    """Attention over keys and values that come from a latent.

    Args:
        config: the model.
        kind: rotary embedding of this layer, of the last R numbers of a head.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind) -> None:
        super().__init__(config, kind)
        self.score_options["scale"] = score_scale(config)

    def _make_projections(self, config: ModelConfig) -> Projections:
        """Make the linear layers and the norms of the latents; return the layers that read the hidden states."""
        assert config.kv_latent_dim is not None
        assert config.value_head_dim is not None
        assert config.rotary_dim is not None
        self.latent_dim, self.value_dim, self.turned_dim = (
            config.kv_latent_dim,
            config.value_head_dim,
            config.rotary_dim,
        )
        heads, hidden, bias = config.num_attention_heads, config.hidden_size, config.qkv_bias
        queries, plain = heads * config.head_dim, config.head_dim - config.rotary_dim
        first = "q_proj"
        if config.q_latent_dim is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            first = "q_down_proj"
            self.q_down_proj = nn.Linear(hidden, config.q_latent_dim, bias=bias)
            self.q_latent_norm = RMSNorm(config.q_latent_dim, LATENT_EPSILON)
            self.q_up_proj = nn.Linear(config.q_latent_dim, queries, bias=False)
        self.has_query_latent = config.q_latent_dim is not None
        self.kv_down_proj = nn.Linear(hidden, self.latent_dim + self.turned_dim, bias=bias)
        self.kv_latent_norm = RMSNorm(self.latent_dim, LATENT_EPSILON)
        self.kv_up_proj = nn.Linear(self.latent_dim, heads * (plain + self.value_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.value_dim, hidden, bias=config.output_bias)
        return Projections(self, (first, "kv_down_proj"))

    def cache_shapes(self, tp: int) -> tuple[tuple[int, ...], ...]:
        """Return the shape of what is kept of one token, on every rank alike: its latent and the turned numbers."""
        return ((self.latent_dim + self.turned_dim,),)

    def forward(
        self,
        x: torch.Tensor,
        inputs: AttentionInputs,
        cache: CachedPass | None = None,
        cache_index: int = 0,
    ) -> torch.Tensor:
        """Attend: [B, S, H] -> [B, S, H]; see `Attention.forward`."""
        q, latent, turned = self._queries_and_latents(x, inputs)
        attend = self._attend_function(inputs)
        if cache is None:
            attended = self._attend_plain(attend, q, latent, turned, inputs)
        else:
            attended = self._attend_absorbed(attend, q, latent, turned, inputs, cache, cache_index)
        return apply_linear(self.o_proj, attended.flatten(2), inputs.dropout_masks)

    def _queries_and_latents(
        self, x: torch.Tensor, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries [B, S, N, D], latents [B, S, C] and what all keys end with, [B, S, 1, R]; ends are turned."""
        first, down = self.projections(x, inputs.dropout_masks)
        if self.has_query_latent:
            first = apply_linear(self.q_up_proj, self.q_latent_norm(first), inputs.dropout_masks)
        q = first.view(*first.shape[:-1], -1, self.head_dim)
        latent, turned = down.split([self.latent_dim, self.turned_dim], dim=-1)
        plain, end = q.split([self.head_dim - self.turned_dim, self.turned_dim], dim=-1)
        turned = turned.unsqueeze(-2)
        assert inputs.rotary is not None
        if self.kind.rotary is not None and self.kind.rotary.is_interleaved:
            end, turned = (halves_of_pairs(part, self.turned_dim) for part in (end, turned))
        end, turned = self.rotate(end, turned, *inputs.rotary)
        return torch.cat([plain, end], dim=-1), self.kv_latent_norm(latent), turned

    def _attend_plain(
        self,
        attend: AttentionFunction,
        q: torch.Tensor,
        latent: torch.Tensor,
        turned: torch.Tensor,
        inputs: AttentionInputs,
    ) -> torch.Tensor:
        """Make keys and values and attend: [B, S, N, V]."""
        made = apply_linear(self.kv_up_proj, latent, inputs.dropout_masks)
        plain = self.head_dim - self.turned_dim
        keys, values = made.view(*q.shape[:-1], -1).split([plain, self.value_dim], dim=-1)
        k = torch.cat([keys, turned.expand(*keys.shape[:-1], -1)], dim=-1)
        # Implementations take values as wide as keys.
        v = F.pad(values, (0, self.head_dim - self.value_dim))
        return self._attend_whole(attend, q, k, v, inputs.mask)[..., : self.value_dim]

    def _attend_absorbed(
        self,
        attend: AttentionFunction,
        q: torch.Tensor,
        latent: torch.Tensor,
        turned: torch.Tensor,
        inputs: AttentionInputs,
        cache: CachedPass,
        cache_index: int,
    ) -> torch.Tensor:
        """Attend to latents, with one key-value head for all queries: [1, M, N, V].

        On a CPU the rounding of a product may depend on where its rows begin; C + R is a multiple of 16 in all
        published models.
        """
        plain = self.head_dim - self.turned_dim
        weight = _whole_weight(self.kv_up_proj).view(-1, plain + self.value_dim, self.latent_dim)
        of_keys, of_values = weight.split([plain, self.value_dim], dim=1)
        start, end = q[0].split([plain, self.turned_dim], dim=-1)
        # [N, M, D - R] @ [N, D - R, C].
        moved = (start.transpose(0, 1) @ of_keys).transpose(0, 1)
        queries = torch.cat([moved, end], dim=-1).unsqueeze(0)
        kept = torch.cat([latent, turned.squeeze(-2)], dim=-1)

        def attend_latents(q: torch.Tensor, kept: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            """[1, N, S, C + R] and [1, T, C + R] -> [1, N, S, C + R]; the end of a result means nothing."""
            both = kept.unsqueeze(1)
            attended: torch.Tensor = attend(q, both, both, mask)
            return attended

        found = cache.attend(cache_index, queries, (kept,), attend_latents, inputs.chunk_masks)
        latents = found[0, ..., : self.latent_dim].transpose(0, 1)
        values: torch.Tensor = latents @ of_values.transpose(1, 2)
        return values.transpose(0, 1).unsqueeze(0)


def score_scale(config: ModelConfig) -> float:
    """Return the factor of the scores of a model with latent attention."""
    scale: float = config.head_dim**-0.5
    scaling = config.rotary_scaling
    if scaling is not None and scaling.mscale_all_dim is not None:
        # YaRN's sharpening, here of all numbers of a head, those that are not turned included.
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _whole_weight(linear: nn.Linear) -> torch.Tensor:
    """Return the weight of a linear layer with what its adapter adds: [O, I]."""
    if not isinstance(linear, LoraLinear):
        return linear.weight
    return linear.weight + linear.lora_B.weight @ linear.lora_A.weight * linear.scale
