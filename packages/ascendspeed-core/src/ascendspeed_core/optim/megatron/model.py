"""A model whose stages megatron-core computes, behind the interface of `Transformer`.

Objectives, evaluation and checkpoints ask a model for its config, its stages and its logits; who computes these they do
not ask.

Shapes: B micro-batch size, S sequence length, H hidden size, V vocabulary, R the part of a head that rotary embedding
turns. Hidden states are [B, S, H] as everywhere in this project, [B, S/tp, H] with sequence parallelism; megatron-core
has [S, B, H].
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ascendspeed_core.config.compute import ComputeConfig
from ascendspeed_core.config.layout import Stage, stages_of_ranks
from ascendspeed_core.config.megatron import LOGITS_ONLY, LayerOptions
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.recompute import RecomputeConfig
from ascendspeed_core.config.sharding import chunk_range, query_heads
from ascendspeed_core.kernels.mask_rule import MaskRule
from ascendspeed_core.kernels.registry import Choice, KernelContext, choose
from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses
from ascendspeed_core.models.norm import LayerNorm, RMSNorm
from ascendspeed_core.models.router import Router
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.optim.megatron.core import make_config, make_gpt_model, mark_cut, prepare, start_groups
from ascendspeed_core.optim.megatron.latent_attention import with_positions
from ascendspeed_core.optim.megatron.layers import (
    CoreAttention,
    MaskRules,
    Rotary,
    add_embedding_norm,
    rotary_angles,
)
from ascendspeed_core.optim.megatron.parameters import HeldParameter, fill, held_parameters, vocabulary_rows
from ascendspeed_core.optim.megatron.routers import TokenRouter, replace_routers, routers_of_chunks
from ascendspeed_core.optim.megatron.settings import layer_fields, transformer_fields
from ascendspeed_core.optim.megatron.specs import block_spec
from ascendspeed_core.parallel.context import attend_with_some_heads, cut_positions
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights.source import WeightSource


class MegatronTransformer(Transformer):
    """The stages of this rank, each a `GPTModel`.

    Args:
        config: the model.
        stages: of this rank.
        chunks: a `GPTModel` for each stage.
        mesh: of this rank.
        version: of megatron-core.

    Attributes:
        chunks: a `GPTModel` for each stage; wrapped, once an engine has them.
        held: what they are made of.
        version: of megatron-core.
    """

    def __init__(
        self,
        config: ModelConfig,
        stages: Sequence[Stage],
        chunks: Sequence[nn.Module],
        mesh: ParallelMesh,
        version: str,
    ) -> None:
        with torch.device("meta"):
            super().__init__(config, stages)
        # The stages hold the weights: of this project's modules nothing is left.
        self.embedding = self.embedding_norm = self.final_norm = self.output_head = None
        self.layers = nn.ModuleDict()
        self.chunks, self.version = nn.ModuleList(chunks), version
        self.held: list[HeldParameter] = [
            held
            for chunk, stage in zip(chunks, stages, strict=True)
            for held in held_parameters(chunk, stage, config, mesh)
        ]
        rows = chunk_range(config.vocab_size, mesh.layout.tp, mesh.tp_rank)
        self._vocabulary = rows.stop - rows.start
        self.positions.heads = query_heads(config, mesh.layout.tp, mesh.tp_rank)
        rules, parts = MaskRules(self._mask_rule), mesh.group("cp")
        if parts is not None:
            cut_positions(self.positions, mesh.layout.cp, mesh.index("cp"))
        for module in self.modules():
            if isinstance(module, CoreAttention):
                module.rules = rules
                if parts is not None:
                    module.wrapper = partial(attend_with_some_heads, group=parts)

    def run_stage(
        self, stage: Stage, batch: ModelInput, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """Run one stage of this rank; see `Transformer.run_stage`."""
        number = self.stages.index(stage)
        out = self.run_chunk(self.chunks[number], number, batch, hidden)
        if not stage.is_last:
            return out.transpose(0, 1), {}
        if batch.read_at is not None:
            out = out.gather(1, batch.read_at.unsqueeze(-1).expand(-1, -1, out.shape[-1]))
        return out, {}

    def run_chunk(
        self, chunk: nn.Module, number: int, batch: ModelInput, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run a stage as megatron-core's schedules do.

        Args:
            chunk: it, wrapped or not.
            number: which of this rank's stages it is.
            batch: what the model reads.
            hidden: what the stage before computed, [B, S, H]; by default what a schedule has set.

        Returns:
            Logits, [B, S, V/tp]; from a stage before the last hidden states, [S, B, H].
        """
        stage = self.stages[number]
        inner: Any = inner_model(chunk)
        if hidden is not None:
            inner.set_input_tensor(hidden.transpose(0, 1).contiguous())
        elif stage.is_first:
            inner.set_input_tensor(None)
        positions = batch.positions
        if positions is None:
            positions = self.positions.default_position_ids(batch.tokens[:1])
        rotary = getattr(inner, "rotary_pos_emb", None)
        if isinstance(rotary, Rotary):
            rotary.angles = self._angles(positions)
        mask = batch.segments
        if self.config.kv_latent_dim is not None:
            mask = with_positions(positions, mask, self.positions.sequence_parts)
        out: torch.Tensor = chunk(batch.tokens, positions, mask)
        return out[..., : self._vocabulary] if stage.is_last else out

    def _angles(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Return the angles of positions, [B, S] -> [S, B, 1, R]; `None` without rotary embedding."""
        (kind,) = dict.fromkeys(kind.rotary for kind in self.positions.kinds)
        return None if kind is None else rotary_angles(positions, kind)

    def _mask_rule(self, segments: torch.Tensor | None, query: torch.Tensor) -> MaskRule | None:
        """Return which keys queries see, [S, B, N, D]; all layers have one window."""
        length = len(query) * self.positions.sequence_parts
        rules = self.positions.mask_rules(length, query.device, query.dtype, segments)
        (rule,) = rules.values()
        return rule

    def token_routers(self) -> Iterator[tuple[int, TokenRouter]]:
        """Yield number of the layer and router of each layer of this rank that has experts."""
        return routers_of_chunks([inner_model(chunk) for chunk in self.chunks], self.stages)

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Yield number of the layer and this project's router in it; see `Transformer.routers`."""
        for number, router in self.token_routers():
            yield number, router.choose

    def modules_of(self, stage: Stage) -> list[nn.Module]:
        """Return the modules that one stage runs."""
        return [self.chunks[self.stages.index(stage)]]


def inner_model(chunk: nn.Module) -> nn.Module:
    """Return the `GPTModel` in what megatron-core has wrapped around it."""
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk


def load_megatron_model(
    source: WeightSource,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    recompute: RecomputeConfig,
    shapes_vary: bool,
    more: Mapping[str, Any],
    options: LayerOptions | None = None,
) -> MegatronTransformer:
    """Return this rank's stages of the model that `source` holds, reading only its own slices.

    Args:
        source: the weights.
        mesh: of this rank.
        dtype: of the weights.
        recompute: what is computed again.
        shapes_vary: micro-batches differ in their number or length of samples.
        more: further fields of `TransformerConfig`.
        options: what layers compute besides; by default nothing.
    """
    version = prepare(mesh.device)
    layout, described = mesh.layout, source.config
    stages = stages_of_ranks(described.num_layers, layout)[mesh.pp_rank]
    start_groups(layout, len(stages))
    fields = transformer_fields(described, layout, dtype, recompute, len(stages), shapes_vary)
    options = options or LayerOptions()
    fields |= layer_fields(described, options)
    kind = "TransformerConfig" if described.kv_latent_dim is None else "MLATransformerConfig"
    config = make_config(kind, fields, more)
    chunks = [
        _make_chunk(described, config, stage, number, len(stages), mesh, options)
        for number, stage in enumerate(stages)
    ]
    model = MegatronTransformer(described, stages, chunks, mesh, version)
    for held in model.held:
        if held.dim is not None:
            mark_cut(held.parameter, held.dim)
        fill(held, source)
    return model


def _make_chunk(
    described: ModelConfig,
    config: Any,
    stage: Stage,
    number: int,
    stages_per_rank: int,
    mesh: ParallelMesh,
    options: LayerOptions,
) -> nn.Module:
    is_rotary = described.position == "rotary"
    chunk: Any = make_gpt_model(
        number,
        stages_per_rank,
        config=config,
        transformer_layer_spec=block_spec(described, stage.layers, options),
        vocab_size=vocabulary_rows(described.vocab_size, mesh.layout.tp),
        max_sequence_length=described.max_position_embeddings,
        pre_process=stage.is_first,
        post_process=stage.is_last,
        share_embeddings_and_output_weights=described.tie_word_embeddings,
        position_embedding_type="rope" if is_rotary else "none",
    )
    if is_rotary and described.kv_latent_dim is None:
        chunk.rotary_pos_emb = Rotary()
    if stage.is_first and described.embedding_norm:
        add_embedding_norm(chunk, described, config)
    made: nn.Module = chunk.to(device=mesh.device.torch, dtype=config.params_dtype)
    if described.experts is not None:
        replace_routers(made, described.experts, described.hidden_size, config, mesh)
    return made


def choose_kernels(model: MegatronTransformer, config: ComputeConfig, context: KernelContext) -> list[Choice]:
    """Give the parts that are this project's the implementations that `config` asks for, in place.

    Args:
        model: the stages.
        config: names, or `auto`.
        context: where it runs.

    Returns:
        What was chosen, by operator.
    """
    context = replace(context, needs_logits=LOGITS_ONLY)
    norm = "rms_norm" if model.config.norm == "rmsnorm" else "layer_norm"
    asked, choices, chosen = config.kernel_names(), [], {}
    for operator in ("attention", norm, "cross_entropy"):
        implementation, choice = choose(operator, asked[operator], context)
        chosen[operator] = implementation.run
        choices.append(choice)
    model.token_losses = chosen["cross_entropy"]
    for module in model.modules():
        if isinstance(module, CoreAttention):
            module.attend = chosen["attention"]
        elif isinstance(module, LayerNorm if norm == "layer_norm" else RMSNorm):
            module.normalise = chosen[norm]
    return choices
