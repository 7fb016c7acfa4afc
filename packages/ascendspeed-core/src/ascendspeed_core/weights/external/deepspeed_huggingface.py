"""Read what DeepSpeed's engine writes of a Hugging Face model under ZeRO-1 and 2, or without ZeRO.

    config.json                              written beside by the Trainer of transformers, or given
    latest                                   "global_step5"
    global_step5/mp_rank_00_model_states.pt  {"module": {"model.embed_tokens.weight": ...}, "dp_world_size": 8, ...}

The tensors are the weights that the run computed with; the fp32 masters lie in shares in `*_optim_states.pt`.
"""

from pathlib import Path

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights.external.deepspeed_ranks import open_deepspeed_ranks
from ascendspeed_core.weights.external.detect_format import detect_name_map
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.files.torch_files import TorchFile
from ascendspeed_core.weights.huggingface.files import without_wrappers
from ascendspeed_core.weights.huggingface.source import HuggingFaceSource, StoredWeights
from ascendspeed_core.weights.source import CheckpointError, UnknownModelError

_ADAPTER = (".lora_A.", ".lora_B.", ".lora_embedding_")
_OPTIMIZER_STATES = "*_optim_states.pt"


class DeepSpeedHuggingFaceSource(HuggingFaceSource):
    """The weights of a Hugging Face model in a file of DeepSpeed's engine.

    Args:
        path: the folder as the user named it.
        folder: the one with the file.
        config: the architecture, where no config.json lies beside.
    """

    kind = "deepspeed"

    def __init__(self, path: Path, folder: Path, config: ModelConfig | None = None) -> None:
        files, states = open_deepspeed_ranks(folder)
        self._file: TorchFile = files[0, 0]
        if len(files) > 1:
            raise CheckpointError(
                f"{folder} holds a Hugging Face model that DeepSpeed cut for {len(files)} tensor-parallel ranks, which "
                "is not read; use the weights that the run wrote with save_16bit_model or save_pretrained"
            )
        tensors = without_wrappers(states[0, 0].tensors, self._file.path)
        adapter = next((name for name in tensors if any(part in name for part in _ADAPTER)), None)
        if adapter is not None:
            raise CheckpointError(
                f"{self._file.path} holds a model with an adapter of peft inside ({adapter}); give --lora-load the "
                "folder with adapter_model.safetensors, and --load the model that it was trained on"
            )
        super().__init__(path, StoredWeights(_hugging_face_config(folder, config), tensors))
        formats = sorted({str(tensor.info.dtype).removeprefix("torch.") for tensor in tensors.values()})
        if any(folder.glob(_OPTIMIZER_STATES)):
            announce(
                f"{self._file.path}: read are the weights of the model, in {' and '.join(formats)}; not read: the fp32 "
                "masters in *_optim_states.pt, which DeepSpeed's zero_to_fp32.py joins"
            )

    def other_contents(self) -> list[str]:
        """Name what lies in the folder of the step beside the weights."""
        return sorted(path.name for path in self._file.path.parent.iterdir() if path != self._file.path)

    def check(self) -> bool:
        """Read everything once and compare the checksums."""
        self._file.check()
        return True


def holds_hugging_face_names(folder: Path) -> bool:
    """Tell whether the files of DeepSpeed's engine in a folder hold a model under Hugging Face's names.

    Raises:
        CheckpointError: a file is missing or damaged, or holds no weights.
    """
    _, states = open_deepspeed_ranks(folder)
    tensors: dict[str, StoredTensor] = states[0, 0].tensors
    try:
        detect_name_map(tensors, folder)
    except CheckpointError:
        return not any("language_model." in name or "decoder.layers." in name for name in tensors)
    return False


def _hugging_face_config(folder: Path, config: ModelConfig | None) -> dict[str, object]:
    """Return the config.json of the step's folder or of its parent, or the one that says what `config` says."""
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            return dict(read_json(path))
    if config is not None:
        return find_family(config.family).write_config(config)
    raise UnknownModelError(
        f"{folder} holds a Hugging Face model, but does not say which; put the model's config.json into it, or name it "
        "with --model-config"
    )
