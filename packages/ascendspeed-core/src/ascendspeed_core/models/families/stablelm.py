"""StableLM (Stability AI, 2023) and Nemotron (NVIDIA, 2024): LayerNorm with bias, part of each head turned."""

from collections.abc import Mapping

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.attention_rules import PartialRotary
from ascendspeed_core.models.families.base import ConfigRule, Family, WeightRule, count_layers
from ascendspeed_core.models.families.config_rules import Heads, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    GATED_MLP_RULES,
    HEAD_RULES,
    MUST_BE,
    OUTPUT_RULES,
    QUERY_KEY_VALUE_RULES,
    SIZES,
    layer_norm_rules,
    norm_rules,
    numbers,
    size,
)


def _has_second_norm(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return not config.parallel_blocks


STABLELM = Family(
    name="stablelm",
    model_type="stablelm",
    architectures=("StableLmForCausalLM",),
    config=(
        *SIZES,
        *numbers("layer_norm_eps", 1e-5),
        key("max_position_embeddings", default=4096),
        Heads(writes_head_dim=False),
        PartialRotary(default_share=0.25),
        key("use_qkv_bias", "qkv_bias", default=False),
        key("qk_layernorm", "qk_norm", default=False),
        key("use_parallel_residual", "parallel_blocks", default=False),
    ),
    fixed={"norm": "layernorm", "qk_norm_kind": "by_head"},
    must_be=MUST_BE,
    dropouts=("attention_dropout", "hidden_dropout"),
    rules=(
        *EMBEDDING_RULES,
        *layer_norm_rules("attention_norm", "input_layernorm"),
        *QUERY_KEY_VALUE_RULES,
        # One tensor for each head.
        WeightRule(
            "layers.{layer}.attention.q_heads_norm.weight",
            "model.layers.{layer}.self_attn.q_layernorm.norms.{head}.weight",
            when="qk_norm",
        ),
        WeightRule(
            "layers.{layer}.attention.k_heads_norm.weight",
            "model.layers.{layer}.self_attn.k_layernorm.norms.{key_head}.weight",
            when="qk_norm",
        ),
        *OUTPUT_RULES,
        *layer_norm_rules("mlp_norm", "post_attention_layernorm", _has_second_norm),
        *GATED_MLP_RULES,
        *norm_rules("final_norm", "model.norm"),
        HEAD_RULES[-1],
    ),
    indices={
        "layer": count_layers,
        "head": lambda config: config.num_attention_heads,
        "key_head": lambda config: config.num_key_value_heads,
    },
    sizes={
        "stablelm-3b": size(2560, 6912, 32, 32, 50304, 4096, bos_token_id=0, eos_token_id=0),
        "stablelm2-1.6b": size(
            2048, 5632, 24, 32, 100352, 4096, use_qkv_bias=True, bos_token_id=100257, eos_token_id=100257
        ),
        "stablelm2-12b": size(
            5120, 13824, 40, 32, 100352, 4096, num_key_value_heads=8, qk_layernorm=True, use_parallel_residual=True,
            bos_token_id=100257, eos_token_id=100257,
        ),
    },
)  # fmt: skip

_NEMOTRON: tuple[ConfigRule, ...] = (
    *SIZES,
    *numbers("norm_eps", 1e-5),
    key("max_position_embeddings", default=4096),
    Heads(),
    PartialRotary(default_share=0.5),
    key("attention_bias", "qkv_bias", "output_bias", default=False),
    key("mlp_bias", default=False),
)

NEMOTRON = Family(
    name="nemotron",
    model_type="nemotron",
    architectures=("NemotronForCausalLM",),
    config=_NEMOTRON,
    fixed={"norm": "layernorm", "norm_unit_offset": True, "mlp": "relu2"},
    must_be={"hidden_act": ("relu2",)},
    dropouts=DROPOUTS,
    rules=(
        *EMBEDDING_RULES,
        *layer_norm_rules("attention_norm", "input_layernorm"),
        *QUERY_KEY_VALUE_RULES,
        *OUTPUT_RULES,
        *layer_norm_rules("mlp_norm", "post_attention_layernorm"),
        *(rule for rule in GATED_MLP_RULES if "gate_proj" not in rule.ours),
        *norm_rules("final_norm", "model.norm"),
        HEAD_RULES[-1],
    ),
    sizes={
        "minitron-4b": size(
            3072,
            9216,
            32,
            24,
            256000,
            4096,
            num_key_value_heads=8,
            head_dim=128,
            bos_token_id=2,
            eos_token_id=3,
        ),
    },
)
