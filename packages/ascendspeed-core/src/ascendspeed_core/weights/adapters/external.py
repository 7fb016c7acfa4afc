"""Adapters that AscendSpeed of 2023 trained: what LoRA changed, in the files of a model-parallel checkpoint.

    iter_0000100/mp_rank_00_000/model_optim_rng.pt
        language_model.layers.0.attention.query_key_value.lora_A.default.weight
        language_model.layers.0.attention.query_key_value.lora_B.default.weight
        embedding.word_embeddings.modules_to_save.default.weight

A stage counts its layers from 0. Beside a weight that is cut by rows B is cut and packed as it is, and A is whole;
beside one that is cut by columns A is cut, and B is whole. A packed projection has one A for all of its parts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import sharded_dim
from ascendspeed_core.models.linear import LowRank
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.adapters.files import CONFIG, Adapter
from ascendspeed_core.weights.adapters.write import peft_form
from ascendspeed_core.weights.external.detect_format import recognise_table
from ascendspeed_core.weights.external.layout import from_counts
from ascendspeed_core.weights.external.mp_rank import chunks_of, count_layers, iteration_folder, open_grid
from ascendspeed_core.weights.external.name_maps import EMBEDDING, HEAD, Packing, Row, StageLayers, Table
from ascendspeed_core.weights.external.packing import Packed
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.source import CheckpointError

WHOLE_MODULE = "modules_to_save.default.weight"
UNUSED = ("original_module.weight", "_extra_state")
"""What modules were before they were trained, and nothing."""
SMALL_BYTES = 1 << 20


def open_adapter(path: Path, model: ModelConfig) -> Adapter:
    """Open an adapter, whatever wrote it: peft, a run of ours, or AscendSpeed of 2023.

    Args:
        path: its folder.
        model: what it is for.

    Raises:
        CheckpointError: nothing there, damaged, or of another model.
    """
    if (path / CONFIG).is_file():
        return Adapter(path)
    folder = iteration_folder(path)
    return Adapter(folder, _read(folder, model)) if any(folder.glob("mp_rank_*")) else Adapter(path)


def _read(folder: Path, model: ModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the adapter in peft's form."""
    files = open_grid(folder)
    tp, pp = (max(rank[i] for rank in files) + 1 for i in (0, 1))
    first = dict(stored_tensors(chunks_of(files[0, 0])[0]))
    rank = next((t.info.shape[0] for key, t in first.items() if key.endswith("lora_A.default.weight")), None)
    if rank is None:
        raise CheckpointError(f"{folder} holds no adapter (nothing ends with lora_A.default.weight)")
    table = recognise_table(first, folder)[1]
    shapes = parameter_shapes(model)
    embedding = next((t for key, t in first.items() if key.endswith(f"word_embeddings.{WHOLE_MODULE}")), None)
    rows = embedding.info.shape[0] * tp if embedding else shapes[EMBEDDING][0]
    linear = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    everything = AdapterPlan(dict.fromkeys(linear, LowRank(rank, 1.0)), frozenset())
    all_shapes = shapes | everything.shapes(shapes)
    placed = ShardedTensors(all_shapes)
    counts = [[count_layers(chunk, files[0, s].path) for chunk in chunks_of(files[0, s])] for s in range(pp)]
    layout, packing = from_counts(tp, counts), Packing(all_shapes, model, rows)
    for (tp_rank, stage), file in files.items():
        for number, chunk in enumerate(chunks_of(file)):
            stored = dict(stored_tensors(chunk))
            used = set()
            for packed in _of_stage(table, packing, layout.stage(stage, number)):
                key = packed.key.replace("/", ".")
                if key in stored:
                    placed.add(f"{file.path}: {key}", packed.of_rank(tp_rank, tp), stored[key])
                    used.add(key)
            rest = sorted(key for key in stored.keys() - used if not key.endswith(UNUSED))
            if rest:
                raise CheckpointError(
                    f"{file.path} holds {rest[0]}, which is no part of an adapter of this model"
                )
    names = set(placed.names())
    placed.check_complete(folder, names)
    placed.check_replicas(SMALL_BYTES)
    scale = _alpha(files[0, 0]) / rank
    adapted = {name: LowRank(rank, scale) for name in linear if f"{name}.lora_B.weight" in names}
    return peft_form(AdapterPlan(adapted, frozenset(names & {EMBEDDING, HEAD})), model, placed.read)


def _of_stage(table: Table, packing: Packing, stage: StageLayers) -> Iterator[Packed]:
    """Yield what a stage may hold; an A once for each of our layers that share it."""
    if stage.is_first:
        first = table.first[0].theirs.removesuffix("weight") + WHOLE_MODULE
        yield from packing.rows((Row(first, (EMBEDDING,)),), 0, 0)
    for place, number in enumerate(stage.layers):
        for row in table.layer:
            if sharded_dim(row.ours[0].format(layer=number, kind="weight")) is None:
                continue
            theirs = row.theirs.removesuffix(".{kind}")
            ours = [name.removesuffix(".{kind}") for name in row.ours]
            a = [Row(f"{theirs}.lora_A.default.weight", (f"{name}.lora_A.weight",)) for name in ours]
            names = tuple(f"{name}.lora_B.weight" for name in ours)
            b = Row(f"{theirs}.lora_B.default.weight", names, row.by_head)
            yield from packing.rows((*a, b), number, place)
    if stage.is_last:
        head = table.head.removesuffix("weight") + WHOLE_MODULE
        yield from packing.rows((Row(head, (HEAD,)),), 0, 0)


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
