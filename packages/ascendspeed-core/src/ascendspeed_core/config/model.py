"""The architecture of one model, and the flags that name parts of it."""

from typing import Any

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings
from ascendspeed_data.errors import AscendSpeedError


class ModelConfig(Config):
    """A decoder-only transformer, complete: two models with equal configs have the same tensors.

    The word `llama` in `family` names the table that maps the model to and from a Hugging Face folder.
    """

    family: str = Field(description="Name of the family's table: llama.")
    vocab_size: int = Field(ge=1, description="Rows of the embedding.")
    hidden_size: int = Field(ge=1, description="Width of the residual stream, H.")
    ffn_hidden_size: int = Field(ge=1, description="Width inside the MLP, F.")
    num_layers: int = Field(ge=1, description="Transformer layers, L.")
    num_attention_heads: int = Field(ge=1, description="Query heads, N.")
    num_key_value_heads: int = Field(
        ge=1, description="Key and value heads, K; K < N is grouped-query attention."
    )
    head_dim: int = Field(ge=1, description="Width of one head, D.")
    max_position_embeddings: int = Field(
        ge=1, description="Longest sequence the model was made for, in tokens."
    )
    norm_epsilon: float = Field(gt=0, description="Added to the mean square in RMSNorm.")
    rotary_base: float = Field(gt=0, description="Base of the rotary frequencies.")
    tie_word_embeddings: bool = Field(description="The output head uses the embedding's weight.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of random weights.")
    bos_token_id: int | None = Field(None, description="Id that begins a text.")
    eos_token_ids: tuple[int, ...] = Field((), description="Ids that end a generation.")
    pad_token_id: int | None = Field(None, description="Id of padding.")

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embedding turns pairs, choose an even size"
            )
        return self

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied head is counted once."""
        attention = (
            self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        )
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


class ArchitectureFlags(Config):
    """Architecture flags of Megatron-style scripts: compared with the model that is loaded, never used to make one."""

    num_layers: int | None = Field(None, ge=1, description="Must equal the model's number of layers.")
    hidden_size: int | None = Field(None, ge=1, description="Must equal the model's hidden size.")
    ffn_hidden_size: int | None = Field(None, ge=1, description="Must equal the model's MLP width.")
    num_attention_heads: int | None = Field(None, ge=1, description="Must equal the model's query heads.")
    num_key_value_heads: int | None = Field(
        None,
        ge=1,
        description="Must equal the model's key and value heads.",
        json_schema_extra=spellings("--num-query-groups"),
    )
    max_position_embeddings: int | None = Field(
        None, ge=1, description="Longest sequence of this run in tokens; at most the model's own."
    )
    norm_epsilon: float | None = Field(
        None,
        gt=0,
        description="Must equal the model's normalisation epsilon.",
        json_schema_extra=spellings("--layernorm-epsilon"),
    )
    rotary_base: float | None = Field(
        None, gt=0, description="Must equal the base of the rotary frequencies."
    )

    def check(self, model: ModelConfig, where: str) -> None:
        """Raise `AscendSpeedError` when a flag contradicts `model`, which was read from `where`."""
        for name, value in self.model_dump(exclude_none=True).items():
            theirs: Any = getattr(model, name)
            if name == "max_position_embeddings":
                if value > theirs:
                    raise AscendSpeedError(
                        f"max_position_embeddings={value} is more than the {theirs} of {where}; "
                        f"choose {theirs} or less"
                    )
            elif value != theirs:
                raise AscendSpeedError(
                    f"{name}={value} contradicts {where}, which has {name}={theirs}; "
                    f"leave --{name.replace('_', '-')} out or name another model"
                )
