"""Keys and values of finished sequences, kept for prompts with the same prefix until their memory is needed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ascendspeed_core.models.cache import CacheSlot

MIN_PREFIX_TOKENS = 16
"""A shorter prefix is computed again, not copied."""


@dataclass(eq=False)
class CachedSequence:
    """One sequence and its slot of the key-value cache.

    Attributes:
        slot: where its keys and values lie.
        token_ids: prompt and new tokens.
        num_prompt_tokens: how many of them are the prompt's.
        cache_salt: only requests with the same salt may share its prefix.
        batch_invariant: whether its keys and values were computed in passes of fixed shape.
        num_computed_tokens: how many of them have keys and values.
        adapter: number of the adapter that computed them, if the model has several.
    """

    slot: CacheSlot
    token_ids: list[int]
    num_prompt_tokens: int
    cache_salt: str | None = None
    batch_invariant: bool = False
    num_computed_tokens: int = 0
    adapter: int | None = None

    @property
    def shared_ids(self) -> list[int]:
        """What another sequence can share: the prompt, even while it is read, or all that is computed.

        In batch-invariant mode only the prompt: what was decoded was computed in another shape.
        """
        if self.batch_invariant:
            return self.token_ids[: self.num_prompt_tokens]
        return self.token_ids[: max(self.num_computed_tokens, self.num_prompt_tokens)]


def find_longest_prefix(
    sequences: Iterable[CachedSequence],
    prompt_ids: Sequence[int],
    cache_salt: str | None,
    batch_invariant: bool,
    adapter: int | None,
) -> tuple[CachedSequence | None, int]:
    """Return the sequence that shares the longest prefix with a prompt, and its length; the last id always stays.

    Args:
        sequences: those in the cache.
        prompt_ids: the prompt.
        cache_salt: of the prompt's request.
        batch_invariant: whether the prompt is read in passes of fixed shape.
        adapter: of the prompt's request.
    """
    source, longest = None, MIN_PREFIX_TOKENS - 1
    wanted = list(prompt_ids[:-1])
    for sequence in sequences:
        own = (sequence.cache_salt, sequence.batch_invariant, sequence.adapter)
        if own != (cache_salt, batch_invariant, adapter):
            continue
        common = common_prefix_length(sequence.shared_ids, wanted)
        if common > longest:
            source, longest = sequence, common
    return source, longest


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        # Comparing slices is far faster than comparing ids one by one.
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
