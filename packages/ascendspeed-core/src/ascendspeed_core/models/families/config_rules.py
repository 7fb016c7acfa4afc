"""Rows of which the families' config tables are made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import AscendSpeedError

LARGEST = 1 << 31
"""Of a number that says a size; larger ones are damage."""

REQUIRED = object()
"""Default of a key that a config.json must have."""


@dataclass(frozen=True)
class Key:
    """One key that says one or more fields as it stands.

    Attributes:
        theirs: the key.
        ours: the fields.
        default: what an absent key means.
        also: other spellings that are read.
    """

    theirs: str
    ours: tuple[str, ...]
    default: Any = REQUIRED
    also: tuple[str, ...] = ()

    @property
    def keys(self) -> Sequence[str]:
        """All spellings."""
        return (self.theirs, *self.also)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the value of the first spelling that is there."""
        value = next((hf[key] for key in self.keys if hf.get(key) is not None), self.default)
        if value is REQUIRED:
            said = "is null" if self.theirs in hf else "is missing"
            raise AscendSpeedError(f"{self.theirs} {said}, and has no default; add it")
        return dict.fromkeys(self.ours, value)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the key; of several fields all must be equal, which reading back proves."""
        return {self.theirs: getattr(config, self.ours[0])}


def key(theirs: str, *ours: str, default: Any = REQUIRED, also: tuple[str, ...] = ()) -> Key:
    """Return a row for one key; without `ours` the field has the same name."""
    return Key(theirs, ours or (theirs,), default, also)


@dataclass(frozen=True)
class Heads:
    """Key-value heads and head size, which follow from others when a config leaves them out.

    Attributes:
        is_grouped: the family has key-value heads of its own; otherwise each head has its own key and value.
        writes_head_dim: its config can say a head size.
    """

    is_grouped: bool = True
    writes_head_dim: bool = True
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    also_hidden: str = "n_embed"

    @property
    def keys(self) -> Sequence[str]:
        """Keys that are read."""
        return ("num_key_value_heads",) * self.is_grouped + ("head_dim",) * self.writes_head_dim

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return both sizes."""
        heads = whole_number(hf, self.heads, "num_attention_heads")
        hidden = whole_number(hf, self.hidden, self.also_hidden)
        stated = hf.get("head_dim") if self.writes_head_dim else None
        if stated is None and hidden % heads:
            raise AscendSpeedError(
                f"{self.heads}={heads} does not divide hidden_size={hidden}; correct one of them"
            )
        key_value_heads = hf.get("num_key_value_heads") if self.is_grouped else None
        return {
            "num_key_value_heads": heads if key_value_heads is None else key_value_heads,
            "head_dim": hidden // heads if stated is None else stated,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return what the family's config can say."""
        said = {"num_key_value_heads": config.num_key_value_heads} if self.is_grouped else {}
        return said | ({"head_dim": config.head_dim} if self.writes_head_dim else {})


SCALING_KEYS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
"""Kinds of rotary scaling, and what each takes besides its factor and the original length."""


class Rotary:
    """Base and scaling of the rotary frequencies, where transformers 4 wrote them and where 5 does."""

    keys: Sequence[str] = (
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "original_max_position_embeddings",
    )

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return base and scaling; a kind or key that is not known is refused."""
        _refuse_two_scalings(hf)
        stated = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        kinds = [stated.pop(name) for name in ("rope_type", "type") if stated.get(name) is not None]
        kind = kinds[0] if kinds else "default"
        if len(set(map(str, kinds))) > 1:
            raise AscendSpeedError(
                f"rope_type={kinds[0]!r} and type={kinds[1]!r} contradict each other; leave one"
            )
        inner, outer = stated.pop("rope_theta", None), hf.get("rope_theta")
        if inner is not None and outer is not None and inner != outer:
            raise AscendSpeedError(
                f"rope_theta={outer!r} contradicts the rope_theta={inner!r} of its rope_parameters or "
                "rope_scaling; correct one of them"
            )
        base = next(value for value in (inner, outer, 10000.0) if value is not None)
        scaling = None
        if kind in SCALING_KEYS:
            scaling = {"kind": kind, "factor": stated.pop("factor", None)}
            length = stated.pop("original_max_position_embeddings", None)
            length = length or hf.get("original_max_position_embeddings")
            if kind != "linear":
                scaling["original_max_position_embeddings"] = length
            scaling |= {name: stated.pop(name) for name in SCALING_KEYS[kind] if stated.get(name) is not None}
        elif kind != "default":
            raise AscendSpeedError(
                f"rope scaling {kind!r} is not supported; there are default, {', '.join(SCALING_KEYS)}"
                f"{_without_scaling(kind)}"
            )
        left = {
            name: value
            for name, value in stated.items()
            if value is not None and (name, value) != ("truncate", True)
        }
        if left and not kinds:
            raise AscendSpeedError(
                f"rope_parameters or rope_scaling says {left}, but no rope_type; add it, or leave these keys out"
            )
        if left and kind != "default":
            raise AscendSpeedError(f"rope scaling {kind!r} with {left} is not supported; leave it out")
        return {"rotary_base": base, "rotary_scaling": scaling}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of transformers 4, which 5 reads too."""
        scaling = config.rotary_scaling
        written = None
        if scaling is not None:
            names = ("factor", "original_max_position_embeddings", *SCALING_KEYS[scaling.kind])
            stated = {name: getattr(scaling, name) for name in names}
            is_said = {k: v for k, v in stated.items() if v is not None and (k, v) != ("truncate", True)}
            written = {"rope_type": scaling.kind} | is_said
        return {"rope_theta": config.rotary_base, "rope_scaling": written}


def _without_scaling(kind: Any) -> str:
    """Say what to do about a kind of scaling that is not supported."""
    key = "leave out rope_scaling, or in rope_parameters all but rope_theta"
    if kind == "dynamic":
        return f". It changes nothing up to max_position_embeddings: for sequences up to there, {key}"
    return (
        f"; it changes the model, so {key}, only if the weights were trained without it, or use another model"
    )


def _refuse_two_scalings(hf: Mapping[str, Any]) -> None:
    """Raise when the keys of transformers 4 and 5 are both there and say different things."""
    found = [hf[key] for key in ("rope_parameters", "rope_scaling") if isinstance(hf.get(key), Mapping)]
    said = [
        {
            ("rope_type" if name == "type" else name): value
            for name, value in one.items()
            if name != "rope_theta"
        }
        for one in found
    ]
    if len(said) == 2 and all(found) and said[0] != said[1]:
        raise AscendSpeedError(
            f"rope_parameters={found[0]!r} and rope_scaling={found[1]!r} contradict each other; leave one"
        )


class EndIds:
    """Ids that end a text: one or a list."""

    keys: Sequence[str] = ("eos_token_id",)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return all of them."""
        return {"eos_token_ids": end_ids(hf.get("eos_token_id"))}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return one id as a number, several as a list."""
        return {"eos_token_id": written_end_ids(config)}


class SlidingWindow:
    """Qwen's window: switched on, and from one layer on, or in the layers of a list."""

    keys: Sequence[str] = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the window and the layers that have it, if any."""
        layers = whole_number(hf, "num_hidden_layers")
        if type(hf.get("use_sliding_window", False)) is not bool:
            raise TypeError("use_sliding_window must be true or false")
        window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
        first = hf.get("max_window_layers", layers)
        kinds = hf.get("layer_types") or [
            "sliding_attention" if window and number >= first else "full_attention"
            for number in range(layers)
        ]
        if len(kinds) != layers or set(kinds) - {"sliding_attention", "full_attention"}:
            raise AscendSpeedError(
                f"layer_types must name sliding_attention or full_attention for each of num_hidden_layers={layers} "
                "layers; correct it"
            )
        windowed = tuple(number for number, kind in enumerate(kinds) if kind == "sliding_attention")
        if not windowed or window is None:
            return {"sliding_window": None, "window_layers": None}
        return {"sliding_window": window, "window_layers": None if len(windowed) == layers else windowed}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys."""
        windowed = [layer for layer in range(config.num_layers) if config.has_window(layer)]
        said = {
            "use_sliding_window": bool(windowed),
            "sliding_window": config.sliding_window,
            "max_window_layers": windowed[0] if windowed else config.num_layers,
        }
        if config.window_layers is None:
            return said
        kinds = ["full_attention"] * config.num_layers
        for layer in windowed:
            kinds[layer] = "sliding_attention"
        return said | {"layer_types": kinds}


def end_ids(stated: Any) -> tuple[int, ...]:
    """Return ids that end a text from what a config says: nothing, one or several."""
    return tuple(stated) if isinstance(stated, list) else () if stated is None else (stated,)


def written_end_ids(config: ModelConfig) -> int | list[int] | None:
    """Return ids that end a text as configs say them."""
    ids = list(config.eos_token_ids)
    return ids[0] if len(ids) == 1 else ids or None


def whole_number(hf: Mapping[str, Any], *spellings: str) -> int:
    """Return the value of the first key that is there, or raise `AscendSpeedError`."""
    for spelling in spellings:
        value = hf.get(spelling)
        if type(value) is int and 0 < value <= LARGEST:
            return value
    raise AscendSpeedError(
        f"{spellings[0]}={hf.get(spellings[0])!r} is not a number of 1 to {LARGEST:,}; correct it"
    )
