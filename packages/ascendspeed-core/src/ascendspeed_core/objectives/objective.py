"""What a run trains for: its data, its loss, and what it reports beside the loss.

An `Objective` is chosen by the run's config (`objectives.registry`) and known before any process starts; it makes an
`ObjectiveLoss`, which belongs to a model on one rank. To add an objective, write both in a file of their own and add a
row to the table.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism), V/tp this rank's part of the vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from ascendspeed_core.config.training import DataConfig, PretrainConfig
from ascendspeed_core.data.loader import BatchLoader
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import NativeSource, WeightSource
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.manifest import DatasetManifest

MicroBatchLoss = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of a micro-batch and what the model gives for its loss (`ModelInput.for_loss`) -> the sum of its losses."""

LoadFrozen = Callable[[WeightSource], Transformer]
"""Load a second model under the layout and kernels of the run, for forward passes only."""


class ObjectiveLoss(Protocol):
    """The loss of a model on this rank; all ranks call it alike."""

    def prepare(
        self, micro_batches: Sequence[MicroBatch], num_tokens: int | None = None
    ) -> tuple[int, MicroBatchLoss]:
        """Return what the loss of the global batch is divided by, and the sum of a micro-batch's losses.

        Args:
            micro_batches: of this rank.
            num_tokens: tokens of the global batch that count, where the caller has counted them.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Return what the last step reports beside its loss, the same on every rank."""
        ...

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> dict[str, float]:
        """Return `loss` and all metrics of the micro-batches of all data-parallel ranks, without gradients."""
        ...


class Objective(ABC):
    """What a run trains for.

    Attributes:
        name: by which a config chooses it.
        loss_unit: what the loss is a mean of.
        data_order: options beside those of every run that decide the order of samples.
        logged_metrics: metrics that the log shows, with their decimal places.
    """

    name: ClassVar[str]
    loss_unit: ClassVar[str] = "nats per token"
    data_order: ClassVar[Mapping[str, Any]] = {}
    logged_metrics: ClassVar[Mapping[str, int]] = {}

    @classmethod
    @abstractmethod
    def check_data(cls, config: DataConfig, num_samples: tuple[int, int, int]) -> DatasetManifest | None:
        """Prove the data whole and fit for the objective; needs no processes.

        Args:
            config: files and split.
            num_samples: samples of the whole run: (training, validation, test).

        Returns:
            The manifest of the first prefix; `None` if it has none (data made by other tools).

        Raises:
            DataError: a file is missing or damaged, or holds another kind of data; a split is empty.
        """

    @classmethod
    @abstractmethod
    def samples_of_epochs(cls, config: DataConfig, epochs: float) -> int:
        """Return how many samples passes over the training data have; of a blend, over all its parts together.

        Args:
            config: files and split.
            epochs: passes.

        Raises:
            DataError: they hold no whole sample.
        """

    @classmethod
    def held_out_samples(cls, config: DataConfig) -> int:
        """Return how many samples the held-out data has; 0 where it has none.

        Raises:
            ConfigError: this objective cannot tell.
        """
        raise ConfigError(
            "eval_interval was given without --eval-iters, and this objective needs both; give it too"
        )

    @classmethod
    def plan(
        cls, config: PretrainConfig, source: WeightSource, checkpoint: NativeSource | None
    ) -> "Objective":
        """Return the objective of one run, checked, before any process starts.

        Args:
            config: of the run.
            source: the weights it starts from.
            checkpoint: of the run that goes on, if it does.
        """
        return cls()

    @abstractmethod
    def open_data(
        self,
        config: DataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        mesh: ParallelMesh,
    ) -> BatchLoader:
        """Open the data of a run; all ranks call together.

        Args:
            config: files, split, length of a sample.
            seed: of the order.
            num_samples: samples of the whole run: (training, validation, test).
            vocab_size: ids must be below.
            mesh: of this rank.
        """

    @abstractmethod
    def make_loss(self, model: Transformer, mesh: ParallelMesh, load_frozen: LoadFrozen) -> ObjectiveLoss:
        """Return the loss of a model.

        Args:
            model: this rank's part.
            mesh: of this rank.
            load_frozen: loads another model, if the loss compares with one.
        """

    def describe(self) -> list[str]:
        """Return lines for the log of a plan."""
        return []

    def checkpoint_record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the objective, beside the config of the run."""
        return {}
