"""Continuous batching: requests enter and leave between passes, under a limit of memory.

A request enters when the longest that it can become fits into the key-value cache beside those that run, in the order
of arrival: so memory never runs out half-way, and no request waits for ever. With optimistic admission it enters when
its text so far fits, with a few tokens more, and its slot grows with it. When memory runs out, the request that entered
last leaves and waits, first in the queue, to be computed again from its tokens. The oldest always goes on.

A prompt with the prefix of a sequence in the cache copies its keys and values; those of finished sequences are kept
until their memory is needed.

The scheduler knows no model: it says what the next pass runs, and takes the logits. What it decides depends on the
requests alone, so ranks that make the same calls agree without asking each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ascendspeed_core.kernels.largest import largest
from ascendspeed_core.models.cache import CacheSlot, SequenceChunk, blocks_of
from ascendspeed_infer.engine.batch_invariant import PassShapes
from ascendspeed_infer.engine.model_runner import ScheduledChunk
from ascendspeed_infer.engine.prefix_cache import CachedSequence, find_longest_prefix
from ascendspeed_infer.engine.scheduled_request import ScheduledRequest
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import NextToken, SamplingRequest
from ascendspeed_infer.sampling import check_finite_logits

NOT_FINITE = -1
"""Id of no token."""
PREFILL_TOKENS_PER_STEP = 512
"""Long prompts are read in chunks, so that texts which are being continued do not wait for them."""


class SlotCache(Protocol):
    """Slots of a key-value cache; see `ascendspeed_core.models.cache.KeyValueCache`."""

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        ...

    @property
    def free_blocks(self) -> int:
        """Blocks that no slot holds."""
        ...

    def reserve(self, tokens: int) -> CacheSlot:
        """Reserve a slot."""
        ...

    def grow(self, slot: CacheSlot, tokens: int) -> None:
        """Make a slot longer."""
        ...

    def release(self, slot: CacheSlot) -> None:
        """Give a slot back."""
        ...

    def copy(self, source: CacheSlot, target: CacheSlot, start: int, end: int) -> None:
        """Copy keys and values of tokens `start` to `end`."""
        ...


@dataclass(frozen=True)
class SchedulerOutput:
    """What a pass runs.

    Attributes:
        chunks: in order.
        sequences: of each chunk the sequence; `None` for those of scoring requests.
        ready: requests that get logits, and which chunks are theirs.
    """

    chunks: list[ScheduledChunk]
    sequences: list[CachedSequence | None]
    ready: list[tuple[ScheduledRequest, slice]]


class Scheduler:
    """Decide what each pass runs.

    Args:
        cache: that all sequences share.
        shapes: of batch-invariant passes.
        max_num_seqs: most sequences in one pass; `None` leaves it to the cache.
        prefill_tokens_per_step: about the most tokens of prompts in one pass.
        enable_prefix_caching: keep keys and values of finished sequences while there is memory.
    """

    def __init__(
        self,
        cache: SlotCache,
        shapes: PassShapes,
        max_num_seqs: int | None = None,
        prefill_tokens_per_step: int = PREFILL_TOKENS_PER_STEP,
        enable_prefix_caching: bool = True,
    ) -> None:
        self._cache, self._shapes = cache, shapes
        self.max_num_seqs = max_num_seqs
        self._prefill_tokens = prefill_tokens_per_step
        self._enable_prefix_caching = enable_prefix_caching
        self.optimistic = False
        """Let requests enter with room for a few tokens more, instead of for the longest that they can become."""
        self.num_preemptions = 0
        """How often a request had to leave the cache."""
        self.waiting: list[ScheduledRequest] = []
        self.running: list[ScheduledRequest] = []
        self._finished: list[CachedSequence] = []
        """Kept for their prefixes, the least recently used first."""
        self.reused_tokens = 0
        """Tokens of prompts whose keys and values were copied, not computed."""

    def add(self, request: ScheduledRequest) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(request)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its memory; return whether it was there."""
        for scheduled in self.waiting:
            if scheduled.request_id == request_id:
                self.waiting.remove(scheduled)
                return True
        for scheduled in self.running:
            if scheduled.request_id == request_id:
                self._leave(scheduled, keep=False)
                return True
        return False

    def clear_prefix_cache(self) -> None:
        """Free the memory of finished sequences."""
        for sequence in self._finished:
            self._cache.release(sequence.slot)
        self._finished.clear()

    def reset_cache(self) -> None:
        """Forget what the cache holds, because it is replaced by an empty one; nothing may run."""
        assert not self.running
        self._finished.clear()

    def reset(self) -> None:
        """Forget all requests and what the cache holds."""
        self.waiting.clear()
        self.running.clear()
        self.reset_cache()

    def schedule(self) -> SchedulerOutput | None:
        """Admit what fits and return what the next pass runs; `None` when there is nothing to do."""
        if self.optimistic:
            self._grow_slots()
        self._admit()
        chunks: list[ScheduledChunk] = []
        sequences: list[CachedSequence | None] = []
        ready: list[tuple[ScheduledRequest, slice]] = []
        budget = self._prefill_tokens
        for scheduled in self.running:
            first = len(chunks)
            if isinstance(scheduled.request, ScoringRequest):
                own = scheduled.request.next_chunks()
                number = scheduled.adapter
                chunks += own if number is None else [replace(one, adapter=number) for one in own]
                sequences += [None] * (len(chunks) - first)
                ready.append((scheduled, slice(first, len(chunks))))
                continue
            for sequence in scheduled.sequences:
                for chunk in self._chunks(sequence, budget):
                    chunks.append(chunk)
                    sequences.append(sequence)
                    budget -= 0 if chunk.is_decode else len(chunk.token_ids)
            if len(chunks) > first and chunks[-1].num_logits:
                ready.append((scheduled, slice(first, len(chunks))))
        return SchedulerOutput(chunks, sequences, ready) if chunks else None

    def update(
        self, output: SchedulerOutput, logits: Sequence[torch.Tensor]
    ) -> list[tuple[ScheduledRequest, Exception | None]]:
        """Give requests the logits of a pass.

        An error of one request ends that request, and no other.

        Args:
            output: what the pass ran.
            logits: of each chunk.

        Returns:
            The requests that got logits, each with the error that ended it, if any.
        """
        for sequence, chunk in zip(output.sequences, output.chunks, strict=True):
            if sequence is not None:
                sequence.num_computed_tokens = chunk.chunk.end
        advanced: list[tuple[ScheduledRequest, Exception | None]] = []
        likeliest = _likeliest_tokens(output, logits)
        for scheduled, own in output.ready:
            try:
                self._advance(scheduled, logits[own], likeliest.get(own.stop - 1))
                advanced.append((scheduled, None))
            except Exception as error:  # noqa: BLE001 - reported to who asked, and no other's matter
                self._leave(scheduled, keep=False)
                advanced.append((scheduled, error))
        return advanced

    def _chunks(self, sequence: CachedSequence, budget: int) -> list[ScheduledChunk]:
        """Cut what is to be read of a sequence into chunks, of a prompt about `budget` tokens."""
        end = len(sequence.token_ids)
        # The last token is read again if an interrupt came between its pass and the choice of the next one.
        start = min(sequence.num_computed_tokens, end - 1)
        is_decode = start >= sequence.num_prompt_tokens
        if not sequence.batch_invariant:
            # The tokens of a text that had to leave are read again as a prompt is.
            is_decode = is_decode and end - start == 1
            ends = [end if is_decode else min(end, start + budget)] if is_decode or budget > 0 else []
        elif is_decode:
            # Each token by itself, as it was computed before.
            ends = list(range(start + 1, min(start + self._shapes.decode_tokens, end) + 1))
        else:
            # A chunk is never cut: with less than one of budget nothing would ever be read.
            if budget == self._prefill_tokens:
                budget = max(budget, self._shapes.chunk_tokens)
            tiles = self._shapes.chunk_ends(start, min(end, sequence.num_prompt_tokens))
            ends = [one for one in tiles if one - start <= budget]
        chunks = []
        for one in ends:
            chunks.append(
                ScheduledChunk(
                    SequenceChunk(sequence.slot, start, one - start),
                    sequence.token_ids[start:one],
                    int(one == end),
                    is_decode,
                    sequence.batch_invariant,
                    sequence.adapter,
                )
            )
            start = one
        return chunks

    def _advance(
        self, scheduled: ScheduledRequest, logits: Sequence[torch.Tensor], likeliest: int | None
    ) -> None:
        request = scheduled.request
        if isinstance(request, ScoringRequest):
            request.advance(logits)
            if request.is_finished:
                self._leave(scheduled, keep=False)
            return
        if likeliest is not None and isinstance(request, SamplingRequest):
            if likeliest == NOT_FINITE:
                check_finite_logits(float(logits[0].max()))
            following = request.take(likeliest)
        else:
            following = request.advance(torch.cat(list(logits)) if len(logits) > 1 else logits[0])
        if following:
            self._continue(scheduled, following)
        else:
            self._leave(scheduled, keep=self._enable_prefix_caching)

    def _admit(self) -> None:
        """Let requests enter while the longest that they can become fits."""
        while self.waiting:
            scheduled = self.waiting[0]
            num_seqs = sum(one.num_seqs for one in self.running) + scheduled.num_seqs
            if self.max_num_seqs is not None and num_seqs > self.max_num_seqs:
                return
            wanted = scheduled.num_seqs * blocks_of(scheduled.tokens_to_reserve(self.optimistic))
            if wanted > self._cache.free_blocks + self._kept_blocks:
                return
            if isinstance(scheduled.request, ScoringRequest):
                self._free_blocks(wanted)
                slot = self._cache.reserve(scheduled.slot_tokens)
                scheduled.request.start(slot)
                scheduled.spare_slots = [slot]
            elif not self._admit_prompt(scheduled, scheduled.request.prompt_ids, wanted):
                return
            self.waiting.pop(0)
            self.running.append(scheduled)

    @property
    def _kept_blocks(self) -> int:
        return sum(sequence.slot.num_blocks for sequence in self._finished)

    def _grow_slots(self) -> None:
        """Give texts that have filled their slots longer ones; those that entered last leave if there is no memory."""
        for scheduled in list(self.running):
            for sequence in scheduled.sequences:
                num_tokens = len(sequence.token_ids)
                if num_tokens <= sequence.slot.tokens:
                    continue
                tokens = scheduled.tokens_to_reserve(True, num_tokens)
                more = blocks_of(tokens) - sequence.slot.num_blocks
                while more > self._cache.free_blocks + self._kept_blocks and scheduled in self.running:
                    self._preempt(next(one for one in reversed(self.running) if one.can_leave))
                if scheduled in self.running:
                    self._free_blocks(more)
                    self._cache.grow(sequence.slot, tokens)

    def _preempt(self, scheduled: ScheduledRequest) -> None:
        """Let a request leave the cache and wait, first in the queue."""
        (sequence,) = scheduled.sequences
        scheduled.computed_ids = list(sequence.token_ids)
        self._leave(scheduled, keep=False)
        self.waiting.insert(0, scheduled)
        self.num_preemptions += 1

    def _admit_prompt(self, scheduled: ScheduledRequest, prompt_ids: Sequence[int], wanted: int) -> bool:
        """Reserve slots for a prompt and copy what is computed of it; return whether it may enter now."""
        token_ids = scheduled.computed_ids or list(prompt_ids)
        # Keys and values of tokens that were computed one by one are not those of a prompt, bit for bit.
        shareable = prompt_ids if scheduled.batch_invariant else token_ids
        in_cache = (*self._finished, *(one for running in self.running for one in running.sequences))
        source, common = find_longest_prefix(
            in_cache, shareable, scheduled.cache_salt, scheduled.batch_invariant, scheduled.adapter
        )
        if source is not None and source.num_computed_tokens < common:
            # It is being read just now; no need to read it twice.
            return False
        if source in self._finished:
            self._finished.remove(source)
            self._finished.append(source)
        if self._free_blocks(wanted, source):
            source = None
        tokens = scheduled.tokens_to_reserve(self.optimistic)
        slot, *scheduled.spare_slots = [self._cache.reserve(tokens) for _ in range(scheduled.num_seqs)]
        sequence = CachedSequence(
            slot,
            list(token_ids),
            len(prompt_ids),
            scheduled.cache_salt,
            scheduled.batch_invariant,
            adapter=scheduled.adapter,
        )
        if source is not None:
            self._cache.copy(source.slot, slot, 0, common)
            sequence.num_computed_tokens = common
            self.reused_tokens += common
            if isinstance(scheduled.request, SamplingRequest) and not scheduled.computed_ids:
                scheduled.request.num_cached_tokens = common
        scheduled.sequences = [sequence]
        return True

    def _free_blocks(self, wanted: int, source: CachedSequence | None = None) -> bool:
        """Drop finished sequences until some blocks are free; return whether `source` was dropped."""
        is_dropped = False
        while wanted > self._cache.free_blocks:
            dropped = self._finished.pop(0)
            self._cache.release(dropped.slot)
            is_dropped = is_dropped or dropped is source
        return is_dropped

    def _continue(self, scheduled: ScheduledRequest, following: Sequence[NextToken]) -> None:
        """Let each sequence go on from its parent: the first child in its parent's slot, others in a free one."""
        living = {one.parent for one in following}
        dead = [one.slot for number, one in enumerate(scheduled.sequences) if number not in living]
        free, continued, sequences = [*scheduled.spare_slots, *dead], set[int](), []
        for one in following:
            parent = scheduled.sequences[one.parent]
            slot = parent.slot
            if one.parent in continued:
                slot = free.pop()
                # Sequences that lived have the prompt in common.
                start = parent.num_prompt_tokens if slot in dead else 0
                self._cache.copy(parent.slot, slot, start, parent.num_computed_tokens)
            continued.add(one.parent)
            sequences.append(
                CachedSequence(
                    slot,
                    [*parent.token_ids, one.token_id],
                    parent.num_prompt_tokens,
                    parent.cache_salt,
                    parent.batch_invariant,
                    parent.num_computed_tokens,
                    parent.adapter,
                )
            )
        scheduled.sequences, scheduled.spare_slots = sequences, free

    def _leave(self, scheduled: ScheduledRequest, keep: bool) -> None:
        self.running.remove(scheduled)
        for slot in scheduled.spare_slots:
            self._cache.release(slot)
        kept = scheduled.sequences[:1] if keep else []
        for sequence in scheduled.sequences[len(kept) :]:
            self._cache.release(sequence.slot)
        self._finished += kept
        scheduled.sequences, scheduled.spare_slots = [], []


def _likeliest_tokens(output: SchedulerOutput, logits: Sequence[torch.Tensor]) -> dict[int, int]:
    """Return by chunk the token of each request that takes the likeliest one: one copy to the host for all of them.

    `NOT_FINITE` stands for a token whose logit is not finite; a NaN counts as the largest.
    """
    # Of the chunks of a prompt the last one has logits.
    chunks = [
        own.stop - 1
        for scheduled, own in output.ready
        if isinstance(scheduled.request, SamplingRequest) and scheduled.request.takes_likeliest
    ]
    if not chunks:
        return {}
    numbers, positions = largest([logits[chunk][0] for chunk in chunks])
    tokens = torch.where(numbers.isfinite(), positions, NOT_FINITE)
    return dict(zip(chunks, tokens.tolist(), strict=True))
