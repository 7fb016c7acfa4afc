"""Rows of config tables about attention that differs from LLaMA's: windows by layer, rotary positions, multipliers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.config_rules import Rotary, whole_number
from ascendspeed_data.errors import AscendSpeedError

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Computed:
    """A key that says a field by arithmetic, such as a divisor for a factor.

    Attributes:
        theirs: the key.
        ours: the field.
        default: what an absent key means.
        read_as: the field from the key's value and the whole config.
        written_as: the key from our config; the nearest number that is read as the same is written.
    """

    theirs: str
    ours: str
    default: float
    read_as: Callable[[float, Mapping[str, Any]], float]
    written_as: Callable[[ModelConfig], float]

    @property
    def keys(self) -> Sequence[str]:
        """The key."""
        return (self.theirs,)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the field."""
        return {self.ours: self.read_as(positive_number(hf, self.theirs, self.default), hf)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the key; rounding twice may end one step beside."""
        guess, wanted = self.written_as(config), getattr(config, self.ours)
        sizes = {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
        near = (math.nextafter(guess, math.inf), math.nextafter(guess, 0.0))
        nearest = (round(guess), round(guess, 9), guess, *near)
        found = next((x for x in nearest if x and self.read_as(x, sizes) == wanted), guess)
        return {self.theirs: found}


@dataclass(frozen=True)
class PartialRotary(Rotary):
    """Rotary positions that turn the first part of each head.

    Attributes:
        default_share: of each head, where the config does not say it.
        is_scaled: the family knows scaled frequencies.
    """

    default_share: float = 1.0
    is_scaled: bool = True

    keys = ("partial_rotary_factor", *Rotary.keys)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return base, scaling, and how much is turned."""
        hf, stated = without_share(hf)
        shares = [share for share in stated if share is not None]
        if len(set(shares)) > 1:
            raise AscendSpeedError(
                f"partial_rotary_factor={shares[0]!r} and {shares[1]!r} in rope_parameters contradict each other; "
                "leave one"
            )
        share = shares[0] if shares else self.default_share
        if type(share) not in (int, float) or not 0 < share <= 1:
            raise AscendSpeedError(
                f"partial_rotary_factor={share!r} is no number above 0 up to 1; correct it"
            )
        values = super().read(hf)
        if values["rotary_scaling"] is not None and not self.is_scaled:
            raise AscendSpeedError(
                f"rope scaling {values['rotary_scaling']['kind']!r} stands for longrope in this family, which is not "
                "supported; it changes the model, so use another one"
            )
        head = hf.get("head_dim") or (
            whole_number(hf, "hidden_size") // whole_number(hf, "num_attention_heads")
        )
        turned = int(head * share)
        return values | {"rotary_dim": None if turned == head else turned}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of transformers 4, which 5 reads too."""
        share = 1.0 if config.rotary_dim is None else config.rotary_dim / config.head_dim
        return super().write(config) | {"partial_rotary_factor": share}


def without_share(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Return a config without `partial_rotary_factor`, and what stood there, outside and inside."""
    bare, found = dict(hf), [hf.get("partial_rotary_factor")]
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(hf.get(name), Mapping):
            bare[name] = {k: v for k, v in hf[name].items() if k != "partial_rotary_factor"}
            found.append(hf[name].get("partial_rotary_factor"))
    return bare, found


class UnstretchedRotary(Rotary):
    """Rotary positions whose scaling `dynamic` changes frequencies only beyond `max_position_embeddings`.

    No run here goes beyond, so it is the same as none.
    """

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return base and scaling."""
        bare = dict(hf)
        for name in ("rope_scaling", "rope_parameters"):
            stated = hf.get(name)
            if isinstance(stated, Mapping) and "dynamic" in (stated.get("rope_type"), stated.get("type")):
                bare[name] = {k: v for k, v in stated.items() if k == "rope_theta"}
        return super().read(bare)


@dataclass(frozen=True)
class LayerWindows:
    """Which layers have a sliding window: a list of their kinds, or every layer but each n-th.

    Attributes:
        every: n, where the config says neither.
        window: where the config does not say it.
    """

    every: int
    window: int | None = 4096

    @property
    def keys(self) -> Sequence[str]:
        """Keys that are read."""
        return ("sliding_window", "layer_types", "sliding_window_pattern", "_sliding_window_pattern")

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the window and the layers that have it."""
        kinds = self.kinds(hf)
        layers = tuple(number for number, kind in enumerate(kinds) if kind == SLIDING)
        window = hf.get("sliding_window", self.window)
        if not layers or window is None:
            return {"sliding_window": None, "window_layers": None}
        return {"sliding_window": window, "window_layers": None if len(layers) == len(kinds) else layers}

    def kinds(self, hf: Mapping[str, Any]) -> list[str]:
        """Return the kind of each layer."""
        count = whole_number(hf, "num_hidden_layers")
        if hf.get("layer_types") is None:
            every = hf.get("sliding_window_pattern", self.every)
            if type(every) is not int or every < 1:
                raise AscendSpeedError(
                    f"sliding_window_pattern={every!r} is not a number of layers; correct it"
                )
            return [FULL if (number + 1) % every == 0 else SLIDING for number in range(count)]
        kinds = list(hf["layer_types"])
        if len(kinds) != count or set(kinds) - {SLIDING, FULL}:
            raise AscendSpeedError(
                f"layer_types must name {SLIDING} or {FULL} for each of num_hidden_layers={count} layers, and names "
                f"{len(kinds)}: {', '.join(sorted(set(map(str, kinds))))}; correct it"
            )
        return kinds

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        kinds = [SLIDING if config.has_window(layer) else FULL for layer in range(config.num_layers)]
        return {"sliding_window": config.sliding_window, "layer_types": kinds}


@dataclass(frozen=True)
class RotaryByLayer(LayerWindows):
    """Windows by layer, and a rotary base of their own, never scaled, in the layers that have one.

    transformers 5 says both bases in `rope_parameters`, one entry for each kind of layer; 4 in keys of their own.

    Attributes:
        base: of layers without a window, where the config does not say it.
        window_base: of the others; `None` is the same.
        window_base_key: where transformers 4 says it, if the family has a key for it.
    """

    base: float = 10000.0
    window_base: float | None = None
    window_base_key: str | None = None

    @property
    def keys(self) -> Sequence[str]:
        """Keys that are read."""
        own = () if self.window_base_key is None else (self.window_base_key,)
        return (*super().keys, *own, *Rotary.keys)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return windows, both bases and the scaling."""
        by_kind = hf.get("rope_parameters")
        is_nested = isinstance(by_kind, Mapping) and bool({SLIDING, FULL} & by_kind.keys())
        flat = {name: hf[name] for name in Rotary.keys if hf.get(name) is not None}
        found = []
        if is_nested:
            assert isinstance(by_kind, Mapping)
            del flat["rope_parameters"]
            found.append(self._nested(by_kind))
        if flat or not found:
            found.append(self._flat(flat, hf))
        if len(found) == 2 and found[0] != found[1]:
            raise AscendSpeedError(f"rope_parameters={by_kind!r} contradicts {flat!r} beside it; leave one")
        full, window_base = found[0]
        values = super().read(hf)
        is_same = window_base == full["rotary_base"] and full["rotary_scaling"] is None
        if values["sliding_window"] is None or is_same:
            return values | full
        return values | full | {"window_rotary_base": window_base}

    def _flat(self, flat: Mapping[str, Any], hf: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        full = Rotary().read({"rope_theta": self.base, **flat})
        stated = None if self.window_base_key is None else hf.get(self.window_base_key)
        default = full["rotary_base"] if self.window_base is None else self.window_base
        return full, default if stated is None else stated

    def _nested(self, by_kind: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        full = Rotary().read({"rope_parameters": {"rope_theta": self.base, **(by_kind.get(FULL) or {})}})
        default = self.base if self.window_base is None else self.window_base
        local = Rotary().read({"rope_parameters": {"rope_theta": default, **(by_kind.get(SLIDING) or {})}})
        if local["rotary_scaling"] is not None:
            raise AscendSpeedError(
                f"rope_parameters: a rope_type of {SLIDING} but default is not supported; no published model has one"
            )
        return full, local["rotary_base"]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of transformers 4 and of 5; each leaves the other's alone."""
        flat = Rotary().write(config)
        local = config.rotary_base if config.window_rotary_base is None else config.window_rotary_base
        scaling = flat["rope_scaling"] or {"rope_type": "default"}
        nested = {
            FULL: {"rope_theta": config.rotary_base, **scaling},
            SLIDING: {"rope_theta": local, "rope_type": "default"},
        }
        own = {} if self.window_base_key is None else {self.window_base_key: local}
        return super().write(config) | flat | own | {"rope_parameters": nested}


def positive_number(hf: Mapping[str, Any], key: str, default: float) -> float:
    """Return a number above zero, the default where the key is absent or null; or raise `AscendSpeedError`."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise AscendSpeedError(f"{key}={value!r} is no number above zero; correct it")
    return value
