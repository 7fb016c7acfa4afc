"""Read model-parallel checkpoints: one `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt` for each tensor-parallel rank, stage
and expert-parallel rank.

AscendSpeed of 2023 and Megatron-LM share this layout; names and packing differ, see `name_maps`:

    latest_checkpointed_iteration.txt        "100" or "release"
    iter_0000100/ or release/
        mp_rank_00_000/model_optim_rng.pt    args, iteration, model (or model0, model1, ... with a virtual pipeline)
        ascendspeed.json                     only where asd-ckpt wrote it, see `sidecar`

The files of expert-parallel ranks hold their experts, and all of them the rest.

The files of DeepSpeed's engine hold the same models, see `deepspeed_ranks`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.derived_tensors import derived_reason
from ascendspeed_core.weights.external.config_of_arguments import CheckpointFacts
from ascendspeed_core.weights.external.deepspeed import LATEST, step_folder
from ascendspeed_core.weights.external.deepspeed_ranks import is_deepspeed_ranks, open_deepspeed_ranks
from ascendspeed_core.weights.external.detect_format import STATES, detect_name_map
from ascendspeed_core.weights.external.megatron_args import (
    check_arguments,
    check_experts,
    read_arguments,
    resolve_config,
)
from ascendspeed_core.weights.external.model_state import ModelState, model_state
from ascendspeed_core.weights.external.name_maps import EMBEDDING, ROTARY, NameMap, expert_indices
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.external.sidecar import read_sidecar, written_by
from ascendspeed_core.weights.external.source import ExternalSource
from ascendspeed_core.weights.files.json_file import read_iteration
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.source import TRACKER
from ascendspeed_core.weights.shard_layout import ShardLayout, from_counts
from ascendspeed_core.weights.source import CheckpointError, Kind, inside

_RANK_FOLDER = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
_LAYER = re.compile(r"\blayers\.(\d+)\.")

Rank = tuple[int, int, int]
"""Tensor rank, stage and expert-parallel rank."""

FIRST_VERSION = 2.0
"""Of `checkpoint_version`; a file without one is read as the newest."""
SMALL_BYTES = 1 << 20
"""Parts up to this size that several files hold are compared when a checkpoint is opened."""


class MpRankSource(ExternalSource):
    """The weights of a model-parallel checkpoint as one logical model.

    Args:
        path: the folder with the tracker, or the one with the `mp_rank_*` folders.
        config: the architecture, where the checkpoint does not include it.
        vocab_size: vocabulary size without padding, where the checkpoint does not record it.
        fallback_config: called for the architecture when neither the checkpoint nor `config` gives it.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig | None = None,
        vocab_size: int | None = None,
        fallback_config: Callable[[], ModelConfig | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.path: Path | None = path
        self.folder = folder_with_ranks(path)
        self._files, chunks = _open_states(self.folder)
        self.tp, pp, ep = sizes_of(self._files)
        self.sidecar = read_sidecar(self.folder)
        counts = [
            [_count_layers(chunk.tensors, self._files[0, stage, 0].path) for chunk in chunks[0, stage, 0]]
            for stage in range(pp)
        ]
        self.layout: ShardLayout = from_counts(self.tp, counts, ep)
        first = dict(chunks[0, 0, 0][0].tensors)
        kind, name_map, self.naming = detect_name_map(first, self.folder)
        self.kind: str = "deepspeed" if is_deepspeed_ranks(self.folder) else kind
        _check_version(self._files[0, 0, 0])
        self.arguments: Any = read_arguments(self._files[0, 0, 0])
        embedding = next(iter(first[key] for key in first if key.endswith("word_embeddings.weight")), None)
        if embedding is None:
            raise CheckpointError(
                f"{self._files[0, 0, 0].path} holds no embedding; it is no first stage, or several stages were written "
                "under one name: convert the model again with one stage"
            )
        self.vocabulary_rows = embedding.info.shape[0] * self.tp
        facts = CheckpointFacts(kind, self.naming, self.folder, self.layout, first, self.vocabulary_rows)
        self.config: ModelConfig = resolve_config(
            facts, self.sidecar, self.arguments, config, vocab_size, fallback_config
        )
        shapes = parameter_shapes(self.config)
        self._shapes = shapes | {ROTARY: (self.config.head_dim // 2,)}
        self._sharded = ShardedTensors(self._shapes)
        self.num_stored = sum(len(chunk.tensors) for states in chunks.values() for chunk in states)
        check_experts(self.folder, self.arguments, self.config, self.layout)
        for rank, file in self._files.items():
            check_arguments(file, self.sidecar, self.layout, rank)
            for number, chunk in enumerate(chunks[rank]):
                self._locate(file, chunk, name_map, rank, number)
        self._sharded.check_complete(self.folder, shapes)
        self._sharded.check_replicas(SMALL_BYTES, whole=(EMBEDDING,))
        self._check_rotary()

    @classmethod
    def kind_in(cls, folder: Path) -> Kind:
        """Return `ascendspeed` or `megatron`, by the names of the tensors in one of the files."""
        file = open_rank_files(folder)[0, 0, 0]
        kind: Kind = detect_name_map(dict(stored_tensors(model_chunks(file)[0])), folder)[0]
        return kind

    def other_contents(self) -> list[str]:
        """Name what is stored in the files beside the weights of the model, and other files beside them."""
        content = self._files[0, 0, 0].content
        known = {"model", "module", "args", "checkpoint_version", "iteration", "tokens", "ascendspeed"}
        found = {str(key) for key in content if key not in known and not re.fullmatch(r"model\d+", str(key))}
        return sorted(found.union(path.name for path in self.folder.glob("*zero_pp_rank_*")))

    def check(self) -> bool:
        """Read everything once: compare checksums, and all parts that several files hold.

        Raises:
            CheckpointError: a file is damaged, or two are of different checkpoints.
        """
        for file in self._files.values():
            file.check()
        self._sharded.check_replicas()
        return True

    def details(self) -> dict[str, Any]:
        """Return layout, rows of the embedding with padding, and who wrote the checkpoint."""
        return super().details() | {"written by": written_by(self.sidecar)}

    def _locate(self, file: TorchFile, state: ModelState, name_map: NameMap, rank: Rank, chunk: int) -> None:
        tp_rank, stage, ep_rank = rank
        stored = state.tensors
        layers, indices = self.layout.stage(stage, chunk), expert_indices(self.config, self.layout, ep_rank)
        for packed in name_map.of_chunk(self._shapes, self.config, layers, self.vocabulary_rows, indices):
            key = packed.key.replace("/", ".")
            if key not in stored:
                if ROTARY in packed.slices[0].name:
                    continue
                raise CheckpointError(f"{file.path} lacks {key}; the copy is incomplete, or of another model")
            self._sharded.add(f"{file.path}: {key}", packed.of_rank(tp_rank, self.tp), stored.pop(key))
        self._note_left_out(file, state)
        extra = sorted(stored)
        if extra:
            raise CheckpointError(
                f"{file.path} holds {len(extra)} tensors that the model does not have, first {extra[0]}; "
                "they would be lost"
            )

    def _note_left_out(self, file: TorchFile, state: ModelState) -> None:
        """Take what is no weight out of a state, after a comparison with what it must be."""
        self._left_out |= state.left_out
        for key in list(state.tensors):
            reason = derived_reason(key, state.tensors[key], self.config, file.path)
            if reason is not None:
                self._left_out[key] = reason
                del state.tensors[key]

    def _check_rotary(self) -> None:
        """Compare stored rotary frequencies with what the config says; all layers have the same."""
        if ROTARY in set(self._sharded.names()):
            name, stored = f"rotary_emb.{ROTARY.partition('.')[2]}", self._sharded.shard(ROTARY)
            reason = derived_reason(name, stored.tensor, self.config, stored.where)
            self._left_out[f"{name} of {self.config.num_layers} layers"] = str(reason)


def rotary_frequencies(config: ModelConfig) -> torch.Tensor:
    """Return the rotary frequencies that some external formats store, base^(-2i/D), [D/2], in fp32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return (1.0 / config.rotary_base**exponents).float()


def folder_with_ranks(path: Path) -> Path:
    """Return the folder with the files of ranks, which a tracker or DeepSpeed's `latest` names."""
    return step_folder(path) if follows_latest(path) else iteration_folder(path)


def follows_latest(path: Path) -> bool:
    """Tell whether `latest` names the checkpoint: there is no tracker, or only one that names no folder here.

    Megatron-DeepSpeed writes both, and the folder under the name that `latest` says.
    """
    if not (path / LATEST).is_file():
        return False
    tracker = path / TRACKER
    text = read_iteration(tracker) if tracker.is_file() else ""
    name = f"iter_{int(text):07d}" if text.isdecimal() else text
    return not name or not (path / name).is_dir() or name == step_folder(path).name


def _open_states(folder: Path) -> tuple[dict[Rank, TorchFile], dict[Rank, list[ModelState]]]:
    """Return all files, and the state of each of their chunks, by tensor rank and stage."""
    if is_deepspeed_ranks(folder):
        opened, state_of = open_deepspeed_ranks(folder)
        files = {(*rank, 0): file for rank, file in opened.items()}
        return files, {(*rank, 0): [state] for rank, state in state_of.items()}
    files = open_rank_files(folder)
    return files, {
        rank: [model_state(chunk, file.path) for chunk in model_chunks(file)] for rank, file in files.items()
    }


def iteration_folder(path: Path) -> Path:
    """Return the folder with the weights: `path`, or the one that its tracker names.

    Raises:
        CheckpointError: the tracker names nothing that is there, or something outside.
    """
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    text = read_iteration(tracker)
    if text != "release" and not text.isdecimal():
        raise CheckpointError(
            f"{tracker} says {text!r}, neither an iteration nor release; write which of them to use"
        )
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir() or folder.resolve().parent != path.resolve():
        raise CheckpointError(
            f"{tracker} names {folder.name}, which is not a folder in {path}; copy it again"
        )
    return folder


def open_rank_files(folder: Path) -> dict[Rank, TorchFile]:
    """Open all files by tensor rank, stage and expert-parallel rank.

    Raises:
        CheckpointError: one is missing.
    """
    names: dict[tuple[int, ...], str] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            names[tuple(int(number) for number in match.groups() if number is not None)] = path.name
    if not names:
        raise CheckpointError(f"{folder} holds no mp_rank_* folders; copy it again")
    spread = len(max(names, key=len)) == 2 and _are_expert_ranks(folder, names)
    found: dict[Rank, str] = {}
    for numbers, name in names.items():
        tensor_rank, *others = numbers
        first, second = (*others, 0, 0)[:2]
        found[(tensor_rank, 0, first) if spread else (tensor_rank, first, second)] = name
    tp, pp, ep = sizes_of(found)
    ranks = [(t, p, e) for p in range(pp) for e in range(ep) for t in range(tp)]
    for rank in ranks:
        if rank not in found:
            expert = f", expert-parallel rank {rank[2]}" if ep > 1 else ""
            sizes = f"{tp} x {pp}" + (f" x {ep}" if ep > 1 else "")
            raise CheckpointError(
                f"{folder} lacks tensor rank {rank[0]} of stage {rank[1]}{expert}, though it has "
                f"{len(found)} of {sizes} files; copy it again"
            )
    return {rank: TorchFile(inside(folder, f"{found[rank]}/{STATES}")) for rank in ranks}


def sizes_of(ranks: Iterable[Rank]) -> tuple[int, int, int]:
    """Return how many tensor ranks, stages and expert-parallel ranks there are."""
    tp, pp, ep = (max(numbers) + 1 for numbers in zip(*ranks, strict=True))
    return tp, pp, ep


def _are_expert_ranks(folder: Path, names: Mapping[tuple[int, ...], str]) -> bool:
    """Tell whether the second number is that of an expert-parallel rank: of stages only the first has an embedding."""
    if not {(0, 0), (0, 1)} <= names.keys():
        return False
    files = [TorchFile(inside(folder, f"{names[0, number]}/{STATES}")) for number in (0, 1)]
    return all(
        any(
            key.endswith("embedding.word_embeddings.weight")
            for key, _ in stored_tensors(model_chunks(file)[0])
        )
        for file in files
    )


def _check_version(file: TorchFile) -> None:
    """Refuse the first versions of the format, in which the rows of the packed attention lie otherwise."""
    version = file.content.get("checkpoint_version") if isinstance(file.content, dict) else None
    if isinstance(version, int | float) and version < FIRST_VERSION:
        raise CheckpointError(
            f"{file.path} has checkpoint_version={version:g}, in which the rows of query_key_value lie otherwise; load "
            "it with Megatron-LM and save it again, which writes version 3"
        )


def model_chunks(file: TorchFile) -> list[Any]:
    """Return the states of all chunks of a file."""
    content = file.content
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.path} holds no dictionary; it is no checkpoint of a model")
    numbered = sorted(
        (key for key in content if re.fullmatch(r"model\d+", str(key))), key=lambda key: int(key[5:])
    )
    if not numbered and "model" not in content:
        raise CheckpointError(
            f"{file.path} holds no 'model'; it holds {', '.join(map(str, content)) or 'nothing'}"
        )
    return [content[key] for key in numbered or ["model"]]


def count_layers(chunk: Any, path: Path) -> int:
    """Return how many layers a chunk holds.

    Raises:
        CheckpointError: one is missing.
    """
    return _count_layers((key for key, _ in stored_tensors(chunk)), path)


def _count_layers(names: Iterable[str], path: Path) -> int:
    numbers = {int(match.group(1)) for key in names if (match := _LAYER.search(key))}
    if numbers != set(range(len(numbers))):
        missing = min(set(range(max(numbers) + 1)) - numbers)
        raise CheckpointError(f"{path} lacks layer {missing} of its stage; the copy is incomplete")
    return len(numbers)
