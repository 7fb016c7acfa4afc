"""DeepSeek-V2 and V3: multi-head latent attention. The tables know dense layers; a model with experts is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import ConfigRule, Family, WeightRule
from ascendspeed_core.models.families.config_rules import Rotary, key, whole_number
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    GATED_MLP_RULES,
    HEAD_RULES,
    INPUT_NORM_RULES,
    LENGTH,
    MLP_NORM_RULES,
    MUST_BE,
    NUMBERS,
    OUTPUT_RULES,
    SIZES,
)
from ascendspeed_data.errors import AscendSpeedError

_OF_ATTENTION = "model.layers.{layer}.self_attn"


def _has_query_latent(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return config.q_latent_dim is not None


def _has_down_bias(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return config.q_latent_dim is not None and config.qkv_bias


LATENT_ATTENTION_RULES = (
    WeightRule(
        "layers.{layer}.attention.q_proj.weight",
        f"{_OF_ATTENTION}.q_proj.weight",
        when=lambda config, _: config.q_latent_dim is None,
    ),
    *(
        WeightRule(f"layers.{{layer}}.attention.{ours}", f"{_OF_ATTENTION}.{theirs}", when=when)
        for ours, theirs, when in (
            ("q_down_proj.weight", "q_a_proj.weight", _has_query_latent),
            ("q_down_proj.bias", "q_a_proj.bias", _has_down_bias),
            ("q_latent_norm.weight", "q_a_layernorm.weight", _has_query_latent),
            ("q_up_proj.weight", "q_b_proj.weight", _has_query_latent),
            ("kv_down_proj.weight", "kv_a_proj_with_mqa.weight", None),
            ("kv_down_proj.bias", "kv_a_proj_with_mqa.bias", "qkv_bias"),
            ("kv_latent_norm.weight", "kv_a_layernorm.weight", None),
            ("kv_up_proj.weight", "kv_b_proj.weight", None),
        )
    ),
    *OUTPUT_RULES,
)
"""The weight table of attention."""


@dataclass(frozen=True)
class LatentHeads:
    """Sizes of multi-head latent attention; a head is its plain part and its turned part together."""

    keys: Sequence[str] = (
        "kv_lora_rank",
        "q_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "num_key_value_heads",
        "head_dim",
        "qk_head_dim",
    )

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of them."""
        heads, turned = whole_number(hf, "num_attention_heads"), whole_number(hf, "qk_rope_head_dim")
        keys = hf.get("num_key_value_heads")
        if keys not in (None, heads):
            raise AscendSpeedError(
                f"num_key_value_heads={keys!r} is not num_attention_heads={heads}; with latent attention each head "
                "has its own key and value, correct it"
            )
        queries = hf.get("q_lora_rank")
        return {
            "num_key_value_heads": heads,
            "head_dim": whole_number(hf, "qk_nope_head_dim") + turned,
            "rotary_dim": turned,
            "value_head_dim": whole_number(hf, "v_head_dim"),
            "kv_latent_dim": whole_number(hf, "kv_lora_rank"),
            "q_latent_dim": None if queries is None else whole_number(hf, "q_lora_rank"),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys; to transformers a head's size is that of its turned part."""
        assert config.rotary_dim is not None
        return {
            "kv_lora_rank": config.kv_latent_dim,
            "q_lora_rank": config.q_latent_dim,
            "qk_nope_head_dim": config.head_dim - config.rotary_dim,
            "qk_rope_head_dim": config.rotary_dim,
            "v_head_dim": config.value_head_dim,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": config.rotary_dim,
        }


class NoExperts:
    """All layers are dense: the first `first_k_dense_replace`, of which there must be as many as layers."""

    keys: Sequence[str] = ("first_k_dense_replace",)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return nothing, or refuse layers with experts."""
        layers, dense = whole_number(hf, "num_hidden_layers"), hf.get("first_k_dense_replace", 0)
        if hf.get("n_routed_experts") and dense < layers:
            raise AscendSpeedError(
                f"first_k_dense_replace={dense} is below num_hidden_layers={layers}: some layers have experts, which "
                "this table does not know; use a dense model"
            )
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Say that all layers are dense."""
        return {"first_k_dense_replace": config.num_layers}


LATENT_ATTENTION_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *NUMBERS,
    LENGTH,
    LatentHeads(),
    Rotary(),
    key("attention_bias", "qkv_bias", "output_bias", default=False),
)
"""The config table without the MLP."""

_OF_EXPERTS = (
    "aux_loss_alpha", "ep_size", "moe_intermediate_size", "moe_layer_freq", "n_group", "n_routed_experts",
    "n_shared_experts", "norm_topk_prob", "num_experts_per_tok", "num_nextn_predict_layers", "output_router_logits",
    "routed_scaling_factor", "router_aux_loss_coef", "scoring_func", "seq_aux", "topk_group", "topk_method",
)  # fmt: skip
"""Keys that mean nothing where no layer has experts."""

_RULES = (
    *EMBEDDING_RULES,
    *INPUT_NORM_RULES,
    *LATENT_ATTENTION_RULES,
    *MLP_NORM_RULES,
    *GATED_MLP_RULES,
    *HEAD_RULES,
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    config=(*LATENT_ATTENTION_CONFIG, NoExperts(), key("mlp_bias", default=False)),
    fixed={"rotary_interleaved": True},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=("pretraining_tp", *_OF_EXPERTS),
    rules=_RULES,
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    config=(
        *LATENT_ATTENTION_CONFIG,
        NoExperts(),
        key("rope_interleave", "rotary_interleaved", default=True),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=("pretraining_tp", *_OF_EXPERTS),
    rules=_RULES,
)
