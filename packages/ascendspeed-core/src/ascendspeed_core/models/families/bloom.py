"""Bloom (BigScience, 2022): ALiBi, LayerNorm with a bias, a norm after the embedding, GELU, biases, tied head."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Family, WeightRule
from ascendspeed_core.models.families.config_rules import EndIds, Heads, key, whole_number
from ascendspeed_core.models.families.packing import Packed
from ascendspeed_data.errors import AscendSpeedError

_LAYER = "transformer.h.{layer}"


def _norm(ours: str, theirs: str) -> tuple[WeightRule, ...]:
    return tuple(WeightRule(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias"))


RULES = (
    WeightRule("embedding.weight", "transformer.word_embeddings.weight"),
    *_norm("embedding_norm", "transformer.word_embeddings_layernorm"),
    *_norm("layers.{layer}.attention_norm", f"{_LAYER}.input_layernorm"),
    *(
        WeightRule(
            f"layers.{{layer}}.attention.{name}_proj.{kind}",
            f"{_LAYER}.self_attention.query_key_value.{kind}",
            packed=Packed(part, "by_head"),
        )
        for kind in ("weight", "bias")
        for part, name in enumerate(("q", "k", "v"))
    ),
    WeightRule("layers.{layer}.attention.o_proj.weight", f"{_LAYER}.self_attention.dense.weight"),
    WeightRule("layers.{layer}.attention.o_proj.bias", f"{_LAYER}.self_attention.dense.bias"),
    *_norm("layers.{layer}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
    WeightRule("layers.{layer}.mlp.up_proj.weight", f"{_LAYER}.mlp.dense_h_to_4h.weight"),
    WeightRule("layers.{layer}.mlp.up_proj.bias", f"{_LAYER}.mlp.dense_h_to_4h.bias"),
    WeightRule("layers.{layer}.mlp.down_proj.weight", f"{_LAYER}.mlp.dense_4h_to_h.weight"),
    WeightRule("layers.{layer}.mlp.down_proj.bias", f"{_LAYER}.mlp.dense_4h_to_h.bias"),
    *_norm("final_norm", "transformer.ln_f"),
    WeightRule("output_head.weight", "lm_head.weight", tied=True),
)


class InnerSize:
    """The MLP is four times as wide as the model; the config has a key for it that no code reads."""

    keys: Sequence[str] = ("n_inner",)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the width, or refuse another one."""
        width = 4 * whole_number(hf, "hidden_size", "n_embed")
        if hf.get("n_inner") not in (None, width):
            raise AscendSpeedError(
                f"n_inner={hf['n_inner']} is not four times the hidden size, {width}; Bloom knows no other"
            )
        return {"ffn_hidden_size": width}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return nothing: the width follows."""
        return {}


def _size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 250880, "hidden_size": hidden, "n_layer": layers, "n_head": heads, "seq_length": 2048,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    }  # fmt: skip


BLOOM = Family(
    name="bloom",
    model_type="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    config=(
        key("vocab_size"),
        key("hidden_size", also=("n_embed",)),
        key("n_layer", "num_layers", also=("num_hidden_layers",)),
        key("n_head", "num_attention_heads", also=("num_attention_heads",)),
        # ALiBi has no limit of its own; the published models were trained on 2,048 tokens.
        key("seq_length", "max_position_embeddings", default=2048),
        key("layer_norm_epsilon", "norm_epsilon", default=1e-5),
        key("initializer_range", default=0.02),
        key("tie_word_embeddings", default=True),
        key("bos_token_id", default=None),
        key("pad_token_id", default=None),
        EndIds(),
        InnerSize(),
        Heads(is_grouped=False, writes_head_dim=False, heads="n_head"),
    ),
    fixed={
        "norm": "layernorm",
        "position": "alibi",
        "mlp": "gelu",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "embedding_norm": True,
    },
    must_be={
        "apply_residual_connection_post_layernorm": (False,),
    },
    dropouts=("hidden_dropout", "attention_dropout"),
    # How the published weights were trained and may be computed; the arithmetic is the same.
    unused=(
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "pretraining_tp",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "slow_but_exact",
    ),
    prefix="transformer.",
    rules=RULES,
    sizes={
        "bloom-560m": _size(1024, 24, 16),
        "bloom-7b1": _size(4096, 30, 32),
        "bloom-176b": _size(14336, 70, 112),
    },
)
