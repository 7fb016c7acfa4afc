"""How an external checkpoint is written: layout, names, packing and padding."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ascendspeed_ckpt.writers.supported import check_supported
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.external.mp_rank import Rank
from ascendspeed_core.weights.external.name_maps import (
    ROTARY,
    NameMap,
    ascendspeed_gpt,
    ascendspeed_llama,
    expert_indices,
    megatron,
    megatron_distributed,
)
from ascendspeed_core.weights.external.packing import PackedTensor
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import ShardLayout
from ascendspeed_core.weights.source import CheckpointError, TensorInfo, WeightSource
from ascendspeed_data.errors import ConfigError

ExternalKind = Literal["ascendspeed", "megatron", "torch_dist"]


@dataclass(frozen=True)
class WritePlan:
    """How an external checkpoint is written.

    Attributes:
        kind: the format.
        layout: which layers each file holds; `torch_dist` holds one logical model in every layout.
        dtype: of the weights; `None` keeps the stored one.
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
        """Return the rows of embedding and head with padding, by Megatron-LM's rule."""
        multiple = self.vocabulary_multiple * self.layout.tp
        return -(-config.vocab_size // multiple) * multiple

    def name_map(self, config: ModelConfig) -> NameMap:
        """Return the names.

        Raises:
            CheckpointError: the format cannot hold something that the model has.
        """
        check_supported(self.kind, config)
        self._check_experts(config)
        if self.kind == "ascendspeed" and config.num_key_value_heads % self.layout.tp:
            raise CheckpointError(
                f"tensor_model_parallel_size={self.layout.tp} does not divide num_key_value_heads="
                f"{config.num_key_value_heads}, and AscendSpeed of 2023 does not copy heads; choose a divisor"
            )
        if self.kind == "torch_dist":
            return megatron_distributed(own_layers=not self.transformer_engine)
        if self.kind == "megatron":
            return megatron(self.transformer_engine)
        return ascendspeed_gpt() if config.mlp == "gelu" else ascendspeed_llama(self.merged_mlp)

    def _check_experts(self, config: ModelConfig) -> None:
        """Raise `AscendSpeedError` unless there are experts to spread, as many on each rank."""
        if config.experts is not None:
            self.layout.experts(config.experts.count, 0)
        elif self.layout.ep > 1:
            raise ConfigError(
                f"expert_model_parallel_size={self.layout.ep} spreads experts, which this model does not have; "
                "leave it out"
            )

    def plan(self, source: WeightSource) -> Iterator[tuple[Rank, list[list[PackedTensor]]]]:
        """Yield tensor-parallel rank, stage and expert-parallel rank of each file, and the tensors of its chunks."""
        config = source.config
        shapes = parameter_shapes(config)
        if config.position == "rotary":
            shapes = shapes | {ROTARY: (config.head_dim // 2,)}
        name_map, rows = self.name_map(config), self.vocabulary_rows(config)
        layout = self.layout
        for stage in range(layout.pp):
            for ep_rank in range(layout.ep):
                indices = expert_indices(config, layout, ep_rank)
                whole = [
                    list(name_map.of_chunk(shapes, config, layout.stage(stage, chunk), rows, indices))
                    for chunk in range(layout.vpp)
                ]
                for rank in range(layout.tp):
                    yield (
                        (rank, stage, ep_rank),
                        [[packed.of_rank(rank, layout.tp) for packed in chunk] for chunk in whole],
                    )

    def info(self, packed: PackedTensor, stored: Mapping[str, TensorInfo]) -> TensorInfo:
        """Return shape and format of a tensor to be written."""
        name = packed.slices[0].name
        if name == ROTARY:
            return TensorInfo(packed.shape, torch.float32)
        return TensorInfo(packed.shape, self.dtype or stored[name].dtype)
