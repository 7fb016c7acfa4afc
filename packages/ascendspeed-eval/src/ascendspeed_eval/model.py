"""What an evaluated model must do: text in; text or log-probability out. Backends fit this shape."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """Score `continuation` as what follows `context`.

    Attributes:
        context: what stands before.
        continuation: what is scored.
        shared_characters: beginning of `context` that other requests have too; a backend may compute it once.
    """

    context: str
    continuation: str
    shared_characters: int = 0


@dataclass(frozen=True)
class LoglikelihoodResult:
    """Answer to a `LoglikelihoodRequest`.

    Attributes:
        logprob: natural logarithm of the continuation's probability.
        is_greedy: greedy decoding would have produced it.
        truncated_tokens: tokens of the context that did not fit.
    """

    logprob: float
    is_greedy: bool
    truncated_tokens: int


@dataclass(frozen=True)
class GenerateRequest:
    """Continue `prompt` by up to `max_new_tokens` tokens, ending before any of `stop`.

    Attributes:
        prompt: what is continued.
        max_new_tokens: at most so many.
        stop: texts that end the answer and are cut off.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn.
        seed: of the draws.
        shared_characters: as in `LoglikelihoodRequest`.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    shared_characters: int = 0


@dataclass(frozen=True)
class GenerateResult:
    """Answer to a `GenerateRequest`.

    Attributes:
        text: what follows the prompt.
        finish_reason: `stop` or `length`.
        truncated_tokens: tokens of the prompt that did not fit.
    """

    text: str
    finish_reason: str
    truncated_tokens: int = 0


@dataclass(frozen=True)
class ModelDescription:
    """What stands in the report about a model.

    Attributes:
        name: as the user knows it.
        num_parameters: weights, or `None` when the backend does not know.
        fingerprint: digest of the weights, or `None`.
        details: further lines of the report, such as dtype and layout.
    """

    name: str
    num_parameters: int | None = None
    fingerprint: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


class EvaluatedModel(Protocol):
    """A model that answers requests; answers come in the order of the requests."""

    def describe(self) -> ModelDescription:
        """Say which model this is."""
        ...

    def loglikelihood(self, requests: Sequence[LoglikelihoodRequest]) -> Sequence[LoglikelihoodResult]:
        """Score continuations."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> Sequence[GenerateResult]:
        """Continue prompts."""
        ...


@dataclass(frozen=True)
class BackendOption:
    """An option that a backend adds to `asd-eval run`.

    Attributes:
        name: with underscores; the flag has dashes.
        type: `str`, `int`, `float` or `bool`.
        help: for `--help`.
        flags: further spellings.
    """

    name: str
    type: type
    help: str
    flags: tuple[str, ...] = ()


class Backend(Protocol):
    """What an entry point of the group `ascendspeed_eval.backends` names: a light object, no model yet.

    An exception with an integer attribute `exit_code` is shown to the user as one line, with that exit status.

    Attributes:
        name: of the backend.
        summary: one line.
        options: what it adds to the command line; only options that were given are handed on.
    """

    name: str
    summary: str
    options: Sequence[BackendOption]

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Tell whether these options ask for this backend."""
        ...

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """Run the whole command again in several processes if the options ask for it.

        Args:
            options: of this backend.
            arguments: the command line after `asd-eval`.

        Returns:
            Whether that was done; then this process has nothing left to do.
        """
        ...

    def open(self, options: Mapping[str, Any]) -> AbstractContextManager[EvaluatedModel | None]:
        """Load the model; `None` in a process that only served another one and is done."""
        ...
