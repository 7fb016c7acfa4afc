"""The decoder: embedding, layers, final norm, output head. It knows nothing of parallelism.

Shapes: B batch, S sequence, H hidden size, V vocabulary (V/tp logits on each rank under tensor parallelism).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.reference import LossFunction, token_losses
from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses, add_losses, split_output
from ascendspeed_core.models.cache import LayerCache
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.dropout import Dropout, DropoutMasks
from ascendspeed_core.models.experts import ExpertsMLP
from ascendspeed_core.models.layer import TransformerLayer, auxiliary_loss_names
from ascendspeed_core.models.lm_head import make_head
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.models.norm import LayerNorm, RMSNorm, make_norm
from ascendspeed_core.models.position import AttentionInputs, AttentionKind, Positions
from ascendspeed_core.models.router import Router


class ModelInput(NamedTuple):
    """What a model reads in one forward pass.

    Attributes:
        tokens: ids, [B, S].
        positions: of each token in its text, [B, S]; `None` counts from 0.
        segments: number of the text that each token belongs to, [B, S], when a row holds several texts; attention stays
            inside a text. Not with a cache.
        samples: number of each sample in the run, [B]; training with dropout needs it, and without it nothing is
            dropped.
        cache: chunks of sequences whose earlier keys and values are kept; the tokens are theirs, [1, M], and so are
            their positions.
        read_at: tokens whose logits are wanted, [B, P]; `None` for all. The head is a model's largest matrix.
        for_loss: a loss alone is wanted: where it is made without logits (`Transformer.loss_from_hidden`), the last
            stage gives the hidden states that the head reads.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    cache: CachedPass | None = None
    read_at: torch.Tensor | None = None
    for_loss: bool = False


class ModelOutput(NamedTuple):
    """What a model computes in one forward pass.

    Attributes:
        logits: of the next token, [B, S, V]; with `ModelInput.read_at` [B, P, V]; or see `ModelInput.for_loss`.
        auxiliary_losses: sums over the tokens, by name; see `models.auxiliary_losses`.
    """

    logits: torch.Tensor
    auxiliary_losses: AuxiliaryLosses


class Transformer(nn.Module):
    """A decoder-only language model, or some stages of it.

    Layers are keyed by their global number, so that parameter names are the same wherever a layer lives:
    `layers.17.attention.q_proj.weight`. What no stage needs is absent; a rank with the last stage but not the first
    holds the embedding's weight too if the head is tied to it.
    """

    def __init__(self, config: ModelConfig, stages: Sequence[Stage] = ()) -> None:
        super().__init__()
        self.config = config
        self.stages = tuple(stages) or (Stage(0, 1, range(config.num_layers)),)
        self.has_first = any(stage.is_first for stage in self.stages)
        self.has_last = any(stage.is_last for stage in self.stages)
        self.embedding: nn.Embedding | None = None
        self.embedding_norm: RMSNorm | LayerNorm | None = None
        self.final_norm: RMSNorm | LayerNorm | None = None
        self.output_head: nn.Linear | None = None
        if self.has_first or (self.has_last and config.tie_word_embeddings):
            table = torch.empty(config.vocab_size, config.hidden_size)
            if not table.is_meta:
                # Drawn only where there is storage: without it, a draw would load torch's compiler, for seconds.
                nn.init.normal_(table)
            self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        if self.has_first and config.embedding_norm:
            self.embedding_norm = make_norm(config)
        layers = {
            number: TransformerLayer(config, number) for stage in self.stages for number in stage.layers
        }
        self.layers = nn.ModuleDict({str(number): layer for number, layer in layers.items()})
        self._cache_index = {number: index for index, number in enumerate(layers)}
        if self.has_last:
            self.final_norm = make_norm(config)
            self.output_head = make_head(config)
        self.token_losses: LossFunction = token_losses
        self.loss_from_hidden = False
        """Whether the loss is made of hidden states, a part of the vocabulary at a time."""
        self.enter_head: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
        """What the head reads, from what stands between layers: whole sequences where these are cut."""
        self.dropout: Dropout | None = None
        kinds: list[AttentionKind] = list(dict.fromkeys(layer.attention.kind for layer in layers.values()))
        self.positions = Positions(config, kinds)
        self._kind_index = {number: kinds.index(layer.attention.kind) for number, layer in layers.items()}
        self.auxiliary_loss_names = auxiliary_loss_names(config)
        """Names of the auxiliary losses of the whole model, sorted."""
        self.needs_batch_load = False
        """Whether routers must know the load of the global batch before its first backward."""
        self.adapters: AdapterPlan | None = None
        """Which tensors are trained, when not all are; see `models.lora`."""
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head use the embedding's weight, if the config says so; needed again when weights are replaced."""
        if self.config.tie_word_embeddings and self.output_head is not None and self.embedding is not None:
            self.output_head.weight = self.embedding.weight

    @property
    def borrowed(self) -> tuple[str, ...]:
        """Names of parameters that belong to the first stage and are here for a tied head."""
        tied = self.config.tie_word_embeddings and self.has_last and not self.has_first
        return ("embedding.weight",) if tied else ()

    def updated_without_gradient(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield names and parameters that steps change by other rules than the optimizer's: biases of routers."""
        for name, module in self.named_modules():
            if isinstance(module, Router) and module.bias is not None and self.adapters is None:
                yield f"{name}.bias", module.bias

    def routers(self) -> Iterator[tuple[int, Router]]:
        """Yield number and router of each layer of this rank that has experts."""
        for number, layer in self.layers.items():
            mlp = layer.get_submodule("mlp")
            if isinstance(mlp, ExpertsMLP):
                yield int(number), mlp.router

    def forward(self, batch: ModelInput) -> ModelOutput:
        """Run a model that is one stage: ids [B, S] -> logits of the next token [B, S, V]."""
        return ModelOutput(*self.run_stage(self.stages[0], batch))

    def run_stage(
        self, stage: Stage, batch: ModelInput, hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AuxiliaryLosses]:
        """Run one stage of this rank.

        Args:
            stage: which.
            batch: what the model reads; the same for all stages.
            hidden: hidden states that the stage before computed, [B, S, H]; the first stage has none.

        Returns:
            Logits, [B, S, V]; from a stage before the last its hidden states, [B, S, H]. And the auxiliary losses of
            its layers.
        """
        dropout_masks = self._dropout_masks(batch.samples)
        x = self._embed(batch.tokens, dropout_masks) if hidden is None else hidden
        by_kind = self._attention_inputs(batch, x.dtype, dropout_masks)
        losses: AuxiliaryLosses | None = None
        for number in stage.layers:
            inputs = by_kind[self._kind_index[number]].in_layer(number)
            layer, cache_index = self.layers[str(number)], self._cache_index[number]
            x, of_layer = split_output(layer(x, inputs, batch.cache, cache_index))
            if of_layer is not None:
                losses = add_losses(losses, self._checked(of_layer, number))
        if stage.is_last and self.output_head is not None and self.final_norm is not None:
            if batch.read_at is not None:
                x = x.gather(1, batch.read_at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            x = self.final_norm(x)
            if not (batch.for_loss and self.loss_from_hidden):
                x = self._changed_logits(self.output_head(x))
        return x, losses or {}

    def _embed(self, tokens: torch.Tensor, dropout_masks: DropoutMasks | None) -> torch.Tensor:
        """[B, S] -> [B, S, H]."""
        assert self.embedding is not None
        x: torch.Tensor = self.embedding(tokens)
        if self.config.embedding_multiplier != 1:
            # Rounded to the format of the weights first, as the models that have it were trained.
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype, device=x.device)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return dropout_masks.hidden(x) if dropout_masks else x

    def _changed_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Multiply and soft-cap logits, if the model does: [..., V] -> [..., V]."""
        if self.config.logits_multiplier != 1:
            logits = logits * self.config.logits_multiplier
        cap = self.config.logits_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def _attention_inputs(
        self, batch: ModelInput, dtype: torch.dtype, dropout_masks: DropoutMasks | None
    ) -> list[AttentionInputs]:
        """Return what the attention of each kind of layer needs."""
        if batch.cache is not None:
            return self.positions.cached_attention_inputs(batch.cache, dtype)
        positions = batch.positions
        if positions is None:
            positions = self.positions.default_position_ids(batch.tokens)
        return self.positions.attention_inputs(positions, dtype, batch.segments, dropout_masks)

    def _dropout_masks(self, samples: torch.Tensor | None) -> DropoutMasks | None:
        """Return what dropout drops of some samples."""
        if self.dropout is None:
            return None
        if samples is None:
            if torch.is_grad_enabled():
                raise ValueError("training with dropout needs the numbers of the samples")
            return None
        return self.dropout.masks(samples, self.positions.heads)

    def _checked(self, losses: AuxiliaryLosses, layer: int) -> AuxiliaryLosses:
        """Refuse losses that other ranks know nothing of, or that would be rounded where they are added up."""
        for name, loss in losses.items():
            if name not in self.auxiliary_loss_names:
                raise ValueError(
                    f"layer {layer} returns the auxiliary loss {name!r}, which its class does not state; add it to "
                    "`auxiliary_losses`"
                )
            if loss.dim() or loss.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"layer {layer}: auxiliary loss {name!r} is {loss.dtype} of shape {tuple(loss.shape)}; return a "
                    "scalar in float32 or float64"
                )
        return losses

    def layer_caches(self, tp: int) -> list[LayerCache]:
        """Return what each layer of this rank keeps of a token in decoding, under `tp` tensor-parallel ranks."""
        caches = []
        for layer in self.layers.values():
            assert isinstance(layer, TransformerLayer)
            caches.append(LayerCache(layer.attention.cache_shapes(tp), layer.attention.kind.window))
        return caches

    def modules_of(self, stage: Stage) -> list[nn.Module]:
        """Return the modules that one stage runs, in order."""
        before = [self.embedding, self.embedding_norm] if stage.is_first else []
        after = [self.final_norm, self.output_head] if stage.is_last else []
        layers = [self.layers[str(number)] for number in stage.layers]
        return [module for module in (*before, *layers, *after) if module is not None]


def empty_transformer(config: ModelConfig, dtype: torch.dtype, stages: Sequence[Stage] = ()) -> Transformer:
    """Return the model without storage (torch's meta device): shapes only, to be cut before it is filled."""
    with torch.device("meta"):
        model = Transformer(config, stages).to(dtype)
        for module in model.modules():
            if isinstance(module, Router) and module.bias is not None:
                # Steps change it by less than a 16-bit number could show.
                module.bias = nn.Parameter(module.bias.float(), requires_grad=False)
    return model


def filled_in_turn(
    model: Transformer, device: torch.device, fill: Callable[[str, nn.Parameter], None]
) -> Iterator[nn.Module]:
    """Give a model without storage its weights, one module after the other, inner ones first.

    Whoever iterates may change the weights of a module as it comes, or hold them in less memory: nothing else holds
    them, except those that a later module shares.

    Args:
        model: on the meta device.
        device: where its weights go.
        fill: writes the weight of a name into a parameter.

    Yields:
        Each module that has parameters of its own, filled.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    shared: dict[int, nn.Parameter] = {}

    def filled(empty: nn.Parameter) -> nn.Parameter:
        if id(empty) in shared:
            return shared[id(empty)]
        storage = torch.empty(empty.shape, dtype=empty.dtype, device=device)
        parameter = nn.Parameter(storage, requires_grad=empty.requires_grad)
        fill(names[id(empty)], parameter)
        if owners[id(empty)] > 1:
            shared[id(empty)] = parameter
        return parameter

    for module in reversed(list(model.modules())):
        own = list(module.named_parameters(recurse=False))
        for kind, empty in own:
            setattr(module, kind, filled(empty))
        if own:
            yield module
