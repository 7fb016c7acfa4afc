"""What the engine continues: anything that is told logits and says which tokens follow.

Shapes: R rows, texts of one request that are continued side by side; V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from ascendspeed_data.errors import ConfigError
from ascendspeed_infer.beams import Beams, BeamSettings
from ascendspeed_infer.sampling import Sampling, choose_token


@dataclass(frozen=True)
class GenerationSettings:
    """How a text is continued.

    Attributes:
        max_new_tokens: exactly so many, unless the text ends before.
        sampling: how each token is chosen.
        eos_ids: ids that end the text; the id itself is kept in `token_ids`, not in the text.
        stop: texts that end the text; cut off together with what follows.
        with_log_probs: whether the log-probability of each token is wanted.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    with_log_probs: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} is below 1; give how many tokens to generate"
            )


FinishReason = Literal["length", "stop"]
Ends = Callable[[Sequence[int]], bool]
"""Told the new ids after each, says whether the text is complete (stop strings)."""


def never(new_ids: Sequence[int]) -> bool:
    """Let a text go on."""
    return False


@dataclass(frozen=True)
class Generated:
    """New tokens, and why they end.

    Attributes:
        token_ids: the new ones.
        finish_reason: `length` when the limit was reached, `stop` when the text ended before.
        log_probs: of each token by the model itself, where asked for.
        score: of a text found by beam search.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    log_probs: tuple[float, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class NextToken:
    """How a row goes on.

    Attributes:
        parent: the row that it continues.
        token_id: with what.
    """

    parent: int
    token_id: int


class Continuation(Protocol):
    """A request, as the engine sees it; the same on every process of a layout."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """At least one id."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """After so many calls of `advance` at most it is complete; memory is reserved for them."""
        ...

    @property
    def max_rows(self) -> int:
        """Rows at most; memory is reserved for them."""
        ...

    def advance(self, logits: torch.Tensor) -> Sequence[NextToken]:
        """Choose the next token of each row.

        Args:
            logits: of the token that follows each row that the last call gave, [R, V]; first of the prompt, [1, V].

        Returns:
            The rows that are continued, at most `max_rows`; none when all is complete.
        """
        ...


class Text:
    """One text that is continued token by token: greedy, or with draws of its own seed.

    Args:
        prompt_ids: at least one id.
        settings: length, sampling, end ids.
        ends: told the new ids, says whether the text is complete.
        on_token: called after each token, the last one included, with this object.

    Attributes:
        new_ids: so far.
        log_probs: of each, where asked for.
        finish_reason: `None` until the text is complete.
    """

    max_rows = 1

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GenerationSettings,
        ends: Ends = never,
        on_token: Callable[["Text"], None] | None = None,
    ) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self.max_new_tokens = settings.max_new_tokens
        self.new_ids: list[int] = []
        self.log_probs: list[float] = []
        self.finish_reason: FinishReason | None = None
        self._ends, self._on_token = ends, on_token
        self._generator = settings.sampling.generator()

    def advance(self, logits: torch.Tensor) -> Sequence[NextToken]:
        """Add the next token; see `Continuation.advance`."""
        own = self.settings
        noise = own.sampling.noise(self._generator, logits.shape[-1])
        ids = [*self.prompt_ids, *self.new_ids]
        choice = choose_token(logits[0], own.sampling, noise, ids, own.with_log_probs)
        self.new_ids.append(choice.token_id)
        if choice.log_prob is not None:
            self.log_probs.append(choice.log_prob)
        if choice.token_id in own.eos_ids or self._ends(self.new_ids):
            self.finish_reason = "stop"
        elif len(self.new_ids) == own.max_new_tokens:
            self.finish_reason = "length"
        if self._on_token is not None:
            self._on_token(self)
        return [NextToken(0, choice.token_id)] if self.finish_reason is None else []

    @property
    def is_complete(self) -> bool:
        """Whether no token follows."""
        return self.finish_reason is not None

    def generated(self) -> Generated:
        """Return the complete text."""
        assert self.finish_reason is not None
        log_probs = tuple(self.log_probs) if self.settings.with_log_probs else None
        return Generated(tuple(self.new_ids), self.finish_reason, log_probs)


class BeamSearch:
    """Texts of one prompt, continued side by side by beam search.

    Args:
        prompt_ids: at least one id.
        settings: length, sampling rules, end ids.
        beam_settings: how beams are kept.
        ends: told the new ids of a beam, says whether it is complete.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        settings: GenerationSettings,
        beam_settings: BeamSettings,
        ends: Ends = never,
    ) -> None:
        self.prompt_ids, self.settings = list(prompt_ids), settings
        self.max_new_tokens, self.max_rows = settings.max_new_tokens, beam_settings.num_beams
        self._beams = Beams(
            beam_settings, settings.sampling, prompt_ids, settings.max_new_tokens, settings.eos_ids, ends
        )

    def advance(self, logits: torch.Tensor) -> Sequence[NextToken]:
        """Continue every beam; see `Continuation.advance`."""
        # After the prompt all beams are the same text.
        rows = len(logits)
        parents = self._beams.advance(logits.expand(self.max_rows, -1) if rows == 1 else logits)
        if self._beams.done:
            return []
        return [
            NextToken(min(parent, rows - 1), beam.ids[-1])
            for parent, beam in zip(parents, self._beams.running, strict=True)
        ]

    @property
    def is_complete(self) -> bool:
        """Whether no beam goes on."""
        return self._beams.done

    def generated(self) -> list[Generated]:
        """Return the texts that were asked for, the best first; fewer if the rules leave no more."""
        return [
            Generated(
                beam.ids,
                "stop" if beam.ended else "length",
                beam.log_probs if self.settings.with_log_probs else None,
                beam.score,
            )
            for beam in self._beams.best()
        ]
