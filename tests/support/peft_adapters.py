"""Adapters that peft makes, and what a model computes after peft has loaded one again."""

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TOKENS = torch.tensor([[5, 17, 99, 3, 41, 77, 5, 60]])


def make(base: Path, folder: Path, options: dict[str, Any], seed: int = 1) -> None:
    """Make an adapter with peft, with random values in all that it trains, and save it."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(_base(base), LoraConfig(task_type="CAUSAL_LM", **options))
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                # Added to what is there: a norm stays about one.
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise, alpha=0.1)
        adapted.save_pretrained(folder)


def reloaded(base: Path, folder: Path) -> Any:
    """Return peft's model of a base and an adapter, as its `from_pretrained` gives it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(_base(base), str(folder)).eval()


def unread(model: Any, folder: Path) -> set[str]:
    """Return the tensors of an adapter's file that peft's model of it has no place for; peft says nothing of them."""
    from peft import get_peft_model_state_dict

    return load_file(folder / "adapter_model.safetensors").keys() - get_peft_model_state_dict(model).keys()


@torch.no_grad()
def reloaded_logits(base: Path, folder: Path) -> torch.Tensor:
    """Return the logits after peft has loaded an adapter: [S, V]."""
    logits: torch.Tensor = reloaded(base, folder)(TOKENS).logits[0]
    return logits


def respell(folder: Path, target: Path, targets: Any, draw: random.Random) -> str:
    """Write an adapter once more as other programs do: pickled, without peft's prefix, with the adapter's name.

    Args:
        folder: of the adapter.
        target: folder that is made.
        targets: `target_modules` as they were given; peft writes names in place of `all-linear` and of nothing.
        draw: chooses.

    Returns:
        How it is written.
    """
    shutil.copytree(folder, target)
    path = target / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    spelling = []
    if not isinstance(targets, list):
        config = json.loads((target / "adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    if draw.random() < 0.4:
        spelling.append("no prefix")
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    if draw.random() < 0.4:
        spelling.append("with its name")
        for half in ("lora_A", "lora_B"):
            tensors = {
                name.replace(f".{half}.", f".{half}.default."): tensor for name, tensor in tensors.items()
            }
    if draw.random() < 0.5:
        spelling.append("bin")
        torch.save(tensors, target / "adapter_model.bin")
    else:
        save_file(tensors, path, {"format": "pt"})
    return ", ".join(spelling) or "as peft"


def _base(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
