"""What a family is: names, a table that reads and writes its Hugging Face config, and a table of weights."""

import itertools
import re
import string
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.launch import announce
from ascendspeed_core.models.families.config_rules import Heads, Key
from ascendspeed_core.models.families.packing import RowPacking
from ascendspeed_data.errors import AscendSpeedError, ConfigError

IGNORED_HF_KEYS = frozenset(
    (
        "_attn_implementation",
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "gradient_checkpointing",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "trust_remote_code",
        "unk_token_id",
        "use_cache",
    )
)
"""Keys of a config.json that speak of files, training tools or transformers itself, not of the model."""

PREDICTED_LAYERS = "num_nextn_predict_layers"
"""Key of layers after the last that predict further tokens (DeepSeek-V3, section 2.2); the decoder has none."""

_OTHER_KEYS = {"rotary_base": "rope_theta", "rotary_scaling": "rope_scaling", "eos_token_ids": "eos_token_id"}
"""Keys of all families by the fields that they say, besides those of `Key`."""


Condition = Callable[[ModelConfig, Mapping[str, int]], bool]
"""Tells by a model's config, and the value of each index by name, whether the model has a tensor."""


def count_layers(config: ModelConfig) -> int:
    """Return how many values the index `{layer}` has."""
    return config.num_layers


@dataclass(frozen=True)
class WeightRule:
    """One row of a weight table: our tensors of a name pattern, and the tensors of a Hugging Face folder with theirs.

    Names in braces are indices, which count from 0 (`Family.indices`). `{layer}` in both names is the layer's number.
    An index that only `ours` has is a leading dimension of their tensor, which is fused:

        WeightRule("layers.{layer}.mlp.experts.{expert}.down_proj.weight",      # [H, F] each
                   "model.layers.{layer}.mlp.experts.down_proj")                # [experts, H, F]

    An index that only `theirs` has is a leading dimension of our tensor.

    Attributes:
        ours: parameter name in `Transformer`.
        theirs: tensor name in a Hugging Face folder.
        tied: leave the row out when the head is tied to the embedding.
        when: field of `ModelConfig` without which the model lacks the tensor, for example `qkv_bias`; or a function
            of config and indices, for tensors that only some layers have.
        packed: which rows of `theirs` are ours, when several of our tensors share it.
        transposed: their matrix is stored as [in, out], ours as [out, in]. `packed` speaks of rows of ours.
    """

    ours: str
    theirs: str
    tied: bool = False
    when: str | Condition | None = None
    packed: RowPacking | None = None
    transposed: bool = False

    def belongs_to(self, config: ModelConfig, indices: Mapping[str, int]) -> bool:
        """Tell whether a model has the tensor with these indices."""
        if self.tied and config.tie_word_embeddings:
            return False
        if isinstance(self.when, str):
            return bool(getattr(config, self.when))
        return self.when is None or self.when(config, indices)

    def expand(self, config: ModelConfig, ranges: Mapping[str, range]) -> Iterator["TensorMapping"]:
        """Yield one mapping for each combination of indices that the names have."""
        in_ours, in_theirs = index_names(self.ours), index_names(self.theirs)
        names = list(dict.fromkeys(in_ours + in_theirs))
        for values in itertools.product(*(ranges[name] for name in names)):
            indices = dict(zip(names, values, strict=True))
            if self.belongs_to(config, indices):
                yield TensorMapping(
                    self.ours.format(**indices),
                    self.theirs.format(**indices),
                    tuple(indices[name] for name in in_theirs if name not in in_ours),
                    tuple(indices[name] for name in in_ours if name not in in_theirs),
                    self.packed,
                    self.transposed,
                )


@dataclass(frozen=True)
class TensorMapping:
    """One of our tensors, or a member of it, and the tensor of a Hugging Face folder that holds it.

    Attributes:
        ours: parameter name in `Transformer`.
        theirs: tensor name in a Hugging Face folder.
        our_position: position in the leading dimensions of our tensor; empty when it is the whole tensor.
        their_position: position in the leading dimensions of their tensor; empty when it is not fused.
        packed: which rows of theirs are ours; `None` for all.
        transposed: their matrix is the transpose of ours.
    """

    ours: str
    theirs: str
    our_position: tuple[int, ...] = ()
    their_position: tuple[int, ...] = ()
    packed: RowPacking | None = None
    transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether both tensors are the same, or differ in `packed` only."""
        return not (self.our_position or self.their_position or self.transposed)


def index_names(pattern: str) -> tuple[str, ...]:
    """Return the names in braces of a name pattern, in order."""
    return tuple(field for _, field, _, _ in string.Formatter().parse(pattern) if field)


def leading_shape(positions: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the leading dimensions that these positions fill."""
    return tuple(max(along) + 1 for along in zip(*positions, strict=True))


class ConfigRule(Protocol):
    """One row of a config table: some keys of a `config.json`, and the fields of `ModelConfig` they decide.

    Attributes:
        keys: keys of the config.json that the row reads.
    """

    @property
    def keys(self) -> Sequence[str]:
        """Keys of the config.json that the row reads."""
        ...

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return fields of `ModelConfig`, or raise `AscendSpeedError` naming key, value and rule."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return keys of the config.json."""
        ...


@dataclass(frozen=True)
class Family:
    """A family of models with one architecture.

    Attributes:
        name: `llama`.
        model_type: of its Hugging Face configs.
        architectures: `architectures` entries of Hugging Face configs that belong to it; the first is written.
        config: the config table.
        rules: the weight table.
        other_model_types: of configs that say the same architecture under another name, which is not written.
        other_rules: weight tables of other layouts of the same tensors, which are read but never written.
        fixed: fields of `ModelConfig` that are the same for all its models.
        must_be: keys of the config.json with the values that the family does; the first is written, and is what an
            absent key means.
        dropouts: keys of the config.json that say what training drops, which our options of the same names say here.
        unused: keys of the config.json that change nothing of what the model computes.
        prefix: of tensor names, absent in folders of the model without its head.
        sizes: Hugging Face configs of published models, by name.
        indices: how many values each index in the names of `rules` has; by default `{layer}` alone.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    config: tuple[ConfigRule, ...]
    rules: tuple[WeightRule, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    dropouts: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    prefix: str = ""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    other_model_types: tuple[str, ...] = ()
    other_rules: tuple[tuple[WeightRule, ...], ...] = ()
    indices: Mapping[str, Callable[[ModelConfig], int]] = field(
        default_factory=lambda: {"layer": count_layers}
    )

    def read_config(self, hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """Return the model that a Hugging Face `config.json` describes.

        Args:
            hf: its content.
            where: its path, for messages.

        Raises:
            AscendSpeedError: a key is missing, or asks for something this family does not do.
        """
        try:
            values = self._read_values(hf)
        except AscendSpeedError as error:
            raise AscendSpeedError(f"{where}: {error}") from None
        dropped = {key: value for key, value in self.dropout_of(hf, where).items() if value}
        known = IGNORED_HF_KEYS.union(
            self.must_be, self.unused, self.dropouts, *(rule.keys for rule in self.config)
        )
        unknown = [key for key in hf if key not in known]
        if unknown:
            announce(
                f"{where}: {self.name} knows no {', '.join(unknown)}; not used, so check that the model does not "
                "depend on it"
            )
        if dropped:
            said = ", ".join(f"{key}={value}" for key, value in dropped.items())
            announce(
                f"{where}: {said} is not kept as a part of the model; training drops what its options say, and nothing "
                "else drops anything"
            )
        try:
            return validate(ModelConfig, values, strict=True)
        except ConfigError as error:
            raise AscendSpeedError(f"{where}: {self._in_their_words(str(error), hf)}; correct it") from None

    def dropout_of(self, hf: Mapping[str, Any], where: str = "config.json") -> dict[str, float]:
        """Return what a Hugging Face config would have training drop, by the name of our option.

        Raises:
            AscendSpeedError: a value is no share.
        """
        found = {key: hf[key] for key in self.dropouts if hf.get(key) is not None}
        for key, value in found.items():
            if type(value) not in (int, float) or not 0 <= value < 1:
                raise AscendSpeedError(f"{where}: {key}={value!r} is no number from 0 to below 1; correct it")
        return {key: float(value) for key, value in found.items()}

    def key_of(self, field: str) -> str:
        """Return the key of this family's config.json that says a field of `ModelConfig`; the field if none does."""
        for rule in self.config:
            if isinstance(rule, Key) and field in rule.ours:
                return rule.theirs
            if isinstance(rule, Heads) and field == "num_attention_heads":
                return rule.heads
        return _OTHER_KEYS.get(field, field)

    def _in_their_words(self, complaint: str, hf: Mapping[str, Any]) -> str:
        """Return a complaint about fields of `ModelConfig` with the keys that say them in the file."""
        scaling = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
        inner = "|".join(RotaryScaling.model_fields)
        complaint = re.sub(rf"^({inner})=", rf"{scaling}: \1=", complaint)
        fields = "|".join(ModelConfig.model_fields)
        return re.sub(rf"\b({fields})(?==|\[)", lambda match: self.key_of(match[1]), complaint)

    def _read_values(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of `ModelConfig` that a config says."""
        for key, allowed in self.must_be.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise AscendSpeedError(
                    f"{key}={hf[key]!r} is not supported for {self.name}; only "
                    f"{' or '.join(map(repr, allowed))} is"
                )
        values: dict[str, Any] = {"family": self.name, **self.fixed}
        for rule in self.config:
            try:
                values |= rule.read(hf)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                said = ", ".join(f"{key}={hf[key]!r}" for key in rule.keys if hf.get(key) is not None)
                raise AscendSpeedError(
                    f"{said or rule.keys} has a value of the wrong type ({error}); correct it"
                ) from None
        return values

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return the `config.json` that is read as the same model.

        Raises:
            AscendSpeedError: the family's config cannot say what this model is.
        """
        hf: dict[str, Any] = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        hf |= {key: allowed[0] for key, allowed in self.must_be.items()}
        hf |= dict.fromkeys(self.dropouts, 0.0)
        for rule in self.config:
            hf |= rule.write(config)
        again = self.read_config(hf).model_dump()
        lost = [name for name, value in config.model_dump().items() if again[name] != value]
        if lost:
            said = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
            raise AscendSpeedError(f"a config.json of {self.name} cannot say {said}; choose another family")
        return hf | {"use_cache": True}

    def in_layout_of(self, names: Collection[str], config: ModelConfig) -> "Family":
        """Return this family with the weight table that most of these tensors are in; its own where none is better."""

        def found(rules: tuple[WeightRule, ...]) -> int:
            family = replace(self, rules=rules, other_rules=())
            return len({mapping.theirs for mapping in family.weights(config)} & set(names))

        if not self.other_rules:
            return self
        own = {mapping.theirs for mapping in self.weights(config)}
        if own <= set(names):
            return self
        best = max((self.rules, *self.other_rules), key=found)
        return replace(self, rules=best)

    def weights(self, config: ModelConfig) -> Iterator[TensorMapping]:
        """Yield the table with all indices filled in: every tensor of the model, once."""
        ranges = self.index_ranges(config)
        for rule in self.rules:
            yield from rule.expand(config, ranges)

    def index_ranges(self, config: ModelConfig) -> dict[str, range]:
        """Return the values of each index of the weight table by its name."""
        return {name: range(count(config)) for name, count in self.indices.items()}
