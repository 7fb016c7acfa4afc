"""The arguments that external checkpoints store beside the weights, under their trainer's names."""

from argparse import Namespace
from typing import Any

import torch

from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.config.model import ModelConfig


def megatron_args(plan: WritePlan, config: ModelConfig, dtype: torch.dtype) -> Namespace:
    """Return the arguments that the trainer of that format compares with its own."""
    layout = plan.layout
    common: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": plan.vocabulary_rows(config),
        "make_vocab_size_divisible_by": plan.vocabulary_multiple,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "num_layers_per_virtual_pipeline_stage": len(layout.chunks[0][0]) if layout.vpp > 1 else None,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        "init_method_std": config.initializer_range,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "tokenizer_type": None,
    }
    if plan.kind == "ascendspeed":
        common |= {
            "position_embedding_type": "alibi" if config.position == "alibi" else "absolute",
            "layernorm_epsilon": config.norm_epsilon,
            "embed_layernorm": config.embedding_norm,
            "mlp_layer_fusion": plan.merged_mlp,
        }
        return Namespace(**common)
    counts = [len(layers) for stage in layout.chunks for layers in stage]
    even = len(set(counts)) == 1
    common |= {
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "rotary_base": config.rotary_base,
        "rotary_percent": 1.0,
        "use_rope_scaling": config.rotary_scaling is not None,
        "rope_scaling_factor": config.rotary_scaling.factor if config.rotary_scaling else 8.0,
        "window_size": (config.sliding_window - 1, 0) if config.sliding_window else None,
        "normalization": "RMSNorm" if config.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": config.norm_epsilon,
        "layernorm_epsilon": config.norm_epsilon,
        "swiglu": config.mlp == "swiglu",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "add_bias_linear": config.output_bias,
        "add_qkv_bias": config.qkv_bias,
        "qk_layernorm": config.qk_norm,
        "decoder_first_pipeline_num_layers": None if even else counts[0],
        "decoder_last_pipeline_num_layers": None if even else counts[-1],
        "transformer_impl": "transformer_engine" if plan.transformer_engine else "local",
        "num_experts": None,
    }
    return Namespace(**common | _expert_args(plan, config))


def _expert_args(plan: WritePlan, config: ModelConfig) -> dict[str, Any]:
    """Return the arguments that say what experts there are and how they are chosen."""
    experts = config.experts
    if experts is None:
        return {}
    is_softmax = experts.score == "softmax"
    routed = [config.has_experts(layer) for layer in range(config.num_layers)]
    return {
        "num_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # A list, even of ones, lets megatron-core store each layer by itself.
        "moe_layer_freq": 1 if all(routed) else [int(has_experts) for has_experts in routed],
        "moe_router_topk": experts.per_token,
        "moe_router_num_groups": experts.groups if experts.groups > 1 else None,
        "moe_router_group_topk": experts.groups_per_token if experts.groups > 1 else None,
        # A softmax over all, then over the sum of the chosen, is a softmax over the chosen.
        "moe_router_pre_softmax": is_softmax and not experts.normalised and not experts.score_after_choice,
        "moe_router_score_function": experts.score,
        "moe_router_enable_expert_bias": experts.score_bias,
        "moe_router_topk_scaling_factor": None if experts.scaling == 1 else experts.scaling,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_grouped_gemm": plan.transformer_engine,
        "expert_model_parallel_size": plan.layout.ep,
        "expert_tensor_parallel_size": plan.layout.tp,
    }
