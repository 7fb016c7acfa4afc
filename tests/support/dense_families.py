"""Tiny reference models of the dense families of today: transformers' own classes.

InternLM 2 and MiniCPM have none. Their published code computes what a LLaMA and a Granite compute, with other names and
other keys: those are renamed here by the arithmetic of that code.
"""

from collections.abc import Mapping
from typing import Any

import torch

from support.families import SIZES, YARN, Reference

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = [SLIDING, FULL, SLIDING]
_EAGER = {"attn_implementation": "eager"}
"""The only attention of transformers that caps scores."""


def internlm2_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a LLaMA's tensors as `modeling_internlm2.py` reads them.

    `wqkv` is rearranged as `(h gs d)` with `gs = 2 + heads / key-value heads`: of each group the queries, then key and
    value. `w1` is the gate, `w3` the up projection.
    """
    words = {
        "model.embed_tokens": "model.tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2",
    }  # fmt: skip
    made: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if any(f"{part}_proj" in name for part in "kv"):
            continue
        if "q_proj" in name:
            others = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "kv"]
            groups = SIZES["num_key_value_heads"]
            parts = [part.unflatten(0, (groups, -1)) for part in (tensor, *others)]
            made[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts, 1).flatten(0, 1)
            continue
        for theirs, published in words.items():
            name = name.replace(theirs, published)
        made[name] = tensor
    return made


def _reference(family: str, word: str, written: dict[str, Any] | None = None, **options: Any) -> Reference:
    return Reference(family, (f"{word}Config", f"{word}ForCausalLM"), SIZES | _EAGER | options, written or {})


_MINICPM = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 8}
_WITHOUT = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
)
_LATENT = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "num_key_value_heads": 8,
    "first_k_dense_replace": 3,
}  # fmt: skip
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0}

DENSE_REFERENCES: dict[str, Reference] = {
    "Qwen 2 with windows in its last layers": _reference(
        "qwen2", "Qwen2", use_sliding_window=True, sliding_window=7, max_window_layers=1,
    ),
    "InternLM 2": Reference(
        "internlm2",
        ("LlamaConfig", "LlamaForCausalLM"),
        SIZES | {"attention_bias": True, "rope_theta": 1e6},
        {
            "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": True,
            "rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0},
            "attention_bias": None, "mlp_bias": None, "head_dim": None,
        },
        internlm2_names,
    ),
    "InternLM 3": Reference(
        "internlm3",
        ("LlamaConfig", "LlamaForCausalLM"),
        SIZES | {"attention_bias": True, "mlp_bias": True},
        {
            "architectures": ["InternLM3ForCausalLM"], "model_type": "internlm3", "bias": True, "qkv_bias": True,
            "rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
            "attention_bias": None, "mlp_bias": None,
        },
    ),
    "Gemma 2": _reference(
        "gemma2", "Gemma2", head_dim=6, layer_types=KINDS, sliding_window=7, query_pre_attn_scalar=9,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0, hidden_activation="gelu_pytorch_tanh",
    ),
    "Gemma 3": Reference(
        "gemma3",
        ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        SIZES
        | _EAGER
        | {
            "head_dim": 6, "layer_types": KINDS, "sliding_window": 7, "query_pre_attn_scalar": 9, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {},
    ),
    "Phi 3": _reference("phi3", "Phi3", sliding_window=7),
    "Phi 4 with part of a head": _reference(
        "phi3", "Phi3", num_attention_heads=4, num_key_value_heads=2,
        rope_parameters=_PARTIAL | {"partial_rotary_factor": 0.75}, partial_rotary_factor=0.75,
    ),
    "OLMo 2": _reference("olmo2", "Olmo2", rope_theta=500000.0),
    "OLMo 3": _reference(
        "olmo3", "Olmo3", layer_types=KINDS, sliding_window=7, rope_theta=500000.0, rope_scaling=dict(YARN),
    ),
    "GLM": _reference("glm", "Glm", head_dim=8),
    "GLM 4": _reference("glm4", "Glm4", head_dim=8, attention_bias=False),
    "Granite": _reference(
        "granite", "Granite", embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.4,
        logits_scaling=3.0, tie_word_embeddings=True,
    ),
    "SmolLM 3": _reference("smollm3", "SmolLM3", no_rope_layers=[1, 0, 1]),
    "MiniCPM": Reference(
        "minicpm",
        ("GraniteConfig", "GraniteForCausalLM"),
        SIZES
        | {
            "embedding_multiplier": 12.0, "residual_multiplier": 1.4 / 3**0.5, "logits_scaling": 32 / 8,
            "attention_multiplier": 4**-0.5, "tie_word_embeddings": True,
        },
        {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "mlp_bias": None} | _MINICPM | _WITHOUT,
    ),
    "Command R": _reference("cohere", "Cohere", logit_scale=0.3, attention_bias=True),
    "Command R+": _reference("cohere", "Cohere", logit_scale=0.8333333333333334, use_qk_norm=True),
    "Command R7B": _reference("cohere2", "Cohere2", logit_scale=0.25, layer_types=KINDS, sliding_window=7),
    "StableLM": _reference(
        "stablelm", "StableLm", hidden_size=64, partial_rotary_factor=0.25, use_qkv_bias=True,
    ),
    "StableLM 2 12B": _reference(
        "stablelm", "StableLm", hidden_size=64, partial_rotary_factor=0.5, qk_layernorm=True,
        use_parallel_residual=True,
    ),
    "DeepSeek-V3 without experts": _reference(
        "deepseek_v3", "DeepseekV3", **_LATENT, q_lora_rank=24, attention_bias=True,
        rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
    ),
    "DeepSeek-V2 without experts": _reference(
        "deepseek_v2", "DeepseekV2", **_LATENT, q_lora_rank=None,
        rope_scaling=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "Nemotron": _reference("nemotron", "Nemotron", head_dim=8, mlp_bias=True, attention_bias=True),
}  # fmt: skip
"""The second layer of three is the odd one: without a window, or without rotary positions."""
