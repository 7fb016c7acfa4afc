"""Requests that the engine runs, and what they give: everything that knows tokens, and nothing of the model.

Shapes: R sequences of one request that are continued side by side; V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from ascendspeed_data.errors import ConfigError
from ascendspeed_infer.beams import BeamHypotheses, BeamSettings
from ascendspeed_infer.sampling import SamplingParams, sample_token, top_log_probs


@dataclass(frozen=True)
class GenerationSettings:
    """How a prompt is continued.

    Attributes:
        max_new_tokens: generation ends after this many tokens if it has not ended before.
        sampling: how each token is chosen.
        eos_token_ids: ids that end the text; the id itself is kept in `token_ids`, not in the text.
        stop: strings that end the text; they are cut off together with what follows.
        return_log_probs: whether the log-probability of each token is wanted.
        num_top_log_probs: how many of the likeliest tokens are wanted beside each, with `return_log_probs`.
    """

    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    return_log_probs: bool = False
    num_top_log_probs: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} is below 1; give how many tokens to generate"
            )


FinishReason = Literal["length", "stop"]
StopCheck = Callable[[Sequence[int]], bool]
"""Gets the new ids after each token and returns whether the text has ended (stop strings)."""


class TokenConstraint(Protocol):
    """What the tokens of one text may be: a grammar."""

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        ...

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Return which tokens may follow, bool, [V]; at least one."""
        ...

    def take(self, token_id: int) -> None:
        """Go on to the state after a token."""
        ...


TopLogProbs = tuple[tuple[int, float], ...]
"""Tokens with their log-probabilities, the likeliest first."""


def never_stop(new_ids: Sequence[int]) -> bool:
    """Let a text go on: the `StopCheck` of requests without stop strings."""
    return False


@dataclass(frozen=True)
class CompletionOutput:
    """The tokens that follow a prompt.

    Attributes:
        token_ids: the new ids.
        finish_reason: `length` when the limit was reached, `stop` when the text ended before.
        log_probs: log-probability of each token by the model itself, if it was asked for.
        score: of a beam.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    log_probs: tuple[float, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class TokenOutput:
    """One more token of a text.

    Attributes:
        token_id: the token.
        log_prob: its log-probability, if it was asked for.
        finish_reason: why the text ends with it; `None` when it goes on.
        top_log_probs: the likeliest tokens at its place, if they were asked for.
    """

    token_id: int
    log_prob: float | None
    finish_reason: FinishReason | None
    top_log_probs: TopLogProbs = ()


@dataclass(frozen=True)
class NextToken:
    """How a sequence goes on.

    Attributes:
        parent: number of the sequence that it continues.
        token_id: the token that it adds.
    """

    parent: int
    token_id: int


class Request(Protocol):
    """A prompt that is continued, as the scheduler sees it.

    Attributes:
        prompt_ids: at least one id.
        max_new_tokens: most calls of `advance`; cache is reserved for as many tokens.
        max_num_seqs: most sequences at once; cache is reserved for each.
        error: what ended the request early; set by the engine.
    """

    prompt_ids: list[int]
    max_new_tokens: int
    max_num_seqs: int
    error: Exception | None

    @property
    def is_finished(self) -> bool:
        """Whether no token follows, or an error ended the request."""
        ...

    def advance(self, logits: torch.Tensor) -> Sequence[NextToken]:
        """Choose the next token of each sequence.

        Args:
            logits: of the token after each sequence that the last call returned, [R, V]; at first after the prompt,
                [1, V].

        Returns:
            The sequences that go on, at most `max_num_seqs`; none when the request is finished.
        """
        ...

    def new_tokens(self, start: int) -> Sequence[TokenOutput]:
        """Return the tokens of a single sequence from number `start` on; none for beams, which still change."""
        ...

    def outputs(self) -> list[CompletionOutput]:
        """Return the finished completions, the best first."""
        ...


class SamplingRequest:
    """A prompt that is continued by one sequence, greedily or with draws of its own seed.

    Args:
        prompt_ids: at least one id.
        settings: length, sampling, end ids.
        stop_check: gets the new ids and returns whether the text has ended.
        constraint: what the tokens may be; `None` for any.

    Attributes:
        new_ids: the tokens so far.
        log_probs: of each token, if asked for.
        top_log_probs: at the place of each token, if asked for.
        finish_reason: `None` until the text is complete.
        constraint: what the tokens may be.
        num_cached_tokens: of the prompt, copied from an earlier text; set by the scheduler.
    """

    max_num_seqs = 1
    num_cached_tokens = 0

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GenerationSettings,
        stop_check: StopCheck = never_stop,
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self.constraint = constraint
        self.max_new_tokens = settings.max_new_tokens
        self.error: Exception | None = None
        self.new_ids: list[int] = []
        self.log_probs: list[float] = []
        self.top_log_probs: list[TopLogProbs] = []
        self.finish_reason: FinishReason | None = None
        self._stop_check = stop_check
        self._generator = settings.sampling.generator()

    def advance(self, logits: torch.Tensor) -> Sequence[NextToken]:
        """Choose and add the next token; see `Request.advance`."""
        own = self.settings
        noise = own.sampling.noise(self._generator, logits.shape[-1])
        ids = [*self.prompt_ids, *self.new_ids]
        allowed = None if self.constraint is None else self.constraint.allowed(logits.shape[-1])
        sampled = sample_token(
            logits[0], own.sampling, noise, ids, own.return_log_probs, self.new_ids, allowed
        )
        if sampled.log_prob is not None:
            self.log_probs.append(sampled.log_prob)
            self.top_log_probs.append(
                top_log_probs(logits[0], own.num_top_log_probs) if own.num_top_log_probs else ()
            )
        return self.take(sampled.token_id)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the one with the largest logit, and nothing else of the logits is wanted."""
        is_changed = self.settings.sampling.changes_greedy or self.constraint is not None
        return not is_changed and not self.settings.return_log_probs

    def take(self, token_id: int) -> Sequence[NextToken]:
        """Add a token that was chosen; see `Request.advance`."""
        own = self.settings
        self.new_ids.append(token_id)
        if self.constraint is not None:
            self.constraint.take(token_id)
        is_complete = self.constraint is not None and self.constraint.is_finished
        if token_id in own.eos_token_ids or is_complete or self._stop_check(self.new_ids):
            self.finish_reason = "stop"
        elif len(self.new_ids) == own.max_new_tokens:
            self.finish_reason = "length"
        return [NextToken(0, token_id)] if self.finish_reason is None else []

    @property
    def is_finished(self) -> bool:
        """See `Request`."""
        return self.finish_reason is not None or self.error is not None

    def new_tokens(self, start: int) -> Sequence[TokenOutput]:
        """See `Request`."""
        last = len(self.new_ids) - 1
        return [
            TokenOutput(
                self.new_ids[number],
                self.log_probs[number] if self.log_probs else None,
                self.finish_reason if number == last else None,
                self.top_log_probs[number] if self.top_log_probs else (),
            )
            for number in range(start, last + 1)
        ]

    def outputs(self) -> list[CompletionOutput]:
        """See `Request`; always one."""
        assert self.finish_reason is not None
        log_probs = tuple(self.log_probs) if self.settings.return_log_probs else None
        return [CompletionOutput(tuple(self.new_ids), self.finish_reason, log_probs)]


class BeamSearchRequest:
    """A prompt that is continued by beam search.

    Args:
        prompt_ids: at least one id.
        settings: length, sampling rules, end ids.
        beam_settings: how beams are kept.
        stop_check: gets the new ids of a beam and returns whether it has ended.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GenerationSettings,
        beam_settings: BeamSettings,
        stop_check: StopCheck = never_stop,
    ) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self.max_new_tokens, self.max_num_seqs = settings.max_new_tokens, beam_settings.num_beams
        self.error: Exception | None = None
        self._beams = BeamHypotheses(
            beam_settings,
            settings.sampling,
            prompt_ids,
            settings.max_new_tokens,
            settings.eos_token_ids,
            stop_check,
        )

    def advance(self, logits: torch.Tensor) -> Sequence[NextToken]:
        """Continue every beam; see `Request.advance`."""
        # After the prompt all beams are the same text.
        num_seqs = len(logits)
        parents = self._beams.advance(logits.expand(self.max_num_seqs, -1) if num_seqs == 1 else logits)
        if self._beams.done:
            return []
        return [
            NextToken(min(parent, num_seqs - 1), beam.ids[-1])
            for parent, beam in zip(parents, self._beams.running, strict=True)
        ]

    @property
    def is_finished(self) -> bool:
        """See `Request`."""
        return self._beams.done or self.error is not None

    def new_tokens(self, start: int) -> Sequence[TokenOutput]:
        """See `Request`."""
        return ()

    def outputs(self) -> list[CompletionOutput]:
        """See `Request`; fewer than asked for if the filters leave no more."""
        return [
            CompletionOutput(
                beam.ids,
                "stop" if beam.ended else "length",
                beam.log_probs if self.settings.return_log_probs else None,
                beam.score,
            )
            for beam in self._beams.best()
        ]
