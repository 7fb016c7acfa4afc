"""Several adapters beside one base, of which each token of a pass uses one or none.

The matrices A of a layer are stacked, and so are its matrices B: one adapter of the ranks together. What a token uses
is a factor for each row of A, which is 0 for the rows of other adapters (`models.lora.AdapterRows`). So texts with
different adapters are computed in the same pass, and the adapters are cut over ranks as one is.
"""

from collections.abc import Mapping

import torch

from ascendspeed_core.models.linear import LowRank
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.adapters.lora import AdaptedWeights, frozen_changes, loaded_adapters
from ascendspeed_core.weights.adapters.peft import Adapter
from ascendspeed_core.weights.source import CheckpointError, TensorInfo, WeightSource

HALF_A, HALF_B = "lora_A.weight", "lora_B.weight"


def stacked_adapters(base: WeightSource, adapters: Mapping[str, Adapter]) -> AdaptedWeights:
    """Add several adapters in peft's format to a model, by name.

    Args:
        base: the model; an adapter that is in it already must be merged.
        adapters: by the name that chooses each; all must leave every tensor of the model as it is.

    Raises:
        CheckpointError: one does not fit the model, or replaces a tensor of it.
    """
    if base.adapters is not None:
        raise CheckpointError(
            "adapters are chosen by name beside merged weights only; leave --no-merge-adapter out"
        )
    each = [_checked(base, name, adapter) for name, adapter in adapters.items()]
    layers = {layer: None for one in each for layer in one.adapters.layers}
    stacks = {
        layer: tuple(one.adapters.layers.get(layer, LowRank(0, 0.0)) for one in each) for layer in layers
    }
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        own = [one for one in each if layer in one.adapters.layers]
        for half, dim in ((HALF_A, 0), (HALF_B, 1)):
            parts = [one.read(f"{layer}.{half}") for one in own]
            widest = max((part.dtype for part in parts), key=lambda dtype: torch.finfo(dtype).bits)
            tensors[f"{layer}.{half}"] = torch.cat([part.to(widest) for part in parts], dim=dim)
    ranks = {layer: LowRank(sum(one.rank for one in stack), 1.0) for layer, stack in stacks.items()}
    plan = AdapterPlan(ranks, frozenset(), tuple(adapters), stacks)
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return AdaptedWeights(base, plan, base.config, infos, lambda name, index: tensors[name][index])


def _checked(base: WeightSource, name: str, adapter: Adapter) -> AdaptedWeights:
    loaded = loaded_adapters(base, adapter)
    replaced = [*sorted(loaded.adapters.trained), *frozen_changes(base, adapter)]
    if replaced or loaded.config != base.config:
        what = replaced[0] if replaced else "the vocabulary"
        raise CheckpointError(
            f"adapter {name} ({adapter.folder}) replaces {what} of the model, which others use too; serve it "
            "alone with --lora-load"
        )
    return loaded
