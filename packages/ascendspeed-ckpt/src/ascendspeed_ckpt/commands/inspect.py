"""`asd-ckpt inspect`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_ckpt.commands.arguments import Folder, FromKind, ModelConfigFile, OrigVocabSize

if TYPE_CHECKING:
    from ascendspeed_core.weights import WeightSource


def inspect_command(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    from_kind: FromKind = None,
    model_config: ModelConfigFile = None,
    orig_vocab_size: OrigVocabSize = None,
) -> None:
    """Describe a checkpoint: kind, architecture, layout, sizes, dtypes, every tensor."""
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.weights import open_weights
    from ascendspeed_core.weights.huggingface.config import read_model_config

    config = read_model_config(model_config) if model_config is not None else None
    source = open_weights(folder, from_kind, config, orig_vocab_size)
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
        **source.details(),
        "beside the weights": source.other_contents(),
        "model": source.config.model_dump(mode="json"),
    }
