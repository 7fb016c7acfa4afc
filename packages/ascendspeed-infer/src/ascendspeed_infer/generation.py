"""Continue a text: `prefill` the prompt, then `decode_one_token` again and again.

Shapes: B texts or beams, S prompt length, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ascendspeed_core.models.cache import KeyValueCache
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.beams import Beams, BeamSettings
from ascendspeed_infer.sampling import Choice, Sampling, choose_token

NEARLY_EQUAL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Differences of logits that batching could turn round: far above the noise of each format."""


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


class _Text:
    """One text that is being continued: its tokens, its draws, and whether it has ended."""

    def __init__(self, prompt_ids: Sequence[int], settings: GenerationSettings, ends: Ends) -> None:
        self.prompt_ids, self.settings, self._ends = list(prompt_ids), settings, ends
        self.new_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._log_probs: list[float] = []
        self._generator = settings.sampling.generator()

    def choose(self, logits: torch.Tensor, again: Callable[[Sequence[int]], torch.Tensor] | None) -> Choice:
        """Add the next token.

        Args:
            logits: of it, [V].
            again: computes the logits alone, should they be so close that a batch could have changed the choice.
        """
        own = self.settings
        noise = own.sampling.noise(self._generator, logits.shape[-1])
        ids = [*self.prompt_ids, *self.new_ids]
        choice = choose_token(logits, own.sampling, noise, ids, own.with_log_probs)
        if again is not None and choice.lead < NEARLY_EQUAL[logits.dtype]:
            choice = choose_token(again(ids), own.sampling, noise, ids, own.with_log_probs)
        self.new_ids.append(choice.token_id)
        if choice.log_prob is not None:
            self._log_probs.append(choice.log_prob)
        if choice.token_id in own.eos_ids or self._ends(self.new_ids):
            self.finish_reason = "stop"
        elif len(self.new_ids) == own.max_new_tokens:
            self.finish_reason = "length"
        return choice

    def generated(self) -> Generated:
        """Return the ended text."""
        assert self.finish_reason is not None
        log_probs = tuple(self._log_probs) if self.settings.with_log_probs else None
        return Generated(tuple(self.new_ids), self.finish_reason, log_probs)


@dataclass(frozen=True)
class Step:
    """One more token of a text.

    Attributes:
        token_id: the token.
        log_prob: of it, where asked for.
        finish_reason: why the text ends with it; `None` when it goes on.
    """

    token_id: int
    log_prob: float | None
    finish_reason: FinishReason | None


@torch.no_grad()
def stream_ids(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    ends: Ends = never,
) -> Iterator[Step]:
    """Continue one prompt, token by token; all processes of a layout iterate alike and get the same tokens.

    Args:
        model: this process's part.
        mesh: its place.
        prompt_ids: at least one id.
        settings: length, sampling, end ids.
        ends: whether a stop text is there.

    Raises:
        AscendSpeedError: an empty prompt, or one that leaves no room for the new tokens.
    """
    check_length(len(prompt_ids), settings.max_new_tokens, model.config.max_position_embeddings)
    cache = make_cache(model, mesh, 1, len(prompt_ids) + settings.max_new_tokens)
    text = _Text(prompt_ids, settings, ends)
    logits = prefill(model, mesh, torch.tensor([list(prompt_ids)], device=mesh.device.torch), cache)
    while True:
        choice = text.choose(logits, None)
        yield Step(choice.token_id, choice.log_prob, text.finish_reason)
        if text.finish_reason is not None:
            return
        logits = decode_one_token(model, mesh, choice.token_id, cache)


def generate_ids(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    ends: Ends = never,
) -> Generated:
    """Continue one prompt to its end; see `stream_ids`."""
    steps = list(stream_ids(model, mesh, prompt_ids, settings, ends))
    reason = steps[-1].finish_reason
    assert reason is not None
    log_probs = tuple(step.log_prob for step in steps if step.log_prob is not None)
    ids = tuple(step.token_id for step in steps)
    return Generated(ids, reason, log_probs if settings.with_log_probs else None)


@torch.no_grad()
def generate_together(
    model: Transformer,
    mesh: ParallelMesh,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
    ends: Sequence[Ends],
) -> list[Generated]:
    """Continue several prompts, of any lengths, one token of each at a time; see `stream_ids`.

    Each prompt is read alone, into its place of one cache in which all end together. The texts are those of
    `generate_ids`: where another token is nearly as good, the logits of that text are computed again alone, as its
    neighbours in a batch change the last bits of a sum.
    """
    for ids, own in zip(prompts, settings, strict=True):
        check_length(len(ids), own.max_new_tokens, model.config.max_position_embeddings)
    longest, room = max(map(len, prompts)), max(own.max_new_tokens for own in settings)
    cache = make_cache(model, mesh, len(prompts), longest + room)
    device = mesh.device.torch
    texts = [_Text(*one) for one in zip(prompts, settings, ends, strict=True)]
    for number, text in enumerate(texts):
        alone = make_cache(model, mesh, 1, len(text.prompt_ids))
        text.choose(prefill(model, mesh, torch.tensor([text.prompt_ids], device=device), alone), None)
        cache.place(number, alone, longest)
    cache.advance(longest)
    cache.padding_tokens = torch.tensor([longest - len(ids) for ids in prompts], device=device)

    def again(ids: Sequence[int]) -> torch.Tensor:
        alone = make_cache(model, mesh, 1, len(ids))
        return prefill(model, mesh, torch.tensor([list(ids)], device=device), alone)

    while any(text.finish_reason is None for text in texts):
        # Texts that have ended go on with their last token, which nobody reads.
        tokens = torch.tensor([[text.new_ids[-1]] for text in texts], device=device)
        for text, logits in zip(texts, decode_tokens(model, mesh, tokens, cache), strict=True):
            if text.finish_reason is None:
                text.choose(logits, again)
    return [text.generated() for text in texts]


@torch.no_grad()
def search_beams(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    beam_settings: BeamSettings,
    ends: Ends = never,
) -> list[Generated]:
    """Continue one prompt by beam search; see `stream_ids`.

    Returns:
        `num_return_sequences` texts, the best first; fewer if the rules leave no more.
    """
    check_length(len(prompt_ids), settings.max_new_tokens, model.config.max_position_embeddings)
    device, count = mesh.device.torch, beam_settings.num_beams
    alone = make_cache(model, mesh, 1, len(prompt_ids))
    logits = prefill(model, mesh, torch.tensor([list(prompt_ids)], device=device), alone).expand(count, -1)
    cache = make_cache(model, mesh, count, len(prompt_ids) + settings.max_new_tokens)
    for number in range(count):
        cache.place(number, alone, len(prompt_ids))
    cache.advance(len(prompt_ids))
    limit, eos_ids = settings.max_new_tokens, settings.eos_ids
    beams = Beams(beam_settings, settings.sampling, prompt_ids, limit, eos_ids, ends)
    while True:
        parents = beams.advance(logits)
        if beams.done:
            break
        cache.select(torch.tensor(parents, device=device))
        tokens = torch.tensor([[beam.ids[-1]] for beam in beams.running], device=device)
        logits = decode_tokens(model, mesh, tokens, cache)
    return [
        Generated(
            beam.ids,
            "stop" if beam.ended else "length",
            beam.log_probs if settings.with_log_probs else None,
            beam.score,
        )
        for beam in beams.best()
    ]


def prefill(
    model: Transformer, mesh: ParallelMesh, prompt: torch.Tensor, cache: KeyValueCache
) -> torch.Tensor:
    """Run the prompt [1, S], fill the cache, and return the logits of the token that follows, [V]."""
    last = torch.full((1, 1), prompt.shape[1] - 1, device=prompt.device)
    logits = forward_through_stages(model, mesh, prompt, cache, last)
    return gather_logits(logits[0, -1], model.config.vocab_size, mesh.group("tp"))


def decode_one_token(
    model: Transformer, mesh: ParallelMesh, token: int, cache: KeyValueCache
) -> torch.Tensor:
    """Run one more token and return the logits of the one that follows, [V]."""
    return decode_tokens(model, mesh, torch.tensor([[token]], device=mesh.device.torch), cache)[0]


def decode_tokens(
    model: Transformer, mesh: ParallelMesh, tokens: torch.Tensor, cache: KeyValueCache
) -> torch.Tensor:
    """Run one more token of each text, [B, 1], and return the logits of those that follow, [B, V]."""
    logits = forward_through_stages(model, mesh, tokens, cache)
    return gather_logits(logits[:, -1], model.config.vocab_size, mesh.group("tp"))


def make_cache(
    model: Transformer, mesh: ParallelMesh, batch_size: int, capacity_tokens: int
) -> KeyValueCache:
    """Return an empty cache for this process's heads."""
    config = model.config
    return KeyValueCache(
        num_layers=len(model.layers),
        batch_size=batch_size,
        capacity_tokens=capacity_tokens,
        num_key_value_heads=max(config.num_key_value_heads // mesh.layout.tp, 1),
        head_dim=config.head_dim,
        dtype=next(model.parameters()).dtype,
        device=mesh.device.torch,
    )


def check_length(prompt_tokens: int, new_tokens: int, limit: int) -> None:
    """Raise `AscendSpeedError` unless prompt and new tokens fit the model."""
    if prompt_tokens == 0:
        raise AscendSpeedError("the prompt has no token and the tokenizer adds none; give a text to continue")
    if prompt_tokens + new_tokens > limit:
        raise AscendSpeedError(
            f"the prompt has {prompt_tokens} tokens; with max_new_tokens={new_tokens} that is more than "
            f"max_position_embeddings={limit} of the model; shorten the prompt or ask for "
            f"{max(limit - prompt_tokens, 0)} tokens"
        )
