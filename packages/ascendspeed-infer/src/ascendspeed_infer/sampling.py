"""Sample the next token from its logits.

Logits are processed in transformers' order: repetition penalty, temperature, top-k, top-p. Before them come a bias of
tokens, and OpenAI's presence and frequency penalties. A draw is a race: each
token's probability is divided by an exponential number of its own and the largest quotient wins, which is how
`torch.multinomial` draws. The numbers depend on the seed alone, so the margin of the winner tells whether another
order of sums, in a batch or under another layout, could change the draw.

Shapes: V vocabulary, B beams.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascendspeed_data.errors import AscendSpeedError, ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen.

    Attributes:
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens stay; 0 keeps all.
        top_p: of these, the smallest set whose probability reaches p stays; 1 keeps all.
        seed: of the draws; the same seed gives the same text.
        repetition_penalty: divides positive logits of tokens that the text has, and multiplies negative ones.
        presence_penalty: subtracted from the logits of tokens that were generated.
        frequency_penalty: subtracted as often as they were generated.
        logit_bias: numbers that are added to logits of tokens.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature} is not positive; leave --do-sample out for greedy decoding"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is negative; give 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]; give 1 to keep all tokens")
        if self.repetition_penalty <= 0:
            raise ConfigError(
                f"repetition_penalty={self.repetition_penalty} is not positive; give 1 for none, more to repeat less"
            )

    @property
    def changes_greedy(self) -> bool:
        """Whether another token than the likeliest one may be taken."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return self.do_sample or any(penalties) or bool(self.logit_bias)

    def generator(self) -> torch.Generator:
        """Return a fresh source of draws."""
        return torch.Generator().manual_seed(self.seed)

    def noise(self, generator: torch.Generator, vocab_size: int) -> torch.Tensor | None:
        """Return the numbers of one draw, [V], fp32; nothing when the likeliest token is taken."""
        return torch.empty(vocab_size).exponential_(1, generator=generator) if self.do_sample else None


@dataclass(frozen=True)
class SampledToken:
    """The next token.

    Attributes:
        token_id: the token.
        log_prob: natural logarithm of the probability that the model itself gives it, before any rule; `None` when
            it was not asked for.
        margin: by how much logits must change before another token is chosen.
    """

    token_id: int
    log_prob: float | None
    margin: float


def sample_token(
    logits: torch.Tensor,
    sampling: SamplingParams,
    noise: torch.Tensor | None = None,
    ids: Sequence[int] = (),
    return_log_prob: bool = False,
    new_ids: Sequence[int] = (),
    allowed: torch.Tensor | None = None,
) -> SampledToken:
    """Sample the next token.

    Args:
        logits: [V], the same on every process, so that all choose alike.
        sampling: the parameters.
        noise: of `SamplingParams.noise`, when drawing.
        ids: the text so far, prompt included.
        return_log_prob: whether its log-probability is wanted.
        new_ids: those of `ids` that were generated.
        allowed: which tokens may follow, bool, [V]; `None` for all.

    Raises:
        AscendSpeedError: a logit is not finite, or the temperature makes it so.
    """
    scores = apply_penalties(logits, new_ids, sampling)
    if allowed is not None:
        check_finite_logits(float(logits.max()))
        scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
    scores = apply_repetition_penalty(scores, ids, sampling.repetition_penalty)
    if noise is None:
        best, indices = scores.topk(2)
        # A NaN counts as the largest.
        check_finite_logits(float(best[0]))
        margin = float(best[0]) - float(best[1])
    else:
        check_finite_logits(float(logits.max()))
        scores = scores.double().cpu() / sampling.temperature
        scores = keep_top_p(keep_top_k(scores, sampling.top_k), sampling.top_p)
        best, indices = (scores.float().softmax(dim=-1) / noise).topk(2)
        if not math.isfinite(float(best[0])):
            raise ConfigError(
                f"temperature={sampling.temperature} makes scores of tokens infinite; give a larger one, or leave "
                "--do-sample out for greedy decoding"
            )
        margin = float(best[0].log() - best[1].log()) * sampling.temperature
    token = int(indices[0])
    wide = logits.double().cpu() if return_log_prob else logits
    log_prob = float(wide[token] - wide.logsumexp(dim=-1)) if return_log_prob else None
    return SampledToken(
        token, log_prob, margin / max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)
    )


def top_log_probs(logits: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """Return the likeliest tokens of [V] with their log-probabilities, computed as `SampledToken.log_prob` is."""
    wide = logits.double().cpu()
    values, ids = (wide - wide.logsumexp(dim=-1)).topk(min(count, len(wide)))
    return tuple(zip(ids.tolist(), values.tolist(), strict=True))


def check_finite_logits(largest: float) -> None:
    """Raise `AscendSpeedError` unless the largest logit is a finite number; NaN counts as the largest."""
    if not math.isfinite(largest):
        raise AscendSpeedError(
            f"a logit of the model is {largest}, which is not finite, so no token can be chosen; look for such numbers "
            "in the checkpoint, or compute in another --dtype if it holds none"
        )


def apply_penalties(scores: torch.Tensor, new_ids: Sequence[int], sampling: SamplingParams) -> torch.Tensor:
    """Add the bias of tokens and subtract OpenAI's penalties; [V] -> [V]."""
    change = dict(sampling.logit_bias)
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in Counter(new_ids).items():
            penalty = sampling.presence_penalty + count * sampling.frequency_penalty
            change[token] = change.get(token, 0.0) - penalty
    if not change:
        return scores
    where = torch.tensor(list(change), device=scores.device)
    added = torch.tensor(list(change.values()), device=scores.device, dtype=scores.dtype)
    return scores.index_add(0, where, added)


def apply_repetition_penalty(scores: torch.Tensor, ids: Sequence[int], penalty: float) -> torch.Tensor:
    """Make tokens that a text already has less likely (Keskar et al., 2019, CTRL, section 4.1); [V] -> [V]."""
    if penalty == 1 or not ids:
        return scores
    seen = torch.tensor(sorted(set(ids)), device=scores.device)
    found = scores[seen]
    return scores.index_put((seen,), torch.where(found < 0, found * penalty, found / penalty))


def keep_top_k(scores: torch.Tensor, k: int, at_least: int = 1) -> torch.Tensor:
    """Set all but the k largest of [V] to minus infinity; ties with the k-th stay."""
    k = max(k, at_least) if k else 0
    if k == 0 or k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)


def keep_top_p(scores: torch.Tensor, p: float, at_least: int = 1) -> torch.Tensor:
    """Keep the likeliest tokens of [V] until their probability reaches p (Holtzman et al., 2019)."""
    if p >= 1:
        return scores
    ordered, order = scores.sort(descending=True)
    probabilities = ordered.softmax(dim=-1)
    is_dropped = probabilities.cumsum(dim=-1) - probabilities >= p
    is_dropped[:at_least] = False
    return scores.masked_fill(torch.zeros_like(is_dropped).scatter(0, order, is_dropped), -torch.inf)
