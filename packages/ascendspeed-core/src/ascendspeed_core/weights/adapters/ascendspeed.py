"""Adapters that AscendSpeed of 2023 trained: what LoRA changed, in the files of a model-parallel checkpoint.

    iter_0000100/mp_rank_00_000/model_optim_rng.pt
        language_model.layers.0.attention.query_key_value.lora_A.default.weight
        language_model.layers.0.attention.query_key_value.lora_B.default.weight
        embedding.word_embeddings.modules_to_save.default.weight

A stage counts its layers from 0. Beside a weight that is cut by rows B is cut and packed as it is, and A is whole;
beside one that is cut by columns A is cut, and B is whole. A packed projection has one A for all of its parts.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import sharded_dim
from ascendspeed_core.models.linear import LowRank
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.adapters.peft import Adapter, has_peft_config, read_adapter
from ascendspeed_core.weights.adapters.write_peft import peft_form
from ascendspeed_core.weights.external.detect_format import detect_name_map
from ascendspeed_core.weights.external.mp_rank import (
    count_layers,
    iteration_folder,
    model_chunks,
    open_rank_files,
    sizes_of,
)
from ascendspeed_core.weights.external.name_maps import EMBEDDING, HEAD, NameMap, NameRule, Packer
from ascendspeed_core.weights.external.packing import PackedTensor
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import PipelineChunk, from_counts
from ascendspeed_core.weights.source import CheckpointError

WHOLE_MODULE = "modules_to_save.default.weight"
UNUSED = ("original_module.weight", "_extra_state")
"""What modules were before they were trained, and nothing."""
SMALL_BYTES = 1 << 20


def open_adapter(path: Path, model: ModelConfig, base: Path | None = None) -> Adapter:
    """Open an adapter of any kind: of peft, of a training run, or of AscendSpeed 2023.

    Args:
        path: its folder.
        model: architecture of the model that it belongs to.
        base: path of that model, to compare with the name that the adapter gives it.

    Raises:
        CheckpointError: there is no adapter, or it is damaged, of another model, or of a kind that is not done here.
    """
    if has_peft_config(path):
        return read_adapter(path, model, base)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; check --lora-load")
    folder = iteration_folder(path)
    return _read(folder, model) if any(folder.glob("mp_rank_*")) else read_adapter(folder, model, base)


def _read(folder: Path, model: ModelConfig) -> Adapter:
    """Read what all ranks wrote, and put it together under the names of the Hugging Face model."""
    files = open_rank_files(folder)
    tp, pp, _ = sizes_of(files)
    first = dict(stored_tensors(model_chunks(files[0, 0, 0])[0]))
    rank = next((t.info.shape[0] for key, t in first.items() if key.endswith("lora_A.default.weight")), None)
    if rank is None:
        raise CheckpointError(f"{folder} holds no adapter (nothing ends with lora_A.default.weight)")
    name_map = detect_name_map(first, folder)[1]
    shapes = parameter_shapes(model)
    embedding = next((t for key, t in first.items() if key.endswith(f"word_embeddings.{WHOLE_MODULE}")), None)
    rows = embedding.info.shape[0] * tp if embedding else shapes[EMBEDDING][0]
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    everything = AdapterPlan(dict.fromkeys(linear, LowRank(rank, 1.0)), frozenset())
    all_shapes = shapes | everything.shapes(shapes)
    sharded = ShardedTensors(all_shapes)
    counts = [
        [count_layers(chunk, files[0, s, 0].path) for chunk in model_chunks(files[0, s, 0])]
        for s in range(pp)
    ]
    layout, packer = from_counts(tp, counts), Packer(all_shapes, model, rows)
    for (tp_rank, stage, _), file in files.items():
        for number, chunk in enumerate(model_chunks(file)):
            stored = dict(stored_tensors(chunk))
            used = set()
            for packed in _of_chunk(name_map, packer, layout.stage(stage, number)):
                key = packed.key.replace("/", ".")
                if key in stored:
                    sharded.add(f"{file.path}: {key}", packed.of_rank(tp_rank, tp), stored[key])
                    used.add(key)
            rest = sorted(key for key in stored.keys() - used if not key.endswith(UNUSED))
            if rest:
                raise CheckpointError(
                    f"{file.path} holds {rest[0]}, which is no part of an adapter of this model"
                )
    names = set(sharded.names())
    sharded.check_complete(folder, names)
    _check_layers(folder, names, linear)
    sharded.check_replicas(SMALL_BYTES)
    scale = _alpha(files[0, 0, 0]) / rank
    adapted = {name: LowRank(rank, scale) for name in linear if f"{name}.lora_B.weight" in names}

    def read(name: str) -> torch.Tensor:
        tensor = sharded.read(name)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{folder}: {name} holds values that are no finite numbers; the training that wrote it diverged"
            )
        return tensor

    form = peft_form(AdapterPlan(adapted, frozenset(names & {EMBEDDING, HEAD})), model, read)
    return form.adapter(folder)


def _check_layers(folder: Path, names: Collection[str], linear: Sequence[str]) -> None:
    """Refuse halves of pairs, and layers without an adapter that others have: a name meant all layers in 2023."""
    halves = [(name, f"{name}.lora_{half}.weight") for name in linear for half in "AB"]
    kinds = {_in_layer(name) for name, half in halves if half in names}
    lacking = sorted(half for name, half in halves if _in_layer(name) in kinds and half not in names)
    if lacking:
        raise CheckpointError(
            f"{folder} lacks {lacking[0]}, though other layers have adapters there; copy the adapter again"
        )


def _in_layer(name: str) -> str:
    """Return what a module is called inside its layer; the whole name of one outside."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _of_chunk(name_map: NameMap, packer: Packer, chunk: PipelineChunk) -> Iterator[PackedTensor]:
    """Yield the tensors that a chunk may hold; a shared A once for each of our layers that use it."""
    if chunk.is_first:
        first = name_map.first[0].theirs.removesuffix("weight") + WHOLE_MODULE
        yield from packer.pack((NameRule(first, (EMBEDDING,)),))
    for position, number in enumerate(chunk.layers):
        for rule in name_map.layer:
            if sharded_dim(rule.ours[0].format(layer=number, kind="weight")) is None:
                continue
            theirs = rule.theirs.removesuffix(".{kind}")
            ours = [name.removesuffix(".{kind}") for name in rule.ours]
            a = [NameRule(f"{theirs}.lora_A.default.weight", (f"{name}.lora_A.weight",)) for name in ours]
            names = tuple(f"{name}.lora_B.weight" for name in ours)
            b = NameRule(f"{theirs}.lora_B.default.weight", names, rule.by_head)
            yield from packer.pack((*a, b), number, position)
    if chunk.is_last:
        head = name_map.head.removesuffix("weight") + WHOLE_MODULE
        yield from packer.pack((NameRule(head, (HEAD,)),))


def _alpha(file: TorchFile) -> float:
    content = file.content
    arguments = content.get("args") if isinstance(content, dict) else None
    alpha = getattr(arguments, "lora_alpha", None)
    if alpha is None:
        raise CheckpointError(
            f"{file.path} does not say lora_alpha in its arguments, so the scale of the adapter is unknown; copy the "
            "file that was saved in training"
        )
    return float(alpha)
