"""Read the files that DeepSpeed's engine and the 2023 converters write, one for each rank.

    latest                                   "release", or "global_step1000"
    release/mp_rank_00_model_states.pt       {"module": ..., "checkpoint_version": 3.0, "dp_world_size": 0}

`module` is the model under its own names, or `{"module": ...}` with the names of Bloom's pipeline: layers are counted
from 3 on over all stages, `{L + 4}.final_layernorm` is the final norm, `tied_modules.embed` the embedding, which the
last stage holds too. Ranks are numbered `stage * tp + tensor rank`. ZeRO's optimizer states are not read.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ascendspeed_core.weights.external.model_state import ModelState, model_state
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.torch_files import TorchFile
from ascendspeed_core.weights.huggingface.files import has_weight_files
from ascendspeed_core.weights.source import CheckpointError, inside

RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
RANK_FILES = "mp_rank_*_model_states.pt"
"""Pattern of the files in a folder."""
ZERO_3 = "zero_pp_rank_*_mp_rank_*_model_states.pt"
FIRST_LAYER = 3
"""Number of the first layer in names of the pipeline."""

_PIPE_LAYER = re.compile(r"(\d+)\.(.+)")
_FINAL = "final_layernorm."
_EMBEDDING = "tied_modules.embed."

Rank = tuple[int, int]
"""Tensor rank and stage."""


def is_deepspeed_ranks(folder: Path) -> bool:
    """Tell whether a folder holds such files, with the weights in them."""
    has_ranks = any(folder.glob(RANK_FILES)) or any(folder.glob(ZERO_3))
    return has_ranks and not any(folder.glob("layer_*-model_*-model_states.pt"))


def open_deepspeed_ranks(folder: Path) -> tuple[dict[Rank, TorchFile], dict[Rank, ModelState]]:
    """Open all files of a folder, and give Bloom's pipeline the names that its model has without one.

    Returns:
        The files, and the states of the model in them, by tensor rank and stage.

    Raises:
        CheckpointError: one is missing, holds no weights, or the weights lie in shares of ZeRO-3.
    """
    if any(folder.glob(ZERO_3)):
        is_beside = (folder.parent / "config.json").is_file() and has_weight_files(folder.parent)
        raise CheckpointError(
            f"{folder} holds the weights in shares of ZeRO-3 ({ZERO_3}), which are not read; "
            + (f"name {folder.parent}, in which they lie whole, or " if is_beside else "")
            + "join them with the zero_to_fp32.py that DeepSpeed wrote beside: python zero_to_fp32.py "
            f"{folder.parent} OUT, and put the model's config.json into OUT"
        )
    if any(path.is_dir() for path in folder.glob("mp_rank_*")):
        raise CheckpointError(
            f"{folder} holds two checkpoints, folders mp_rank_* and files {RANK_FILES}; move one of them elsewhere"
        )
    names = {
        int(match[1]): path.name for path in folder.iterdir() if (match := RANK_FILE.fullmatch(path.name))
    }
    if set(names) != set(range(len(names))) or not names:
        missing = min(set(range(max(names, default=0) + 1)) - set(names))
        raise CheckpointError(f"{folder} lacks mp_rank_{missing:02d}_model_states.pt; copy it again")
    files = [TorchFile(inside(folder, names[number])) for number in sorted(names)]
    states = [_state_of(file) for file in files]
    is_pipe = [any(_PIPE_LAYER.fullmatch(name) for name in state.tensors) for state in states]
    if any(is_pipe) != all(is_pipe):
        raise CheckpointError(f"{folder}: its files are of different models; copy it again")
    if not is_pipe[0]:
        return {(n, 0): file for n, file in enumerate(files)}, {(n, 0): s for n, s in enumerate(states)}
    stages = _stages(files, states)
    tp = len(files) // (max(stages) + 1)
    renamed = [
        ModelState(_renamed(state.tensors, is_last=stage == max(stages), file=file), state.left_out)
        for stage, state, file in zip(stages, states, files, strict=True)
    ]
    ranks = [(number % tp, number // tp) for number in range(len(files))]
    return dict(zip(ranks, files, strict=True)), dict(zip(ranks, renamed, strict=True))


def _state_of(file: TorchFile) -> ModelState:
    content = file.content
    module = content.get("module") if isinstance(content, dict) else None
    inner = module.get("module") if isinstance(module, dict) else None
    module = inner if isinstance(inner, dict) else module
    if not isinstance(module, dict) or not module:
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{file.path} holds no weights under 'module', only {held or 'nothing'}")
    state = model_state(module, file.path)
    if not any(0 not in tensor.info.shape for tensor in state.tensors.values()):
        raise CheckpointError(
            f"{file.path} holds names of weights without their numbers, as under ZeRO-3; join the shares with "
            "DeepSpeed's zero_to_fp32.py"
        )
    return state


def _stages(files: Sequence[TorchFile], states: Sequence[ModelState]) -> list[int]:
    """Return the stage of each file: files of one stage hold the same layers, and have consecutive numbers.

    Raises:
        CheckpointError: stages have different numbers of files, or a layer is missing.
    """
    layers = [_layers(state.tensors) for state in states]
    stages = [0]
    for number in range(1, len(files)):
        is_other = layers[number] != layers[number - 1]
        stages.append(stages[-1] + is_other)
    sizes = {stages.count(stage) for stage in stages}
    count = [number for stage in range(max(stages) + 1) for number in layers[stages.index(stage)]]
    if len(sizes) > 1 or count != list(range(FIRST_LAYER, FIRST_LAYER + len(count))):
        raise CheckpointError(
            f"{files[0].path.parent}: its {len(files)} files do not hold every layer once for each tensor rank (layers "
            f"from {FIRST_LAYER} on: {', '.join(map(str, count))}); files are missing or of another checkpoint"
        )
    return stages


def _layers(names: Mapping[str, StoredTensor]) -> list[int]:
    found = {
        int(match[1])
        for name in names
        if (match := _PIPE_LAYER.fullmatch(name)) and not match[2].startswith(_FINAL)
    }
    return sorted(found)


def _renamed(tensors: Mapping[str, StoredTensor], is_last: bool, file: TorchFile) -> dict[str, StoredTensor]:
    """Return tensors of the pipeline under the names of `GPTModel`; layers count from 0 within the stage."""
    layers = _layers(tensors)
    is_first = not layers or layers[0] == FIRST_LAYER
    renamed = {}
    for name, tensor in tensors.items():
        match = _PIPE_LAYER.fullmatch(name)
        if match and match[2].startswith(_FINAL) and is_last:
            new = f"language_model.encoder.{match[2]}"
        elif match and int(match[1]) in layers:
            new = f"language_model.encoder.layers.{layers.index(int(match[1]))}.{match[2]}"
        elif name.startswith(_EMBEDDING) and is_first:
            new = f"language_model.embedding.{name.removeprefix(_EMBEDDING)}"
        elif name == f"{_EMBEDDING}word_embeddings.weight" and is_last:
            new = "word_embeddings_for_head.weight"
        else:
            raise CheckpointError(
                f"{file.path} holds {name}, which its stage of the pipeline does not have; it is of another model"
            )
        renamed[new] = tensor
    return renamed
