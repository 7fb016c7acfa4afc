"""LLaMA (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU; grouped-query attention from LLaMA 2 70B on."""

from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.config_rules import key
from ascendspeed_core.models.families.decoder import CONFIG, DROPOUTS, MUST_BE, RULES, size

_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_IDS_3 = {"bos_token_id": 128000, "eos_token_id": 128001}
_GROUPED = {"num_key_value_heads": 8}
_LLAMA_3 = {"rms_norm_eps": 1e-5, "rope_theta": 500000.0, **_GROUPED, **_IDS_3}


def _scaled(factor: float) -> dict[str, object]:
    """Return the scaling that Llama 3.1 and later read 131,072 tokens with."""
    lengths = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {**_LLAMA_3, "rope_scaling": {"rope_type": "llama3", "factor": factor, **lengths}}


SIZES = {
    "llama-7b": size(4096, 11008, 32, 32, 32000, 2048, rms_norm_eps=1e-6, **_IDS),
    "llama-13b": size(5120, 13824, 40, 40, 32000, 2048, rms_norm_eps=1e-6, **_IDS),
    "llama-33b": size(6656, 17920, 60, 52, 32000, 2048, rms_norm_eps=1e-6, **_IDS),
    "llama-65b": size(8192, 22016, 80, 64, 32000, 2048, rms_norm_eps=1e-5, **_IDS),
    "llama2-7b": size(4096, 11008, 32, 32, 32000, 4096, rms_norm_eps=1e-5, **_IDS),
    "llama2-13b": size(5120, 13824, 40, 40, 32000, 4096, rms_norm_eps=1e-5, **_IDS),
    "llama2-70b": size(8192, 28672, 80, 64, 32000, 4096, rms_norm_eps=1e-5, **_GROUPED, **_IDS),
    "llama3-8b": size(4096, 14336, 32, 32, 128256, 8192, **_LLAMA_3),
    "llama3-70b": size(8192, 28672, 80, 64, 128256, 8192, **_LLAMA_3),
    "llama3.1-8b": size(4096, 14336, 32, 32, 128256, 131072, **_scaled(8.0)),
    "llama3.1-70b": size(8192, 28672, 80, 64, 128256, 131072, **_scaled(8.0)),
    "llama3.2-1b": size(2048, 8192, 16, 32, 128256, 131072, **_scaled(32.0), tie_word_embeddings=True),
    "llama3.2-3b": size(3072, 8192, 28, 24, 128256, 131072, **_scaled(32.0), tie_word_embeddings=True),
    "llama3.3-70b": size(8192, 28672, 80, 64, 128256, 131072, **_scaled(8.0)),
}

LLAMA = Family(
    name="llama",
    model_type="llama",
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    config=(
        *CONFIG,
        key("attention_bias", "qkv_bias", "output_bias", default=False),
        key("mlp_bias", default=False),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    # In how many parts the weights were trained; the arithmetic is the same.
    unused=("pretraining_tp", "max_sequence_length"),
    rules=RULES,
    sizes=SIZES,
)
