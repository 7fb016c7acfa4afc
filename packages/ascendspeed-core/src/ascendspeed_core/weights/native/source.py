"""Read a native checkpoint, which is a torch distributed checkpoint (DCP) with a description, by slices.

Files of a run's folder, all written by `training.checkpoint`:

    latest_checkpointed_iteration.txt    "100"
    iter_0000100/checkpoint.json         model config, iteration, run config; written last
    iter_0000100/.metadata, *.distcp     DCP: tensors by logical name, one or more shards each
    iter_0000100/checksums.json          CRC-32 of every shard
    tokenizer/                           files of the tokenizer, if the run had one

Tensor names: `model/NAME`, `optimizer/exp_avg/NAME`, `optimizer/exp_avg_sq/NAME`, `optimizer/master/NAME`,
`rng/RANK`. A checkpoint is one logical model: how it was sharded shows only in the list of shards.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.linear import LowRank
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.files.distributed_reader import DistributedTensors
from ascendspeed_core.weights.files.json_file import read_iteration
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.description import read_description
from ascendspeed_core.weights.source import (
    BaseWeightSource,
    CheckpointError,
    Index,
    TensorInfo,
    read_data_manifest,
)
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.manifest import DatasetManifest

TRACKER = "latest_checkpointed_iteration.txt"
DESCRIPTION = "checkpoint.json"
TOKENIZER = "tokenizer"
ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")


class NativeSource(BaseWeightSource):
    """The weights of a native checkpoint, and its training state.

    Args:
        path: a run's folder, or one `iter_*` folder in it.
        is_adapter: the checkpoint must hold adapters alone, without the weights that they belong to.
    """

    kind = "native"

    def __init__(self, path: Path, is_adapter: bool = False) -> None:
        self.path: Path | None = path
        self.folder = iteration_folder(path)
        self.description = read_description(self.folder / DESCRIPTION)
        adapters = self.description.get("adapters")
        if adapters and not is_adapter:
            raise CheckpointError(
                f"{self.folder} holds an adapter only; give its base ({adapters['base'] or 'random weights'}) with "
                "--load, and this folder with --lora-load, to asd-core finetune, asd-infer or asd-eval; asd-ckpt "
                "merge-lora merges the two"
            )
        if is_adapter and not adapters:
            raise CheckpointError(
                f"{self.folder} holds all weights, not an adapter; give it with --load, without options of adapters"
            )
        try:
            self.config: ModelConfig = validate(ModelConfig, self.description["model"], strict=True)
        except ConfigError as error:
            raise CheckpointError(f"{self.folder / DESCRIPTION}: no valid model config: {error}") from None
        self.stored = DistributedTensors(self.folder)
        self._check_tensors()

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer of the run, if it had one."""
        for folder in (self.folder, self.folder.parent):
            if (folder / TOKENIZER).is_dir():
                return folder / TOKENIZER
        return None

    @property
    def data_manifest(self) -> DatasetManifest | None:
        """Manifest of the data that the run was trained on, if it had one."""
        return find_data_manifest(self.folder)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every weight by its name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        prefix = "model/"
        return {
            name.removeprefix(prefix): self.stored.info(name)
            for name in self.stored.names()
            if name.startswith(prefix)
        }

    def _check_tensors(self) -> None:
        """Compare names and shapes of the weights with those of the model, or of what is trained of it.

        Raises:
            CheckpointError: one is missing, is too many, or has another shape.
        """
        whole = parameter_shapes(self.config)
        expected = whole
        if adapters := self.description.get("adapters"):
            layers = {name: LowRank(**values) for name, values in adapters["layers"].items()}
            unknown = [f"{name}.weight" for name in layers if len(whole.get(f"{name}.weight", ())) != 2]
            unknown += [name for name in adapters["trained"] if name not in whole]
            if unknown:
                raise CheckpointError(f"{self.folder}: its adapter is of {unknown[0]}, which the model lacks")
            plan = AdapterPlan(layers, frozenset(adapters["trained"]))
            expected = plan.shapes(whole) | {name: whole[name] for name in plan.trained}
        for name in sorted(expected.keys() | self._infos.keys()):
            have = list(self._infos[name].shape) if name in self._infos else "missing"
            want = list(expected[name]) if name in expected else "none"
            if have != want:
                raise CheckpointError(
                    f"{self.folder}: {name} is {have}, the model's is {want}; its description and its weights "
                    "disagree, so copy it again"
                )

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice of a weight."""
        return self.stored.read(f"model/{name}", index)

    def other_contents(self) -> list[str]:
        """Name the kinds of state that are stored beside the weights: `optimizer`, `rng`, ..."""
        return sorted({name.partition("/")[0] for name in self.stored.names()} - {"model"})

    def details(self) -> dict[str, Any]:
        """Return the iteration, and the layout of the run that wrote the checkpoint."""
        return {"iteration": self.description["iteration"], "layout": self.description["layout"]}

    def check(self) -> bool:
        """Read everything once and compare the checksums."""
        self.stored.check()
        return True


def find_data_manifest(folder: Path) -> DatasetManifest | None:
    """Return the manifest of the training data beside a checkpoint, or in the folder of its run, if there is one."""
    return read_data_manifest(folder) or read_data_manifest(folder.parent)


def iteration_folder(path: Path) -> Path:
    """Return the checkpoint to use: `path` itself, or the one that the run's tracker names.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    if (path / DESCRIPTION).is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{path} holds no checkpoint: neither {DESCRIPTION} nor {TRACKER} is there")
    text = read_iteration(tracker)
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker} says {text!r}, not an iteration; write the number of a complete checkpoint"
        )
    folder = path / f"iter_{int(text):07d}"
    if not (folder / DESCRIPTION).is_file():
        complete = sorted(p.name for p in path.glob("iter_*") if (p / DESCRIPTION).is_file())
        raise CheckpointError(
            f"{tracker} names iteration {text}, but {folder.name} is missing or incomplete; "
            f"complete are {', '.join(complete) or 'none'}: name one of these folders with --load"
        )
    return folder
