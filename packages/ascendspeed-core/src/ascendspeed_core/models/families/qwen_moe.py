"""Qwen1.5 and Qwen2 with experts (a shared one with a gate beside them), and Qwen 3 with experts (no shared one)."""

from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.config_rules import key
from ascendspeed_core.models.families.decoder import CONFIG, DROPOUTS, MUST_BE, size
from ascendspeed_core.models.families.expert_rules import (
    DENSE_RULES,
    FUSED_EXPERT_RULES,
    INDICES,
    PLAIN_RULES,
    ROUTER_TRAINING_KEYS,
    SHARED_RULES,
    ExpertKeys,
    NoWindow,
    expert_rules,
)

_NORMALISED = key("norm_topk_prob", "normalised", default=False)
_SHARED = key("shared_expert_intermediate_size", "shared_ffn_hidden_size")
_IDS = {"bos_token_id": 151643, "eos_token_id": 151643, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
_QWEN3 = {
    **_IDS, "head_dim": 128, "num_key_value_heads": 4, "norm_topk_prob": True, "num_experts": 128,
    "num_experts_per_tok": 8,
}  # fmt: skip

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_type="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    config=(
        *CONFIG,
        NoWindow(),
        key("qkv_bias", default=True),
        ExpertKeys(
            "num_experts",
            "moe_intermediate_size",
            fixed={"shared_gate": True},
            more=(_NORMALISED, _SHARED),
            says_dense_layers=True,
        ),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=ROUTER_TRAINING_KEYS,
    rules=PLAIN_RULES + DENSE_RULES + expert_rules("mlp") + SHARED_RULES,
    other_rules=(PLAIN_RULES + DENSE_RULES + FUSED_EXPERT_RULES + SHARED_RULES,),
    sizes={
        "qwen1.5-moe-a2.7b": size(
            2048, 5632, 24, 16, 151936, 8192, **_IDS, num_experts=60, num_experts_per_tok=4,
            moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
        ),
        "qwen2-57b-a14b": size(
            3584, 18944, 28, 28, 151936, 131072, **_IDS, num_key_value_heads=4, num_experts=64,
            num_experts_per_tok=8, moe_intermediate_size=2560, shared_expert_intermediate_size=20480,
        ),
    },
    indices=INDICES,
)  # fmt: skip

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    config=(
        *CONFIG,
        NoWindow(),
        key("attention_bias", "qkv_bias", "output_bias", default=False),
        ExpertKeys("num_experts", "moe_intermediate_size", more=(_NORMALISED,), says_dense_layers=True),
    ),
    fixed={"qk_norm": True},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=ROUTER_TRAINING_KEYS,
    rules=PLAIN_RULES + DENSE_RULES + expert_rules("mlp"),
    other_rules=(PLAIN_RULES + DENSE_RULES + FUSED_EXPERT_RULES,),
    sizes={
        "qwen3-30b-a3b": size(2048, 6144, 48, 32, 151936, 40960, **_QWEN3, moe_intermediate_size=768),
        "qwen3-235b-a22b": size(4096, 12288, 94, 64, 151936, 40960, **_QWEN3, moe_intermediate_size=1536),
    },
    indices=INDICES,
)
