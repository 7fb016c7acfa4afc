"""What objectives of padded samples share: how their data is checked and opened."""

from math import ceil
from typing import ClassVar

from ascendspeed_core.config.finetune import PaddedDataConfig
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.loader import BatchLoader
from ascendspeed_core.data.padded_dataset import (
    DatasetFormat,
    PaddedBatchLoader,
    check_padded_data,
    count_examples,
)
from ascendspeed_core.objectives.objective import Objective
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.manifest import DatasetManifest


class PaddedObjective(Objective):
    """An objective whose samples are whole examples, padded or packed.

    Attributes:
        data_format: of its datasets.
    """

    data_format: ClassVar[DatasetFormat]

    @classmethod
    def check_data(cls, config: DataConfig, num_samples: tuple[int, int, int]) -> DatasetManifest | None:
        """Prove the datasets whole; see `Objective.check_data`."""
        assert isinstance(config, PaddedDataConfig)
        return check_padded_data(cls.data_format, config, num_samples)

    @classmethod
    def samples_of_epochs(cls, config: DataConfig, epochs: float) -> int:
        """Count examples, without those that are left out; see `Objective.samples_of_epochs`."""
        assert isinstance(config, PaddedDataConfig)
        return ceil(epochs * count_examples(cls.data_format, config))

    @classmethod
    def held_out_samples(cls, config: DataConfig) -> int:
        """Count examples, without those that are left out; see `Objective.held_out_samples`."""
        assert isinstance(config, PaddedDataConfig)
        return count_examples(cls.data_format, config, 1)

    def open_data(
        self,
        config: DataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        mesh: ParallelMesh,
    ) -> BatchLoader:
        """Open the datasets; see `Objective.open_data`."""
        assert isinstance(config, PaddedDataConfig)
        return PaddedBatchLoader(self.data_format, config, seed, num_samples, vocab_size, mesh)
