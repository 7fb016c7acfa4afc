"""Choose the next token from its logits.

Shapes: V vocabulary.
"""

from dataclasses import dataclass

import torch

from ascendspeed_data.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens stay; 0 keeps all.
        top_p: of these, the smallest set whose probability reaches p stays; 1 keeps all.
        seed: of the draws; the same seed gives the same text.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ConfigError(
                f"temperature={self.temperature} is not positive; leave --do-sample out for greedy decoding"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} is negative; give 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]; give 1 to keep all tokens")

    def generator(self) -> torch.Generator:
        """Return a fresh source of draws."""
        return torch.Generator().manual_seed(self.seed)


def choose_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the id of the next token.

    Args:
        logits: [V], the same on every process, so that all choose alike.
        sampling: how.
        generator: advanced by one draw when sampling.
    """
    if not sampling.do_sample:
        return int(logits.argmax())
    scores = logits.double().cpu() / sampling.temperature
    scores = keep_top_p(keep_top_k(scores, sampling.top_k), sampling.top_p)
    return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=generator))


def keep_top_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest of [V] to minus infinity; ties with the k-th stay."""
    if k == 0 or k >= scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(k).values[-1], -torch.inf)


def keep_top_p(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the likeliest tokens of [V] until their probability reaches p (Holtzman et al., 2019), at least one."""
    if p >= 1:
        return scores
    ordered, order = scores.sort(descending=True)
    before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
    return scores.masked_fill(
        torch.zeros_like(scores, dtype=torch.bool).scatter(0, order, before >= p), -torch.inf
    )
