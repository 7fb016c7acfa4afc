"""Qwen 2, 2.5 (bias on queries, keys and values) and Qwen 3 dense (norms of queries and keys instead)."""

from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.config_rules import SlidingWindow, key
from ascendspeed_core.models.families.decoder import CONFIG, DROPOUTS, MUST_BE, RULES, size

_IDS = {"bos_token_id": 151643, "eos_token_id": 151643, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
_TIED = {**_IDS, "tie_word_embeddings": True}
_IDS_25 = {**_IDS, "rms_norm_eps": 1e-5}
_QWEN3 = {**_IDS, "head_dim": 128, "num_key_value_heads": 8}
_QWEN3_TIED = {**_QWEN3, "tie_word_embeddings": True}

QWEN2_SIZES = {
    "qwen2-0.5b": size(896, 4864, 24, 14, 151936, 131072, num_key_value_heads=2, **_TIED),
    "qwen2-1.5b": size(1536, 8960, 28, 12, 151936, 131072, num_key_value_heads=2, **_TIED),
    "qwen2-7b": size(3584, 18944, 28, 28, 152064, 131072, num_key_value_heads=4, **_IDS),
    "qwen2-72b": size(8192, 29568, 80, 64, 152064, 131072, num_key_value_heads=8, **_IDS_25),
    "qwen2.5-0.5b": size(896, 4864, 24, 14, 151936, 32768, num_key_value_heads=2, **_TIED),
    "qwen2.5-1.5b": size(1536, 8960, 28, 12, 151936, 131072, num_key_value_heads=2, **_TIED),
    "qwen2.5-3b": size(2048, 11008, 36, 16, 151936, 32768, num_key_value_heads=2, **_TIED),
    "qwen2.5-7b": size(3584, 18944, 28, 28, 152064, 131072, num_key_value_heads=4, **_IDS),
    "qwen2.5-14b": size(5120, 13824, 48, 40, 152064, 131072, num_key_value_heads=8, **_IDS_25),
    "qwen2.5-32b": size(5120, 27648, 64, 40, 152064, 131072, num_key_value_heads=8, **_IDS_25),
    "qwen2.5-72b": size(8192, 29568, 80, 64, 152064, 131072, num_key_value_heads=8, **_IDS_25),
}

QWEN3_SIZES = {
    "qwen3-0.6b": size(1024, 3072, 28, 16, 151936, 40960, **_QWEN3_TIED),
    "qwen3-1.7b": size(2048, 6144, 28, 16, 151936, 40960, **_QWEN3_TIED),
    "qwen3-4b": size(2560, 9728, 36, 32, 151936, 40960, **_QWEN3_TIED),
    "qwen3-8b": size(4096, 12288, 36, 32, 151936, 40960, **_QWEN3),
    "qwen3-14b": size(5120, 17408, 40, 40, 151936, 40960, **_QWEN3),
    "qwen3-32b": size(5120, 25600, 64, 64, 151936, 40960, **_QWEN3),
}

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architectures=("Qwen2ForCausalLM",),
    config=(*CONFIG, SlidingWindow()),
    fixed={"qkv_bias": True},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes=QWEN2_SIZES,
)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architectures=("Qwen3ForCausalLM",),
    config=(*CONFIG, SlidingWindow(), key("attention_bias", "qkv_bias", "output_bias", default=False)),
    fixed={"qk_norm": True},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes=QWEN3_SIZES,
)
