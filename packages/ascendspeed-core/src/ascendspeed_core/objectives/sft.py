"""Supervised fine-tuning: next-token prediction on the labels of instruction sets."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ascendspeed_core.config.finetune import PaddedDataConfig
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.loader import BatchLoader
from ascendspeed_core.data.padded_dataset import PaddedBatchLoader, check_padded_data
from ascendspeed_core.data.sft_dataset import SFT_FORMAT
from ascendspeed_core.objectives.next_token import NextToken
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.manifest import DatasetManifest


class SupervisedFineTuning(NextToken):
    """Predict the tokens of an instruction set that its labels name."""

    name = "sft"
    data_order: ClassVar[Mapping[str, Any]] = {"is_instruction_dataset": True}

    @classmethod
    def check_data(cls, config: DataConfig, num_samples: tuple[int, int, int]) -> DatasetManifest | None:
        """Prove the instruction sets whole; see `Objective.check_data`."""
        assert isinstance(config, PaddedDataConfig)
        return check_padded_data(SFT_FORMAT, config, num_samples)

    def open_data(
        self,
        config: DataConfig,
        seed: int,
        num_samples: tuple[int, int, int],
        vocab_size: int,
        manifest: DatasetManifest | None,
        mesh: ParallelMesh,
    ) -> BatchLoader:
        """Open instruction sets, padded or packed."""
        assert isinstance(config, PaddedDataConfig)
        return PaddedBatchLoader(SFT_FORMAT, config, seed, num_samples, vocab_size, mesh)
