"""Dropout applied to a model on this rank: which part of each mask is its own."""

from ascendspeed_core.config.training import DropoutConfig
from ascendspeed_core.models.dropout import Dropout
from ascendspeed_core.models.linear import LoraLinear
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh


def apply_dropout(model: Transformer, config: DropoutConfig, seed: int, mesh: ParallelMesh) -> None:
    """Let a model drop while it trains, in place; its attention must hold weights if these are dropped.

    Args:
        model: this rank's part.
        config: shares that are dropped; those of adapters are in the model.
        seed: of the run.
        mesh: the mesh, with this rank's coordinates.
    """
    drops_inside = any(isinstance(module, LoraLinear) and module.dropout for module in model.modules())
    if config.is_any or drops_inside:
        part = mesh.cp_rank
        if mesh.layout.sequence_parallel:
            part = part * mesh.layout.tp + mesh.tp_rank
        model.dropout = Dropout(config.hidden_dropout, config.attention_dropout, seed, part, mesh.cp_rank)
