"""The published models of all families, with their sizes in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.registry import known_families

WEIGHT_BYTES = 2
"""Of a bf16 parameter."""
TRAINING_BYTES = 2 + 4 + 4 + 8
"""bf16 weight, fp32 gradient, fp32 master weight, two fp32 moments."""


@dataclass(frozen=True)
class PublishedModel:
    """One row of `asd-core models`.

    Attributes:
        name: of the size.
        family: name of the table.
        num_parameters: a tied head counted once.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_key_value_heads: key-value heads.
        vocab_size: ids.
        max_position_embeddings: longest sequence, in tokens.
        weight_bytes: of all weights in bf16.
        training_bytes: weights, gradients and optimizer state of mixed-precision training, without activations.
        cache_bytes_per_token: bf16 keys and values of one token in all layers.
    """

    name: str
    family: str
    num_parameters: int
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    weight_bytes: int
    training_bytes: int
    cache_bytes_per_token: int

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> "PublishedModel":
        """Return the row of a model."""
        return cls(
            name=name,
            family=config.family,
            num_parameters=config.num_parameters,
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            weight_bytes=config.num_parameters * WEIGHT_BYTES,
            training_bytes=config.num_parameters * TRAINING_BYTES,
            cache_bytes_per_token=WEIGHT_BYTES * config.num_layers * _kept_per_token(config),
        )


def _kept_per_token(config: ModelConfig) -> int:
    """Return how many numbers a layer keeps of a token: keys and values, or a latent and what all keys share."""
    if config.kv_latent_dim is not None:
        return config.kv_latent_dim + (config.rotary_dim or 0)
    return 2 * config.num_key_value_heads * config.head_dim


def published_size(name: str) -> tuple[Family, Mapping[str, Any]] | None:
    """Return the family of a published size, and its Hugging Face config; `None` if no family has it."""
    return next(
        ((family, family.sizes[name]) for family in known_families().values() if name in family.sizes), None
    )


def published_names() -> list[str]:
    """Return the names of all sizes."""
    return [name for family in known_families().values() for name in family.sizes]


def published_models() -> list[PublishedModel]:
    """Return all sizes of all families, those of installed packages included."""
    return [
        PublishedModel.of(name, family.read_config(hf))
        for family in known_families().values()
        for name, hf in family.sizes.items()
    ]


def table(models: Sequence[PublishedModel]) -> list[str]:
    """Return the rows as aligned lines, with a legend."""
    header = (
        "family", "model", "parameters", "layers", "hidden", "heads", "kv heads", "vocabulary", "length", "weights GB",
        "training GB", "cache KiB/token",
    )  # fmt: skip
    rows = [header, *(_cells(model) for model in models)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [
        *lines,
        "",
        f"GB are 1e9 bytes of the whole model: weights {WEIGHT_BYTES} bytes a parameter (bf16), training "
        f"{TRAINING_BYTES} (weights 2, gradients 4,",
        "master weights 4, moments 8) and activations on top; cache: keys and values of one token, bf16.",
    ]


def _cells(model: PublishedModel) -> tuple[str, ...]:
    return (
        model.family,
        model.name,
        f"{model.num_parameters:,}",
        str(model.num_layers),
        str(model.hidden_size),
        str(model.num_attention_heads),
        str(model.num_key_value_heads),
        str(model.vocab_size),
        str(model.max_position_embeddings),
        f"{model.weight_bytes / 1e9:.1f}",
        f"{model.training_bytes / 1e9:.1f}",
        f"{model.cache_bytes_per_token / 1024:.0f}",
    )
