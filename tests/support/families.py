"""Tiny reference models of every family: transformers' own classes, and Baichuan as its published code reads."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from support.baichuan import BaichuanForCausalLM, BaichuanShape
from support.versions import skip_before

LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SIZES = {
    "vocab_size": 125, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
"""Three layers make uneven stages, 125 ids uneven parts of the vocabulary."""


@dataclass(frozen=True)
class Reference:
    """A family's reference.

    Attributes:
        family: whose table reads it.
        classes: transformers' config and model, by name; or `None` for Baichuan.
        options: changes of the config.
        written: changes of the config.json after transformers wrote it: the published name, and its own keys.
        renamed: the model's tensors as the published files have them, from those of transformers' class.
    """

    family: str
    classes: tuple[str, str] | None
    options: dict[str, Any]
    written: dict[str, Any]
    renamed: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict

    def save(self, folder: Path, seed: int = 0) -> nn.Module:
        """Make a random model, save it as a Hugging Face folder, and return it."""
        torch.manual_seed(seed)
        model = self._transformers(folder) if self.classes else self._baichuan(folder)
        config = json.loads((folder / "config.json").read_text()) | self.written
        removed = [key for key, value in self.written.items() if value is None]
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key not in removed})
        )
        return model.eval()

    def _transformers(self, folder: Path) -> nn.Module:
        import transformers

        assert self.classes is not None
        config_name, model_name = self.classes
        if "swiglu_limit" in self.options:
            skip_before("transformers", "5.0", "has a clamp of 7 in gpt-oss, whatever its config says")
        # All weights are drawn below; those of norms without a bias transformers 4 cannot draw.
        is_4 = transformers.__version__.startswith("4.")
        with transformers.modeling_utils.no_init_weights() if is_4 else nullcontext():
            model: Any = getattr(transformers, model_name)(getattr(transformers, config_name)(**self.options))
        _fill(model)
        model.save_pretrained(folder)
        if self.renamed is not dict:
            weights = folder / "model.safetensors"
            tensors = {name: tensor.contiguous() for name, tensor in self.renamed(load_file(weights)).items()}
            save_file(tensors, weights, {"format": "pt"})
        reference: nn.Module = model
        return reference

    def _baichuan(self, folder: Path) -> nn.Module:
        model = BaichuanForCausalLM(BaichuanShape(**self.options))
        _fill(model)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        sizes = {key: value for key, value in self.options.items() if not key.startswith(("is_", "has_"))}
        common = {"model_type": "baichuan", "hidden_act": "silu", "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(sizes | common))
        return model


def _fill(model: nn.Module) -> None:
    """Draw all weights, norms about 1 and biases too, so that nothing that is left out goes unseen."""
    for name, parameter in model.named_parameters():
        is_norm_weight = parameter.dim() == 1 and name.endswith("weight")
        nn.init.normal_(parameter, 1.0 if is_norm_weight else 0.0, 0.08 if is_norm_weight else 0.15)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, 0.0, 0.15)


def rotary_of(config: Any) -> Mapping[str, Any]:
    """Return type and base of the rotary positions of a config of transformers, 4 or 5."""
    stated: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    if stated is None:
        stated = {"rope_type": "default", **(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    return stated


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Run a reference: [B, S] -> [B, S, V]."""
    out: Any = model(tokens)
    logits: torch.Tensor = out if isinstance(out, torch.Tensor) else out.logits
    return logits


def _llama(**options: Any) -> dict[str, Any]:
    return SIZES | options


_LLAMA = ("LlamaConfig", "LlamaForCausalLM")
_MULTI_HEAD = {"num_key_value_heads": 8}
_BAICHUAN = {
    "vocab_size": 125, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "rms_norm_eps": 1e-6,
}  # fmt: skip


def _baichuan(architecture: str, is_alibi: bool, has_norm_head: bool) -> Reference:
    limit = {"model_max_length" if is_alibi else "max_position_embeddings": 64}
    mark = {"z_loss_weight": 0} if has_norm_head else {}
    options = _BAICHUAN | {"is_alibi": is_alibi, "has_norm_head": has_norm_head}
    return Reference("baichuan", None, options, {"architectures": [architecture], **limit, **mark})


REFERENCES: dict[str, Reference] = {
    "LLaMA": Reference("llama", _LLAMA, _llama(**_MULTI_HEAD), {}),
    "LLaMA 2 70B": Reference("llama", _LLAMA, _llama(rms_norm_eps=1e-5), {}),
    "Llama 3.2": Reference(
        "llama", _LLAMA, _llama(tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=LLAMA_3), {}
    ),
    "LLaMA with all biases": Reference("llama", _LLAMA, _llama(attention_bias=True, mlp_bias=True), {}),
    "Mistral": Reference(
        "mistral", ("MistralConfig", "MistralForCausalLM"), _llama(sliding_window=7, head_dim=6), {}
    ),
    "Qwen 2": Reference(
        "qwen2", ("Qwen2Config", "Qwen2ForCausalLM"), _llama(tie_word_embeddings=True, rope_theta=1e6), {}
    ),
    "Qwen 2.5 with YaRN": Reference(
        "qwen2", ("Qwen2Config", "Qwen2ForCausalLM"), _llama(rope_theta=1e6, rope_scaling=dict(YARN)), {}
    ),
    "Qwen 3": Reference("qwen3", ("Qwen3Config", "Qwen3ForCausalLM"), _llama(head_dim=6, rope_theta=1e6), {}),
    "InternLM": Reference(
        "internlm",
        _LLAMA,
        _llama(**_MULTI_HEAD, attention_bias=True),
        {
            "architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True,
            "attention_bias": None, "mlp_bias": None, "num_key_value_heads": None, "head_dim": None,
            "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
        },
    ),
    "Aquila": Reference(
        "aquila",
        _LLAMA,
        _llama(**_MULTI_HEAD),
        {"architectures": ["AquilaModel"], "model_type": "aquila", "attention_bias": None, "mlp_bias": None},
    ),
    "Baichuan 7B": _baichuan("BaiChuanForCausalLM", is_alibi=False, has_norm_head=False),
    "Baichuan 13B": _baichuan("BaichuanForCausalLM", is_alibi=True, has_norm_head=False),
    "Baichuan 2 7B": _baichuan("BaichuanForCausalLM", is_alibi=False, has_norm_head=True),
    "Baichuan 2 13B": _baichuan("BaichuanForCausalLM", is_alibi=True, has_norm_head=True),
    "Bloom": Reference(
        "bloom",
        ("BloomConfig", "BloomForCausalLM"),
        {"vocab_size": 125, "hidden_size": 48, "n_layer": 3, "n_head": 12, "pad_token_id": 3},
        {"seq_length": 64},
    ),
}  # fmt: skip
"""Bloom has 12 heads: no power of 2, like the 112 of its largest."""

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

_SIGMOID = {
    "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.7, "first_k_dense_replace": 1,
}  # fmt: skip


def _latent(**options: Any) -> dict[str, Any]:
    scaling = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}
    sizes = {"kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
    return (
        _llama(
            **_MULTI_HEAD, **sizes, moe_intermediate_size=24, rope_scaling=scaling, first_k_dense_replace=1
        )
        | options
    )


EXPERT_REFERENCES: dict[str, Reference] = {
    "Mixtral": Reference(
        "mixtral", ("MixtralConfig", "MixtralForCausalLM"), _llama(num_local_experts=4, num_experts_per_tok=2), {}
    ),
    "Qwen2-MoE": Reference(
        "qwen2_moe",
        ("Qwen2MoeConfig", "Qwen2MoeForCausalLM"),
        _llama(**_EXPERTS, shared_expert_intermediate_size=40, mlp_only_layers=[1]),
        {},
    ),
    "Qwen3-MoE": Reference(
        "qwen3_moe",
        ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        _llama(**_EXPERTS, head_dim=6, norm_topk_prob=True, decoder_sparse_step=2),
        {},
    ),
    "DeepSeek-V2": Reference(
        "deepseek_v2",
        ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
        _latent(
            n_routed_experts=8, n_shared_experts=2, topk_method="group_limited_greedy", n_group=4, topk_group=2,
            num_experts_per_tok=3, routed_scaling_factor=1.7, q_lora_rank=None,
        ),
        {},
    ),
    "DeepSeek-V3": Reference(
        "deepseek_v3", ("DeepseekV3Config", "DeepseekV3ForCausalLM"), _latent(**_SIGMOID, q_lora_rank=24), {}
    ),
    "Kimi-K2": Reference(
        "deepseek_v3",
        ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
        _latent(**_SIGMOID | {"n_group": 1, "topk_group": 1}, q_lora_rank=24),
        {"model_type": "kimi_k2"},
    ),
    "GLM-4.5": Reference(
        "glm4_moe",
        ("Glm4MoeConfig", "Glm4MoeForCausalLM"),
        _llama(**_SIGMOID, moe_intermediate_size=24, head_dim=8, use_qk_norm=True, attention_bias=True),
        {},
    ),
    "gpt-oss": Reference(
        "gpt_oss",
        ("GptOssConfig", "GptOssForCausalLM"),
        _llama(
            num_local_experts=4, num_experts_per_tok=2, head_dim=6, sliding_window=7, swiglu_limit=0.5,
            rope_theta=150000.0, rope_scaling=YARN | {"truncate": False},
        ),
        {},
    ),
}  # fmt: skip
"""Families with experts."""
