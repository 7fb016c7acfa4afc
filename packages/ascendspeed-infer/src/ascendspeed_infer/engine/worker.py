"""One rank of the engine: it holds its part of the model and of the cache, and runs what the scheduler decided.

Without a control channel every rank of a layout has a scheduler of its own and makes the same calls. With one, only
the leader has requests: each pass that it runs is broadcast, and the followers run the same pass in `follow` until the
leader shuts them down. They need no requests, no tokenizer and no sampling, so nothing that happens to a request on
the leader can part the ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ascendspeed_core.models.cache import CacheSlot, SequenceChunk
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.control_channel import ControlChannel
from ascendspeed_infer.engine.model_runner import (
    ModelRunner,
    ScheduledChunk,
    check_batch_invariance,
    make_cache,
)


@dataclass(frozen=True)
class ChunkMessage:
    """A `ScheduledChunk` as it is broadcast: with the number of its slot."""

    slot: int
    start: int
    token_ids: tuple[int, ...]
    num_logits: int
    is_decode: bool
    batch_invariant: bool
    adapter: int | None


CacheCommand = tuple[str, tuple[int, ...]]
"""`reserve`, `grow`, `release` or `copy`, and its arguments with slots as numbers."""


class Worker:
    """Run passes on this rank and, as the leader of a channel, on the followers.

    A scheduler uses it as its `SlotCache`.

    Args:
        model: this rank's part.
        mesh: the layout and this rank's position in it.
        channel: to the followers, if this rank leads some, or from the leader.
    """

    def __init__(self, model: Transformer, mesh: ParallelMesh, channel: ControlChannel | None = None) -> None:
        self.runner = ModelRunner(model, mesh)
        self.channel = channel
        self._slots: dict[int, CacheSlot] = {}
        self._numbers: dict[CacheSlot, int] = {}
        self._next_number = 0
        self._commands: list[CacheCommand] = []

    @property
    def num_blocks(self) -> int:
        """All blocks of the cache."""
        return self.runner.cache.num_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks of the cache that no slot holds."""
        return self.runner.cache.free_blocks

    def reserve(self, tokens: int) -> CacheSlot:
        """Reserve a slot of the cache."""
        slot = self.runner.cache.reserve(tokens)
        if self.channel is not None:
            self._numbers[slot] = self._next_number
            self._commands.append(("reserve", (self._next_number, tokens)))
            self._next_number += 1
        return slot

    def release(self, slot: CacheSlot) -> None:
        """Give a slot back."""
        self.runner.cache.release(slot)
        if self.channel is not None:
            self._commands.append(("release", (self._numbers.pop(slot),)))

    def grow(self, slot: CacheSlot, tokens: int) -> None:
        """Make a slot of the cache longer."""
        self.runner.cache.grow(slot, tokens)
        if self.channel is not None:
            self._commands.append(("grow", (self._numbers[slot], tokens)))

    def copy(self, source: CacheSlot, target: CacheSlot, start: int, end: int) -> None:
        """Copy keys and values of tokens `start` to `end` from one slot to another."""
        self.runner.cache.copy(source, target, start, end)
        if self.channel is not None:
            numbers = (self._numbers[source], self._numbers[target])
            self._commands.append(("copy", (*numbers, start, end)))

    def allocate_cache(self, num_tokens: int) -> None:
        """Replace the cache by an empty one for this many tokens."""
        self._broadcast("allocate_cache", num_tokens)
        for slots in (self._slots, self._numbers, self._commands):
            slots.clear()
        runner = self.runner
        # Memory of the old one is free before the new one takes its own.
        runner.cache = make_cache(runner.model, runner.mesh, 0)
        runner.cache = make_cache(runner.model, runner.mesh, num_tokens)

    def run(self, chunks: Sequence[ScheduledChunk]) -> list[torch.Tensor]:
        """Run chunks; see `ModelRunner.run`."""
        if self.channel is not None:
            commands, self._commands = self._commands, []
            self._broadcast("follow_pass", commands, [self._message(one) for one in chunks])
        return self.runner.run(chunks)

    def follow_pass(self, commands: Sequence[CacheCommand], messages: Sequence[ChunkMessage]) -> None:
        """Do to the cache what the leader did, and run the same pass."""
        cache, slots = self.runner.cache, self._slots
        for method, arguments in commands:
            if method == "reserve":
                slots[arguments[0]] = cache.reserve(arguments[1])
            elif method == "release":
                cache.release(slots.pop(arguments[0]))
            elif method == "grow":
                cache.grow(slots[arguments[0]], arguments[1])
            else:
                source, target, start, end = arguments
                cache.copy(slots[source], slots[target], start, end)
        self.runner.run(
            [
                ScheduledChunk(
                    SequenceChunk(slots[one.slot], one.start, len(one.token_ids)),
                    one.token_ids,
                    one.num_logits,
                    one.is_decode,
                    one.batch_invariant,
                    one.adapter,
                )
                for one in messages
            ]
        )

    def forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits at every position of one text; see `ModelRunner.forward`."""
        self._broadcast("forward", tuple(token_ids))
        return self.runner.forward(token_ids)

    def check_batch_invariance(self) -> None:
        """See `model_runner.check_batch_invariance`."""
        self._broadcast("check_batch_invariance")
        check_batch_invariance(self.runner.model, self.runner.mesh)

    def follow(self) -> None:
        """Run what the leader runs until it shuts down."""
        assert self.channel is not None
        channel, self.channel = self.channel, None
        while (call := channel.receive()) is not None:
            method, arguments = call
            try:
                getattr(self, method)(*arguments)
            except AscendSpeedError:
                # All ranks find the same; the leader reports it and goes on.
                if method != "check_batch_invariance":
                    raise

    def shutdown(self) -> None:
        """Let the followers go."""
        if self.channel is not None:
            self.channel.send(None)
            self.channel = None

    def _broadcast(self, method: str, *arguments: Any) -> None:
        if self.channel is not None:
            self.channel.send((method, arguments))

    def _message(self, one: ScheduledChunk) -> ChunkMessage:
        return ChunkMessage(
            self._numbers[one.chunk.slot],
            one.chunk.start,
            tuple(one.token_ids),
            one.num_logits,
            one.is_decode,
            one.batch_invariant,
            one.adapter,
        )
