"""The samples of one forward pass.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.context import part_of_sequence
from ascendspeed_core.parallel.mesh import ParallelMesh


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass; under context parallelism this rank's part of them, S/cp for S.

    Attributes:
        tokens: ids, [B, S].
        labels: the id to predict at each position, [B, S].
        loss_mask: 1 where the loss counts, [B, S].
        positions: position of each token in its text, [B, S]; `None` counts from 0.
        segments: number of the text that each token belongs to, [B, S], where rows hold several; see `ModelInput`. Of
            whole sequences under context parallelism too.
        samples: number of each sample in the run, [B]; training with dropout needs it.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    samples: torch.Tensor | None = None

    @property
    def input(self) -> ModelInput:
        """What the model reads of it."""
        return ModelInput(self.tokens, self.positions, self.segments, self.samples)

    @property
    def input_for_loss(self) -> ModelInput:
        """What the model reads of it where only the loss is wanted."""
        return self.input._replace(for_loss=True)

    def to(self, device: torch.device) -> "MicroBatch":
        """Move to a device."""
        present = {name: part for name, part in vars(self).items() if part is not None}
        return MicroBatch(**{name: part.to(device) for name, part in present.items()})

    def part_of_sequence(self, mesh: ParallelMesh) -> "MicroBatch":
        """Return what a process under context parallelism works on: [B, S] -> [B, S/cp].

        Segments stay whole, as attention sees whole sequences.
        """
        whole = ("segments", "samples")
        cut = {name: part for name, part in vars(self).items() if part is not None and name not in whole}
        parts = {name: part_of_sequence(x, mesh.layout.cp, mesh.cp_rank) for name, x in cut.items()}
        return replace(self, **parts)


def count_tokens(micro_batches: Sequence[MicroBatch], mesh: ParallelMesh) -> int:
    """Return how many tokens count in the global batch."""
    count = sum(int(micro_batch.loss_mask.sum()) for micro_batch in micro_batches)
    return int(mesh.sum_over("replicas", torch.tensor(count, device=mesh.device.torch)))
