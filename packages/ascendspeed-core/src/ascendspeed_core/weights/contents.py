"""List what lies in a folder, tensor by tensor as it is stored, without knowing what model it is."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from ascendspeed_core.weights.external.mp_rank import folder_with_ranks
from ascendspeed_core.weights.files.distributed_reader import DistributedTensors
from ascendspeed_core.weights.files.safetensors_files import read_safetensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.huggingface.files import has_weight_files
from ascendspeed_core.weights.source import CheckpointError, TensorInfo

METADATA = ".metadata"
"""Names all tensors of a distributed checkpoint."""

_ENDINGS = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class StoredFileContents:
    """What one file holds.

    Attributes:
        path: of the file, from the folder on.
        tensors: shape and dtype by stored name.
        others: names of what lies beside tensors, such as `args`.
        error: why it cannot be read, if so.
    """

    path: str
    tensors: dict[str, TensorInfo]
    others: tuple[str, ...] = ()
    error: str | None = None


def stored_contents(path: Path) -> list[StoredFileContents]:
    """Return what the weight files of a folder hold; of a run's folder, those of its latest checkpoint.

    A file that cannot be read is listed with the reason. Nothing of a file is run.
    """
    folder = path
    if not (path / "config.json").is_file() or not has_weight_files(path):
        with contextlib.suppress(CheckpointError):
            folder = folder_with_ranks(path)
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and (file.name == METADATA or file.suffix in _ENDINGS)
        and file.resolve().is_relative_to(folder.resolve())
    )
    return [_contents_of(file, str(file.relative_to(path))) for file in files]


def _contents_of(file: Path, name: str) -> StoredFileContents:
    try:
        if file.name == METADATA:
            stored = DistributedTensors(file.parent)
            return StoredFileContents(name, {tensor: stored.info(tensor) for tensor in stored.names()})
        if file.suffix == ".safetensors":
            return StoredFileContents(
                name, {key: found.info for key, found in read_safetensors(file).items()}
            )
        content = TorchFile(file).content
        tensors = {key: found.info for key, found in stored_tensors(content)}
        tops = {key.partition(".")[0] for key in tensors}
        others = sorted(map(str, content)) if isinstance(content, dict) else []
        return StoredFileContents(name, tensors, tuple(key for key in others if key not in tops))
    except CheckpointError as error:
        return StoredFileContents(name, {}, (), str(error))
