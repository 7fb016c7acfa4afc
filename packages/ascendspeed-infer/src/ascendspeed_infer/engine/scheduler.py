"""Continuous batching: requests enter and leave between passes, under a limit of memory.

    engine = Engine(ModelRunner(model, mesh, capacity_tokens=4096))
    text = Text(prompt_ids, GenerationSettings(max_new_tokens=64))
    engine.submit(text)
    while engine.is_busy:
        for advanced in engine.step():
            ...
    text.generated()

A request enters when the longest that it can become fits beside those that are there, in the order of submission: so
nothing runs out of memory half-way, and none waits for ever. One too large for the whole cache is refused at once.
Texts that begin like one whose keys and values are there copy them; those of complete texts are kept until their
memory is needed.

Every process of a layout makes the same calls in the same order. What is computed next depends on the requests alone,
so all processes agree without asking each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ascendspeed_core.models.cache import CacheSlot, SequenceChunk, blocks_of
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.runner import ModelRunner, Work
from ascendspeed_infer.engine.sequences import Continuation, NextToken

PROMPT_TOKENS_PER_STEP = 512
"""Prompts are read in pieces, so that texts which are being continued do not wait for a long one."""

SHORTEST_PREFIX_TOKENS = 16
"""A shorter beginning is computed again, not copied."""


@dataclass(eq=False)
class _Row:
    """One text.

    Attributes:
        room: of it.
        ids: prompt and new ones.
        num_prompt: how many of them are the prompt's.
        stored: how many of them have keys and values.
    """

    room: CacheSlot
    ids: list[int]
    num_prompt: int
    stored: int = 0

    @property
    def prefix(self) -> list[int]:
        """What another text could share: the prompt, even while it is being read, or all that is stored."""
        return self.ids[: max(self.stored, self.num_prompt)]


@dataclass(eq=False)
class _Entry:
    """A request that has been admitted."""

    request: Continuation
    rows: list[_Row]
    spare: list[CacheSlot] = field(default_factory=list)


class Engine:
    """Continue any number of requests with one model.

    Args:
        runner: the model, and the cache that all share.
        max_rows: texts computed in one pass at most.
        prompt_tokens_per_step: of prompts, read in one pass at most.
        keeps_beginnings: keep keys and values of complete texts for those that begin alike, while there is memory.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_rows: int = 64,
        prompt_tokens_per_step: int = PROMPT_TOKENS_PER_STEP,
        keeps_beginnings: bool = True,
    ) -> None:
        self._runner, self._cache = runner, runner.cache
        self._max_rows = max_rows
        # A chunk is never cut: with less than one nothing would ever be read.
        shortest = runner.tiles.chunk_tokens if runner.tiles is not None else 1
        self._prompt_tokens = max(prompt_tokens_per_step, shortest)
        self._keeps_beginnings = keeps_beginnings
        self._waiting: list[Continuation] = []
        self._active: list[_Entry] = []
        self._kept: list[_Row] = []
        self.reused_tokens = 0
        """Of prompts, whose keys and values were copied instead of computed."""

    @property
    def is_busy(self) -> bool:
        """Whether any request is not complete."""
        return bool(self._waiting or self._active)

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache."""
        return self._cache.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks of the cache that hold nothing; those of beginnings that are kept count as used."""
        return self._cache.free_blocks

    def submit(self, request: Continuation) -> None:
        """Let a request wait for its turn.

        Raises:
            AscendSpeedError: no prompt, longer than the model takes, or more than the whole cache holds.
        """
        prompt, new = len(request.prompt_ids), request.max_new_tokens
        check_length(prompt, new, self._runner.model.config.max_position_embeddings)
        if request.max_rows > self._max_rows:
            raise AscendSpeedError(
                f"the request continues {request.max_rows} texts side by side, more than max_rows={self._max_rows} of "
                "the engine; ask for fewer beams"
            )
        if self._blocks_of(request) > self.num_blocks:
            raise AscendSpeedError(
                f"{request.max_rows} x {prompt + new} tokens of prompt and continuation need "
                f"{self._blocks_of(request)} blocks of the key-value cache, which has {self.num_blocks}; shorten the "
                "prompt, ask for fewer tokens, or make the cache larger"
            )
        self._waiting.append(request)

    def cancel(self, request: Continuation) -> bool:
        """Drop a request and free its memory; return whether it was there. What it has so far stays in it."""
        if request in self._waiting:
            self._waiting.remove(request)
            return True
        entry = next((entry for entry in self._active if entry.request is request), None)
        if entry is not None:
            self._leave(entry, keep=False)
        return entry is not None

    def clear_prefix_cache(self) -> None:
        """Free the memory of texts that are complete."""
        for row in self._kept:
            self._cache.release(row.room)
        self._kept.clear()

    def run(self) -> None:
        """Go on until every request is complete."""
        while self.is_busy:
            self.step()

    def step(self) -> list[Continuation]:
        """Admit what fits, run one pass, and let each request choose its next tokens.

        Returns:
            The requests that were told logits.
        """
        self._admit()
        works: list[Work] = []
        read: list[_Row] = []
        told: list[tuple[_Entry, slice]] = []
        budget = self._prompt_tokens
        for entry in self._active:
            first = len(works)
            for row in entry.rows:
                for work in self._works(row, budget):
                    works.append(work)
                    read.append(row)
                    budget -= 0 if work.is_decoding else len(work.ids)
            if len(works) > first and works[-1].read:
                told.append((entry, slice(first, len(works))))
        if not works:
            return []
        logits = self._runner.run(works)
        for row, work in zip(read, works, strict=True):
            row.stored += len(work.ids)
        return [entry.request for entry, mine in told if self._advance(entry, logits[mine])]

    def _works(self, row: _Row, budget: int) -> list[Work]:
        """Cut what a text has to be read into pieces, of a prompt about `budget` tokens."""
        end, is_decoding = len(row.ids), row.stored >= row.num_prompt
        tiles = self._runner.tiles
        if is_decoding:
            ends = [end]
        elif tiles is None:
            ends = [min(end, row.stored + budget)] if budget else []
        else:
            ends = [place for place in tiles.cut(row.stored, end) if place - row.stored <= budget]
        works, start = [], row.stored
        for place in ends:
            piece = SequenceChunk(row.room, start, place - start)
            works.append(Work(piece, row.ids[start:place], int(place == end), is_decoding))
            start = place
        return works

    def _advance(self, entry: _Entry, logits: Sequence[torch.Tensor]) -> bool:
        """Let a request choose; return whether it is still there to be told."""
        if entry not in self._active:
            return False
        try:
            following = entry.request.advance(torch.cat(list(logits)) if len(logits) > 1 else logits[0])
        except BaseException:
            self.cancel(entry.request)
            raise
        if entry not in self._active:
            return True
        if following:
            self._continue(entry, following)
        else:
            self._leave(entry, keep=self._keeps_beginnings)
        return True

    def _admit(self) -> None:
        """Let requests enter while the longest that they can become fits."""
        while self._waiting:
            request = self._waiting[0]
            rows = sum(entry.request.max_rows for entry in self._active) + request.max_rows
            if rows > self._max_rows:
                return
            kept_blocks = sum(row.room.num_blocks for row in self._kept)
            if self._blocks_of(request) > self.free_blocks + kept_blocks:
                return
            source, common = self._longest_beginning(request.prompt_ids)
            if source is not None and source.stored < common:
                # It is being read just now; no need to read it twice.
                return
            if source in self._kept:
                self._kept.remove(source)
                self._kept.append(source)
            while self._blocks_of(request) > self.free_blocks:
                dropped = self._kept.pop(0)
                self._cache.release(dropped.room)
                source = None if dropped is source else source
            self._waiting.pop(0)
            length = len(request.prompt_ids) + request.max_new_tokens
            room, *spare = [self._cache.reserve(length) for _ in range(request.max_rows)]
            row = _Row(room, list(request.prompt_ids), len(request.prompt_ids))
            if source is not None:
                self._cache.copy(source.room, room, 0, common)
                row.stored = common
                self.reused_tokens += common
            self._active.append(_Entry(request, [row], spare))

    def _longest_beginning(self, prompt: Sequence[int]) -> tuple[_Row | None, int]:
        """Return the text with which a prompt has most ids in common, and how many; its last id is never one."""
        source, most = None, SHORTEST_PREFIX_TOKENS - 1
        wanted, tiles = list(prompt[:-1]), self._runner.tiles
        for row in (*self._kept, *(row for entry in self._active for row in entry.rows)):
            if tiles is None:
                common = common_prefix(row.prefix, wanted)
            else:
                # What was decoded was computed in another shape.
                common = tiles.reusable(common_prefix(row.ids[: row.num_prompt], wanted))
            if common > most:
                source, most = row, common
        return source, most

    def _continue(self, entry: _Entry, following: Sequence[NextToken]) -> None:
        """Let each row go on from its parent: the first child in its parent's room, others in a free one."""
        living = {one.parent for one in following}
        dead = [row.room for number, row in enumerate(entry.rows) if number not in living]
        free, heirs, rows = [*entry.spare, *dead], set[int](), []
        for one in following:
            parent = entry.rows[one.parent]
            room = parent.room
            if one.parent in heirs:
                room = free.pop()
                # Rows that lived have the prompt in common.
                start = parent.num_prompt if room in dead else 0
                self._cache.copy(parent.room, room, start, parent.stored)
            heirs.add(one.parent)
            rows.append(_Row(room, [*parent.ids, one.token_id], parent.num_prompt, parent.stored))
        entry.rows, entry.spare = rows, free

    def _leave(self, entry: _Entry, keep: bool) -> None:
        self._active.remove(entry)
        first, *others = entry.rows
        for room in (*entry.spare, *(row.room for row in others)):
            self._cache.release(room)
        if keep:
            self._kept.append(first)
        else:
            self._cache.release(first.room)

    def _blocks_of(self, request: Continuation) -> int:
        return request.max_rows * blocks_of(len(request.prompt_ids) + request.max_new_tokens)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two texts have in common at their beginning."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        # Comparing slices is far faster than comparing ids one by one.
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


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
