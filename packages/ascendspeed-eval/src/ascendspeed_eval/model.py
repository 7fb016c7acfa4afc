"""The interface of evaluated models and their backends: text in; text or log-probability out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """Ask for the log-likelihood of `continuation` after `context`.

    Attributes:
        context: text before the continuation.
        continuation: text to score.
        shared_characters: length of the prefix of `context` that other requests share; a backend may compute it once.
        messages: the conversation that `context` renders, where the model is asked in a chat.
    """

    context: str
    continuation: str
    shared_characters: int = 0
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class LoglikelihoodResult:
    """Answer to a `LoglikelihoodRequest`.

    Attributes:
        logprob: natural logarithm of the continuation's probability.
        is_greedy: whether greedy decoding gives the continuation; `None` when the backend does not know.
        truncated_tokens: tokens dropped from the start of the context to fit the model.
    """

    logprob: float
    is_greedy: bool | None
    truncated_tokens: int


@dataclass(frozen=True)
class GenerateRequest:
    """Ask for up to `max_new_tokens` tokens after `prompt`, ending before any string of `stop`.

    Attributes:
        prompt: text to continue.
        max_new_tokens: maximum number of new tokens.
        stop: strings that end the answer; the answer does not include them.
        temperature: 0 is greedy decoding; otherwise tokens are sampled.
        seed: of sampling.
        shared_characters: as in `LoglikelihoodRequest`.
        messages: the conversation that `prompt` renders, where the model is asked in a chat.
    """

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    shared_characters: int = 0
    messages: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class GenerateResult:
    """Answer to a `GenerateRequest`.

    Attributes:
        text: the generated text, without the prompt.
        finish_reason: `stop`, `length`, or what else a server gives, such as `content_filter`.
        truncated_tokens: tokens dropped from the start of the prompt to fit the model.
        reasoning: what the model thought before its answer, where it is kept apart from the text.
    """

    text: str
    finish_reason: str
    truncated_tokens: int = 0
    reasoning: str = ""


@dataclass(frozen=True)
class RequestFailure:
    """Stands in place of a result that could not be had; the sample counts as failed and is asked again later.

    Attributes:
        reason: one line.
    """

    reason: str


Request = LoglikelihoodRequest | GenerateRequest
Result = LoglikelihoodResult | GenerateResult | RequestFailure


@dataclass(frozen=True)
class ModelDescription:
    """What a report says about a model.

    Attributes:
        name: as the user knows it.
        num_parameters: weights, or `None` when the backend does not know.
        fingerprint: digest of the weights, or `None`.
        details: further lines of the report, such as dtype and layout, which could change a score.
        location: further lines that change none, such as a server's address; a run may go on at another.
    """

    name: str
    num_parameters: int | None = None
    fingerprint: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)
    location: Mapping[str, str] = field(default_factory=dict)


class EvaluatedModel(Protocol):
    """A model that handles requests and returns results in their order."""

    def describe(self) -> ModelDescription:
        """Return the name, size and fingerprint of the model."""
        ...

    def loglikelihood(
        self, requests: Sequence[LoglikelihoodRequest]
    ) -> Sequence[LoglikelihoodResult | RequestFailure]:
        """Return the log-likelihood of each continuation, or why there is none."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> Sequence[GenerateResult | RequestFailure]:
        """Generate a text after each prompt."""
        ...


@runtime_checkable
class ChatModel(Protocol):
    """A model that can be asked in a conversation, for `--apply-chat-template`."""

    def start_chat(self, template_values: Mapping[str, Any], day: str | None) -> None:
        """Get ready; from now on `describe` says with which chat template.

        Args:
            template_values: variables of the chat template.
            day: `YYYY-MM-DD` that the template shows.
        """
        ...

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[Mapping[str, str]]]:
        """Return a conversation up to the answer as text, and the messages that were rendered.

        Requests with these messages are answered by what the text means as control and content; a server that renders
        messages itself returns them as JSON.
        """
        ...


@runtime_checkable
class ConcurrentModel(Protocol):
    """A model with requests of several samples in work at once, such as a server; results come when they are ready."""

    def answer_each(self, groups: Sequence[Sequence[Request]]) -> Iterator[tuple[int, Sequence[Result]]]:
        """Yield the number of a group and the results of its requests, in the order in which they come."""
        ...


@dataclass(frozen=True)
class BackendOption:
    """An option that a backend adds to `asd-eval run`.

    Attributes:
        name: with underscores; the flag has dashes.
        type: `str`, `int`, `float` or `bool`; `list[str]` for an option that may be given several times.
        help: for `--help`.
        flags: other spellings of the flag.
    """

    name: str
    type: Any
    help: str
    flags: tuple[str, ...] = ()


class Backend(Protocol):
    """A source of models, offered as an entry point of the group `ascendspeed_eval.backends`.

    Importing a backend must not load a model or a model library; `open` does.

    The command line shows an exception with an integer `exit_code` as one line and exits with that status.

    Attributes:
        name: of the backend.
        summary: one line.
        options: its command-line options; methods receive only those that the user gave.
    """

    name: str
    summary: str
    options: Sequence[BackendOption]

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Return whether these options choose this backend."""
        ...

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """Start the whole command again in several processes if the options ask for that.

        Args:
            options: of this backend.
            arguments: the command line after `asd-eval`.

        Returns:
            Whether other processes ran the command, so that this process must stop.
        """
        ...

    def open(self, options: Mapping[str, Any]) -> AbstractContextManager[EvaluatedModel | None]:
        """Load the model; `None` in a process that only helped rank 0 and has finished."""
        ...
