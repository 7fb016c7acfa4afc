"""From files to a model on the device, beside transformers; the files are in the page cache for both."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.weights import open_weights
from on_device.setting import Setting, llama


def measure(setting: Setting, name: str) -> dict[str, Any]:
    """Time the second loading of each."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from ascendspeed_core.models.families import find_family

    config = llama(setting.shape(name))
    with tempfile.TemporaryDirectory() as folder:
        settings = LlamaConfig(**find_family("llama").write_config(config))
        with torch.device(setting.device.torch):
            made = LlamaForCausalLM._from_config(settings, dtype=torch.bfloat16)
        made.save_pretrained(folder)
        size = sum(one.stat().st_size for one in Path(folder).glob("*.safetensors"))
        del made
        setting.free()

        def ours() -> None:
            load_model(open_weights(Path(folder)), setting.mesh, torch.bfloat16, joined_projections=True)

        def theirs() -> None:
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map=str(setting.device.torch)
            )

        figures: dict[str, Any] = {"GB": size / 1e9}
        ways = {"ours": ours} | ({"transformers": theirs} if setting.with_others else {})
        for way, load in ways.items():
            for _ in range(2):
                setting.free()
                started = time.perf_counter()
                load()
                setting.device.synchronize()
                figures[f"{way} s"] = time.perf_counter() - started
        return figures
