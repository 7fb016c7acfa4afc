"""Baichuan as its published modelling code reads: `BaiChuanForCausalLM` (7B) and `BaichuanForCausalLM` (13B, 2).

A plain reading for comparison, one function for each piece, without caches or options that no released config uses.
Parameter names are those of the published checkpoints.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class BaichuanShape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float
    is_alibi: bool
    has_norm_head: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.epsilon))


class MLP(nn.Module):
    def __init__(self, shape: BaichuanShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def interleaved_slopes(n: int) -> list[float]:
    """13B: `_get_interleave`."""

    def power_of_2(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_2(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_2(closest) + interleaved_slopes(2 * closest)[0::2][: n - closest]


def alibi_mask(heads: int, length: int) -> torch.Tensor:
    """13B: `_gen_alibi_mask`, [N, S, S]; the bias goes by the key's place, which softmax makes relative."""
    slopes = torch.tensor(interleaved_slopes(heads))
    alibi = slopes[:, None, None] * torch.arange(length)[None, None, :]
    return torch.triu(torch.full((length, length), -torch.inf), 1) + alibi


def rotary(x: torch.Tensor) -> torch.Tensor:
    """7B: `RotaryEmbedding` and `apply_rotary_pos_emb` on [B, N, S, D]."""
    dim, length = x.shape[-1], x.shape[-2]
    inv_freq = 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim))
    freqs = torch.einsum("i,j->ij", torch.arange(length).float(), inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    half = dim // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * emb.cos() + rotated * emb.sin()


class Attention(nn.Module):
    def __init__(self, shape: BaichuanShape) -> None:
        super().__init__()
        self.shape = shape
        self.W_pack = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        heads, size = self.shape.num_attention_heads, self.shape.head_dim
        q, k, v = (
            part.view(batch, length, heads, size).transpose(1, 2)
            for part in self.W_pack(x).split(self.shape.hidden_size, dim=-1)
        )
        if self.shape.is_alibi:
            mask = alibi_mask(heads, length)
        else:
            q, k = rotary(q), rotary(k)
            mask = torch.triu(torch.full((length, length), -torch.inf), 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(size) + mask
        out = (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, -1)
        projected: torch.Tensor = self.o_proj(out)
        return projected


class Layer(nn.Module):
    def __init__(self, shape: BaichuanShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class NormHead(nn.Module):
    """Baichuan 2: the weight is normalised at every step of training, and once before inference."""

    def __init__(self, shape: BaichuanShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight))


class BaichuanModel(nn.Module):
    def __init__(self, shape: BaichuanShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.num_hidden_layers)])
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class BaichuanForCausalLM(nn.Module):
    def __init__(self, shape: BaichuanShape) -> None:
        super().__init__()
        self.model = BaichuanModel(shape)
        self.lm_head = (
            NormHead(shape)
            if shape.has_norm_head
            else nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x)
        logits: torch.Tensor = self.lm_head(self.model.norm(x))
        return logits
