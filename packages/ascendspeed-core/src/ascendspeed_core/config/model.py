"""The architecture of one model, and the flags that name parts of it."""

from typing import Any, Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings
from ascendspeed_core.config.experts import Experts
from ascendspeed_data.errors import AscendSpeedError

MOST_LAYERS, WIDEST, MOST_IDS = 10_000, 1 << 20, 1 << 26
"""No model comes near these sizes; a config that goes beyond them is damaged, and nothing is allocated for it."""

WeightQuantization = Literal["none", "int8"]
"""How a model holds its matrices for inference: in its format, or as integers with a scale for each row."""


class RotaryScaling(Config):
    """How rotary frequencies are changed so that a model reads longer texts than it was first trained on.

    `linear` divides all positions (Chen et al., 2023). `llama3` divides slow frequencies only, as Llama 3.1 does.
    `yarn` does so by a ramp over the dimensions, and makes attention sharper (Peng et al., 2023).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0, description="By how much texts may be longer.")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, description="Longest sequence before the change; llama3 and yarn need it."
    )
    low_freq_factor: float = Field(1.0, gt=0, description="llama3: slower frequencies are divided.")
    high_freq_factor: float = Field(4.0, gt=0, description="llama3: faster frequencies stay.")
    beta_fast: float = Field(32.0, gt=0, description="yarn: dimensions that turn more often stay.")
    beta_slow: float = Field(1.0, gt=0, description="yarn: dimensions that turn less often are divided.")
    attention_factor: float | None = Field(
        None, gt=0, description="yarn: factor of cosine and sine. [default: 0.1 ln(factor) + 1]"
    )

    @model_validator(mode="after")
    def _has_its_length(self) -> "RotaryScaling":
        if self.kind != "linear" and self.original_max_position_embeddings is None:
            raise ValueError(
                f"rotary scaling {self.kind} lacks original_max_position_embeddings; add it to the model's config"
            )
        return self


class ModelConfig(Config):
    """A decoder-only transformer, complete: two models with equal configs have the same tensors.

    `family` names the table that maps the model to and from a Hugging Face folder. What a field leaves out is as in
    LLaMA: RMSNorm, rotary positions, SwiGLU, no biases.
    """

    family: str = Field(description="Name of the family's table, see `asd-core models`.")
    vocab_size: int = Field(ge=1, le=MOST_IDS, description="Rows of the embedding.")
    hidden_size: int = Field(ge=1, le=WIDEST, description="Width of the residual stream, H.")
    ffn_hidden_size: int = Field(ge=1, le=WIDEST, description="Width inside the MLP, F.")
    num_layers: int = Field(ge=1, le=MOST_LAYERS, description="Transformer layers, L.")
    num_attention_heads: int = Field(ge=1, le=WIDEST, description="Query heads, N.")
    num_key_value_heads: int = Field(
        ge=1, le=WIDEST, description="Key and value heads, K; K < N is grouped-query attention."
    )
    head_dim: int = Field(ge=1, le=WIDEST, description="Width of one head, D.")
    max_position_embeddings: int = Field(
        ge=1, description="Longest sequence the model was made for, in tokens."
    )
    norm: Literal["rmsnorm", "layernorm"] = Field(
        "rmsnorm", description="Normalisation; layernorm has a bias."
    )
    norm_epsilon: float = Field(gt=0, description="Added to the mean square or the variance.")
    position: Literal["rotary", "alibi"] = Field("rotary", description="How positions are encoded.")
    rotary_base: float = Field(10000.0, gt=0, description="Base of the rotary frequencies.")
    rotary_scaling: RotaryScaling | None = Field(None, description="Change of the rotary frequencies.")
    sliding_window: int | None = Field(
        None, ge=1, description="Tokens that a token sees, itself included. [default: all]"
    )
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="MLP; gelu is its tanh approximation.")
    experts: Experts | None = Field(None, description="Experts in place of one MLP. [default: none]")
    qkv_bias: bool = Field(False, description="Queries, keys and values have a bias.")
    output_bias: bool = Field(False, description="The attention's output projection has a bias.")
    mlp_bias: bool = Field(False, description="The MLP's projections have a bias.")
    qk_norm: bool = Field(False, description="Each query and key head is normalised (RMSNorm).")
    embedding_norm: bool = Field(False, description="A norm follows the embedding.")
    normalised_head: bool = Field(False, description="Rows of the output head are used at length 1.")
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
        if self.position == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd; rotary embedding turns pairs, choose an even size"
            )
        if self.position == "alibi" and self.rotary_scaling:
            raise ValueError("rotary_scaling was given for position=alibi, which has no rotary frequencies")
        if self.normalised_head and self.tie_word_embeddings:
            raise ValueError(
                "normalised_head=true needs a head of its own; no model has tie_word_embeddings=true with it"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> "ModelConfig":
        if self.experts is None:
            return self
        if self.mlp != "swiglu" or self.mlp_bias:
            raise ValueError("experts are SwiGLU without biases; they go with mlp=swiglu and mlp_bias=false")
        beyond = [layer for layer in self.experts.dense_layers if not 0 <= layer < self.num_layers]
        if beyond:
            raise ValueError(
                f"experts: dense_layers names layer {beyond[0]}, the model has layers 0 to {self.num_layers - 1}; "
                "leave it out"
            )
        return self

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def num_expert_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.has_experts(layer) for layer in range(self.num_layers))

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied head is counted once."""
        queries, keys = (self.head_dim * n for n in (self.num_attention_heads, self.num_key_value_heads))
        projections = 3 if self.mlp == "swiglu" else 2
        norm = self.hidden_size * (2 if self.norm == "layernorm" else 1)
        layer = 2 * self.hidden_size * (queries + keys)
        layer += self.qkv_bias * (queries + 2 * keys) + self.output_bias * self.hidden_size
        layer += 2 * norm + self.qk_norm * 2 * self.head_dim
        dense = projections * self.hidden_size * self.ffn_hidden_size
        dense += self.mlp_bias * ((projections - 1) * self.ffn_hidden_size + self.hidden_size)
        sparse = self.num_expert_layers
        experts = self._expert_layer_parameters(self.experts.count) if self.experts else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        mlps = (self.num_layers - sparse) * dense + sparse * experts
        return self.num_layers * layer + mlps + embeddings + (1 + self.embedding_norm) * norm

    @property
    def num_active_parameters(self) -> int:
        """Number of weights that a token uses: of the experts only those that it is sent to."""
        if self.experts is None:
            return self.num_parameters
        idle = self.experts.count - self.experts.per_token
        one = 3 * self.hidden_size * self.experts.ffn_hidden_size
        return self.num_parameters - self.num_expert_layers * idle * one

    def _expert_layer_parameters(self, count: int) -> int:
        """Return the weights of a layer's router, of `count` experts, and of what all tokens use."""
        assert self.experts is not None
        inner = count * self.experts.ffn_hidden_size + (self.experts.shared_ffn_hidden_size or 0)
        router = self.experts.count * (self.hidden_size + self.experts.score_bias)
        return 3 * self.hidden_size * inner + router + self.experts.shared_gate * self.hidden_size


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
