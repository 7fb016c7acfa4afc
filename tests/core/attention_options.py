"""Changes of `tiny_config` that together have every option of attention, norms and multipliers."""

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "windows, caps and sinks": {
        "sliding_window": 7, "window_layers": (0, 2), "window_rotary_base": 500.0, "attention_softcap": 1.5,
        "logits_softcap": 2.0, "attention_scale": 0.7, "attention_sinks": True, "norm_placement": "both",
        "norm_unit_offset": True, "mlp": "geglu", "qk_norm": True, "embedding_multiplier": 5.6,
        "tie_word_embeddings": True, "vocab_size": 127,
        "rotary_scaling": {"kind": "linear", "factor": 8.0},
    },
    "norms over all heads": {
        "norm_placement": "after", "qk_norm": True, "qk_norm_kind": "all_heads", "rotary_layers": (0, 1, 3),
        "residual_multiplier": 0.4, "logits_multiplier": 0.5, "qkv_bias": True,
        "rotary_scaling": {
            "kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.8,
            "mscale_all_dim": 0.5, "truncate": False,
        },
    },
    "blocks side by side": {
        "norm": "layernorm", "norm_bias": False, "parallel_blocks": True, "qk_norm": True, "qk_norm_kind": "by_head",
        "rotary_interleaved": True, "rotary_dim": 2, "mlp": "relu2", "attention_sinks": True, "attention_scale": 0.3,
    },
    "latents": {
        "head_dim": 6, "num_key_value_heads": 8, "rotary_dim": 4, "kv_latent_dim": 12, "q_latent_dim": 10,
        "value_head_dim": 5, "rotary_interleaved": True, "qkv_bias": True, "output_bias": True,
        "rotary_scaling": {
            "kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
    },
}  # fmt: skip
