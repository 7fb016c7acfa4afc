"""What a family is: names, a table that reads and writes its Hugging Face config, and a table of weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.models.families.packing import Packed
from ascendspeed_data.errors import AscendSpeedError

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


@dataclass(frozen=True)
class WeightRule:
    """One row of a weight table; `{layer}` in both names stands for the layer's number.

    Attributes:
        ours: parameter name in `Transformer`.
        theirs: tensor name in a Hugging Face folder.
        tied: leave the row out when the head is tied to the embedding.
        when: field of `ModelConfig` without which the model lacks the tensor, for example `qkv_bias`.
        packed: which part of `theirs` ours is, when several of our tensors share it.
    """

    ours: str
    theirs: str
    tied: bool = False
    when: str | None = None
    packed: Packed | None = None

    def belongs_to(self, config: ModelConfig) -> bool:
        """Tell whether a model has the tensor."""
        if self.tied and config.tie_word_embeddings:
            return False
        return self.when is None or bool(getattr(config, self.when))


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
        fixed: fields of `ModelConfig` that are the same for all its models.
        must_be: keys of the config.json with the values that the family does; the first is written, and is what an
            absent key means.
        unused: keys of the config.json that change nothing of what the model computes.
        prefix: of tensor names, absent in folders of the model without its head.
        sizes: Hugging Face configs of published models, by name.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    config: tuple[ConfigRule, ...]
    rules: tuple[WeightRule, ...]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    must_be: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    prefix: str = ""
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def read_config(self, hf: Mapping[str, Any]) -> ModelConfig:
        """Return the model that a Hugging Face `config.json` describes.

        Raises:
            AscendSpeedError: a key is missing, or asks for something this family does not do.
        """
        for key, allowed in self.must_be.items():
            if hf.get(key, allowed[0]) not in allowed:
                raise AscendSpeedError(
                    f"config.json: {key}={hf[key]!r} is not supported for {self.name}; only "
                    f"{' or '.join(map(repr, allowed))} is"
                )
        values: dict[str, Any] = {"family": self.name, **self.fixed}
        for rule in self.config:
            values |= rule.read(hf)
        known = IGNORED_HF_KEYS.union(self.must_be, self.unused, *(rule.keys for rule in self.config))
        unknown = [key for key in hf if key not in known]
        if unknown:
            announce(
                f"config.json: {self.name} knows no {', '.join(unknown)}; not used, so check that the model does not "
                "depend on it"
            )
        return validate(ModelConfig, values)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return the `config.json` that is read as the same model.

        Raises:
            AscendSpeedError: the family's config cannot say what this model is.
        """
        hf: dict[str, Any] = {"architectures": [self.architectures[0]], "model_type": self.model_type}
        hf |= {key: allowed[0] for key, allowed in self.must_be.items()}
        for rule in self.config:
            hf |= rule.write(config)
        again = self.read_config(hf).model_dump()
        lost = [name for name, value in config.model_dump().items() if again[name] != value]
        if lost:
            said = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
            raise AscendSpeedError(f"a config.json of {self.name} cannot say {said}; choose another family")
        return hf | {"use_cache": True}

    def weights(self, config: ModelConfig) -> Iterator[WeightRule]:
        """Yield the table with layer numbers filled in: every tensor of the model, once."""
        for rule in self.rules:
            if not rule.belongs_to(config):
                continue
            for layer in range(config.num_layers) if "{layer}" in rule.ours else (0,):
                yield replace(
                    rule, ours=rule.ours.format(layer=layer), theirs=rule.theirs.format(layer=layer)
                )
