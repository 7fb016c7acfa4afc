"""Which models each external program computes as this project does; others are not written for it."""

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.weights.external.config_of_arguments import llama3_by_factor
from ascendspeed_core.weights.source import CheckpointError


def llama3_scaling(config: ModelConfig) -> RotaryScaling | None:
    """Return the rope scaling that Megatron-LM means by a factor: Llama 3.1's, with its constants."""
    if config.rotary_scaling is None:
        return None
    return llama3_by_factor(config.rotary_scaling.factor)


def _in_no_format(config: ModelConfig) -> dict[str, bool]:
    """Return what neither program computes, or nobody has compared yet, and whether a model has it."""
    experts = config.experts
    return {
        "experts with biases": experts is not None and experts.biases,
        "experts with clamped SwiGLU": experts is not None and experts.clamp is not None,
        "multi-head latent attention": config.kv_latent_dim is not None,
        "windows in some layers": config.window_layers is not None,
        "rotary positions in some layers": config.rotary_layers is not None,
        "rotary positions in a part of each head": config.rotary_dim is not None,
        "interleaved rotary positions": config.rotary_interleaved,
        "rotary base of layers with a window": config.window_rotary_base is not None,
        "scale of attention's scores": config.attention_scale is not None,
        "soft-capped scores": config.attention_softcap is not None,
        "attention sinks": config.attention_sinks,
        "norms of queries and keys but one for all heads": config.qk_norm and config.qk_norm_kind != "shared",
        "norms after attention and MLP": config.norm_placement != "before",
        "LayerNorm without bias": config.norm == "layernorm" and not config.norm_bias,
        "norms that multiply by 1 + weight": config.norm_unit_offset,
        "attention and MLP side by side": config.parallel_blocks,
        "embedding multiplier": config.embedding_multiplier != 1,
        "residual multiplier": config.residual_multiplier != 1,
        "logits multiplier": config.logits_multiplier != 1,
        "soft-capped logits": config.logits_softcap is not None,
        f"{config.mlp} MLP": config.mlp not in ("swiglu", "gelu"),
    }


def _of_experts(experts: Experts) -> dict[str, bool]:
    """Return what of the choice of experts megatron-core does otherwise, see its `topk_routing_with_score_function`."""
    best_of_group = 2 if experts.group_score == "top2" else 1
    return {
        "groups of experts chosen like that": experts.groups > 1
        and experts.per_token // experts.groups_per_token != best_of_group,
        "sigmoid scores that are not divided by their sum": experts.score == "sigmoid"
        and not experts.normalised
        and experts.per_token > 1,
        "bias of softmax scores": experts.score == "softmax" and experts.score_bias,
    }


def check_supported(kind: str, config: ModelConfig) -> None:
    """Raise `CheckpointError` when the format's own program would compute another thing with these weights."""
    if config.experts is not None and kind == "ascendspeed":
        raise CheckpointError(
            f"--to {kind}: experts are not written in this format; choose --to megatron, torch_dist, native or "
            "huggingface"
        )
    is_gpt = config.mlp == "gelu"
    biases = {config.qkv_bias, config.output_bias, config.mlp_bias}
    if kind == "ascendspeed":
        wanted = {
            "norms of queries and keys": config.qk_norm,
            "rope scaling": config.rotary_scaling is not None,
            "sliding window": config.sliding_window is not None,
            "normalised head": config.normalised_head,
            "LLaMA with LayerNorm": not is_gpt and config.norm != "rmsnorm",
            "LLaMA with a norm behind the embedding": not is_gpt and config.embedding_norm,
            "LLaMA with biases in the MLP": not is_gpt and config.mlp_bias,
            "bias on queries, keys and values without one on the output": config.qkv_bias
            != config.output_bias,
            "GPT with an MLP of this kind and rotary positions": is_gpt and config.position == "rotary",
            "GPT without LayerNorm and biases": is_gpt and (config.norm == "rmsnorm" or biases != {True}),
        }
    else:
        wanted = {
            "ALiBi": config.position == "alibi",
            "norm behind the embedding": config.embedding_norm,
            "normalised head": config.normalised_head,
            "rope scaling but Llama 3's": config.rotary_scaling not in (None, llama3_scaling(config)),
            "bias on attention's output without one in the MLP": config.output_bias != config.mlp_bias,
        }
        wanted |= _of_experts(config.experts) if config.experts is not None else {}
    lacks = [what for what, is_wanted in (wanted | _in_no_format(config)).items() if is_wanted]
    if lacks:
        program = "AscendSpeed of 2023" if kind == "ascendspeed" else "megatron-core's GPTModel"
        raise CheckpointError(
            f"--to {kind}: {program} has no {' and no '.join(lacks)}, it would compute another model from these "
            "weights; choose --to native or --to huggingface"
        )
