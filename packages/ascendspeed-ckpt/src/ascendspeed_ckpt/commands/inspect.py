"""`asd-ckpt inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_ckpt.commands.arguments import Folder, FromKind, ModelConfigFile, OrigVocabSize
from ascendspeed_data.errors import AscendSpeedError

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource


def inspect_command(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    from_kind: FromKind = None,
    model_config: ModelConfigFile = None,
    orig_vocab_size: OrigVocabSize = None,
) -> None:
    """Describe a checkpoint: kind, architecture, layout, sizes, dtypes, every tensor.

    Of one that does not say what model it is, the tensors are listed as they are stored.
    """
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.weights import open_weights
    from ascendspeed_core.weights.huggingface.config import read_model_config
    from ascendspeed_core.weights.source import UnknownModelError

    config = read_model_config(model_config) if model_config is not None else None
    try:
        source = open_weights(folder, from_kind, config, orig_vocab_size)
    except AscendSpeedError as error:
        _show_stored(folder, error, as_json)
        if isinstance(error, UnknownModelError):
            return
        raise
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "num_bytes": info.num_bytes,
        }
        for name, info in source.tensors().items()
    }
    description = _describe(source, tensors)
    if as_json:
        print(json.dumps({**description, "tensors": tensors}))
        return
    for key, value in description.items():
        print(f"{key}: {value}")
    width = max(map(len, tensors))
    for name, tensor in tensors.items():
        print(f"  {name:{width}}  {tensor['dtype']:8}  {tensor['shape']}  {tensor['num_bytes']:,} bytes")


def _show_stored(folder: Path, error: AscendSpeedError, as_json: bool) -> None:
    """List what the files of a folder hold, under a line that says what is not known of it."""
    from ascendspeed_core.weights.contents import stored_contents

    files = stored_contents(folder) if folder.is_dir() else []
    if not files:
        return
    described: dict[str, dict[str, Any]] = {
        file.path: {
            "not known": file.error,
            "beside the tensors": list(file.others),
            "tensors": {
                name: {"shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch.")}
                for name, info in file.tensors.items()
            },
        }
        for file in files
    }
    if as_json:
        print(json.dumps({"model": None, "not known": str(error), "files": described}))
        return
    print(f"model: not known ({error})")
    for path, found in described.items():
        beside = (
            f"; beside them {', '.join(found['beside the tensors'])}" if found["beside the tensors"] else ""
        )
        reason = found["not known"]
        print(
            f"{path}: not known ({reason})" if reason else f"{path}: {len(found['tensors'])} tensors{beside}"
        )
        for name, tensor in found["tensors"].items():
            print(f"  {name}  {tensor['dtype']}  {tensor['shape']}")


def _merged_from(source: "WeightSource") -> dict[str, Any]:
    from ascendspeed_ckpt.conversion import MERGED
    from ascendspeed_core.weights.files.json_file import read_json

    path = source.path / MERGED if source.path is not None else None
    return {"merged from": read_json(path)} if path is not None and path.is_file() else {}


def _describe(source: "WeightSource", tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + tensor["num_bytes"]
    return {
        "kind": source.kind,
        "num_parameters": source.config.num_parameters,
        "num_bytes": sum(sizes.values()),
        "dtypes": sizes,
        "tokenizer": str(source.tokenizer) if source.tokenizer else None,
        **_merged_from(source),
        **source.details(),
        "beside the weights": source.other_contents(),
        "left out": [str(left) for left in source.left_out()],
        "model": source.config.model_dump(mode="json"),
    }
