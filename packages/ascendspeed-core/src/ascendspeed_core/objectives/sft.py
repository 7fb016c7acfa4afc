"""Supervised fine-tuning: next-token prediction on the labels of instruction sets."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ascendspeed_core.data.padded_dataset import DatasetFormat
from ascendspeed_core.data.sft_dataset import SFT_FORMAT
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.objectives.objective import LoadFrozen, ObjectiveLoss
from ascendspeed_core.objectives.padded import PaddedObjective
from ascendspeed_core.parallel.mesh import ParallelMesh


class SupervisedFineTuning(PaddedObjective):
    """Predict the tokens of an instruction set that its labels name."""

    name: ClassVar[str] = "sft"
    data_order: ClassVar[Mapping[str, Any]] = {"is_instruction_dataset": True}
    data_format: ClassVar[DatasetFormat] = SFT_FORMAT

    def make_loss(self, model: Transformer, mesh: ParallelMesh, load_frozen: LoadFrozen) -> ObjectiveLoss:
        """Return the loss of every token that counts."""
        return NextTokenLoss(model, mesh)
