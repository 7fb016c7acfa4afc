"""The decoder: embedding, layers, final norm, output head. It knows nothing of parallelism.

Shapes: B batch, S sequence, H hidden size, V vocabulary (V/tp logits on each device under tensor parallel).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.parallel import Stage
from ascendspeed_core.kernels.reference import LossFunction, token_losses
from ascendspeed_core.models.attention import Attention
from ascendspeed_core.models.cache import CachedPass
from ascendspeed_core.models.dropout import AFTER_ATTENTION, AFTER_MLP, Dropout, DropoutMasks
from ascendspeed_core.models.lm_head import make_head
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.models.mlp import make_mlp
from ascendspeed_core.models.norm import LayerNorm, RMSNorm, make_norm
from ascendspeed_core.models.position import AttentionInputs, Positions


@dataclass(frozen=True)
class ModelInput:
    """What a model reads in one forward pass.

    Attributes:
        tokens: ids, [B, S].
        positions: place of each token in its text, [B, S]; `None` counts from 0.
        segments: number of the text that each token belongs to, [B, S]; `None` is one text in each row.
        samples: number of each sample in the run, [B]; dropout goes by it.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    samples: torch.Tensor | None = None


class TransformerLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a residual (pre-norm)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(
        self, x: torch.Tensor, places: AttentionInputs, cache: CachedPass | None = None, cache_layer: int = 0
    ) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; see `Attention` for the other arguments."""
        attended = self.attention(self.attention_norm(x), places=places, cache=cache, cache_layer=cache_layer)
        x = x + (places.draws.hidden(attended, AFTER_ATTENTION) if places.draws else attended)
        inner: torch.Tensor = self.mlp(self.mlp_norm(x), places.draws)
        return x + (places.draws.hidden(inner, AFTER_MLP) if places.draws else inner)


class Transformer(nn.Module):
    """A decoder-only language model, or some stages of it.

    Layers are keyed by their global number, so that parameter names are the same wherever a layer lives:
    `layers.17.attention.q_proj.weight`. What no stage needs is absent; who has the last stage but not the first holds
    the embedding's weight too if the head is tied to it.
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
            self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        if self.has_first and config.embedding_norm:
            self.embedding_norm = make_norm(config)
        numbers = [number for stage in self.stages for number in stage.layers]
        self.layers = nn.ModuleDict({str(number): TransformerLayer(config) for number in numbers})
        self._cache_places = {number: place for place, number in enumerate(numbers)}
        if self.has_last:
            self.final_norm = make_norm(config)
            self.output_head = make_head(config)
        self.token_losses: LossFunction = token_losses
        self.dropout: Dropout | None = None
        self.positions = Positions(config)
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

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        cache: CachedPass | None = None,
        stage: Stage | None = None,
        read_at: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the next token at every place: [B, S] -> [B, S, V].

        Args:
            tokens: ids, [B, S]; for a later stage what the stage before gave, [B, S, H].
            positions: place of each token in its text, [B, S]; by default from 0 on.
            cache: pieces of texts whose earlier keys and values are kept; tokens and positions are theirs then.
            stage: which of this module's stages to run, when it holds several.
            read_at: places whose logits are wanted, [B, P], when not all are: the head is a model's largest matrix.
            segments: number of the text that each token belongs to, [B, S], when a row holds several one behind the
                other; attention stays inside a text. Not with a cache.
            samples: number of each sample in the run, [B]; with dropout training needs them, and without them
                nothing is dropped.

        Returns:
            Logits; from a stage before the last one its hidden states, [B, S, H].
        """
        stage = stage or self.stages[0]
        x = self.embedding(tokens) if stage.is_first and self.embedding is not None else tokens
        if stage.is_first and self.embedding_norm is not None:
            x = self.embedding_norm(x)
        draws = self._draws(samples)
        if draws and stage.is_first:
            x = draws.hidden(x)
        if cache is not None:
            places = self.positions.in_pass(cache, x.dtype)
        else:
            positions = self.positions.default_position_ids(tokens) if positions is None else positions
            places = self.positions.at(positions, positions.shape[1], x.dtype, segments, draws)
        for number in stage.layers:
            x = self.layers[str(number)](x, places.in_layer(number), cache, self._cache_places[number])
        if not stage.is_last or self.output_head is None or self.final_norm is None:
            return x
        if read_at is not None:
            x = x.gather(1, read_at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        logits: torch.Tensor = self.output_head(self.final_norm(x))
        return logits

    def _draws(self, samples: torch.Tensor | None) -> DropoutMasks | None:
        """Return what dropout drops of some samples."""
        if self.dropout is None:
            return None
        if samples is None:
            if torch.is_grad_enabled():
                raise ValueError("training with dropout needs the numbers of the samples")
            return None
        return self.dropout.of(samples, self.positions.heads)

    def modules_of(self, stage: Stage) -> list[nn.Module]:
        """Return the modules that one stage runs, in order."""
        before = [self.embedding, self.embedding_norm] if stage.is_first else []
        after = [self.final_norm, self.output_head] if stage.is_last else []
        layers = [self.layers[str(number)] for number in stage.layers]
        return [module for module in (*before, *layers, *after) if module is not None]


def empty_transformer(config: ModelConfig, dtype: torch.dtype, stages: Sequence[Stage] = ()) -> Transformer:
    """Return the model without storage (torch's meta device): shapes only, to be cut before it is filled."""
    with torch.device("meta"):
        return Transformer(config, stages).to(dtype)


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
        parameter = nn.Parameter(torch.empty_like(empty, device=device), requires_grad=empty.requires_grad)
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
