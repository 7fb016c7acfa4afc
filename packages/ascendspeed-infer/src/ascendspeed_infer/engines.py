"""What continues ids: this project's engine or another program's, behind one small interface.

`TextGenerator` does all that concerns text (tokenizer, templates, stop strings, seeds of several completions) and
hands an engine ids. An installed package offers an engine under the entry-point group `ascendspeed_infer.engines`, and
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
    from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings, StopCheck, TokenOutput

ENTRY_POINTS = "ascendspeed_infer.engines"
NATIVE = "ascendspeed"
"""The name of this project's engine."""

COMMON_OPTIONS = frozenset(
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
        "parse_special",
    )
)
"""Options of `SamplingConfig` that are in every request, or are done with its text."""

ENGINE_INDEPENDENT_SECTIONS = ("engine", "model", "tokenizer", "sampling", "conversation", "server")
"""Sections of a command's config that do not concern the engine: checked, or done with text."""


@dataclass(frozen=True)
class TokenRequest:
    """A prompt in ids, and how it is continued.

    Attributes:
        prompt_ids: at least one id.
        settings: length, sampling with its seed, end ids, stop strings.
        stop_check: gets the new ids after each token and returns whether a stop string is there; for engines that know
            no text.
        beams: of a beam search.
    """

    prompt_ids: tuple[int, ...]
    settings: "GenerationSettings"
    stop_check: "StopCheck"
    beams: "BeamSettings | None" = None


class TextEngine(Protocol):
    """Continues ids with one model.

    Attributes:
        name: as `--engine` takes it.
        supported_options: fields of `SamplingConfig` that it obeys besides `COMMON_OPTIONS`; others are refused.
        max_model_len: the longest text, prompt and new tokens together.
        vocab_size: ids are below.
        eos_token_ids: ids that end a text; empty leaves it to the tokenizer.
    """

    name: str
    supported_options: frozenset[str]

    @property
    def max_model_len(self) -> int:
        """See above."""
        ...

    @property
    def vocab_size(self) -> int:
        """See above."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """See above."""
        ...

    def generate(
        self, requests: Sequence[TokenRequest], config: SamplingConfig
    ) -> Iterator[list["CompletionOutput"]]:
        """Continue requests, and yield what was found for each, in their order, as soon as it is ready.

        Args:
            requests: each by its own settings.
            config: what is the same for all, `batch_size` for instance.

        Returns:
            One completion of each request; of a beam search the best ones. An end id is among the new ids, and so are
            those of a stop string.
        """
        ...

    def stream(self, request: TokenRequest, config: SamplingConfig, session: Any) -> Iterator["TokenOutput"]:
        """Continue one request token by token; the caller may stop before the end.

        Args:
            request: without beams.
            config: as for `generate`.
            session: of `new_session`, or `None`.
        """
        ...

    def new_session(self) -> Any:
        """Return what lets `stream` reuse the history of a chat; `None` where nothing is kept."""
        ...


class EngineKind(Protocol):
    """What an entry point offers: it opens an engine for the model that a command names.

    Attributes:
        name: as `--engine` takes it.
        options: fields of `LoadedModelConfig`'s sections on source, adapter, layout, precision and devices that it
            obeys, besides `load`; `engine_option` if it takes arguments of its own; others are refused.
    """

    name: str
    options: frozenset[str]

    def open(self, config: LoadedModelConfig, dtype: str) -> AbstractContextManager[TextEngine]:
        """Load the model.

        Args:
            config: the options.
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
        known = (NATIVE, *sorted(points))
        meant = "transformers" if name.lower() in ("hf", "huggingface") else name
        raise ConfigError(
            f"engine={name} is not installed; known are {', '.join(known)}{did_you_mean(meant, known)}"
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
    parts = [
        getattr(config, name) for name in type(config).model_fields if name not in ENGINE_INDEPENDENT_SECTIONS
    ]
    for part in parts:
        for name in sorted(part.model_fields_set - kind.options - {"load"}):
            value = getattr(part, name)
            if value != type(part).model_fields[name].default:
                raise ConfigError(f"{name}={value} is no option of engine={kind.name}; leave it out")
    if "engine_option" not in kind.options:
        refuse_engine_options(config, kind.name)


def refuse_engine_options(config: LoadedModelConfig, name: str) -> None:
    """Raise `ConfigError` if arguments of the engine itself were given to one that takes none."""
    for option, value in config.engine.engine_options.items():
        raise ConfigError(f"{show_option(option, value)}: engine={name} takes no such options; leave it out")


def show_option(name: str, value: str) -> str:
    """Return how messages name an argument of an engine itself."""
    return f"engine_option={name}={value}"


def check_sampling(config: SamplingConfig, name: str, supported: frozenset[str]) -> None:
    """Refuse options of sampling that an engine would not obey.

    Raises:
        ConfigError: an option that was given is not among those that it supports.
    """
    for field in sorted(config.model_fields_set - supported - COMMON_OPTIONS):
        value = getattr(config, field)
        if value != type(config).model_fields[field].default:
            raise ConfigError(
                f"engine={name} does not support {field}={value}; leave it out, or use engine={NATIVE}"
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
