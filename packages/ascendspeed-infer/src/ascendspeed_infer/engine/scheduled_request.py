"""A request in the scheduler: what is continued or scored, and what it has of the cache."""

from dataclasses import dataclass, field

from ascendspeed_core.models.cache import CacheSlot, blocks_of
from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.prefix_cache import CachedSequence
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import Request, SamplingRequest

GROWTH_TOKENS = 64
"""New tokens that a slot has room for when it is reserved or grows, with optimistic admission."""


@dataclass(eq=False)
class ScheduledRequest:
    """A request in the scheduler.

    Attributes:
        request_id: its name.
        request: what is continued or scored.
        batch_invariant: run it in passes of fixed shape.
        cache_salt: only requests with the same salt share prefixes.
        shapes: of batch-invariant passes.
        adapter: number of the adapter, where the model has several; `None` for the model alone.
        sequences: in the cache, once it runs.
        spare_slots: slots of the cache for further sequences.
        num_reported: tokens that `step` has reported.
        computed_ids: prompt and new tokens of a request that had to leave the cache; none of others.
    """

    request_id: str
    request: Request | ScoringRequest
    batch_invariant: bool = False
    cache_salt: str | None = None
    shapes: PassShapes = field(default_factory=PassShapes)
    adapter: int | None = None
    sequences: list[CachedSequence] = field(default_factory=list)
    spare_slots: list[CacheSlot] = field(default_factory=list)
    num_reported: int = 0
    computed_ids: list[int] = field(default_factory=list)

    @property
    def can_leave(self) -> bool:
        """Whether it can be computed again from its tokens."""
        return isinstance(self.request, SamplingRequest)

    @property
    def num_seqs(self) -> int:
        """Most sequences at once."""
        return 1 if isinstance(self.request, ScoringRequest) else self.request.max_num_seqs

    @property
    def slot_tokens(self) -> int:
        """Tokens of each slot."""
        if isinstance(self.request, ScoringRequest):
            return self.request.max_tokens
        num_prompt = len(self.request.prompt_ids)
        return self.shapes.slot_tokens(num_prompt, self.request.max_new_tokens, self.batch_invariant)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache for the longest that it can become."""
        return self.num_seqs * blocks_of(self.slot_tokens)

    def tokens_to_reserve(self, optimistic: bool, num_tokens: int | None = None) -> int:
        """Return the tokens of the slot that each of its sequences gets, of at least `num_tokens`."""
        if not optimistic or not self.can_leave or isinstance(self.request, ScoringRequest):
            return self.slot_tokens
        num_prompt = len(self.request.prompt_ids)
        known = max(num_tokens or 0, num_prompt, len(self.computed_ids))
        grown = self.shapes.slot_tokens(num_prompt, known - num_prompt + GROWTH_TOKENS, self.batch_invariant)
        return min(grown, self.slot_tokens)
