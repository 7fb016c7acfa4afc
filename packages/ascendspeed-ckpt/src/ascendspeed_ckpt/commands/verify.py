"""`asd-ckpt verify`."""

import os
from typing import Annotated

import typer

from ascendspeed_ckpt.commands.arguments import Folder, ModelConfigFile, OrigVocabSize
from ascendspeed_data.errors import AscendSpeedError


def verify_command(
    first: Folder,
    second: Folder,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest accepted absolute difference of an element.")
    ] = 0.0,
    model_config: ModelConfigFile = None,
    orig_vocab_size: OrigVocabSize = None,
) -> None:
    """Check that two checkpoints, of any kinds, hold the same model; exit with status 1 if they differ."""
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_ckpt.comparison import compare
    from ascendspeed_core.weights import open_weights
    from ascendspeed_core.weights.huggingface.config import read_model_config

    config = read_model_config(model_config) if model_config is not None else None
    sources = [open_weights(folder, None, config, orig_vocab_size) for folder in (first, second)]
    checked = [source.check() for source in sources]
    found = compare(sources[0], sources[1], tolerance=tolerance, workers=len(os.sched_getaffinity(0)))
    if not found.equal:
        raise AscendSpeedError(
            f"{first} and {second} differ in {found.num_different} of {found.num_tensors} tensors (largest difference "
            f"{found.largest:.3e}): {found.summary()}"
        )
    for folder, source, is_checked in zip((first, second), sources, checked, strict=True):
        for left in source.left_out():
            print(f"{folder}: left out: {left}")
        if source.other_contents():
            print(f"{folder}: not compared: {', '.join(source.other_contents())}")
        print(f"{folder}: {'checksums are right' if is_checked else 'has no checksums'}")
    print(
        f"the same model: {found.num_tensors} tensors ({found.num_bytes:,} bytes), largest difference "
        f"{found.largest:.3e}"
    )
