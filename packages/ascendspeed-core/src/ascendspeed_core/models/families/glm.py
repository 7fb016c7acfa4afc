"""GLM-4 and GLM-4.5.

GLM-4: half of each head turned by neighbours, packed gate and up; from 0414 on norms after attention and MLP too.
GLM-4.5: half of each head turned, DeepSeek-V3's experts.
"""

from ascendspeed_core.models.families.attention_rules import PartialRotary
from ascendspeed_core.models.families.base import PREDICTED_LAYERS, ConfigRule, Family
from ascendspeed_core.models.families.config_rules import Heads, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    HEAD_RULES,
    INPUT_NORM_RULES,
    MLP_NORM_RULES,
    MUST_BE,
    OUTPUT_RULES,
    PACKED_MLP_RULES,
    QUERY_KEY_VALUE_RULES,
    SIZES,
    layer_norm_rules,
    numbers,
    size,
)
from ascendspeed_core.models.families.expert_rules import (
    DEEPSEEK_SHARED_RULES,
    DENSE_RULES,
    FUSED_EXPERT_RULES,
    INDICES,
    PLAIN_RULES,
    expert_rules,
)
from ascendspeed_core.models.families.routed_experts import ROUTER_KEYS, WITHOUT_LOSS, RoutedExperts

RULES = (
    *EMBEDDING_RULES,
    *INPUT_NORM_RULES,
    *QUERY_KEY_VALUE_RULES,
    *OUTPUT_RULES,
    *MLP_NORM_RULES,
    *PACKED_MLP_RULES,
    *HEAD_RULES,
)
_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *numbers(epsilon_value=1.5625e-7),
    key("max_position_embeddings", default=131072),
    Heads(),
    PartialRotary(default_share=0.5),
    key("attention_bias", "qkv_bias", default=True),
)
_IDS = {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "head_dim": 128}

GLM = Family(
    name="glm",
    model_type="glm",
    architectures=("GlmForCausalLM",),
    config=_CONFIG,
    fixed={"rotary_interleaved": True},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "glm4-9b-chat": size(4096, 13696, 40, 32, 151552, 131072, num_key_value_heads=2, **_IDS),
    },
)

GLM4 = Family(
    name="glm4",
    model_type="glm4",
    architectures=("Glm4ForCausalLM",),
    config=_CONFIG,
    fixed={"rotary_interleaved": True, "norm_placement": "both"},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=(
        *RULES,
        *layer_norm_rules("attention_post_norm", "post_self_attn_layernorm"),
        *layer_norm_rules("mlp_post_norm", "post_mlp_layernorm"),
    ),
    sizes={
        "glm4-9b-0414": size(
            4096, 13696, 40, 32, 151552, 32768, num_key_value_heads=2, rms_norm_eps=1e-5, **_IDS
        ),
        "glm4-32b-0414": size(
            6144, 23040, 61, 48, 151552, 32768, num_key_value_heads=8, attention_bias=False, rms_norm_eps=1e-5, **_IDS
        ),
    },
)  # fmt: skip

_MOE_SIZE = {
    **_IDS, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "partial_rotary_factor": 0.5,
    "attention_bias": True, "num_experts_per_tok": 8, "n_shared_experts": 1,
}  # fmt: skip
_MOE_PLAIN = PLAIN_RULES + DENSE_RULES + DEEPSEEK_SHARED_RULES

GLM4_MOE = Family(
    name="glm4_moe",
    model_type="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    config=(
        *SIZES,
        *numbers(epsilon_value=1e-5),
        key("max_position_embeddings", default=131072),
        Heads(),
        PartialRotary(default_share=0.5),
        key("attention_bias", "qkv_bias", default=False),
        key("use_qk_norm", "qk_norm", default=False),
        RoutedExperts("sigmoid", (WITHOUT_LOSS,), default_dense=1, says_method=False),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=(PREDICTED_LAYERS, *ROUTER_KEYS),
    rules=_MOE_PLAIN + expert_rules("mlp"),
    other_rules=(_MOE_PLAIN + FUSED_EXPERT_RULES,),
    indices=INDICES,
    sizes={
        "glm-4.5": size(
            5120, 12288, 92, 96, 151552, 131072, **_MOE_SIZE, n_routed_experts=160, moe_intermediate_size=1536,
            first_k_dense_replace=3, routed_scaling_factor=2.5, use_qk_norm=True,
        ),
        "glm-4.5-air": size(
            4096, 10944, 46, 96, 151552, 131072, **_MOE_SIZE, n_routed_experts=128, moe_intermediate_size=1408,
            first_k_dense_replace=1, routed_scaling_factor=1.0, use_qk_norm=False,
        ),
    },
)  # fmt: skip
