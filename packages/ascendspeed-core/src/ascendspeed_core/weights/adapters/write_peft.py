"""Write what a run trained as an adapter in peft's format, which peft, this project and most servers read.

Hugging Face's code of some families packs queries, keys and values into one layer. Their adapters are put together
exactly: one above the other the A, and each B in its own rows and columns, at the sum of their ranks.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.adapters.peft import (
    CONFIG,
    PREFIX,
    TIED_HEAD,
    WEIGHTS,
    HuggingFaceTensor,
    hugging_face_tensors,
)
from ascendspeed_core.weights.files.distributed_reader import DistributedTensors
from ascendspeed_core.weights.load import parameter_shapes

Read = Callable[[str], torch.Tensor]


def write_adapter(folder: Path, plan: AdapterPlan, model: ModelConfig, base: str | None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` of a native checkpoint into its own folder.

    Args:
        folder: of the checkpoint, complete. Values are the fp32 master weights where there are any.
        plan: which tensors are trained.
        model: the architecture.
        base: name of the base model, for readers of the config.
    """
    from safetensors.torch import save_file

    stored = DistributedTensors(folder)
    names = set(stored.names())

    def read(name: str) -> torch.Tensor:
        master = f"optimizer/master/{name}"
        return stored.read(master if master in names else f"model/{name}")

    tensors, config = peft_form(plan, model, read)
    config["base_model_name_or_path"] = base
    save_file(
        {name: value.contiguous().clone() for name, value in tensors.items()},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def peft_form(
    plan: AdapterPlan, model: ModelConfig, read: Read
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return peft's tensors and config of what was trained.

    Args:
        plan: which tensors are trained.
        model: the architecture.
        read: gives a trained tensor by our name.
    """
    hf_tensors = hugging_face_tensors(model)
    by_module: dict[str, list[str]] = {}
    for layer in plan.layers:
        theirs = hf_tensors[f"{layer}.weight"].name.removesuffix(".weight")
        by_module.setdefault(theirs, []).append(layer)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for theirs, layers in by_module.items():
        a, b, scale = _joined(layers, theirs, plan, hf_tensors, model, read)
        tensors[f"{PREFIX}{theirs}.lora_A.weight"], tensors[f"{PREFIX}{theirs}.lora_B.weight"] = a, b
        ranks[theirs], alphas[theirs] = a.shape[0], scale * a.shape[0]
    for name in sorted(plan.trained):
        tensors[PREFIX + hf_tensors[name].name] = read(name)
        if name == "embedding.weight" and model.tie_word_embeddings:
            # peft keeps a copy of each module that it trains, so that a tied head must be among them.
            tensors[PREFIX + TIED_HEAD] = read(name)
    saved = [name.removeprefix(PREFIX).split(".")[-2] for name in tensors if ".lora_" not in name]
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(low_rank.dropout for low_rank in plan.layers.values()),
        "target_modules": _targets(list(by_module), hf_tensors),
        "modules_to_save": sorted(set(saved)) or None,
        "rank_pattern": {_pattern(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {_pattern(name): own for name, own in alphas.items() if own != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return tensors, config


def _joined(
    layers: list[str],
    theirs: str,
    plan: AdapterPlan,
    hf_tensors: dict[str, HuggingFaceTensor],
    model: ModelConfig,
    read: Read,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return A, B and scale of one of their modules."""
    scale = plan.layers[layers[0]].scale
    halves = [(read(f"{layer}.lora_A.weight"), read(f"{layer}.lora_B.weight")) for layer in layers]
    rows = [hf_tensors[f"{layer}.weight"].rows for layer in layers]
    if rows[0] is None:
        return *halves[0], scale
    shapes = parameter_shapes(model)
    height = sum(shapes[name][0] for name, hf in hf_tensors.items() if hf.name == f"{theirs}.weight")
    b = halves[0][1].new_zeros(height, sum(a.shape[0] for a, _ in halves))
    column = 0
    for layer, (a, part), own in zip(layers, halves, rows, strict=True):
        assert own is not None
        assert plan.layers[layer].scale == scale
        b[own, column : column + a.shape[0]] = part
        column += a.shape[0]
    return torch.cat([a for a, _ in halves]), b, scale


def _targets(modules: list[str], hf_tensors: dict[str, HuggingFaceTensor]) -> list[str]:
    """Return short names where every layer of that name is meant, whole names elsewhere."""
    everything = {hf.name.removesuffix(".weight") for hf in hf_tensors.values()}
    targets = set()
    for module in modules:
        word = module.rpartition(".")[2]
        alike = {name for name in everything if name.rpartition(".")[2] == word}
        targets.add(word if alike <= set(modules) else module)
    return sorted(targets)


def _pattern(module: str) -> str:
    """Return a module's name as the pattern that matches it alone."""
    return module.replace(".", r"\.")
