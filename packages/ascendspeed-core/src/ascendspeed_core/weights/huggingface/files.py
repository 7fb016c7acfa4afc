"""The weight files of a Hugging Face folder: which of them are read, and all tensors in them by name."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from ascendspeed_core.launch import announce
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.files.safetensors_files import read_safetensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.source import CheckpointError, inside
from ascendspeed_core.weights.stream import equal_tensors

FORMATS = (("model", "safetensors"), ("pytorch_model", "bin"))
"""Name and ending of weight files, in the order in which transformers looks for them."""

_PART = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)")

_SAME_MODEL = "use the model.safetensors files of the same model"

ADAPTER = (
    "an adapter; give it with --lora-load, and its base with --load (asd-ckpt merge-lora merges the two)"
)

OTHER_WEIGHTS = (
    ("adapter_model.safetensors", ADAPTER),
    ("adapter_model.bin", ADAPTER),
    ("consolidated.safetensors", f"weights under Mistral's own names; {_SAME_MODEL}"),
    ("consolidated*.pth", f"weights under Meta's own names; {_SAME_MODEL}"),
    ("tf_model.h5", f"TensorFlow's weights; {_SAME_MODEL}"),
    ("flax_model.msgpack", f"Flax's weights; {_SAME_MODEL}"),
    (
        "*.gguf",
        "weights in the format GGUF of llama.cpp, which is not read; name the Hugging Face folder that they were made "
        "from",
    ),
    (
        "pytorch_model_fsdp.bin",
        "all weights of a run under FSDP; rename it to pytorch_model.bin, beside the config.json of the model",
    ),
    (
        "*/.metadata",
        "shards that FSDP wrote; join them with accelerate merge-weights FOLDER OUT, FOLDER being the one with "
        ".metadata, and put the config.json of the model into OUT",
    ),
    (
        "*.distcp",
        "shards that torch.distributed.checkpoint wrote, as FSDP does; join them with accelerate merge-weights FOLDER "
        "OUT, and put the config.json of the model into OUT",
    ),
    (
        "*.ckpt",
        "a checkpoint of PyTorch Lightning; write its model with save_pretrained, and name that folder",
    ),
)
"""Patterns of weights in other formats that lie in such folders, and what to do instead."""

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Parts of names that torch.compile, FSDP, recomputation and Lightning add; no module of a model is called so."""
_OUTER = "module."
"""Before all names of a model that DistributedDataParallel or DeepSpeed wrapped."""


class _WeightIndex(BaseModel):
    """`model.safetensors.index.json`: the file of each tensor, by name; totals beside it are not read."""

    weight_map: dict[str, str]


def open_weight_files(folder: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a folder by name; none is read. A line names weight files that are left unread.

    What an index does not name, but lies in one of its files, is there all the same.

    Raises:
        CheckpointError: there are none, one is missing or damaged, or two files hold different tensors of a name.
    """
    files, index, index_name = _files_to_read(folder)
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path not in files
        and path.name != index_name
        and (_PART.fullmatch(path.name) or path.name in _whole_names())
    )
    if others:
        announce(f"{folder}: read are {_shown(files)}; not read: {', '.join(others)}")
    found: dict[str, StoredTensor] = {}
    for path in files:
        opened = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
        for name, tensor in opened.items():
            if name in found and not equal_tensors(found[name], tensor):
                raise CheckpointError(
                    f"{folder}: {found[name].file.path.name} and {path.name} hold different tensors {name}; one of the "
                    "files is of another model, copy the folder again"
                )
            found.setdefault(name, tensor)
        for name in (name for name, file in index.items() if file == path and name not in opened):
            raise CheckpointError(
                f"{path} lacks {name}, which the index of {folder} names there; they are of different models, copy "
                "the folder again"
            )
    return without_wrappers(found, folder)


def without_wrappers(tensors: Mapping[str, StoredTensor], where: object) -> dict[str, StoredTensor]:
    """Return tensors under the names of the model itself, where it was saved inside a wrapper; a line says so.

    Args:
        tensors: by name.
        where: the folder or file, for messages.

    Raises:
        CheckpointError: two tensors would have the same name.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in tensors}
    while bare and all(name.startswith(_OUTER) for name in bare.values()):
        bare = {name: inner.removeprefix(_OUTER) for name, inner in bare.items()}
    renamed = {name: inner for name, inner in bare.items() if name != inner}
    if not renamed:
        return dict(tensors)
    found: dict[str, str] = {}
    for name, inner in bare.items():
        if inner in found:
            raise CheckpointError(
                f"{where} holds {found[inner]} and {name}, which are {inner} twice; save the model once, without the "
                "wrapper around it"
            )
        found[inner] = name
    first = next(iter(renamed))
    announce(
        f"{where}: {len(renamed)} names are those of a wrapper around the model, such as {first}; read as "
        f"{renamed[first]}"
    )
    return {inner: tensors[name] for inner, name in found.items()}


def has_weight_files(folder: Path) -> bool:
    """Tell whether weights of Hugging Face lie in a folder, by names of files alone."""
    names = _whole_names()
    return any((folder / name).is_file() for name in names) or any(
        _PART.fullmatch(path.name) for path in folder.iterdir()
    )


def what_weights(folder: Path) -> str | None:
    """Say which weights lie in a folder that are not read, and what to do instead; `None` if none are known."""
    for pattern, what in OTHER_WEIGHTS:
        found = next(iter(sorted(folder.glob(pattern))), None)
        if found is not None:
            return f"{found.relative_to(folder)}: {what}"
    return None


def _files_to_read(folder: Path) -> tuple[list[Path], Mapping[str, Path], str | None]:
    """Return the weight files in order, and what an index says: the file of each tensor; and the index's name."""
    for stem, ending in FORMATS:
        if (folder / f"{stem}.{ending}").is_file():
            return [inside(folder, f"{stem}.{ending}")], {}, None
        if (folder / f"{stem}.{ending}.index.json").is_file():
            name = f"{stem}.{ending}.index.json"
            return *_indexed(folder, name), name
        parts = _parts_without_index(folder, stem, ending)
        if parts:
            return parts, {}, None
    others = what_weights(folder)
    if others is not None:
        raise CheckpointError(f"{folder} has no weights that are read, only {others}")
    raise CheckpointError(
        f"{folder} has a config.json but no weights (model.safetensors or pytorch_model.bin); "
        "download them, or name the file with --model-config to start from random weights"
    )


def _indexed(folder: Path, name: str) -> tuple[list[Path], Mapping[str, Path]]:
    stated = read_json(folder / name, _WeightIndex)
    index = {tensor: inside(folder, file) for tensor, file in stated.weight_map.items()}
    if not index:
        raise CheckpointError(f"{folder / name} names no tensor; copy it again")
    return sorted(set(index.values())), index


def _parts_without_index(folder: Path, stem: str, ending: str) -> list[Path]:
    """Return the numbered files of a folder that lost its index; all must be there."""
    matches = [match for path in folder.iterdir() if (match := _PART.fullmatch(path.name))]
    matches = [match for match in matches if (match[1], match[4]) == (stem, ending)]
    if not matches:
        return []
    numbers = {int(match[2]) for match in matches}
    counts = {int(match[3]) for match in matches}
    if len(counts) > 1 or numbers != set(range(1, max(counts) + 1)):
        raise CheckpointError(
            f"{folder} has {len(matches)} files {stem}-*-of-*.{ending} without an index, which are not all parts of "
            "one model; copy it again"
        )
    announce(f"{folder}: no index, read are all {len(matches)} files {stem}-*.{ending}")
    return sorted(inside(folder, match[0]) for match in matches)


def _whole_names() -> Sequence[str]:
    return [f"{stem}.{ending}{more}" for stem, ending in FORMATS for more in ("", ".index.json")]


def _shown(files: Sequence[Path]) -> str:
    return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


_SAVE_PLAIN = "load the model with the program that wrote it, and write it with save_pretrained"


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """Open a `.bin` file, whose tensors stay in it.

    Raises:
        CheckpointError: it is damaged, of torch before 1.6, which wrote another format, or holds something else.
    """
    content = TorchFile(path).content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dictionary of tensors; {_SAVE_PLAIN}")
    found = dict(stored_tensors(content))
    if len(found) != len(content):
        other = min(str(key) for key in content if key not in found)
        raise CheckpointError(f"{path} holds {other}, which is no tensor that is read; {_SAVE_PLAIN}")
    return found
