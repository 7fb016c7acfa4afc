"""`asd-ckpt inspect` and `asd-ckpt verify`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_ckpt.config import SourceKind
from ascendspeed_data.errors import AscendSpeedError

if TYPE_CHECKING:
    from ascendspeed_core.config.model import ModelConfig
    from ascendspeed_core.weights import WeightSource

Folder = Annotated[Path, typer.Argument(help="Checkpoint of any kind that is recognised.")]
From = Annotated[SourceKind | None, typer.Option("--from", help="What it is. [default: recognised]")]
Model = Annotated[
    Path | None,
    typer.Option(
        "--model-config", help="config.json, for checkpoints of other systems that do not say what they are."
    ),
]
Vocabulary = Annotated[
    int | None, typer.Option("--orig-vocab-size", min=1, help="Rows of the embedding that are not filling.")
]


def inspect_command(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    from_kind: From = None,
    model_config: Model = None,
    orig_vocab_size: Vocabulary = None,
) -> None:
    """Say what a checkpoint is: kind, architecture, layout, sizes, formats, every tensor."""
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.weights import open_weights

    source = open_weights(folder, from_kind, _config(model_config), orig_vocab_size)
    tensors = {
        name: {
            "shape": list(info.shape),
            "dtype": str(info.dtype).removeprefix("torch."),
            "num_bytes": info.num_bytes,
        }
        for name, info in source.tensors().items()
    }
    facts = _facts(source, tensors)
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
    model_config: Model = None,
    orig_vocab_size: Vocabulary = None,
) -> None:
    """Prove two checkpoints the same logical model, whatever kinds they are; exit 1 with the first differences."""
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_ckpt.compare import compare
    from ascendspeed_core.weights import open_weights

    config = _config(model_config)
    sources = [open_weights(folder, None, config, orig_vocab_size) for folder in (first, second)]
    for source in sources:
        check: Callable[[], None] | None = getattr(source, "check", None)
        if check is not None:
            check()
    found = compare(sources[0], sources[1], tolerance=tolerance, workers=len(os.sched_getaffinity(0)))
    if not found.equal:
        raise AscendSpeedError(
            f"{first} and {second} differ in {found.num_different} of {found.num_tensors} tensors (largest difference "
            f"{found.largest:.3e}): {found.summary()}"
        )
    print(f"the same model: {found.num_tensors} tensors, largest difference {found.largest:.3e}")


def _facts(source: "WeightSource", tensors: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from ascendspeed_core.weights import NativeSource

    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + tensor["num_bytes"]
    facts: dict[str, Any] = {
        "kind": source.kind,
        "num_parameters": source.config.num_parameters,
        "num_bytes": sum(sizes.values()),
        "dtypes": sizes,
        "tokenizer": str(source.tokenizer) if source.tokenizer else None,
    }
    if isinstance(source, NativeSource):
        facts |= {"iteration": source.description["iteration"], "layout": source.description["layout"]}
        facts["beside the weights"] = sorted(
            {name.partition("/")[0] for name in source.stored.names()} - {"model"}
        )
    else:
        if hasattr(source, "layout"):
            facts["layout"] = str(source.layout)
        if hasattr(source, "vocabulary_rows"):
            facts["vocabulary_rows"] = source.vocabulary_rows
        if hasattr(source, "left_behind"):
            facts["beside the weights"] = source.left_behind()
        if hasattr(source, "record"):
            facts["written by"] = "asd-ckpt" if source.record is not None else "another program"
    return facts | {"model": source.config.model_dump(mode="json")}


def _config(path: Path | None) -> "ModelConfig | None":
    """Read the architecture from a config.json."""
    if path is None:
        return None
    from ascendspeed_core.models.families import family_of_hugging_face
    from ascendspeed_core.weights.huggingface.source import read_json

    hf_config = read_json(path)
    return family_of_hugging_face(hf_config, str(path)).read_config(hf_config)
