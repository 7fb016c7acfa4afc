"""Next-token prediction: the negative log-likelihood of every token that counts.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism), V/tp this rank's part of the vocabulary.
"""

from collections.abc import Callable

import torch

from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.cross_entropy import cross_entropy
from ascendspeed_core.parallel.mesh import ParallelMesh

LossOf = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of a micro-batch and its logits, [B, S, V/tp] -> the sum of its losses."""


def loss_sum(model: Transformer, micro_batch: MicroBatch, mesh: ParallelMesh) -> torch.Tensor:
    """Return the main loss added up over the tokens that count."""
    return masked_sum(model, model(micro_batch.input).logits, micro_batch, mesh)


def masked_sum(
    model: Transformer, logits: torch.Tensor, micro_batch: MicroBatch, mesh: ParallelMesh
) -> torch.Tensor:
    """Return the loss of logits added up over the tokens that count."""
    losses = cross_entropy(
        logits, micro_batch.labels, model.config.vocab_size, mesh.group("tp"), model.token_losses
    )
    return (losses * micro_batch.loss_mask).sum()
