"""Tables of the names that LLaMA gave and most families took over."""

from collections.abc import Mapping
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Condition, ConfigRule, WeightRule
from ascendspeed_core.models.families.config_rules import EndIds, Heads, Rotary, key
from ascendspeed_core.models.families.packing import EqualParts, Packed

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

INPUT_NORM_RULES = (WeightRule("layers.{layer}.attention_norm.weight", f"{_LAYER}.input_layernorm.weight"),)

QUERY_KEY_NORM_RULES = tuple(
    WeightRule(
        f"layers.{{layer}}.attention.{name}_norm.weight",
        f"{_LAYER}.self_attn.{name}_norm.weight",
        when="qk_norm",
    )
    for name in ("q", "k")
)

OUTPUT_RULES = (
    WeightRule("layers.{layer}.attention.o_proj.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    WeightRule("layers.{layer}.attention.o_proj.bias", f"{_LAYER}.self_attn.o_proj.bias", when="output_bias"),
)

MLP_NORM_RULES = (WeightRule("layers.{layer}.mlp_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),)

GATED_MLP_RULES = (
    WeightRule("layers.{layer}.mlp.gate_proj.weight", f"{_LAYER}.mlp.gate_proj.weight"),
    WeightRule("layers.{layer}.mlp.gate_proj.bias", f"{_LAYER}.mlp.gate_proj.bias", when="mlp_bias"),
    WeightRule("layers.{layer}.mlp.up_proj.weight", f"{_LAYER}.mlp.up_proj.weight"),
    WeightRule("layers.{layer}.mlp.up_proj.bias", f"{_LAYER}.mlp.up_proj.bias", when="mlp_bias"),
    WeightRule("layers.{layer}.mlp.down_proj.weight", f"{_LAYER}.mlp.down_proj.weight"),
    WeightRule("layers.{layer}.mlp.down_proj.bias", f"{_LAYER}.mlp.down_proj.bias", when="mlp_bias"),
)

LAYER_RULES = INPUT_NORM_RULES + QUERY_KEY_NORM_RULES + OUTPUT_RULES + MLP_NORM_RULES + GATED_MLP_RULES

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


def numbers(
    epsilon: str = "rms_norm_eps", epsilon_value: float = 1e-6, is_tied: bool = False
) -> tuple[ConfigRule, ...]:
    """Return the rows of what is neither a size nor attention, by the key of the norms' epsilon and the defaults."""
    return (
        key(epsilon, "norm_epsilon", default=epsilon_value),
        key("initializer_range", default=0.02),
        key("tie_word_embeddings", default=is_tied),
        key("bos_token_id", default=None),
        key("pad_token_id", default=None),
        EndIds(),
    )


NUMBERS = numbers()
LENGTH = key("max_position_embeddings", default=2048)

CONFIG: tuple[ConfigRule, ...] = (*SIZES, LENGTH, *NUMBERS, Heads(), Rotary())
"""The config table that they share."""

MUST_BE: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
"""What a config may ask for but this decoder does not do otherwise."""

DROPOUTS = ("attention_dropout",)
"""What their training drops."""


def norm_rules(ours: str, theirs: str, when: str | Condition | None = None) -> tuple[WeightRule, ...]:
    """Return the rows of a norm: its weight, and a bias where layer norms have one."""

    def has_bias(config: ModelConfig, indices: Mapping[str, int]) -> bool:
        is_there = when is None or (
            bool(getattr(config, when)) if isinstance(when, str) else when(config, indices)
        )
        return is_there and config.norm == "layernorm" and config.norm_bias

    return (
        WeightRule(f"{ours}.weight", f"{theirs}.weight", when=when),
        WeightRule(f"{ours}.bias", f"{theirs}.bias", when=has_bias),
    )


def layer_norm_rules(ours: str, theirs: str, when: str | Condition | None = None) -> tuple[WeightRule, ...]:
    """Return the rows of a norm of every layer, see `norm_rules`, by its name there and in theirs."""
    return norm_rules(f"layers.{{layer}}.{ours}", f"{_LAYER}.{theirs}", when)


PACKED_QUERY_KEY_VALUE_RULES = tuple(
    WeightRule(
        f"layers.{{layer}}.attention.{name}_proj.weight",
        f"{_LAYER}.self_attn.qkv_proj.weight",
        packed=Packed(part, "stacked"),
    )
    for part, name in enumerate(("q", "k", "v"))
)

PACKED_MLP_RULES = (
    *(
        WeightRule(
            f"layers.{{layer}}.mlp.{name}_proj.weight",
            f"{_LAYER}.mlp.gate_up_proj.weight",
            packed=EqualParts(part),
        )
        for part, name in enumerate(("gate", "up"))
    ),
    WeightRule("layers.{layer}.mlp.down_proj.weight", f"{_LAYER}.mlp.down_proj.weight"),
)


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
