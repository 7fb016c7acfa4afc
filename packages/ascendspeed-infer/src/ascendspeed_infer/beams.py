"""Beam search: the bookkeeping, which knows nothing of models.

Same rules as transformers' beam search, so that ids and scores are the same: of all continuations of the running
beams the best `(1 + end ids) * num_beams` are looked at, at least twice the beams; those that end and are among the
best `num_beams` of them are finished with the score `sum of log-probabilities / length ** length_penalty`; the best
that go on are the next running beams. Drawn candidates are drawn without replacement (Kool et al., 2019).

Shapes: B beams, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ascendspeed_data.errors import ConfigError
from ascendspeed_infer.sampling import (
    SamplingParams,
    apply_repetition_penalty,
    check_finite_logits,
    keep_top_k,
    keep_top_p,
)

IMPOSSIBLE_SCORE = -1.0e9
"""Score of a candidate that is none."""

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamSettings:
    """How beams are kept.

    Attributes:
        num_beams: texts that are continued side by side.
        length_penalty: power of the length by which a score is divided; above 0 prefers long texts.
        early_stopping: `True` ends when `num_beams` texts are finished; `False` when the best running one is, as it
            stands, worse than all finished; `"never"` when it could not become better at any length.
        num_return_sequences: finished texts wanted, the best first.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if self.num_beams < 2:
            raise ConfigError(f"num_beams={self.num_beams} is no beam search; give 2 or more")
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ConfigError(
                f"num_return_sequences={self.num_return_sequences} is not in 1 to num_beams={self.num_beams}; "
                "give more beams or ask for fewer texts"
            )


@dataclass(frozen=True)
class Beam:
    """A text that is being continued, or is finished.

    Attributes:
        ids: the new ones.
        log_probs: of each id by the model itself.
        score: sum of log-probabilities after the rules; of a finished text divided by its length's power.
        ended: by an end id or a stop string, not by the limit.
    """

    ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    score: float = 0.0
    ended: bool = False


class BeamHypotheses:
    """The running and the finished beams of one prompt.

    Args:
        settings: how beams are kept.
        sampling: rules of the log-probabilities; whether candidates are drawn.
        prompt: ids that the repetition penalty counts too.
        max_new_tokens: longest text.
        eos_token_ids: ids that end a text.
        stop_check: gets the new ids and returns whether a stop string is there.
    """

    def __init__(
        self,
        settings: BeamSettings,
        sampling: SamplingParams,
        prompt: Sequence[int],
        max_new_tokens: int,
        eos_token_ids: Sequence[int],
        stop_check: Callable[[Sequence[int]], bool],
    ) -> None:
        self._settings, self._sampling, self._prompt = settings, sampling, tuple(prompt)
        self._max_new_tokens, self._eos_token_ids = max_new_tokens, tuple(eos_token_ids)
        self._stop_check = stop_check
        self._generator = sampling.generator()
        # All begin alike: only the first counts, or each would find the same best continuations.
        others = [Beam(score=IMPOSSIBLE_SCORE)] * (settings.num_beams - 1)
        self.running: list[Beam] = [Beam(), *others]
        self.finished: list[Beam] = []
        self.done = False

    def advance(self, logits: torch.Tensor) -> list[int]:
        """Continue every beam by one token.

        Args:
            logits: of the token that follows each running beam, [B, V].

        Returns:
            For each new running beam the number of the one that it continues, [B].

        Raises:
            AscendSpeedError: a logit is not finite.
        """
        check_finite_logits(float(logits.max()))
        raw = logits.float().cpu().log_softmax(dim=-1)
        processed = torch.stack(
            [self._process_log_probs(row, beam) for row, beam in zip(raw, self.running, strict=True)]
        )
        scores = processed + torch.tensor([beam.score for beam in self.running])[:, None]
        values, indices = self._candidates(scores.flatten())
        parents, tokens = indices // raw.shape[-1], indices % raw.shape[-1]
        candidates = [
            self._continued(parent, token, float(raw[parent, token]), value)
            for parent, token, value in zip(parents.tolist(), tokens.tolist(), values.tolist(), strict=True)
        ]
        length = len(candidates[0].ids)
        is_over = [beam.ended or length == self._max_new_tokens for beam in candidates]
        first = slice(0, self._settings.num_beams)
        self._finish([b for b, over in zip(candidates[first], is_over[first], strict=True) if over])
        running = values + IMPOSSIBLE_SCORE * torch.tensor(is_over)
        best = running.topk(self._settings.num_beams).indices.tolist()
        self.running = [candidates[number] for number in best]
        is_open = len(self.finished) < self._settings.num_beams or self._settings.early_stopping is not True
        self.done = all(is_over) or not is_open or not self._can_improve(float(running[best[0]]), length)
        return [int(parents[number]) for number in best]

    def best(self) -> list[Beam]:
        """Return the texts that were asked for, the best first."""
        return self.finished[: self._settings.num_return_sequences]

    def _process_log_probs(self, log_probs: torch.Tensor, beam: Beam) -> torch.Tensor:
        sampling = self._sampling
        processed = apply_repetition_penalty(
            log_probs, (*self._prompt, *beam.ids), sampling.repetition_penalty
        )
        if sampling.do_sample:
            processed = processed / sampling.temperature
        # Enough for every beam to go on even if its best candidates end it.
        at_least = 1 + max(len(self._eos_token_ids), 1)
        return keep_top_p(keep_top_k(processed, sampling.top_k, at_least), sampling.top_p, at_least)

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return score and flat index of the candidates: the best, or drawn ones in the order of the draw."""
        count = max(2, 1 + len(self._eos_token_ids)) * self._settings.num_beams
        if not self._sampling.do_sample:
            values, indices = scores.topk(min(count, len(scores)))
            return values, indices
        chances = scores.softmax(dim=-1)
        possible = int((chances > 0).sum())
        indices = torch.multinomial(chances, min(count, possible), generator=self._generator)
        if possible < count:
            # As few as the filters left: the rest is filled with what cannot be.
            rest = (
                scores.masked_fill(chances > 0, -torch.inf).topk(min(count, len(scores)) - possible).indices
            )
            indices = torch.cat([indices, rest])
        return scores[indices], indices

    def _continued(self, parent: int, token: int, log_prob: float, score: float) -> Beam:
        beam = self.running[parent]
        ids = (*beam.ids, token)
        return Beam(
            ids, (*beam.log_probs, log_prob), score, token in self._eos_token_ids or self._stop_check(ids)
        )

    def _finish(self, ended: list[Beam]) -> None:
        power = self._settings.length_penalty
        scored = [
            Beam(beam.ids, beam.log_probs, beam.score / len(beam.ids) ** power, beam.ended)
            for beam in ended
            if beam.score > IMPOSSIBLE_SCORE / 2
        ]
        ranked = sorted([*self.finished, *scored], key=lambda beam: -beam.score)
        self.finished = ranked[: self._settings.num_beams]

    def _can_improve(self, best_running: float, length: int) -> bool:
        if len(self.finished) < self._settings.num_beams:
            return True
        power = self._settings.length_penalty
        longest = self._settings.early_stopping == "never" and power > 0
        at_length = self._max_new_tokens if longest else length
        return best_running / float(at_length**power) > self.finished[-1].score
