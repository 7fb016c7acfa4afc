"""Write a native checkpoint of weights alone, tensor by tensor: no more than one tensor is in memory."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from ascendspeed_core import __version__
from ascendspeed_core.config.parallel import Layout
from ascendspeed_core.weights.native import DESCRIPTION, FORMAT_VERSION, TRACKER
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_core.weights.write_tensors import TensorFile, write_metadata


def write_native(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a run's folder that holds weights at iteration 0; training started from it begins its data anew.

    Args:
        source: the weights.
        folder: an existing folder.
        dtype: format of the written weights; by default the stored one.
        on_bytes: told how many bytes were written after each tensor.
    """
    place = folder / "iter_0000000"
    place.mkdir()
    with TensorFile(place) as file:
        for name, info in source.tensors().items():
            tensor = source.read(name)
            file.add(f"model/{name}", tensor.to(dtype or tensor.dtype))
            on_bytes(info.num_bytes)
    write_metadata(place, file.pieces)
    description = {
        "format_version": FORMAT_VERSION,
        "ascendspeed_core": __version__,
        "torch": torch.__version__,
        "iteration": 0,
        "consumed_samples": 0,
        "skipped_samples": 0,
        "optimizer_steps": 0,
        "data_order": {},
        "order_digest": "",
        "layout": asdict(Layout()),
        "loss_scale": None,
        "dtype": str(file.pieces[0].dtype).removeprefix("torch."),
        "model": source.config.model_dump(mode="json"),
        "run": {},
    }
    (place / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (folder / TRACKER).write_text("0\n", encoding="utf-8")
