"""Read the DeepSpeed-pipe layout of Bloom: one file for each layer and tensor-parallel rank.

    latest                                        "global_step1000"
    global_step1000/layer_03-model_00-model_states.pt

Layer files are numbered by the pipeline's pseudo layers: 1 is the embedding, layer k is 3 + k, and the final norm is
4 + L. Names inside are those of one layer. Optimizer states (`zero_pp_rank_*`) are not read.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.external.deepspeed_ranks import FIRST_LAYER
from ascendspeed_core.weights.external.megatron_args import config_beside
from ascendspeed_core.weights.external.model_state import model_state
from ascendspeed_core.weights.external.name_maps import EMBEDDING, ascendspeed_gpt
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.external.source import ExternalSource
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_name
from ascendspeed_core.weights.files.torch_files import TorchFile
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import PipelineChunk
from ascendspeed_core.weights.source import CheckpointError, UnknownModelError, inside

LATEST = "latest"
_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")


class DeepSpeedPipeSource(ExternalSource):
    """The weights of a DeepSpeed-pipe checkpoint of Bloom as one logical model.

    Args:
        path: the folder with `latest`, or the one with the layer files.
        config: the architecture, unless its config.json lies beside the files.
        fallback_config: called for the architecture when neither gives it.
    """

    kind = "deepspeed"

    def __init__(
        self,
        path: Path,
        config: ModelConfig | None = None,
        fallback_config: Callable[[], ModelConfig | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.path: Path | None = path
        self.folder = step_folder(path)
        found = config or config_beside(self.folder) or fallback_config()
        if found is None:
            raise UnknownModelError(
                f"{self.folder} does not say what model it is; put the model's config.json into it, or name it with "
                "--model-config"
            )
        self.config: ModelConfig = found
        files = _open_files(self.folder)
        self.tp = max(rank for _, rank in files) + 1
        self._check_files(set(files))
        states = {
            number_and_rank: model_state(file.content, file.path).tensors
            for number_and_rank, file in files.items()
        }
        self._files = files
        embedding = states[1, 0].get("word_embeddings.weight")
        if embedding is None:
            raise CheckpointError(f"{files[1, 0].path} holds no word_embeddings.weight")
        self.vocabulary_rows = embedding.info.shape[0] * self.tp
        shapes = parameter_shapes(self.config)
        self._sharded = ShardedTensors(shapes)
        self._locate(states, shapes)
        self._sharded.check_complete(self.folder, shapes)
        self._sharded.check_replicas(1 << 20, whole=(EMBEDDING,))

    def other_contents(self) -> list[str]:
        """Name the other files of the folder."""
        return sorted(path.name for path in self.folder.iterdir() if _FILE.fullmatch(path.name) is None)

    def check(self) -> bool:
        """Read everything once: compare checksums, and all parts that several files hold."""
        for file in self._files.values():
            file.check()
        self._sharded.check_replicas()
        return True

    def _check_files(self, found: set[tuple[int, int]]) -> None:
        layers = [1, *range(FIRST_LAYER, FIRST_LAYER + self.config.num_layers), self._last]
        for number, rank in ((n, r) for n in layers for r in range(self.tp)):
            if (number, rank) not in found:
                raise CheckpointError(f"{self.folder} lacks {_name(number, rank)}; copy it again")
        extra = sorted(found - {(n, r) for n in layers for r in range(self.tp)})
        if extra:
            raise CheckpointError(
                f"{self.folder} holds {_name(*extra[0])}, which a model of "
                f"{self.config.num_layers} layers does not have"
            )

    @property
    def _last(self) -> int:
        return FIRST_LAYER + self.config.num_layers + 1

    def _locate(
        self, states: dict[tuple[int, int], dict[str, StoredTensor]], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        stage = PipelineChunk(range(self.config.num_layers), is_first=True, is_last=True)
        name_map = ascendspeed_gpt()
        for packed in name_map.of_chunk(shapes, self.config, stage, self.vocabulary_rows):
            number, name = self._file_of(packed.key)
            for rank in range(self.tp):
                state = states[number, rank]
                short = name.removeprefix("final_layernorm.")
                key = next((key for key in (name, short) if key in state), None)
                if key is None:
                    raise CheckpointError(f"{self.folder / _name(number, rank)} lacks {name}; copy it again")
                where = f"{_name(number, rank)}: {key}"
                self._sharded.add(where, packed.of_rank(rank, self.tp), state.pop(key))
        for (number, rank), state in states.items():
            if state:
                raise CheckpointError(
                    f"{self.folder / _name(number, rank)} holds {min(state)}, which the model does not have"
                )

    def _file_of(self, key: str) -> tuple[int, str]:
        """Return number of the file and name in it of a tensor of `GPTModel`."""
        key = key.replace("/", ".").removeprefix("language_model.")
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)", key)
        if match:
            return FIRST_LAYER + int(match.group(1)), match.group(2)
        if key.startswith("encoder."):
            return self._last, key.removeprefix("encoder.")
        return 1, key.removeprefix("embedding.")


def step_folder(path: Path) -> Path:
    """Return the folder with the layer files: `path`, or the one that `latest` names.

    Raises:
        CheckpointError: it names nothing that is there, or something outside.
    """
    latest = path / LATEST
    if not latest.is_file():
        return path
    name = read_name(latest)
    folder = path / name
    if not name or not folder.is_dir() or folder.resolve().parent != path.resolve():
        raise CheckpointError(f"{latest} names {name!r}, which is no folder in {path}; copy it again")
    return folder


def _open_files(folder: Path) -> dict[tuple[int, int], TorchFile]:
    found = {}
    for path in sorted(folder.glob("layer_*")):
        match = _FILE.fullmatch(path.name)
        if match:
            found[int(match.group(1)), int(match.group(2))] = TorchFile(inside(folder, path.name))
    if (1, 0) not in found:
        raise CheckpointError(f"{folder} lacks {_name(1, 0)}, which holds the embedding; copy it again")
    return found


def _name(number: int, rank: int) -> str:
    return f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
