"""What megatron-core gets of a run: the fields of its configs that follow from ours.

Settings that give wrong numbers, or none, are not left to a user:

- `batch_p2p_comm` is off where ranks hold several stages: with two ranks, two sends between them would cross.
- `overlap_p2p_comm` and `deallocate_pipeline_outputs` are never on together: what is sent may be gone before it is.
- Losses are shares of a sum over the global batch, so that nothing is divided (`calculate_per_token_loss`).
- `variable_seq_lengths` is on only where micro-batches differ in shape. Between interleaved stages its messages cross,
  or wait for each other for ever; `config.megatron` refuses that. It wants `alltoall` as dispatcher, experts or not.
"""

from typing import Any

import torch

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.megatron import LayerOptions
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.recompute import RecomputeConfig
from ascendspeed_core.optim.megatron.layers import activation_of


def transformer_fields(
    model: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    recompute: RecomputeConfig,
    stages_per_rank: int,
    shapes_vary: bool,
) -> dict[str, Any]:
    """Return the fields of `TransformerConfig` that the run sets.

    Args:
        model: the architecture.
        layout: of all ranks.
        dtype: of the weights.
        recompute: what is computed again.
        stages_per_rank: of the pipeline.
        shapes_vary: micro-batches differ in their number or length of samples.
    """
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm" if model.norm == "rmsnorm" else "LayerNorm",
        "layernorm_epsilon": model.norm_epsilon,
        "gated_linear_unit": model.is_gated,
        "activation_func": activation_of(model),
        "add_bias_linear": model.mlp_bias,
        "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm,
        "softmax_scale": model.attention_scale,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "perform_initialization": False,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
    }
    if model.experts is not None:
        fields |= _expert_fields(model, model.experts, dtype)
    if model.kv_latent_dim is not None:
        fields |= _latent_fields(model)
    return (
        fields
        | _layout_fields(layout, dtype, stages_per_rank, shapes_vary)
        | _recompute_fields(recompute)
        | _KERNELS
    )


def layer_fields(model: ModelConfig, options: LayerOptions) -> dict[str, Any]:
    """Return the fields of `TransformerConfig` that say what layers compute besides what the model says."""
    fields: dict[str, Any] = {}
    if model.experts is not None:
        fields["moe_expert_capacity_factor"] = options.expert_capacity
    if options.fp8 is not None:
        fields |= {"fp8": options.fp8, "fp8_recipe": options.fp8_recipe}
    return fields


def _expert_fields(model: ModelConfig, experts: Experts, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of experts; their routers are this project's, see `routers`."""
    return {
        "num_moe_experts": experts.count,
        "moe_layer_freq": [int(model.has_experts(layer)) for layer in range(model.num_layers)],
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        "moe_router_dtype": "fp64" if dtype == torch.float64 else "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_grouped_gemm": False,
    }


def _latent_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of multi-head latent attention; its positions are this project's, see `latent_attention`."""
    assert model.rotary_dim is not None
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_latent_dim,
        "kv_lora_rank": model.kv_latent_dim,
        "qk_head_dim": model.head_dim - model.rotary_dim,
        "qk_pos_emb_head_dim": model.rotary_dim,
        "v_head_dim": model.value_head_dim,
        "rope_type": "rope",
    }


_KERNELS: dict[str, Any] = {
    # They need Apex, Transformer Engine or a compiler.
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}


def _layout_fields(
    layout: Layout, dtype: torch.dtype, stages_per_rank: int, shapes_vary: bool
) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": stages_per_rank if stages_per_rank > 1 else None,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
        "pipeline_dtype": dtype,
        "batch_p2p_comm": stages_per_rank == 1,
        "overlap_p2p_comm": False,
        "deallocate_pipeline_outputs": False,
        "variable_seq_lengths": shapes_vary and layout.pp > 1,
        "moe_token_dispatcher_type": "alltoall",
        "calculate_per_token_loss": True,
    }


def _recompute_fields(recompute: RecomputeConfig) -> dict[str, Any]:
    if not recompute.checkpoint_activations:
        return {}
    if recompute.checkpoint_policy == "attention":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    is_block = recompute.checkpoint_policy == "block"
    return {
        "recompute_granularity": "full",
        "recompute_method": "block" if is_block else "uniform",
        "recompute_num_layers": recompute.checkpoint_block_layer if is_block else 1,
    }


def optimizer_fields(config: OptimizerConfig, dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
    """Return the fields of its `OptimizerConfig` that the run sets.

    Args:
        config: update rule and clipping.
        dtype: of the weights.
        layout: of all ranks.
    """
    return {
        "optimizer": "sgd" if config.optimizer == "sgd" else "adam",
        "lr": config.lr,
        "min_lr": config.min_lr,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_eps": config.adam_eps,
        "sgd_momentum": config.sgd_momentum,
        "clip_grad": config.clip_grad,
        "params_dtype": dtype,
        "fp16": dtype == torch.float16,
        "bf16": dtype == torch.bfloat16,
        # The run's own scaler says the scale of each step.
        "loss_scale": 1.0 if dtype == torch.float16 else None,
        "use_distributed_optimizer": layout.sharded_optimizer,
        "overlap_param_gather": _gathers_late(layout),
    }


def ddp_fields(dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
    """Return the fields of `DistributedDataParallelConfig` that the run sets.

    Args:
        dtype: of the weights.
        layout: of all ranks.
    """
    return {
        "use_distributed_optimizer": layout.sharded_optimizer,
        # 16-bit gradients are added up in fp32; fp64 ones would be narrowed.
        "grad_reduce_in_fp32": dtype in (torch.float16, torch.bfloat16),
        "overlap_grad_reduce": layout.overlap_grad_reduce,
        "overlap_param_gather": _gathers_late(layout),
        "bucket_size": layout.bucket_elements,
    }


def _gathers_late(layout: Layout) -> bool:
    """Whether weights are gathered beside the forward; without early reductions there is one bucket, all of them."""
    return layout.sharded_optimizer and layout.overlap_param_gather and layout.overlap_grad_reduce
