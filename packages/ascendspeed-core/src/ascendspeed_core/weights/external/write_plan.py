"""What is to be written: layout, names, packing, filling; and whether the format can hold the model."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.weights.external.layout import ShardLayout
from ascendspeed_core.weights.external.megatron_args import llama3_by_factor
from ascendspeed_core.weights.external.name_maps import (
    ROTARY,
    Table,
    ascendspeed_gpt,
    ascendspeed_llama,
    megatron,
)
from ascendspeed_core.weights.external.packing import Packed
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.source import CheckpointError, TensorInfo, WeightSource

ExternalKind = Literal["ascendspeed", "megatron", "torch_dist"]


@dataclass(frozen=True)
class WritePlan:
    """How a foreign checkpoint is to look.

    Attributes:
        kind: the format.
        layout: files and what layers they hold; `torch_dist` has one logical model whatever the layout.
        dtype: format of the weights; `None` for the stored one.
        vocabulary_multiple: rows of embedding and head become a multiple of this times tp.
        merged_mlp: AscendSpeed's `--mlp-layer-fusion`, gate and up in one tensor.
        transformer_engine: Megatron-LM's names with Transformer-Engine layers, which is its default.
    """

    kind: ExternalKind
    layout: ShardLayout
    dtype: torch.dtype | None = None
    vocabulary_multiple: int = 128
    merged_mlp: bool = False
    transformer_engine: bool = True

    def vocabulary_rows(self, config: ModelConfig) -> int:
        """Return the rows of embedding and head with filling, by Megatron-LM's rule."""
        multiple = self.vocabulary_multiple * self.layout.tp
        return -(-config.vocab_size // multiple) * multiple

    def table(self, config: ModelConfig) -> Table:
        """Return the names.

        Raises:
            CheckpointError: the format has no place for something that the model has.
        """
        _check_holds(self.kind, config)
        if self.kind == "ascendspeed" and config.num_key_value_heads % self.layout.tp:
            raise CheckpointError(
                f"tensor_model_parallel_size={self.layout.tp} does not divide num_key_value_heads="
                f"{config.num_key_value_heads}, and AscendSpeed of 2023 does not copy heads; choose a divisor"
            )
        if self.kind != "ascendspeed":
            return megatron(self.transformer_engine or self.kind == "torch_dist")
        return ascendspeed_gpt() if config.mlp == "gelu" else ascendspeed_llama(self.merged_mlp)

    def plan(self, source: WeightSource) -> Iterator[tuple[tuple[int, int], list[list[Packed]]]]:
        """Yield tensor rank and stage of each file, and the tensors of each of its chunks, cut."""
        config = source.config
        shapes = parameter_shapes(config)
        if config.position == "rotary":
            shapes = shapes | {ROTARY: (config.head_dim // 2,)}
        table, rows = self.table(config), self.vocabulary_rows(config)
        layout = self.layout
        for stage in range(layout.pp):
            whole = [
                list(table.of_stage(shapes, config, layout.stage(stage, chunk), rows))
                for chunk in range(layout.vpp)
            ]
            for rank in range(layout.tp):
                yield (
                    (rank, stage),
                    [[packed.of_rank(rank, layout.tp) for packed in chunk] for chunk in whole],
                )

    def info(self, packed: Packed, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        """Return shape and format of a tensor to be written."""
        name = packed.blocks[0].name
        if name == ROTARY:
            return TensorInfo(packed.shape, torch.float32)
        return TensorInfo(packed.shape, self.dtype or stored[name].dtype)


def arguments(target: WritePlan, config: ModelConfig, dtype: torch.dtype) -> Namespace:
    """Return the arguments that the target's trainer compares with its own, under its names."""
    layout = target.layout
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
        "padded_vocab_size": target.vocabulary_rows(config),
        "make_vocab_size_divisible_by": target.vocabulary_multiple,
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
    if target.kind == "ascendspeed":
        common |= {
            "position_embedding_type": "alibi" if config.position == "alibi" else "absolute",
            "layernorm_epsilon": config.norm_epsilon,
            "embed_layernorm": config.embedding_norm,
            "mlp_layer_fusion": target.merged_mlp,
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
        "transformer_impl": "transformer_engine" if target.transformer_engine else "local",
        "num_experts": None,
    }
    return Namespace(**common)


def llama3_scaling(config: ModelConfig) -> RotaryScaling | None:
    """Return the rope scaling that Megatron-LM means by a factor: Llama 3.1's, with its constants."""
    if config.rotary_scaling is None:
        return None
    return llama3_by_factor(config.rotary_scaling.factor)


def _check_holds(kind: str, config: ModelConfig) -> None:
    """Raise `CheckpointError` when the format's own program would compute another thing with these weights."""
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
    lacks = [what for what, is_wanted in wanted.items() if is_wanted]
    if lacks:
        program = "AscendSpeed of 2023" if kind == "ascendspeed" else "megatron-core's GPTModel"
        raise CheckpointError(
            f"--to {kind}: {program} has no {' and no '.join(lacks)}, it would compute another model from these "
            "weights; choose --to native or --to huggingface"
        )
