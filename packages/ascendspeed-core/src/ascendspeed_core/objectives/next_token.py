"""Next-token prediction: the negative log-likelihood of every token that counts.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism), V/tp this rank's part of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import ClassVar

import torch

from ascendspeed_core.config.training import DataConfig, PretrainConfig
from ascendspeed_core.data.documents import find_end_of_document
from ascendspeed_core.data.gpt_dataset import GPTBatchLoader, check_data, held_out_samples, samples_of_epochs
from ascendspeed_core.data.loader import BatchLoader
from ascendspeed_core.data.micro_batch import MicroBatch, count_tokens
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.objective import LoadFrozen, MicroBatchLoss, Objective, ObjectiveLoss
from ascendspeed_core.parallel.cross_entropy import losses_of
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.weights import NativeSource, WeightSource
from ascendspeed_data.manifest import DatasetManifest


@dataclass(frozen=True)
class NextToken(Objective):
    """Predict every next token of plain text.

    Attributes:
        end_of_document: id of the token that ends documents, where an option needs it.
        options: those that need it.
        position: how the model knows positions.
    """

    name: ClassVar[str] = "next_token"

    end_of_document: int | None = None
    options: tuple[str, ...] = ()
    position: str = "rotary"

    @classmethod
    def check_data(cls, config: DataConfig, num_samples: tuple[int, int, int]) -> DatasetManifest | None:
        """Prove the files of plain text whole; see `Objective.check_data`."""
        return check_data(config, num_samples)

    @classmethod
    def samples_of_epochs(cls, config: DataConfig, epochs: float) -> int:
        """Count whole samples of joined documents; see `Objective.samples_of_epochs`."""
        return samples_of_epochs(config, epochs)

    @classmethod
    def held_out_samples(cls, config: DataConfig) -> int:
        """Count whole samples of joined documents; see `Objective.held_out_samples`."""
        return held_out_samples(config)

    @classmethod
    def plan(
        cls, config: PretrainConfig, source: WeightSource, checkpoint: NativeSource | None
    ) -> "NextToken":
        """Find out where documents end, if an option needs it."""
        options = tuple(config.data.document_options)
        if not options:
            return cls()
        tokenizer = config.data.tokenizer_name_or_path or source.tokenizer
        return cls(find_end_of_document(config.data, tokenizer), options, source.config.position)

    def describe(self) -> list[str]:
        """Say where documents end, and what follows from it."""
        if not self.options:
            return []
        lines = [f"documents: each ends with id {self.end_of_document} ({', '.join(self.options)})"]
        if self.position == "alibi" and "reset_position_ids" in self.options:
            lines.append("documents: reset_position_ids changes nothing, as ALiBi knows distances only")
        return lines

    def open_data(
        self,
        config: DataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        mesh: ParallelMesh,
    ) -> BatchLoader:
        """Open plain text, cut into samples as megatron-core cuts it."""
        return GPTBatchLoader(config, seed, num_samples, vocab_size, self.end_of_document, mesh)

    def make_loss(self, model: Transformer, mesh: ParallelMesh, load_frozen: LoadFrozen) -> ObjectiveLoss:
        """Return the loss of every token that counts."""
        return NextTokenLoss(model, mesh)


class NextTokenLoss:
    """The negative log-likelihood of every token that counts, in nats.

    Args:
        model: this rank's part.
        mesh: of this rank.
    """

    def __init__(self, model: Transformer, mesh: ParallelMesh) -> None:
        self._model, self._mesh = model, mesh

    def prepare(
        self, micro_batches: Sequence[MicroBatch], num_tokens: int | None = None
    ) -> tuple[int, MicroBatchLoss]:
        """Return the tokens of the global batch that count, and the sum of a micro-batch's losses."""
        if num_tokens is None:
            num_tokens = count_tokens(micro_batches, self._mesh)

        def loss_of(number: int, output: torch.Tensor) -> torch.Tensor:
            return masked_sum(self._model, output, micro_batches[number], self._mesh)

        return num_tokens, loss_of

    def metrics(self) -> dict[str, float]:
        """Return nothing: the loss says all."""
        return {}

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Return the mean `loss` per token of the micro-batches of all data-parallel ranks."""
        return {"loss": evaluate(self._model, micro_batches, self._mesh)}


def masked_sum(
    model: Transformer, output: torch.Tensor, micro_batch: MicroBatch, mesh: ParallelMesh
) -> torch.Tensor:
    """Return the loss of what a model gives for it, added up over the tokens that count."""
    losses = losses_of(model, output, micro_batch.labels, mesh.group("tp"))
    return (losses * micro_batch.loss_mask).sum()


@torch.no_grad()
def evaluate(model: Transformer, micro_batches: Sequence[MicroBatch], mesh: ParallelMesh) -> float:
    """Return the mean loss per token of the micro-batches of all data-parallel ranks, in nats; NaN if none counts."""
    tokens = count_tokens(micro_batches, mesh)
    if tokens == 0:
        return nan
    total = torch.zeros((), dtype=torch.float64, device=mesh.device.torch)
    for micro_batch in micro_batches:
        given = micro_batch.input_for_loss._replace(samples=None)
        output = forward_through_stages(model, mesh, given, is_shared=False)
        if model.has_last:
            total += masked_sum(model, output, micro_batch, mesh)
    return float(mesh.sum_over("replicas", mesh.sum_over("pp", total))) / tokens
