"""DeepSeek-V2 and V3, and Kimi-K2, which is V3's: multi-head latent attention, experts after the first layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import PREDICTED_LAYERS, ConfigRule, Family, WeightRule
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
    size,
)
from ascendspeed_core.models.families.expert_rules import (
    DEEPSEEK_SHARED_RULES,
    DENSE_RULES,
    FUSED_EXPERT_RULES,
    INDICES,
    expert_rules,
)
from ascendspeed_core.models.families.routed_experts import (
    GREEDY,
    GROUP_LIMITED,
    ROUTER_KEYS,
    WITHOUT_LOSS,
    RoutedExperts,
)
from ascendspeed_data.errors import AscendSpeedError

_OF_ATTENTION = "model.layers.{layer}.self_attn"


def _has_query_latent(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return config.q_latent_dim is not None


def _has_down_bias(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return config.q_latent_dim is not None and config.qkv_bias


def _has_dense_bias(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return config.mlp_bias and not config.has_experts(indices["layer"])


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


LATENT_ATTENTION_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *NUMBERS,
    LENGTH,
    LatentHeads(),
    Rotary(),
    key("attention_bias", "qkv_bias", "output_bias", default=False),
)
"""The config table without the MLP."""

_DENSE_BIASES = tuple(
    replace(rule, when=_has_dense_bias) for rule in GATED_MLP_RULES if rule.ours.endswith(".bias")
)
_ALL_BUT_EXPERTS = (
    *EMBEDDING_RULES,
    *INPUT_NORM_RULES,
    *LATENT_ATTENTION_RULES,
    *MLP_NORM_RULES,
    *DENSE_RULES,
    *_DENSE_BIASES,
    *DEEPSEEK_SHARED_RULES,
    *HEAD_RULES,
)
_RULES = _ALL_BUT_EXPERTS + expert_rules("mlp")
_FUSED = (_ALL_BUT_EXPERTS + FUSED_EXPERT_RULES,)
_UNUSED = ("pretraining_tp", PREDICTED_LAYERS, *ROUTER_KEYS)

_LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_V2_IDS = {"bos_token_id": 100000, "eos_token_id": 100001, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}


def _yarn(factor: float, mscale: float, beta_fast: float = 32.0) -> dict[str, Any]:
    return {
        "type": "yarn", "factor": factor, "original_max_position_embeddings": 4096, "beta_fast": beta_fast,
        "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale,
    }  # fmt: skip


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    config=(
        *LATENT_ATTENTION_CONFIG,
        RoutedExperts("softmax", (GREEDY, GROUP_LIMITED), is_normalised=False),
        key("mlp_bias", default=False),
    ),
    fixed={"rotary_interleaved": True},
    must_be={**MUST_BE, "norm_topk_prob": (False, None)},
    dropouts=DROPOUTS,
    unused=_UNUSED,
    rules=_RULES,
    other_rules=_FUSED,
    indices=INDICES,
    sizes={
        "deepseek-v2-lite": size(
            2048, 10944, 27, 16, 102400, 163840, **_LATENT, **_V2_IDS, q_lora_rank=None,
            rope_scaling=_yarn(40.0, 0.707), n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408,
            n_shared_experts=2, n_group=1, topk_group=1, topk_method=GREEDY, routed_scaling_factor=1.0,
            first_k_dense_replace=1,
        ),
    },
)  # fmt: skip

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    other_model_types=("kimi_k2",),
    config=(
        *LATENT_ATTENTION_CONFIG,
        RoutedExperts(
            "sigmoid", (WITHOUT_LOSS,), default_groups=(8, 4), default_scaling=2.5, default_dense=3
        ),
        key("rope_interleave", "rotary_interleaved", default=True),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=_UNUSED,
    rules=_RULES,
    other_rules=_FUSED,
    indices=INDICES,
    sizes={
        "deepseek-v3": size(
            7168, 18432, 61, 128, 129280, 163840, **_LATENT, q_lora_rank=1536, bos_token_id=0, eos_token_id=1,
            rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=_yarn(40.0, 1.0), n_routed_experts=256,
            num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1, n_group=8, topk_group=4,
            routed_scaling_factor=2.5, first_k_dense_replace=3,
        ),
        "kimi-k2": size(
            7168, 18432, 61, 64, 163840, 131072, **_LATENT, q_lora_rank=1536, bos_token_id=163584,
            eos_token_id=163585, rms_norm_eps=1e-6, rope_theta=50000.0, rope_scaling=_yarn(32.0, 1.0, 1.0),
            n_routed_experts=384, num_experts_per_tok=8, moe_intermediate_size=2048, n_shared_experts=1, n_group=1,
            topk_group=1, routed_scaling_factor=2.827, first_k_dense_replace=1,
        ),
    },
)  # fmt: skip
