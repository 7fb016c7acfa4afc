"""Tables of the names that LLaMA gave and most families took over."""

from collections.abc import Mapping
from typing import Any

from ascendspeed_core.models.families.base import ConfigRule, WeightRule
from ascendspeed_core.models.families.config_rules import EndIds, Heads, Rotary, key

_LAYER = "model.layers.{layer}"

EMBEDDING_RULES = (WeightRule("embedding.weight", "model.embed_tokens.weight"),)

QUERY_KEY_VALUE_RULES = tuple(
    WeightRule(
        f"layers.{{layer}}.attention.{name}_proj.{kind}",
        f"{_LAYER}.self_attn.{name}_proj.{kind}",
        when="qkv_bias" if kind == "bias" else None,
    )
    for kind in ("weight", "bias")
    for name in ("q", "k", "v")
)

LAYER_RULES = (
    WeightRule("layers.{layer}.attention_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    WeightRule("layers.{layer}.attention.q_norm.weight", f"{_LAYER}.self_attn.q_norm.weight", when="qk_norm"),
    WeightRule("layers.{layer}.attention.k_norm.weight", f"{_LAYER}.self_attn.k_norm.weight", when="qk_norm"),
    WeightRule("layers.{layer}.attention.o_proj.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    WeightRule("layers.{layer}.attention.o_proj.bias", f"{_LAYER}.self_attn.o_proj.bias", when="output_bias"),
    WeightRule("layers.{layer}.mlp_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
    WeightRule("layers.{layer}.mlp.gate_proj.weight", f"{_LAYER}.mlp.gate_proj.weight"),
    WeightRule("layers.{layer}.mlp.gate_proj.bias", f"{_LAYER}.mlp.gate_proj.bias", when="mlp_bias"),
    WeightRule("layers.{layer}.mlp.up_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
    WeightRule("layers.{layer}.mlp.up_proj.bias", f"{_LAYER}.mlp.up_proj.bias", when="mlp_bias"),
    WeightRule("layers.{layer}.mlp.down_proj.weight", f"{_LAYER}.mlp.down_proj.weight"),
    WeightRule("layers.{layer}.mlp.down_proj.bias", f"{_LAYER}.mlp.down_proj.bias", when="mlp_bias"),
)

HEAD_RULES = (
    WeightRule("final_norm.weight", "model.norm.weight"),
    WeightRule("output_head.weight", "lm_head.weight", tied=True),
)

RULES = EMBEDDING_RULES + QUERY_KEY_VALUE_RULES + LAYER_RULES + HEAD_RULES
"""The weight table of LLaMA and of all that use its names."""

SIZES: tuple[ConfigRule, ...] = (
    key("vocab_size"),
    key("hidden_size"),
    key("intermediate_size", "ffn_hidden_size"),
    key("num_hidden_layers", "num_layers"),
    key("num_attention_heads"),
)
NUMBERS: tuple[ConfigRule, ...] = (
    key("rms_norm_eps", "norm_epsilon", default=1e-6),
    key("initializer_range", default=0.02),
    key("tie_word_embeddings", default=False),
    key("bos_token_id", default=None),
    key("pad_token_id", default=None),
    EndIds(),
)
LENGTH = key("max_position_embeddings", default=2048)

CONFIG: tuple[ConfigRule, ...] = (*SIZES, LENGTH, *NUMBERS, Heads(), Rotary())
"""The config table that they share."""

MUST_BE: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
"""What a config may ask for but this decoder does not do otherwise."""

DROPOUTS = ("attention_dropout",)
"""What their training drops."""


def size(
    hidden: int, inner: int, layers: int, heads: int, vocabulary: int, length: int, **more: Any
) -> dict[str, Any]:
    """Return the Hugging Face config of a published size, under LLaMA's key names."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": length,
        **more,
    }
