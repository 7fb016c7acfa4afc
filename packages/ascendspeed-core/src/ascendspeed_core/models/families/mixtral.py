"""Mixtral (Jiang et al., 2024): Mistral with eight experts in each layer, of which a token uses two."""

from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.config_rules import key
from ascendspeed_core.models.families.decoder import CONFIG, DROPOUTS, MUST_BE, size
from ascendspeed_core.models.families.expert_rules import (
    FUSED_EXPERT_RULES,
    INDICES,
    PLAIN_RULES,
    ROUTER_TRAINING_KEYS,
    ExpertKeys,
    expert_rules,
)

_COMMON = {
    "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip

MIXTRAL = Family(
    name="mixtral",
    model_type="mixtral",
    architectures=("MixtralForCausalLM",),
    config=(
        *CONFIG,
        key("sliding_window", default=None),
        ExpertKeys("num_local_experts", "intermediate_size"),
    ),
    must_be={**MUST_BE, "router_jitter_noise": (0.0,)},
    dropouts=DROPOUTS,
    unused=ROUTER_TRAINING_KEYS,
    rules=PLAIN_RULES + expert_rules("block_sparse_moe", ("w1", "w3", "w2")),
    other_rules=(PLAIN_RULES + FUSED_EXPERT_RULES,),
    sizes={
        "mixtral-8x7b": size(4096, 14336, 32, 32, 32000, 32768, **_COMMON),
        "mixtral-8x22b": size(6144, 16384, 56, 48, 32768, 65536, **_COMMON),
    },
    indices=INDICES,
)
