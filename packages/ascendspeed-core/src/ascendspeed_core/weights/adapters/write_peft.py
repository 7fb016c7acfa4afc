"""Write what a run trained as an adapter in peft's format, which peft, this project and most servers read.

Hugging Face's code of some families packs queries, keys and values into one layer. Their adapters are put together
exactly: one above the other the A, and each B in its own rows and columns, at the sum of their ranks.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.adapters.hugging_face import (
    TIED_HEAD,
    HuggingFaceTensor,
    ModuleKind,
    hugging_face_modules,
    hugging_face_tensors,
)
from ascendspeed_core.weights.adapters.peft import PREFIX, WEIGHTS, Adapter, Update
from ascendspeed_core.weights.files.distributed_reader import DistributedTensors
from ascendspeed_core.weights.load import parameter_shapes

Read = Callable[[str], torch.Tensor]
Bias = Literal["none", "all", "lora_only"]


@dataclass(frozen=True)
class PeftForm:
    """What was trained, by names of the Hugging Face model.

    Attributes:
        updates: A, B and scale by module.
        saved: tensors that replace the model's.
        modules: those that are replaced whole.
        copies_head: the head of a tied model is replaced with the embedding.
        bias: which biases are replaced besides.
        every_module: all modules of the model, and what each is.
        dropout: share of an adapter's input that is dropped while it is trained.
    """

    updates: Mapping[str, Update]
    saved: Mapping[str, torch.Tensor]
    modules: tuple[str, ...]
    copies_head: bool
    bias: Bias
    every_module: Mapping[str, ModuleKind]
    dropout: float

    def adapter(self, folder: Path) -> Adapter:
        """Return it as what reading it gives.

        Args:
            folder: where it lies.
        """
        return Adapter(folder, self.updates, self.saved, dropout=self.dropout)

    def save(self, folder: Path, base: str | None) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`, the latter with peft's own class.

        Args:
            folder: that exists.
            base: name of the base model, for readers of the config.
        """
        from safetensors.torch import save_file

        tensors = {name: value.contiguous().clone() for name, value in self.tensors().items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        self._save_config(folder, base)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by peft's names."""
        found: dict[str, torch.Tensor] = {}
        for module, update in self.updates.items():
            found[f"{PREFIX}{module}.lora_A.weight"] = update.a
            found[f"{PREFIX}{module}.lora_B.weight"] = update.b
        for name, value in self.saved.items():
            module, _, kind = name.rpartition(".")
            under = "base_layer." if module in self.updates else ""
            found[f"{PREFIX}{module}.{under}{kind}"] = value
            if self.copies_head and self.every_module[module] == "embedding":
                # peft keeps a copy of each module that it trains, so that a tied head must be among them.
                found[PREFIX + TIED_HEAD] = value
        return found

    def _save_config(self, folder: Path, base: str | None) -> None:
        from peft import LoraConfig

        ranks = {module: update.a.shape[0] for module, update in self.updates.items()}
        alphas = {module: _alpha(update) for module, update in self.updates.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        targets = _words(self.updates.keys(), self.every_module, lambda word: f".{word}")
        saved = _words(self.modules, self.every_module, lambda word: word)
        config: Any = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=saved or None,
            rank_pattern={_pattern(name): own for name, own in ranks.items() if own != rank},
            alpha_pattern={_pattern(name): own for name, own in alphas.items() if own != alpha},
            bias=self.bias,
        )
        # peft makes a set of them, whose order in the file would differ from run to run.
        config.target_modules = targets
        config.save_pretrained(str(folder))


def write_adapter(folder: Path, plan: AdapterPlan, model: ModelConfig, base: str | None) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` of a native checkpoint into its own folder.

    Args:
        folder: of the checkpoint, complete. Values are the fp32 master weights where there are any.
        plan: which tensors are trained.
        model: the architecture.
        base: name of the base model, for readers of the config.
    """
    stored = DistributedTensors(folder)
    names = set(stored.names())

    def read(name: str) -> torch.Tensor:
        master = f"optimizer/master/{name}"
        return stored.read(master if master in names else f"model/{name}")

    peft_form(plan, model, read).save(folder, base)


def peft_form(plan: AdapterPlan, model: ModelConfig, read: Read) -> PeftForm:
    """Put together what was trained as peft has it.

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
    updates = {
        theirs: Update(*_joined(layers, theirs, plan, hf_tensors, model, read))
        for theirs, layers in by_module.items()
    }
    saved = {hf_tensors[name].name: read(name) for name in sorted(plan.trained)}
    modules = {name.removesuffix(".weight") for name in saved if name.endswith(".weight")}
    copies_head = "embedding.weight" in plan.trained and model.tie_word_embeddings
    if copies_head:
        modules.add(TIED_HEAD.removesuffix(".weight"))
    biases = {hf.name for hf in hf_tensors.values() if hf.name.endswith(".bias")}
    bias = _bias(
        {name.removesuffix(".bias") for name in biases & saved.keys()} - modules,
        {name.removesuffix(".bias") for name in biases} - modules,
        set(updates),
    )
    dropout = max(low_rank.dropout for low_rank in plan.layers.values())
    return PeftForm(
        updates, saved, tuple(sorted(modules)), copies_head, bias, hugging_face_modules(model), dropout
    )


def _bias(trained: set[str], biased: set[str], adapted: set[str]) -> Bias:
    """Return which biases those are that are trained without their modules.

    Args:
        trained: modules whose bias is trained.
        biased: modules that have one.
        adapted: modules with an adapter.
    """
    if not trained:
        return "none"
    kind: Bias = "all" if trained == biased else "lora_only"
    assert kind == "all" or trained == biased & adapted, "trained are all biases, or those of adapted layers"
    return kind


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


def _words(modules: Collection[str], everything: Collection[str], end: Callable[[str], str]) -> list[str]:
    """Return last words of names where peft finds these modules alone by them, whole names elsewhere.

    Args:
        modules: to be found.
        everything: all modules of the model.
        end: gives the end of a name that peft looks for, given a word.
    """
    words = set()
    for module in modules:
        word = module.rpartition(".")[2]
        alike = {name for name in everything if name == word or name.endswith(end(word))}
        words.add(word if alike <= set(modules) else module)
    return sorted(words)


def _pattern(module: str) -> str:
    """Return a module's name as the pattern that matches it alone."""
    return module.replace(".", r"\.")


def _alpha(update: Update) -> float:
    """Return the alpha that gives the update's scale, as a whole number where one does."""
    rank = update.a.shape[0]
    alpha = update.scale * rank
    return round(alpha) if round(alpha) / rank == update.scale else alpha
