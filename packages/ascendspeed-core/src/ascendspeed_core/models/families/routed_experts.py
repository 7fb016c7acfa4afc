"""The keys by which DeepSeek's configs, and those that follow them, say what experts a model has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.config_rules import whole_number
from ascendspeed_data.errors import AscendSpeedError

GREEDY, GROUP_LIMITED, WITHOUT_LOSS = "greedy", "group_limited_greedy", "noaux_tc"
"""Values of `topk_method`."""

ROUTER_KEYS = ("aux_loss_alpha", "ep_size", "output_router_logits", "router_aux_loss_coef", "seq_aux")
"""Keys that say how routers are trained or spread, which options of a run say here."""


@dataclass(frozen=True)
class RoutedExperts:
    """Experts after the first layers, which are dense; a shared one beside them.

    Attributes:
        score: what turns logits into scores.
        methods: values of `topk_method` that the family has; the first is what an absent key means.
        default_groups: of an absent `n_group` and `topk_group`.
        default_scaling: of an absent `routed_scaling_factor`.
        default_dense: of an absent `first_k_dense_replace`.
        is_normalised: what an absent `norm_topk_prob` means.
        says_method: its configs have `topk_method` and `scoring_func`.
    """

    score: str
    methods: tuple[str, ...]
    default_groups: tuple[int, int] = (1, 1)
    default_scaling: float = 1.0
    default_dense: int = 0
    is_normalised: bool = True
    says_method: bool = True

    @property
    def keys(self) -> Sequence[str]:
        """Keys that are read."""
        method = ("topk_method", "scoring_func") * self.says_method
        return (
            "n_routed_experts", "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size",
            "n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
            "first_k_dense_replace", "moe_layer_freq", *method,
        )  # fmt: skip

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the field `experts`; none where all layers are dense."""
        layers, dense = whole_number(hf, "num_hidden_layers"), _stated(hf, "first_k_dense_replace", 0)
        dense = self.default_dense if dense is None else dense
        counts = {
            key: hf[key] for key in ("n_routed_experts", "num_experts", "num_local_experts") if hf.get(key)
        }
        if not counts or dense >= layers:
            return {"experts": None}
        if len(set(map(str, counts.values()))) > 1:
            stated = " and ".join(f"{key}={value!r}" for key, value in counts.items())
            raise AscendSpeedError(f"{stated} contradict each other; leave one")
        if hf.get("moe_layer_freq", 1) not in (None, 1):
            raise AscendSpeedError(
                f"moe_layer_freq={hf['moe_layer_freq']!r} is not supported; only 1 is: all layers but the first have "
                "experts"
            )
        method, inner = self._method(hf), whole_number(hf, "moe_intermediate_size")
        groups = [_stated(hf, key, 1) for key in ("n_group", "topk_group")]
        of_groups = [d if n is None else n for n, d in zip(groups, self.default_groups, strict=True)]
        shared = _stated(hf, "n_shared_experts", 0)
        normalised, scaling = hf.get("norm_topk_prob"), hf.get("routed_scaling_factor")
        is_limited = method != GREEDY
        return {
            "experts": {
                "count": whole_number(hf, *counts),
                "per_token": whole_number(hf, "num_experts_per_tok"),
                "ffn_hidden_size": inner,
                "score": self.score,
                "normalised": self.is_normalised if normalised is None else normalised,
                "scaling": self.default_scaling if scaling is None else scaling,
                "groups": of_groups[0] if is_limited else 1,
                "groups_per_token": of_groups[1] if is_limited else 1,
                "group_score": self._group_score,
                "score_bias": method == WITHOUT_LOSS,
                "shared_ffn_hidden_size": inner * shared if shared else None,
                "dense_layers": tuple(range(dense)),
            }
        }

    @property
    def _group_score(self) -> str:
        return "top2" if WITHOUT_LOSS in self.methods else "max"

    def _method(self, hf: Mapping[str, Any]) -> Any:
        """Return how experts are chosen, or refuse it."""
        if not self.says_method:
            return self.methods[0]
        score = hf.get("scoring_func")
        if score not in (None, self.score):
            raise AscendSpeedError(f"scoring_func={score!r} is not supported here; only {self.score!r} is")
        method = hf.get("topk_method")
        method = self.methods[0] if method is None else method
        if method not in self.methods:
            raise AscendSpeedError(
                f"topk_method={method!r} is not supported here; only {' or '.join(map(repr, self.methods))} is"
            )
        return method

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        experts = config.experts
        if experts is None:
            return {"first_k_dense_replace": config.num_layers}
        method = next((m for m in self.methods if (m == GREEDY) == (experts.groups == 1)), self.methods[0])
        return {
            "n_routed_experts": experts.count,
            "num_experts_per_tok": experts.per_token,
            "moe_intermediate_size": experts.ffn_hidden_size,
            "n_shared_experts": (experts.shared_ffn_hidden_size or 0) // experts.ffn_hidden_size,
            "n_group": experts.groups,
            "topk_group": experts.groups_per_token,
            "norm_topk_prob": experts.normalised,
            "routed_scaling_factor": experts.scaling,
            "first_k_dense_replace": len(experts.dense_layers),
        } | ({"topk_method": method, "scoring_func": experts.score} if self.says_method else {})


def _stated(hf: Mapping[str, Any], key: str, least: int) -> int | None:
    """Return a whole number, `None` where the key is absent or null; or raise `AscendSpeedError`."""
    value = hf.get(key)
    if value is not None and (type(value) is not int or value < least):
        raise AscendSpeedError(f"{key}={value!r} is not a whole number from {least}; correct it")
    return value
