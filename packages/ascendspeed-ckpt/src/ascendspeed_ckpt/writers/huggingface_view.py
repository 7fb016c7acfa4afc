"""A model's weights under the names and in the packing of a Hugging Face folder."""

import itertools
from collections.abc import Mapping
from functools import cached_property

import torch

from ascendspeed_core.models.families import TensorMapping, find_family
from ascendspeed_core.models.families.base import leading_shape
from ascendspeed_core.weights.source import Index, TensorInfo, WeightSource


class HuggingFaceView:
    """Reads any slice of any tensor of a folder that is to be written.

    Args:
        source: the weights under our names.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source, self._config = source, source.config
        self._mappings: dict[str, dict[tuple[int, ...], list[TensorMapping]]] = {}
        """By their name and position in its leading dimensions."""
        for mapping in find_family(source.config.family).weights(source.config):
            positions = self._mappings.setdefault(mapping.theirs, {})
            positions.setdefault(mapping.their_position, []).append(mapping)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return shape and dtype of every tensor by their name, in the order of the family's table."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        ours = self._source.tensors()
        found = {}
        for theirs, positions in self._mappings.items():
            mappings = next(iter(positions.values()))
            shapes = [ours[mapping.ours].shape[len(mapping.our_position) :] for mapping in mappings]
            matrix = (sum(shape[0] for shape in shapes), *shapes[0][1:])
            if _is_swapped(mappings[0], matrix):
                matrix = matrix[::-1]
            found[theirs] = TensorInfo((*leading_shape(positions), *matrix), ours[mappings[0].ours].dtype)
        return found

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        positions = self._mappings[name]
        first = next(iter(positions.values()))[0]
        if first.is_plain and first.packed is None:
            return self._source.read(first.ours, index)
        shape = self._infos[name].shape
        index = index or tuple(slice(0, length) for length in shape)
        depth = len(first.their_position)
        chosen = itertools.product(*(range(part.start, part.stop) for part in index[:depth]))
        matrices = [self._read_matrix(positions[at], index[depth:], shape[depth:]) for at in chosen]
        sizes = [part.stop - part.start for part in index]
        if not matrices:
            return torch.empty(sizes, dtype=self._infos[name].dtype)
        return matrices[0] if depth == 0 else torch.stack(matrices).reshape(sizes)

    def _read_matrix(
        self, mappings: list[TensorMapping], index: Index, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Read a slice of the matrix that these mappings fill; index and shape are in their orientation."""
        if is_swapped := _is_swapped(mappings[0], shape):
            index, shape = index[::-1], shape[::-1]
        packed = mappings[0].packed
        if packed is None:
            found = self._read_ours(mappings[0], index)
        else:
            by_part = {mapping.packed.part: mapping for mapping in mappings if mapping.packed is not None}
            sizes = [part.stop - part.start for part in index]
            found = torch.empty(sizes, dtype=self._infos[mappings[0].theirs].dtype)
            for part, rows, where in packed.unpacked_slices(self._config, shape[0], index[0]):
                found[where] = self._read_ours(by_part[part], (rows, *index[1:]))
        return found.T if is_swapped else found

    def _read_ours(self, mapping: TensorMapping, index: Index) -> torch.Tensor:
        position = tuple(slice(at, at + 1) for at in mapping.our_position)
        found = self._source.read(mapping.ours, (*position, *index))
        return found.reshape(found.shape[len(position) :])


def _is_swapped(mapping: TensorMapping, shape: tuple[int, ...]) -> bool:
    """Tell whether their matrix is the transpose of ours; vectors never are."""
    return mapping.transposed and len(shape) == 2
