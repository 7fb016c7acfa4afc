"""Rows of config and weight tables that families with experts share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Condition, WeightRule, count_layers
from ascendspeed_core.models.families.config_rules import Key, whole_number
from ascendspeed_core.models.families.decoder import (
    EMBEDDING_RULES,
    HEAD_RULES,
    LAYER_RULES,
    QUERY_KEY_VALUE_RULES,
)
from ascendspeed_core.models.families.packing import EqualParts
from ascendspeed_data.errors import AscendSpeedError

ROUTER_TRAINING_KEYS = ("router_aux_loss_coef", "output_router_logits")
"""Keys that say how routers are trained, which options of a run say here; a model computes the same with any."""


def count_experts(config: ModelConfig) -> int:
    """Return how many values the index `{expert}` has."""
    return config.experts.count if config.experts else 0


INDICES: Mapping[str, Callable[[ModelConfig], int]] = {"layer": count_layers, "expert": count_experts}
"""Of families with experts."""


def _in_expert_layers(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return config.has_experts(indices["layer"])


def _in_dense_layers(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return not config.has_experts(indices["layer"])


def _with_shared_expert(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    experts = config.experts
    return _in_expert_layers(config, indices) and experts is not None and bool(experts.shared_ffn_hidden_size)


def _with_shared_gate(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return _in_expert_layers(config, indices) and config.experts is not None and config.experts.shared_gate


def _with_score_bias(config: ModelConfig, indices: Mapping[str, int]) -> bool:
    return _in_expert_layers(config, indices) and config.experts is not None and config.experts.score_bias


_OURS, _THEIRS = "layers.{layer}.mlp", "model.layers.{layer}"
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

PLAIN_RULES = (
    EMBEDDING_RULES
    + QUERY_KEY_VALUE_RULES
    + tuple(rule for rule in LAYER_RULES if ".mlp." not in rule.ours)
    + HEAD_RULES
)
"""The weight table of LLaMA's names without the MLP."""

DENSE_RULES = tuple(
    WeightRule(f"{_OURS}.{name}.weight", f"{_THEIRS}.mlp.{name}.weight", when=_in_dense_layers)
    for name in _PROJECTIONS
)
"""The MLP of layers without experts."""


def _shared_rules(block: str) -> tuple[WeightRule, ...]:
    return tuple(
        WeightRule(
            f"{_OURS}.shared_expert.{name}.weight",
            f"{_THEIRS}.mlp.{block}.{name}.weight",
            when=_with_shared_expert,
        )
        for name in _PROJECTIONS
    )


SHARED_RULES = (
    *_shared_rules("shared_expert"),
    WeightRule(
        f"{_OURS}.shared_expert_gate.weight",
        f"{_THEIRS}.mlp.shared_expert_gate.weight",
        when=_with_shared_gate,
    ),
)
"""What all tokens use beside their experts."""

DEEPSEEK_SHARED_RULES = (
    *_shared_rules("shared_experts"),
    WeightRule(f"{_OURS}.router.bias", f"{_THEIRS}.mlp.gate.e_score_correction_bias", when=_with_score_bias),
)
"""The same under DeepSeek's names, and the biases of the choice."""


def expert_rules(block: str, names: Sequence[str] = _PROJECTIONS) -> tuple[WeightRule, ...]:
    """Return the rows of router and experts, each expert in tensors of its own.

    Args:
        block: their name of the MLP, `mlp`.
        names: their names of gate, up and down projection.
    """
    when: Condition = _in_expert_layers
    return (
        WeightRule(f"{_OURS}.router.weight", f"{_THEIRS}.{block}.gate.weight", when=when),
        *(
            WeightRule(
                f"{_OURS}.experts.{{expert}}.{ours}.weight",
                f"{_THEIRS}.{block}.experts.{{expert}}.{theirs}.weight",
                when=when,
            )
            for ours, theirs in zip(_PROJECTIONS, names, strict=True)
        ),
    )


FUSED_EXPERT_RULES = (
    WeightRule(f"{_OURS}.router.weight", f"{_THEIRS}.mlp.gate.weight", when=_in_expert_layers),
    *(
        WeightRule(
            f"{_OURS}.experts.{{expert}}.{name}.weight",
            f"{_THEIRS}.mlp.experts.gate_up_proj",
            when=_in_expert_layers,
            packed=EqualParts(part),
        )
        for part, name in enumerate(("gate_proj", "up_proj"))
    ),
    WeightRule(
        f"{_OURS}.experts.{{expert}}.down_proj.weight",
        f"{_THEIRS}.mlp.experts.down_proj",
        when=_in_expert_layers,
    ),
)
"""Router and experts as transformers 5 holds them: all experts in one tensor, the rows of gate above those of up."""


@dataclass(frozen=True)
class ExpertKeys:
    """The keys of a config that say what experts a model has.

    Attributes:
        count: key of their number; transformers 5 writes `num_local_experts` for it in some families.
        inner: key of the width of one.
        fixed: fields of `Experts` that are the same for all models of the family.
        more: rows for further fields of `Experts`.
        says_dense_layers: `mlp_only_layers` and `decoder_sparse_step` say which layers have none.
    """

    count: str
    inner: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Key, ...] = ()
    says_dense_layers: bool = False

    @property
    def keys(self) -> Sequence[str]:
        """Keys that are read."""
        further = [key for row in self.more for key in row.keys]
        dense = ("mlp_only_layers", "decoder_sparse_step") * self.says_dense_layers
        return (*self._counts, self.inner, "num_experts_per_tok", *further, *dense)

    @property
    def _counts(self) -> Sequence[str]:
        return tuple(dict.fromkeys((self.count, "num_experts", "num_local_experts")))

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the field `experts`."""
        said = {key: hf[key] for key in self._counts if hf.get(key) is not None}
        if len(set(map(str, said.values()))) > 1:
            stated = " and ".join(f"{key}={value!r}" for key, value in said.items())
            raise AscendSpeedError(f"{stated} contradict each other; leave one")
        experts: dict[str, Any] = {
            "count": whole_number(hf, *self._counts),
            "per_token": whole_number(hf, "num_experts_per_tok"),
            "ffn_hidden_size": whole_number(hf, self.inner),
            **self.fixed,
        }
        for row in self.more:
            experts |= row.read(hf)
        if self.says_dense_layers:
            experts["dense_layers"] = _dense_layers(hf)
        return {"experts": experts}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        experts = config.experts
        if experts is None:
            raise AscendSpeedError(f"a model without experts has no {self.count}; choose another family")
        said: dict[str, Any] = {
            self.count: experts.count,
            "num_experts_per_tok": experts.per_token,
            self.inner: experts.ffn_hidden_size,
        }
        for row in self.more:
            said[row.theirs] = getattr(experts, row.ours[0])
        if self.says_dense_layers:
            said |= {"mlp_only_layers": list(experts.dense_layers), "decoder_sparse_step": 1}
        return said


def _dense_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers without experts: those of a list, and all that are no multiple of a step."""
    layers = whole_number(hf, "num_hidden_layers")
    listed = hf.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
        raise AscendSpeedError(f"mlp_only_layers={listed!r} is not a list of layers; correct it")
    step = whole_number({"decoder_sparse_step": 1} | dict(hf), "decoder_sparse_step")
    return tuple(layer for layer in range(layers) if layer in listed or (layer + 1) % step)


class NoWindow:
    """Attention of all layers sees the whole text; a window that is switched on is refused."""

    keys: Sequence[str] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse a window."""
        if hf.get("use_sliding_window"):
            raise AscendSpeedError(
                "use_sliding_window=True is not supported for models with experts; only False is"
            )
        kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise AscendSpeedError(
                f"layer_types has {sorted(map(str, kinds))[0]!r}, which is not supported; only 'full_attention' is"
            )
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        return {"use_sliding_window": False, "sliding_window": None}
