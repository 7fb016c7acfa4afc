"""What objectives of padded samples share: how their data is checked and opened."""

from typing import ClassVar

from ascendspeed_core.config.finetune import PaddedDataConfig
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.loader import BatchLoader
from ascendspeed_core.data.padded_dataset import DatasetFormat, PaddedBatchLoader, check_padded_data
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

    def open_data(
        self,
        config: DataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        manifest: DatasetManifest | None,
        mesh: ParallelMesh,
    ) -> BatchLoader:
        """Open the datasets; see `Objective.open_data`."""
        assert isinstance(config, PaddedDataConfig)
        return PaddedBatchLoader(self.data_format, config, seed, num_samples, vocab_size, mesh)
