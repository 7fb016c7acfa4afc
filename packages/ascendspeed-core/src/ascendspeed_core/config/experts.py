"""Mixture of experts: what belongs to a model's architecture, and the options of its training; no torch."""

from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config

MOST_EXPERTS = 1 << 14
"""No model comes near this number of experts in a layer."""


class Experts(Config):
    """The experts of a model's layers: of each token the router chooses some, and adds up what they give.

    (Shazeer et al., 2017, Outrageously Large Neural Networks; Fedus et al., 2021, Switch Transformer.)
    """

    count: int = Field(ge=1, le=MOST_EXPERTS, description="Experts of a layer, E.")
    per_token: int = Field(ge=1, description="Experts that a token uses, K.")
    ffn_hidden_size: int = Field(ge=1, le=1 << 20, description="Width inside one expert.")
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="What turns logits into scores.")
    score_after_choice: bool = Field(
        False, description="The softmax is taken over the chosen logits only, not over all."
    )
    normalised: bool = Field(
        True, description="The scores of a token's experts are divided by their sum to be its weights."
    )
    scaling: float = Field(1.0, gt=0, description="Factor of the weights.")
    groups: int = Field(
        1, ge=1, description="Groups of consecutive experts, of which a token uses some only."
    )
    groups_per_token: int = Field(1, ge=1, description="Groups that a token may use.")
    group_score: Literal["max", "top2"] = Field(
        "top2",
        description="A group's score: its best expert's (DeepSeek-V2), or its two best ones' sum (V3).",
    )
    score_bias: bool = Field(
        False,
        description="A bias of each expert takes part in the choice, but not in the weights (DeepSeek-V3).",
    )
    shared_ffn_hidden_size: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="Width of the shared expert, which all tokens use. [default: none]",
    )
    shared_gate: bool = Field(False, description="A sigmoid of each token scales the shared expert's result.")
    biases: bool = Field(False, description="Router and experts have biases (gpt-oss).")
    clamp: float | None = Field(
        None,
        gt=0,
        description="c: an expert is down(g sigmoid(1.702 g) (u + 1)) of the gate g, at most c, and the up projection "
        "u, from -c to c (gpt-oss). [default: plain SwiGLU]",
    )
    dense_layers: tuple[int, ...] = Field((), description="Layers that have a plain MLP, from 0.")

    @model_validator(mode="after")
    def _choice_is_possible(self) -> "Experts":
        if self.count % self.groups:
            raise ValueError(
                f"experts: groups={self.groups} does not divide count={self.count}; choose a divisor"
            )
        if self.groups_per_token > self.groups:
            raise ValueError(
                f"experts: groups_per_token={self.groups_per_token} is more than groups={self.groups}; choose fewer"
            )
        within = self.count // self.groups * self.groups_per_token
        if self.per_token > within:
            raise ValueError(
                f"experts: per_token={self.per_token} is more than the {within} experts that a token may use; "
                "choose fewer"
            )
        if self.groups > 1 and self.group_score == "top2" and self.count // self.groups < 2:
            raise ValueError(
                f"experts: group_score=top2 needs two experts in a group, groups={self.groups} leaves "
                f"{self.count // self.groups}; choose fewer groups"
            )
        if self.score_after_choice and (self.score != "softmax" or self.score_bias):
            raise ValueError(
                "experts: score_after_choice=true is a softmax over the chosen logits; it goes with score=softmax "
                "and score_bias=false"
            )
        if (self.biases or self.clamp is not None) and self.shared_ffn_hidden_size is not None:
            raise ValueError(
                "experts: biases=true or clamp with shared_ffn_hidden_size is not supported: no published model has a "
                "shared expert with them; leave it out"
            )
        if self.shared_gate and self.shared_ffn_hidden_size is None:
            raise ValueError(
                "experts: shared_gate=true needs shared_ffn_hidden_size; give it, or leave the gate out"
            )
        return self

    def weights_in_products(self, hidden_size: int, count: int) -> int:
        """Return the number of weights of router, `count` experts and what all tokens use, without biases."""
        inner = count * self.ffn_hidden_size + (self.shared_ffn_hidden_size or 0)
        return hidden_size * (3 * inner + self.count + self.shared_gate)

    def parameters(self, hidden_size: int) -> int:
        """Return the number of weights of a layer's experts, router, and what all tokens use."""
        biases = self.count * (2 * self.ffn_hidden_size + hidden_size + 1)
        return (
            self.weights_in_products(hidden_size, self.count)
            + self.score_bias * self.count
            + self.biases * biases
        )


BalancingKind = Literal["aux_loss", "seq_aux_loss", "global_aux_loss"]
"""Over which tokens the balancing loss counts the load, by Megatron-LM's names: micro-batch, sequence, global batch."""


class ExpertsConfig(Config):
    """How the routers of a model with experts are trained; other models have no use for it."""

    moe_aux_loss_coeff: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor of the loss that balances the load of experts, which is 1 for each layer where all have "
        "the same load; 0: no such loss.",
    )
    moe_router_load_balancing_type: BalancingKind = Field(
        "global_aux_loss",
        description="Tokens over which the balancing loss counts the load: aux_loss, those of a micro-batch; "
        "seq_aux_loss, of each sequence; global_aux_loss, of the global batch, exactly under every layout: a first "
        "pass without gradients counts them.",
    )
    moe_z_loss_coeff: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Factor of the mean square of the logarithm of the router's summed exponentials (ST-MoE); 0: none.",
    )
    moe_router_bias_update_rate: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="By how much a step raises the score bias of experts with less than average load, and lowers that "
        "of the others (DeepSeek-V3); 0: biases stay.",
    )
    moe_expert_capacity_factor: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Of each sequence an expert takes this times its even share of tokens at most; others pass it by. "
        "[default: experts take all tokens]",
    )
    moe_token_drop_policy: Literal["probs", "position"] = Field(
        "probs",
        description="Which tokens an expert beyond its capacity drops: those of lowest weight, or the last ones.",
    )

    moe_pad_expert_input_to_capacity: bool = Field(
        False,
        description="Fill the tokens of each expert up to its capacity with zeros: products and exchanges have one "
        "size, and results stay what they are.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _pads_to_something(self) -> "ExpertsConfig":
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            raise ValueError(
                "moe_pad_expert_input_to_capacity=true needs moe_expert_capacity_factor; give it, or leave padding out"
            )
        return self

    @property
    def has_losses(self) -> bool:
        """Whether routers add losses."""
        return bool(self.moe_aux_loss_coeff or self.moe_z_loss_coeff)

    @property
    def is_any(self) -> bool:
        """Whether any option asks for something."""
        return bool(self.model_fields_set)
