"""Continue a text: `prefill` the prompt, then `decode_one_token` again and again.

Shapes: S prompt length, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from ascendspeed_core.models.cache import KeyValueCache
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.sampling import Sampling, choose_token

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
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} is below 1; give how many tokens to generate"
            )


@dataclass(frozen=True)
class Generated:
    """New tokens, and why they end."""

    token_ids: tuple[int, ...]
    finish_reason: Literal["length", "stop"]


@torch.no_grad()
def generate_ids(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    ends: Callable[[Sequence[int]], bool] = lambda _: False,
) -> Generated:
    """Continue one prompt; all processes of a tensor-parallel group call it and get the same tokens.

    Args:
        model: this process's part.
        mesh: its place.
        prompt_ids: at least one id.
        settings: length, sampling, end ids.
        ends: told the new ids after each, says whether the text is complete (stop strings).

    Raises:
        AscendSpeedError: an empty prompt, or one that leaves no room for the new tokens.
    """
    check_length(len(prompt_ids), settings.max_new_tokens, model.config.max_position_embeddings)
    cache = make_cache(model, mesh, 1, len(prompt_ids) + settings.max_new_tokens)
    generator = settings.sampling.generator()
    logits = prefill(model, mesh, torch.tensor([list(prompt_ids)], device=mesh.device.torch), cache)
    new_ids: list[int] = []
    while True:
        new_ids.append(choose_token(logits, settings.sampling, generator))
        if new_ids[-1] in settings.eos_ids or ends(new_ids):
            return Generated(tuple(new_ids), "stop")
        if len(new_ids) == settings.max_new_tokens:
            return Generated(tuple(new_ids), "length")
        logits = decode_one_token(model, mesh, new_ids[-1], cache)


@torch.no_grad()
def generate_together(
    model: Transformer,
    mesh: ParallelMesh,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
    ends: Sequence[Callable[[Sequence[int]], bool]],
) -> list[Generated]:
    """Continue several prompts, of any lengths, one token of each at a time; see `generate_ids`.

    Each prompt is read alone, into its place of one cache in which all end together. The texts are those of
    `generate_ids`: where the two likeliest tokens are nearly equal, the logits of that text are computed again alone,
    as its neighbours in a batch change the last bits of a sum.
    """
    for ids, own in zip(prompts, settings, strict=True):
        check_length(len(ids), own.max_new_tokens, model.config.max_position_embeddings)
    longest, room = max(map(len, prompts)), max(own.max_new_tokens for own in settings)
    cache = make_cache(model, mesh, len(prompts), longest + room)
    device = mesh.device.torch
    rows = []
    for number, ids in enumerate(prompts):
        alone = make_cache(model, mesh, 1, len(ids))
        rows.append(prefill(model, mesh, torch.tensor([list(ids)], device=device), alone))
        for whole, part in ((cache.keys, alone.keys), (cache.values, alone.values)):
            # Zeros, not what memory held: a weight of 0 times infinity is no number.
            whole[:, number, :, : longest - len(ids)] = 0
            whole[:, number, :, longest - len(ids) : longest] = part[:, 0]
    cache.advance(longest)
    cache.padding_tokens = torch.tensor([longest - len(ids) for ids in prompts], device=device)
    generators = [own.sampling.generator() for own in settings]
    new_ids: list[list[int]] = [[] for _ in prompts]
    done: dict[int, Generated] = {}
    while True:
        for number, own in enumerate(settings):
            if number in done:
                continue
            ids = new_ids[number]
            ids.append(choose_token(rows[number], own.sampling, generators[number]))
            if ids[-1] in own.eos_ids or ends[number](ids):
                done[number] = Generated(tuple(ids), "stop")
            elif len(ids) == own.max_new_tokens:
                done[number] = Generated(tuple(ids), "length")
        if len(done) == len(prompts):
            return [done[number] for number in range(len(prompts))]
        # Texts that have ended go on with their last token, which nobody reads.
        tokens = torch.tensor([[ids[-1]] for ids in new_ids], device=device)
        logits = forward_through_stages(model, mesh, tokens, cache)
        together = gather_logits(logits[:, -1], model.config.vocab_size, mesh.group("tp"))
        rows = [
            row if number in done else _settled(model, mesh, row, [*prompts[number], *new_ids[number]])
            for number, row in enumerate(together)
        ]


def _settled(
    model: Transformer, mesh: ParallelMesh, logits: torch.Tensor, ids: Sequence[int]
) -> torch.Tensor:
    """Return a text's logits, [V]; where the best two are nearly equal, those of the text computed alone."""
    best, second = logits.topk(2).values.tolist()
    if best - second >= NEARLY_EQUAL[logits.dtype]:
        return logits
    cache = make_cache(model, mesh, 1, len(ids))
    return prefill(model, mesh, torch.tensor([list(ids)], device=mesh.device.torch), cache)


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
    tokens = torch.tensor([[token]], device=mesh.device.torch)
    logits = forward_through_stages(model, mesh, tokens, cache)
    return gather_logits(logits[0, -1], model.config.vocab_size, mesh.group("tp"))


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
