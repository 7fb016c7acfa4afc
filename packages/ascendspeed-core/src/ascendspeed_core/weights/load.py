"""Load weights into a model; each rank reads only the slices that it holds."""

from collections.abc import Mapping

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.models.transformer import Transformer, empty_transformer
from ascendspeed_core.weights.source import CheckpointError, WeightSource
from ascendspeed_core.weights.stream import slabs


def load_weights(model: Transformer, source: WeightSource, slices: Mapping[str, Slice]) -> None:
    """Copy weights into a model, which may be whole, cut, or one stage; dtypes are converted.

    Args:
        model: with allocated parameters.
        source: the weights.
        slices: which part of each parameter the model holds.

    Raises:
        CheckpointError: the source lacks a weight, has one too many, or one of another shape.
    """
    check_weights(model, source, slices)
    for name, parameter in model.named_parameters():
        copy_weight(parameter, source, name, slices[name])


def check_weights(model: Transformer, source: WeightSource, slices: Mapping[str, Slice]) -> None:
    """Compare the names and shapes of `source` with those of `model`.

    Raises:
        CheckpointError: the source lacks a weight, has one too many, or one of another shape.
    """
    have = source.tensors()
    where = source.path or source.kind
    beyond = set(have) - slices.keys()
    for name in sorted(beyond - shapes_of(model).keys() if beyond else ()):
        raise CheckpointError(f"{where} holds {name}, which the model does not have")
    for name, _ in model.named_parameters():
        if name not in have:
            raise CheckpointError(f"{where} lacks {name}; it is another architecture or an incomplete copy")
        if have[name].shape != slices[name].shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(have[name].shape)}, the model's is {list(slices[name].shape)}; "
                "its config and its weights disagree"
            )


@torch.no_grad()
def copy_weight(parameter: torch.Tensor, source: WeightSource, name: str, part: Slice) -> None:
    """Copy a part of one weight, slab by slab; dtypes are converted."""
    start = 0
    for slab in slabs(source, name, part.index):
        parameter[start : start + len(slab)].copy_(slab)
        start += len(slab)


def shapes_of(model: Transformer) -> dict[str, tuple[int, ...]]:
    """Return shape by name of every parameter of the whole model that `model` is a part of, adapters included."""
    shapes = parameter_shapes(model.config)
    return shapes if model.adapters is None else shapes | model.adapters.shapes(shapes)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return shape by name of every parameter of the whole model."""
    model = empty_transformer(config, torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
