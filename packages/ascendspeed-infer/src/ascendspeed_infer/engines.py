"""What continues ids: the own engine, or another program's, by one small interface.

`TextGenerator` does all that concerns text (tokenizer, templates, stop texts, seeds of several completions) and hands
an engine ids. An installed package offers an engine under the entry-point group `ascendspeed_infer.engines`, and
`--engine NAME` chooses it. Importing this module imports no torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean
from ascendspeed_infer.config import LoadedModelConfig, SamplingConfig

if TYPE_CHECKING:
    from ascendspeed_infer.beams import BeamSettings
    from ascendspeed_infer.engine.sequences import Ends, Generated, GenerationSettings
    from ascendspeed_infer.generation import Step

ENTRY_POINTS = "ascendspeed_infer.engines"
OWN = "ascendspeed"
"""The name of the own engine."""

FOR_EVERY_ENGINE = frozenset(
    (
        "max_new_tokens",
        "max_length",
        "stop",
        "eos_token_ids",
        "ignore_eos",
        "num_return_sequences",
        "seed",
        "echo",
        "detokenize",
    )
)
"""Options of `SamplingConfig` that are in every request, or are done with its text."""

FOR_ALL_PARTS = ("engine", "model", "tokenizer", "sampling", "conversation")
"""Parts of the config of a command that are not the engine's: checked, or done with text."""


@dataclass(frozen=True)
class TokenRequest:
    """A prompt in ids, and how it is continued.

    Attributes:
        prompt_ids: at least one id.
        settings: length, sampling with its seed, end ids, stop texts.
        ends: told all new ids after each, says whether a stop text is there; for engines that know no texts.
        beams: of a beam search.
    """

    prompt_ids: tuple[int, ...]
    settings: "GenerationSettings"
    ends: "Ends"
    beams: "BeamSettings | None" = None


class TextEngine(Protocol):
    """Continues ids with one model.

    Attributes:
        name: as `--engine` takes it.
        knows: fields of `SamplingConfig`, besides those of `FOR_EVERY_ENGINE`, that it obeys; others are refused.
        limit_tokens: the longest text, prompt and new tokens together.
        vocab_size: ids are below.
        end_ids: ids that end a text; empty leaves it to the tokenizer.
    """

    name: str
    knows: frozenset[str]

    @property
    def limit_tokens(self) -> int:
        """See above."""
        ...

    @property
    def vocab_size(self) -> int:
        """See above."""
        ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See above."""
        ...

    def complete(
        self, requests: Sequence[TokenRequest], config: SamplingConfig
    ) -> Iterator[list["Generated"]]:
        """Continue requests, and give what was found for each, in their order, as soon as it is ready.

        Args:
            requests: each by its own settings.
            config: what is the same for all: of `knows` for instance `batch_size`.

        Returns:
            One text for each request; of a beam search the best ones. An end id is among the new ids, and so are
            those of a stop text.
        """
        ...

    def stream(self, request: TokenRequest, config: SamplingConfig, memory: Any) -> Iterator["Step"]:
        """Continue one request token by token; the caller may stop before the end.

        Args:
            request: without beams.
            config: as for `complete`.
            memory: of `new_memory`, or `None`.
        """
        ...

    def new_memory(self) -> Any:
        """Return what `stream` may keep of a text for the next one of a chat; `None` where nothing is to be kept."""
        ...


class EngineKind(Protocol):
    """What an entry point offers: it opens an engine for the model that a command was told of.

    Attributes:
        name: as `--engine` takes it.
        options: fields of `LoadedModelConfig`'s parts on source, adapter, layout, precision and devices that it obeys,
            besides `load`; others are refused.
    """

    name: str
    options: frozenset[str]

    def open(self, config: LoadedModelConfig, dtype: str) -> AbstractContextManager[TextEngine]:
        """Load the model.

        Args:
            config: what was asked for.
            dtype: format to compute in.

        Raises:
            AscendSpeedError: its program is not installed, or cannot load the model.
        """
        ...


def find_engine(name: str) -> EngineKind:
    """Return an installed engine.

    Raises:
        ConfigError: there is none of this name.
        AscendSpeedError: its package cannot be imported.
    """
    points = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in points:
        known = (OWN, *sorted(points))
        raise ConfigError(
            f"engine={name} is not installed; known are {', '.join(known)}{did_you_mean(name, known)}"
        )
    try:
        kind: EngineKind = points[name].load()
    except (ImportError, AttributeError) as error:
        raise AscendSpeedError(f"engine={name} cannot be loaded: {error}") from None
    return kind


def check_options(config: LoadedModelConfig, kind: EngineKind) -> None:
    """Refuse what an engine would not obey.

    Raises:
        ConfigError: an option that was given is not among its own.
    """
    parts = [getattr(config, name) for name in type(config).model_fields if name not in FOR_ALL_PARTS]
    for part in parts:
        for name in sorted(part.model_fields_set - kind.options - {"load"}):
            value = getattr(part, name)
            if value != type(part).model_fields[name].default:
                raise ConfigError(f"{name}={value} is no option of engine={kind.name}; leave it out")


def check_sampling(config: SamplingConfig, name: str, knows: frozenset[str]) -> None:
    """Refuse options of sampling that an engine would not obey.

    Raises:
        ConfigError: an option that was given is not among those that it knows.
    """
    for field in sorted(config.model_fields_set - knows - FOR_EVERY_ENGINE):
        value = getattr(config, field)
        if value != type(config).model_fields[field].default:
            raise ConfigError(
                f"engine={name} does not know {field}={value}; leave it out, or use engine={OWN}"
            )


def hugging_face_folder(config: LoadedModelConfig, name: str) -> Path:
    """Return the folder of the model, for engines that read no other kind of checkpoint.

    Raises:
        ConfigError: it is of another kind.
    """
    from ascendspeed_core.weights.detect import detect_kind

    path = config.source.load
    assert path is not None
    kind = detect_kind(path)
    if kind != "huggingface":
        raise ConfigError(
            f"engine={name} reads Hugging Face folders, {path} is of kind {kind}; convert it: asd-ckpt convert "
            f"--input-model-dir {path} --output-model-dir OUT --to huggingface"
        )
    return path


def adapter_folder(config: LoadedModelConfig, name: str) -> Path | None:
    """Return the folder of the adapter, for engines that read peft's format only; `None` when none was given.

    Raises:
        ConfigError: it is of another kind.
    """
    path = config.adapter.lora_load
    if path is not None and not (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"engine={name} reads adapters in peft's format, {path} has no adapter_config.json; merge it: "
            f"asd-ckpt merge-lora --load BASE --lora-load {path} --save OUT"
        )
    return path
