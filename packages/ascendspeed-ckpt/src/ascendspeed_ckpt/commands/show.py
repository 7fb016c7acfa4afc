"""`asd-ckpt inspect` and `asd-ckpt verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.errors import AscendSpeedError

Folder = Annotated[Path, typer.Argument(help="Checkpoint of any kind that is recognised.")]


def inspect_command(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a checkpoint is: kind, architecture, sizes, every tensor."""
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.weights import NativeSource, open_weights

    source = open_weights(folder)
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "num_bytes": info.num_bytes,
        }
        for name, info in source.tensors().items()
    }
    facts = {
        "kind": source.kind,
        "num_parameters": source.config.num_parameters,
        "num_bytes": sum(info.num_bytes for info in source.tensors().values()),
        "tokenizer": str(source.tokenizer) if source.tokenizer else None,
        **({"iteration": source.description["iteration"], "layout": source.description["layout"]}
           if isinstance(source, NativeSource) else {}),
        "model": source.config.model_dump(mode="json"),
    }  # fmt: skip
    if as_json:
        print(json.dumps({**facts, "tensors": tensors}))
        return
    for key, value in facts.items():
        print(f"{key}: {value}")
    width = max(map(len, tensors))
    for name, tensor in tensors.items():
        print(f"  {name:{width}}  {tensor['dtype']:8}  {tensor['shape']}  {tensor['num_bytes']:,} bytes")


def verify_command(
    first: Folder,
    second: Folder,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest accepted difference of an element.")] = 0.0,
) -> None:
    """Prove two checkpoints the same logical model, whatever kinds they are; exit 1 with the first differences."""
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_ckpt.compare import compare
    from ascendspeed_core.weights import open_weights

    found = compare(open_weights(first), open_weights(second), tolerance=tolerance)
    if not found.equal:
        raise AscendSpeedError(
            f"{first} and {second} differ in {found.num_different} of {found.num_tensors} tensors (largest difference "
            f"{found.largest:.3e}): {found.summary()}"
        )
    print(f"the same model: {found.num_tensors} tensors, largest difference {found.largest:.3e}")
