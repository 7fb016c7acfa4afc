"""LLaMA (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention from LLaMA 2 70B on."""

from typing import Any

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Family, WeightRule
from ascendspeed_data.errors import AscendSpeedError

_LAYER = "model.layers.{layer}"

RULES = (
    WeightRule("embedding.weight", "model.embed_tokens.weight", axis=0),
    WeightRule("layers.{layer}.attention_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    WeightRule("layers.{layer}.attention.q_proj.weight", f"{_LAYER}.self_attn.q_proj.weight", axis=0),
    WeightRule("layers.{layer}.attention.k_proj.weight", f"{_LAYER}.self_attn.k_proj.weight", axis=0),
    WeightRule("layers.{layer}.attention.v_proj.weight", f"{_LAYER}.self_attn.v_proj.weight", axis=0),
    WeightRule("layers.{layer}.attention.o_proj.weight", f"{_LAYER}.self_attn.o_proj.weight", axis=1),
    WeightRule("layers.{layer}.mlp_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
    WeightRule("layers.{layer}.mlp.gate_proj.weight", f"{_LAYER}.mlp.gate_proj.weight", axis=0),
    WeightRule("layers.{layer}.mlp.up_proj.weight", f"{_LAYER}.mlp.up_proj.weight", axis=0),
    WeightRule("layers.{layer}.mlp.down_proj.weight", f"{_LAYER}.mlp.down_proj.weight", axis=1),
    WeightRule("final_norm.weight", "model.norm.weight"),
    WeightRule("output_head.weight", "lm_head.weight", axis=0, tied=True),
)

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, 0.0),
    "pretraining_tp": (1,),
}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Read a Hugging Face `LlamaConfig`; both places of the rotary settings (transformers 4 and 5) are known.

    Raises:
        AscendSpeedError: a key is missing, or asks for something this family does not do.
    """
    for key, allowed in _MUST_BE.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise AscendSpeedError(
                f"config.json: {key}={hf[key]!r} is not supported for llama; only {allowed[0]!r} is"
            )
    rotary = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if rotary.get("rope_type", rotary.get("type", "default")) != "default":
        raise AscendSpeedError(f"config.json: rope scaling {rotary!r} is not supported; only the default is")
    heads = _number(hf, "num_attention_heads")
    eos = hf.get("eos_token_id")
    return validate(
        ModelConfig,
        {
            "family": "llama",
            "vocab_size": _number(hf, "vocab_size"),
            "hidden_size": _number(hf, "hidden_size"),
            "ffn_hidden_size": _number(hf, "intermediate_size"),
            "num_layers": _number(hf, "num_hidden_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or _number(hf, "hidden_size") // heads,
            "max_position_embeddings": hf.get("max_position_embeddings", 2048),
            "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
            "rotary_base": rotary.get("rope_theta", hf.get("rope_theta", 10000.0)),
            "tie_word_embeddings": hf.get("tie_word_embeddings", False),
            "initializer_range": hf.get("initializer_range", 0.02),
            "bos_token_id": hf.get("bos_token_id"),
            "eos_token_ids": tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
            "pad_token_id": hf.get("pad_token_id"),
        },
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the `config.json` that transformers reads as the same model."""
    eos = list(config.eos_token_ids)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
    }


def _number(hf: dict[str, Any], key: str) -> int:
    if not isinstance(hf.get(key), int):
        raise AscendSpeedError(f"config.json: {key}={hf.get(key)!r} is not a number; a LLaMA config has it")
    return int(hf[key])


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    write_config=write_config,
    rules=RULES,
)
