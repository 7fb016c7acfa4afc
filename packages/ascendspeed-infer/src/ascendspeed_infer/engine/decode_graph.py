"""Passes of one more token for every text, recorded on the accelerator and replayed.

A pass of one token for a few texts asks for hundreds of small kernels, and asking takes longer than computing. A
recorded pass is asked for at once. Its shape is fixed, so there is one for each of a few numbers of texts; a smaller
batch is filled up with its first text, whose keys and values are then written again, the same.

Shapes: M texts of a pass, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch

from ascendspeed_core.models.cache import KeyValueCache, SequenceChunk
from ascendspeed_core.models.cached_pass import SingleTokenPass
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of texts that passes are recorded for."""

LEAST_KEYS = 1024
"""Passes are recorded for texts of up to this many tokens, and twice and four times and so on as many."""


class DecodeGraphs:
    """The recorded passes of one model and cache.

    Args:
        model: the whole model.
        mesh: of one rank.
        cache: with an attention for all texts in one call.
    """

    def __init__(self, model: Transformer, mesh: ParallelMesh, cache: KeyValueCache) -> None:
        self._model, self._device, self._cache = model, mesh.device, cache
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def run(self, tokens: Sequence[int], chunks: Sequence[SequenceChunk]) -> torch.Tensor:
        """Read one more token of each text and return the logits of those that follow, [M, V]."""
        size = next(size for size in SIZES if size >= len(chunks))
        most_keys = LEAST_KEYS
        while most_keys < max(chunk.end for chunk in chunks):
            most_keys *= 2
        filling = size - len(chunks)
        positions = [chunk.start for chunk in chunks]
        starts = [chunk.slot.start for chunk in chunks]
        numbers = torch.tensor([[*one, *one[:1] * filling] for one in (list(tokens), positions, starts)])
        key = (size, most_keys)
        if key not in self._recorded:
            self._recorded[key] = self._record(numbers, most_keys)
        recorded = self._recorded[key]
        recorded.numbers.copy_(numbers)
        recorded.replay()
        # The next pass writes over them.
        return recorded.logits[: len(chunks)].clone()

    def _record(self, numbers: torch.Tensor, most_keys: int) -> "_Recorded":
        """Record a pass, which runs meanwhile: with the numbers of texts, so that it writes what is theirs."""
        numbers = numbers.to(self._device.torch)

        def work() -> torch.Tensor:
            tokens, positions, starts = numbers
            cached = SingleTokenPass(self._cache, positions, starts, most_keys)
            logits: torch.Tensor = self._model(ModelInput(tokens.unsqueeze(0), cache=cached)).logits[0]
            return logits

        return _Recorded(numbers, *self._device.record(work))


class _Recorded:
    """One recorded pass.

    Args:
        numbers: token, position and first token of the slot of each text, int64, [3, M].
        replay: asks for the pass again.
        logits: that it writes, [M, V].
    """

    def __init__(self, numbers: torch.Tensor, replay: Callable[[], None], logits: torch.Tensor) -> None:
        self.numbers, self.replay, self.logits = numbers, replay, logits


def decode_graphs_for(model: Transformer, mesh: ParallelMesh, cache: KeyValueCache) -> DecodeGraphs | None:
    """Return what records and replays passes; `None` where the device or the layout cannot."""
    # How many rows an expert gets is read by the host, which a record cannot.
    has_experts = model.config.experts is not None
    is_able = (
        not has_experts
        and mesh.device.can_record
        and mesh.layout.world_size == 1
        and cache.lengths_attention is not None
    )
    return DecodeGraphs(model, mesh, cache) if is_able else None
