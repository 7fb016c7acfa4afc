"""Weights of a model with adapters: those of the base, and A and B beside them, drawn, from peft, or from a checkpoint.

`plan_adapters` finds the layers that the user's words mean; the three sources then say where values come from. Drawn
values depend on the seed and the name alone, so they are the same under every layout.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import is_matrix
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.linear import LowRank
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.adapters.hugging_face import HuggingFaceTensor, hugging_face_tensors
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.adapters.peft import Adapter
from ascendspeed_core.weights.adapters.untied import UntiedWeights
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.source import NativeSource
from ascendspeed_core.weights.random_init import seed_of
from ascendspeed_core.weights.source import BaseWeightSource, CheckpointError, Index, TensorInfo, WeightSource
from ascendspeed_data.errors import AscendSpeedError, did_you_mean

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
NAMES_2023: dict[str, tuple[str, ...]] = {
    "query_key_value": QUERY_KEY_VALUE,
    "W_pack": QUERY_KEY_VALUE,
    "dense": ("o_proj",),
    "proj": ("gate_proj", "up_proj"),
    "dense_h_to_4h": ("up_proj",),
    "dense_4h_to_h": ("down_proj",),
    "word_embeddings": ("embedding",),
    "embed_tokens": ("embedding",),
    "lm_head.lm_head": ("output_head",),
    "lm_head": ("output_head",),
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
}
"""Names that scripts of 2023 use for modules, whatever the family."""

ALL_LINEAR = "all-linear"


def plan_adapters(config: LoraConfig, model: ModelConfig, where: str) -> AdapterPlan:
    """Find the layers that `config` names.

    Args:
        config: names and rank.
        model: the architecture.
        where: of the model, for messages.

    Raises:
        AscendSpeedError: a name means nothing in this model, or something that cannot have an adapter.
    """
    hf_tensors, shapes = hugging_face_tensors(model), parameter_shapes(model)
    fused = {mapping.ours for mapping in find_family(model.family).weights(model) if not mapping.is_plain}
    linear = [
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if is_matrix(name, shape) and name != "embedding.weight" and not name.endswith(".router.weight")
    ]
    if model.tie_word_embeddings:
        linear.append("output_head")
    scale = config.lora_alpha / (sqrt(config.lora_r) if config.lora_use_rslora else config.lora_r)
    layers: dict[str, LowRank] = {}
    for word in config.lora_target_modules:
        # As in peft, what Hugging Face's code holds as no linear layer is not among all of them.
        found = [name for name in linear if name != "output_head" and f"{name}.weight" not in fused]
        if word != ALL_LINEAR:
            found = _meant(word, linear, hf_tensors, "lora_target_modules", where)
            parts = [name for name in found if f"{name}.weight" in fused]
            if parts:
                raise AscendSpeedError(
                    f"lora_target_modules: {parts[0]} is a part of a fused tensor in Hugging Face's code, for which no "
                    f"adapter can be saved; leave {word} out"
                )
        layers |= dict.fromkeys(found, LowRank(config.lora_r, scale, config.lora_dropout))
    if "output_head" in layers and (model.normalised_head or model.tie_word_embeddings):
        why = "is divided by the lengths of its rows" if model.normalised_head else "is that of the embedding"
        raise AscendSpeedError(
            f"lora_target_modules: the head's weight of {where} {why}, so an adapter beside it cannot be merged; train "
            "it whole with --lora-modules-to-save lm_head"
        )
    trained: set[str] = set()
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in shapes))
    if model.tie_word_embeddings:
        modules.append("output_head")
    for word in config.lora_modules_to_save:
        for module in _meant(word, modules, hf_tensors, "lora_modules_to_save", where):
            owner = "embedding" if module == "output_head" and model.tie_word_embeddings else module
            trained |= {name for name in shapes if name.rpartition(".")[0] == owner}
    spread = sorted(trained - hf_tensors.keys())
    if spread:
        raise AscendSpeedError(
            f"lora_modules_to_save: {spread[0]} is several tensors in Hugging Face's code or part of one, so it cannot "
            "be saved alone; leave it out"
        )
    packed = sorted(name for name in trained if hf_tensors[name].rows is not None)
    if packed:
        raise AscendSpeedError(
            f"lora_modules_to_save: {packed[0]} is a part of {hf_tensors[packed[0]].name} in Hugging Face's code, so "
            "it cannot be saved alone; give it an adapter instead"
        )
    both = sorted(name for name in trained if name.removesuffix(".weight") in layers)
    if both:
        raise AscendSpeedError(
            f"{both[0]} is in lora_target_modules and in lora_modules_to_save; leave it out of one"
        )
    return AdapterPlan(layers, frozenset(trained))


def _meant(
    word: str, modules: Sequence[str], hf_tensors: Mapping[str, HuggingFaceTensor], option: str, where: str
) -> list[str]:
    """Return the modules that a name means: ours, Hugging Face's last word, or that of 2023."""

    # A name of the model itself counts before the same word of 2023, which may have meant another module.
    theirs = {one.name.split(".")[-2] for one in hf_tensors.values()}

    def names(module: str) -> set[str]:
        ours = module.rpartition(".")[2]
        found = {ours, *(name for name, meant in NAMES_2023.items() if ours in meant and name not in theirs)}
        hf = hf_tensors.get(f"{module}.weight")
        return found | ({hf.name.split(".")[-2]} if hf else set())

    found = [module for module in modules if word in names(module)]
    if not found:
        known = sorted({name for module in modules for name in names(module)} | {ALL_LINEAR})
        raise AscendSpeedError(
            f"{option}: {where} has no module {word}{did_you_mean(word, known)}; known are {', '.join(known)}"
        )
    return found


class AdaptedWeights(BaseWeightSource):
    """The weights of a base, and further tensors that are its adapters or replace its own.

    Args:
        base: the model.
        adapters: which tensors are trained.
        config: the architecture, with the vocabulary that trained embeddings have.
        infos: the further tensors.
        read: reads one of them by name and slice.
        untouched: the base without anything of the adapter's, where `base` already has some of it.
    """

    def __init__(
        self,
        base: WeightSource,
        adapters: AdapterPlan,
        config: ModelConfig,
        infos: Mapping[str, TensorInfo],
        read: Callable[[str, Index], torch.Tensor],
        untouched: WeightSource | None = None,
    ) -> None:
        self.kind, self.path = base.kind, base.path
        self.base: WeightSource = base
        self.untouched: WeightSource = untouched or base
        self.adapters: AdapterPlan = adapters
        self.config = config
        self._more, self._read = infos, read

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer that came with the weights, if any."""
        return self.base.tokenizer

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {**self.base.tensors(), **self._more}

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our name."""
        return self._infos

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        return self._read(name, index) if name in self._more else self.base.read(name, index)


def drawn_adapters(base: WeightSource, adapters: AdapterPlan, seed: int) -> AdaptedWeights:
    """Add new adapters, which change nothing yet: A uniform within 1 / sqrt(I), as peft draws it, and B zero."""
    shapes = adapters.shapes(parameter_shapes(base.config))

    def read(name: str, index: Index) -> torch.Tensor:
        shape = shapes[name]
        if name.endswith(".lora_B.weight"):
            return torch.zeros(shape)[index]
        generator = torch.Generator().manual_seed(seed_of(seed, name))
        bound = 1 / sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)[index]

    infos = {name: TensorInfo(shape, torch.float32) for name, shape in shapes.items()}
    return AdaptedWeights(base, adapters, base.config, infos, read)


def loaded_adapters(base: WeightSource, adapter: Adapter) -> AdaptedWeights:
    """Add an adapter in peft's format, to be trained further or computed beside the weights.

    One of a projection that packs queries, keys and values becomes one for each: A shared at first, B cut by rows.

    Raises:
        CheckpointError: it does not fit the model, or changes something that can only be merged.
    """
    whole = MergedAdapter(base, adapter, only_saved=True)
    hf_tensors = hugging_face_tensors(whole.config)
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, LowRank] = {}
    for name, hf in hf_tensors.items():
        update = adapter.updates.get(hf.name.removesuffix(".weight"))
        if update is None or not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        if update.is_embedding or (layer == "output_head" and whole.config.normalised_head):
            raise CheckpointError(
                f"{adapter.folder} changes {hf.name}, which is no plain linear layer; merge the adapter"
            )
        layers[layer] = LowRank(update.a.shape[0], update.scale, adapter.dropout)
        tensors[f"{layer}.lora_A.weight"] = update.a
        tensors[f"{layer}.lora_B.weight"] = update.b if hf.rows is None else update.b[hf.rows]
    replaced = {name for name, hf in hf_tensors.items() if hf.name in adapter.saved}
    packed = sorted(name for name in replaced if hf_tensors[name].rows is not None)
    if packed:
        raise CheckpointError(
            f"{adapter.folder} replaces {hf_tensors[packed[0]].name} as a whole, which packs several tensors; "
            "merge the adapter"
        )
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    trained = frozenset(name for name in replaced if hf_tensors[name].name not in adapter.frozen)
    plan = AdapterPlan(layers, trained)
    return AdaptedWeights(whole, plan, whole.config, infos, lambda name, index: tensors[name][index], base)


def frozen_changes(base: WeightSource, adapter: Adapter) -> list[str]:
    """Name what an adapter replaces with other values but does not train further.

    peft also writes what it has not changed: the base's own embedding beside an adapter of embedding or head.

    Args:
        base: the model.
        adapter: from peft.
    """
    whole = MergedAdapter(base, adapter, only_saved=True)
    changed = set()
    for name, hf in hugging_face_tensors(whole.config).items():
        if hf.name in adapter.frozen:
            before, after = whole.base.tensors()[name], whole.tensors()[name]
            if before.shape != after.shape or not torch.equal(whole.base.read(name), whole.read(name)):
                changed.add(hf.name)
    return sorted(changed)


def resumed_adapters(base: WeightSource, checkpoint: NativeSource) -> AdaptedWeights:
    """Take what a run had trained from its checkpoint, and the rest from the base that it named.

    Raises:
        CheckpointError: the base is another model.
    """
    kept, untouched = checkpoint.description["adapters"], base
    theirs = checkpoint.config.model_dump(mode="json")
    if base.config.tie_word_embeddings and not checkpoint.config.tie_word_embeddings:
        # An adapter that changed one of the tied two was trained further.
        base = UntiedWeights(base)
    different = [
        key
        for key, value in base.config.model_dump(mode="json").items()
        if value != theirs[key] and key != "vocab_size"
    ]
    if different:
        raise CheckpointError(
            f"{checkpoint.folder} was trained on {kept['base']}; {base.path} differs from it in "
            f"{', '.join(different)}: give the same --load"
        )
    infos = dict(checkpoint.tensors())
    return AdaptedWeights(base, plan_of(kept), checkpoint.config, infos, checkpoint.read, untouched)


def plan_of(description: Mapping[str, Any]) -> AdapterPlan:
    """Return the plan that `description_of` described."""
    layers = {name: LowRank(**values) for name, values in description["layers"].items()}
    return AdapterPlan(layers, frozenset(description["trained"]))


def description_of(plan: AdapterPlan, base: Path | None) -> dict[str, Any]:
    """Return what a checkpoint says of its adapters, as JSON values."""
    return {
        "base": str(base) if base else None,
        "layers": {name: asdict(low_rank) for name, low_rank in plan.layers.items()},
        "trained": sorted(plan.trained),
    }
