"""What a family is: names, a reading of its Hugging Face config, and one table of weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.model import ModelConfig


@dataclass(frozen=True)
class WeightRule:
    """One row of a weight table; `{layer}` in both names stands for the layer's number.

    Attributes:
        ours: parameter name in `Transformer`.
        theirs: tensor name in a Hugging Face folder.
        axis: dimension that is cut under tensor parallel, or `None` when every device holds all of it. It is
            stated here for formats that store cut tensors; the engine's plan says the same for modules.
        tied: leave the row out when the head is tied to the embedding.
    """

    ours: str
    theirs: str
    axis: int | None = None
    tied: bool = False


@dataclass(frozen=True)
class Family:
    """A family of models with one architecture.

    Attributes:
        name: `llama`.
        architectures: `architectures` entries of Hugging Face configs that belong to it.
        read_config: Hugging Face `config.json` -> `ModelConfig`.
        write_config: the reverse.
        rules: the weight table.
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    rules: tuple[WeightRule, ...]

    def weights(self, config: ModelConfig) -> Iterator[WeightRule]:
        """Yield the table with layer numbers filled in: every tensor of the model, once."""
        for rule in self.rules:
            if rule.tied and config.tie_word_embeddings:
                continue
            for layer in range(config.num_layers) if "{layer}" in rule.ours else (0,):
                yield WeightRule(
                    rule.ours.format(layer=layer), rule.theirs.format(layer=layer), rule.axis, rule.tied
                )
