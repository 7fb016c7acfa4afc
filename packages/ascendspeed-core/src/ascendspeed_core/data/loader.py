"""The kinds of training data behind one face."""

from collections.abc import Sequence
from typing import Protocol

from ascendspeed_core.config.finetune import FinetuneDataConfig, PaddedDataConfig
from ascendspeed_core.config.preference import PreferenceDataConfig
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.gpt_dataset import GPTData, check_data
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.padded_dataset import PaddedData, PaddedKind, check_padded_data
from ascendspeed_core.data.preference_dataset import PREFERENCE_DATA
from ascendspeed_core.data.sft_dataset import SFT_DATA
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.manifest import DatasetManifest


class RunData(Protocol):
    """Training and validation samples of one run on this process."""

    def micro_batches(self, consumed: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches, of those sizes, of the step that follows `consumed` samples."""
        ...

    def validation_batches(self, measured: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the measurement that follows `measured` samples."""
        ...

    def order_digest(self, consumed: int) -> str:
        """Return a digest of which samples the first `consumed` ones are; equal digests continue each other."""
        ...

    def content_digest(self, num_samples: int) -> str:
        """Return a digest of the order of all samples and of the tokens of some of them, to compare machines."""
        ...


def check_run_data(config: DataConfig, num_samples: tuple[int, int, int]) -> DatasetManifest | None:
    """Prove the data whole and fit for the run; needs no processes. See `check_data`."""
    if isinstance(config, PaddedDataConfig) and (kind := _row_kind(config)):
        return check_padded_data(kind, config, num_samples)
    return check_data(config, num_samples)


def open_run_data(
    config: DataConfig,
    seed: int,
    num_samples: tuple[int, int, int],
    vocab_size: int,
    manifest: DatasetManifest | None,
    mesh: ParallelMesh,
) -> RunData:
    """Open the data of a run.

    Args:
        config: files, split, length of a sample.
        seed: of the order.
        num_samples: samples of the whole run: (training, validation, test).
        vocab_size: ids must be below.
        manifest: of the data, if it has one.
        mesh: all processes open it together.
    """
    if isinstance(config, PaddedDataConfig) and (kind := _row_kind(config)):
        return PaddedData(kind, config, seed, num_samples, vocab_size, mesh)
    end_of_document = manifest.tokenizer.eos_id if manifest else None
    return GPTData(config, seed, num_samples, vocab_size, end_of_document, mesh)


def _row_kind(config: PaddedDataConfig) -> PaddedKind | None:
    """Return what rows the data has; `None` for plain text."""
    if isinstance(config, PreferenceDataConfig):
        return PREFERENCE_DATA
    return SFT_DATA if isinstance(config, FinetuneDataConfig) and config.is_instruction_dataset else None
