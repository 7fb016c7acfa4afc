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
    mscale: float | None = Field(
        None, gt=0, description="yarn: 0.1 mscale ln(factor) + 1 is in the factor of cosine and sine."
    )
    mscale_all_dim: float | None = Field(
        None, gt=0, description="yarn: the same of it divides that factor, as DeepSeek's models have it."
    )
    truncate: bool = Field(True, description="yarn: the ramp begins and ends at whole dimensions.")

    @model_validator(mode="after")
    def _has_its_length(self) -> "RotaryScaling":
        if self.kind != "linear" and self.original_max_position_embeddings is None:
            raise ValueError(
                f"rotary scaling {self.kind} lacks original_max_position_embeddings; add it to the model's config"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} count only together; give both or none"
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
    mlp: Literal["swiglu", "geglu", "gelu", "relu2"] = Field(
        "swiglu", description="MLP; gelu is its tanh approximation, relu2 the square of relu."
    )
    experts: Experts | None = Field(None, description="Experts in place of one MLP. [default: none]")
    qkv_bias: bool = Field(False, description="Queries, keys and values have a bias.")
    output_bias: bool = Field(False, description="The attention's output projection has a bias.")
    mlp_bias: bool = Field(False, description="The MLP's projections have a bias.")
    qk_norm: bool = Field(False, description="Each query and key head is normalised (RMSNorm).")
    embedding_norm: bool = Field(False, description="A norm follows the embedding.")
    normalised_head: bool = Field(False, description="Rows of the output head are used at length 1.")
    window_layers: tuple[int, ...] | None = Field(
        None, description="Layers that have the sliding window, counted from 0. [default: all]"
    )
    rotary_layers: tuple[int, ...] | None = Field(
        None, description="Layers that have rotary positions; the others have none. [default: all]"
    )
    rotary_dim: int | None = Field(
        None, ge=2, description="First numbers of a head that rotary positions turn, R. [default: all]"
    )
    rotary_interleaved: bool = Field(
        False, description="Rotary positions turn neighbours, 2i and 2i + 1, instead of i and i + R/2."
    )
    window_rotary_base: float | None = Field(
        None,
        gt=0,
        description="Base of the rotary frequencies, unscaled, in layers with a window. [default: as in others]",
    )
    attention_scale: float | None = Field(
        None, gt=0, description="Factor of attention's scores. [default: 1 / sqrt(D)]"
    )
    attention_softcap: float | None = Field(
        None, gt=0, description="c: each score s becomes c tanh(s / c) before the softmax."
    )
    attention_sinks: bool = Field(
        False, description="Each query head has a learned score that takes weight and gives nothing."
    )
    qk_norm_kind: Literal["shared", "by_head", "all_heads"] = Field(
        "shared",
        description="With qk_norm: one weight for all heads; each head has its own, and the norm is that of the "
        "model, without bias; or one RMSNorm over all heads together.",
    )
    kv_latent_dim: int | None = Field(
        None,
        ge=1,
        description="Width of the latent from which keys and values of all heads are made; it makes attention "
        "multi-head latent attention, whose heads end with the rotary_dim numbers that all keys share. [default: none]",
    )
    q_latent_dim: int | None = Field(
        None, ge=1, description="Width of the latent from which queries are made. [default: none]"
    )
    value_head_dim: int | None = Field(
        None, ge=1, description="Width of a value in multi-head latent attention."
    )
    norm_placement: Literal["before", "after", "both"] = Field(
        "before", description="Where norms stand: before attention and MLP, after them, or both."
    )
    norm_bias: bool = Field(True, description="A layernorm has a bias.")
    norm_unit_offset: bool = Field(False, description="Norms multiply by 1 + weight.")
    parallel_blocks: bool = Field(
        False, description="Attention and MLP read the same norm, and both add to its input."
    )
    embedding_multiplier: float = Field(1.0, gt=0, description="Factor of the embedding.")
    residual_multiplier: float = Field(
        1.0, gt=0, description="Factor of what attention and MLP add to the residual stream."
    )
    logits_multiplier: float = Field(1.0, gt=0, description="Factor of the logits.")
    logits_softcap: float | None = Field(
        None, gt=0, description="c: each logit l becomes c tanh(l / c), after its factor."
    )
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
    def _options_fit(self) -> "ModelConfig":
        for name in ("window_layers", "rotary_layers"):
            layers = getattr(self, name) or ()
            if list(layers) != sorted(set(layers)) or any(not 0 <= n < self.num_layers for n in layers):
                raise ValueError(
                    f"{name} must name layers of 0 to {self.num_layers - 1}, each once, in order; correct it"
                )
        if self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(
                f"rotary_dim={self.rotary_dim} is no even part of head_dim={self.head_dim}; correct one of them"
            )
        needs = {
            "window_layers": ("sliding_window", self.sliding_window is not None),
            "window_rotary_base": ("sliding_window", self.sliding_window is not None),
            "rotary_layers": ("position=rotary", self.position == "rotary"),
            "rotary_dim": ("position=rotary", self.position == "rotary"),
        }
        for name, (needed, is_there) in needs.items():
            if getattr(self, name) is not None and not is_there:
                raise ValueError(f"{name} was given without {needed}, and means nothing then; leave it out")
        if self.parallel_blocks and self.norm_placement != "before":
            raise ValueError(
                f"parallel_blocks=true reads one norm, norm_placement={self.norm_placement} has more; choose one"
            )
        return self

    @model_validator(mode="after")
    def _latent_fits(self) -> "ModelConfig":
        if self.kv_latent_dim is None:
            if self.q_latent_dim is not None or self.value_head_dim is not None:
                raise ValueError(
                    "q_latent_dim or value_head_dim was given without kv_latent_dim and means nothing; leave it out"
                )
            return self
        if self.value_head_dim is None or self.rotary_dim is None or self.rotary_dim >= self.head_dim:
            raise ValueError(
                f"kv_latent_dim={self.kv_latent_dim} needs value_head_dim and a rotary_dim below head_dim="
                f"{self.head_dim}; give both"
            )
        refused = {
            "attention_scale": self.attention_scale is not None,
            "attention_softcap": self.attention_softcap is not None,
            "attention_sinks": self.attention_sinks,
            "qk_norm": self.qk_norm,
            "sliding_window": self.sliding_window is not None,
            "rotary_layers": self.rotary_layers is not None,
            "num_key_value_heads below num_attention_heads": self.num_key_value_heads
            != self.num_attention_heads,
            "qkv_bias without q_latent_dim": self.qkv_bias and self.q_latent_dim is None,
            "value_head_dim above head_dim": self.value_head_dim > self.head_dim,
        }
        found = [name for name, is_there in refused.items() if is_there]
        if found:
            raise ValueError(
                f"kv_latent_dim={self.kv_latent_dim} with {', '.join(found)} is not supported: no published model has "
                "multi-head latent attention with it; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _experts_fit(self) -> "ModelConfig":
        if self.experts is None:
            return self
        if self.mlp != "swiglu" or self.mlp_bias:
            raise ValueError(
                "experts go with mlp=swiglu and mlp_bias=false; what is theirs stands in experts"
            )
        beyond = [layer for layer in self.experts.dense_layers if not 0 <= layer < self.num_layers]
        if beyond:
            raise ValueError(
                f"experts: dense_layers names layer {beyond[0]}, the model has layers 0 to {self.num_layers - 1}; "
                "leave it out"
            )
        return self

    def has_window(self, layer: int) -> bool:
        """Whether the tokens of a layer see a window only."""
        return self.sliding_window is not None and (self.window_layers is None or layer in self.window_layers)

    def has_rotary(self, layer: int) -> bool:
        """Whether a layer turns queries and keys."""
        return self.position == "rotary" and (self.rotary_layers is None or layer in self.rotary_layers)

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate beside its up projection."""
        return self.mlp in ("swiglu", "geglu")

    @property
    def _attention_weights(self) -> int:
        """Number of weights of the projections of one layer's attention, without biases."""
        queries, keys = (self.head_dim * n for n in (self.num_attention_heads, self.num_key_value_heads))
        if self.kv_latent_dim is None:
            return 2 * self.hidden_size * (queries + keys)
        assert self.value_head_dim is not None
        assert self.rotary_dim is not None
        values = self.num_attention_heads * self.value_head_dim
        shared = self.num_attention_heads * self.rotary_dim
        of_queries = self.hidden_size * queries
        if self.q_latent_dim is not None:
            of_queries = self.q_latent_dim * (self.hidden_size + queries)
        down = self.hidden_size * (self.kv_latent_dim + self.rotary_dim)
        return (
            of_queries + down + self.kv_latent_dim * (queries - shared + values) + values * self.hidden_size
        )

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def num_expert_layers(self) -> int:
        """Number of layers with experts."""
        return sum(self.has_experts(layer) for layer in range(self.num_layers))

    @property
    def weights_in_products(self) -> int:
        """Number of weights of all layers that a token is multiplied with: of experts, those that it is sent to."""
        dense = (3 if self.is_gated else 2) * self.hidden_size * self.ffn_hidden_size
        sparse = self.num_expert_layers
        experts = (
            self.experts.weights_in_products(self.hidden_size, self.experts.per_token) if self.experts else 0
        )
        return (
            self.num_layers * self._attention_weights + (self.num_layers - sparse) * dense + sparse * experts
        )

    @property
    def num_parameters(self) -> int:
        """Number of weights; a tied head is counted once."""
        queries, keys = (self.head_dim * n for n in (self.num_attention_heads, self.num_key_value_heads))
        norm = self.hidden_size * (2 if self.norm == "layernorm" and self.norm_bias else 1)
        layer = self._attention_weights
        if self.kv_latent_dim is None:
            layer += self.qkv_bias * (queries + 2 * keys)
        else:
            latents = self.kv_latent_dim + (self.q_latent_dim or 0)
            layer += latents + self.qkv_bias * (latents + (self.rotary_dim or 0))
        layer += self.output_bias * self.hidden_size
        norms = 1 if self.parallel_blocks else 4 if self.norm_placement == "both" else 2
        of_heads = 2 * self.head_dim if self.qk_norm_kind == "shared" else queries + keys
        layer += norms * norm + self.qk_norm * of_heads + self.attention_sinks * self.num_attention_heads
        projections = 3 if self.is_gated else 2
        dense = projections * self.hidden_size * self.ffn_hidden_size
        dense += self.mlp_bias * ((projections - 1) * self.ffn_hidden_size + self.hidden_size)
        sparse = self.num_expert_layers
        experts = self.experts.parameters(self.hidden_size) if self.experts else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        mlps = (self.num_layers - sparse) * dense + sparse * experts
        return self.num_layers * layer + mlps + embeddings + (1 + self.embedding_norm) * norm

    @property
    def num_active_parameters(self) -> int:
        """Number of weights that a token uses: of the experts only those that it is sent to."""
        if self.experts is None:
            return self.num_parameters
        idle = self.experts.count - self.experts.per_token
        inner = self.experts.ffn_hidden_size
        one = 3 * self.hidden_size * inner + self.experts.biases * (2 * inner + self.hidden_size)
        return self.num_parameters - self.num_expert_layers * idle * one


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
