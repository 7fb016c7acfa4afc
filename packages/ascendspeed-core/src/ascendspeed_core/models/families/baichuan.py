"""Baichuan: LLaMA with queries, keys and values in one tensor; 13B has ALiBi, Baichuan 2 a normalised head.

The published code, not the config, tells the sizes apart: `BaiChuanForCausalLM` is the first 7B. Under
`BaichuanForCausalLM` a config with `max_position_embeddings` is a rotary 7B and one with `model_max_length` alone is a
13B with ALiBi; Baichuan 2 has 125,696 ids, or the key `z_loss_weight` that only its code writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Family, WeightRule
from ascendspeed_core.models.families.config_rules import Heads, whole_number
from ascendspeed_core.models.families.decoder import (
    EMBEDDING_RULES,
    HEAD_RULES,
    LAYER_RULES,
    MUST_BE,
    NUMBERS,
    SIZES,
    size,
)
from ascendspeed_core.models.families.packing import Packed

FIRST_7B, OTHERS = "BaiChuanForCausalLM", "BaichuanForCausalLM"
BAICHUAN_2_VOCABULARY = 125696

PACKED_RULES = tuple(
    WeightRule(
        f"layers.{{layer}}.attention.{name}_proj.weight",
        "model.layers.{layer}.self_attn.W_pack.weight",
        packed=Packed(part, "stacked"),
    )
    for part, name in enumerate(("q", "k", "v"))
)


class BaichuanKind:
    """Which of the four models it is."""

    keys: Sequence[str] = (
        "architectures",
        "max_position_embeddings",
        "model_max_length",
        "z_loss_weight",
        "normalised_head",
    )

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return positions, their limit and the head."""
        is_first = FIRST_7B in (hf.get("architectures") or [])
        is_rotary = is_first or hf.get("max_position_embeddings") is not None
        is_second = "z_loss_weight" in hf or hf.get("vocab_size") == BAICHUAN_2_VOCABULARY
        return {
            "position": "rotary" if is_rotary else "alibi",
            "max_position_embeddings": whole_number(
                hf, "max_position_embeddings" if is_rotary else "model_max_length"
            ),
            "normalised_head": bool(hf.get("normalised_head", is_second and not is_first)),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys by which it is read as the same; `normalised_head` is ours, others do not read it."""
        is_first = config.position == "rotary" and not config.normalised_head
        limit = "max_position_embeddings" if config.position == "rotary" else "model_max_length"
        written = {
            "architectures": [FIRST_7B if is_first else OTHERS],
            limit: config.max_position_embeddings,
            "normalised_head": config.normalised_head,
        }
        return written | ({"z_loss_weight": 0} if config.normalised_head else {})


_IDS = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _size(architecture: str, sizes: dict[str, Any], is_alibi: bool = False) -> dict[str, Any]:
    limit = {"model_max_length": sizes.pop("max_position_embeddings")} if is_alibi else {}
    return {"architectures": [architecture], **sizes, **limit, **_IDS}


BAICHUAN = Family(
    name="baichuan",
    model_type="baichuan",
    architectures=(OTHERS, FIRST_7B),
    config=(*SIZES, BaichuanKind(), *NUMBERS, Heads(is_grouped=False, writes_head_dim=False)),
    # The second loss term of Baichuan 2's code is not computed here.
    must_be={"hidden_act": MUST_BE["hidden_act"], "z_loss_weight": (0,)},
    rules=EMBEDDING_RULES + PACKED_RULES + LAYER_RULES + HEAD_RULES,
    sizes={
        "baichuan-7b": _size(FIRST_7B, size(4096, 11008, 32, 32, 64000, 4096)),
        "baichuan-13b": _size(OTHERS, size(5120, 13696, 40, 40, 64000, 4096), is_alibi=True),
        "baichuan2-7b": _size(OTHERS, size(4096, 11008, 32, 32, 125696, 4096)),
        "baichuan2-13b": _size(OTHERS, size(5120, 13696, 40, 40, 125696, 4096), is_alibi=True),
    },
)
