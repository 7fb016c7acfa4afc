"""Read LoRA adapters in peft's format: `adapter_config.json`, and the matrices A and B of each adapted layer.

A file must hold exactly what its config promises for the model, and gives then what peft's `from_pretrained` gives.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.weights.adapters.adapter_config import CONFIG, read_adapter_config
from ascendspeed_core.weights.adapters.hugging_face import TIED_HEAD, hugging_face_tensors
from ascendspeed_core.weights.adapters.promised import HEAD_MODULE, Promise, promise_of
from ascendspeed_core.weights.files.safetensors_files import read_safetensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.native.source import TRACKER, iteration_folder
from ascendspeed_core.weights.source import CheckpointError, inside

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PREFIX = "base_model.model."
ROWS_AT_ONCE = 256

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>\w+))?\.weight")
_EMBEDDING_HALF = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<half>[AB])(?:\.(?P<adapter>\w+))?")
_WRAPPED = re.compile(r"(?P<module>.+?)\.(?P<part>modules_to_save|original_module|base_layer)\.(?P<rest>.+)")


@dataclass(frozen=True)
class Update:
    """What is added to one tensor of a Hugging Face model.

    Attributes:
        a: [r, in], or [r, ids] for an embedding.
        b: [out, r].
        scale: factor of b @ a.
        is_embedding: the tensor is [ids, H], and a and b are of its transpose.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor that it is added to."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.is_embedding else (out, into)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of the update, whole, in fp32."""
        left, right = (self.a.T, self.b.T) if self.is_embedding else (self.b, self.a)
        first = start // ROWS_AT_ONCE * ROWS_AT_ONCE
        parts = [
            left[at : at + ROWS_AT_ONCE].float() @ right.float() * self.scale
            for at in range(first, stop, ROWS_AT_ONCE)
        ]
        return torch.cat(parts)[start - first : stop - first]


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to a model, whatever it was read from.

    Attributes:
        folder: where it lies.
        updates: what is added, by module of the Hugging Face model.
        saved: tensors that replace the model's, by name in the Hugging Face model.
        frozen: those of `saved` that peft does not train further.
        unties: embedding and head of a tied model become two tensors, since only one of them is changed.
        dropout: share of an adapter's input that was dropped while it was trained.
        remarks: what the user should know, each one line.
    """

    folder: Path
    updates: Mapping[str, Update]
    saved: Mapping[str, torch.Tensor]
    frozen: frozenset[str] = frozenset()
    unties: bool = False
    dropout: float = 0.0
    remarks: tuple[str, ...] = ()

    def announce(self, base: Path | None) -> None:
        """Log what the user should know, once for all ranks.

        Args:
            base: path of the model that it is loaded onto.
        """
        for remark in self.remarks:
            announce(remark)
        if self.unties:
            announce(
                f"{self.folder} changes only one of the tied embedding and head of {base}; the model gets both"
            )


def has_peft_config(folder: Path) -> bool:
    """Whether a folder is an adapter in peft's format, or meant to be one."""
    return any((folder / name).is_file() for name in (CONFIG, WEIGHTS, PICKLED))


def read_adapter(folder: Path, model: ModelConfig, base: Path | None) -> Adapter:
    """Read an adapter in peft's format.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`; or the folder of a run that
            trained one, whose newest checkpoint is taken.
        model: architecture of the model that it belongs to.
        base: path of that model, to compare with the name that the adapter gives it.

    Raises:
        CheckpointError: it is incomplete, of another model, or of a kind that is not done here.
    """
    if not (folder / CONFIG).is_file() and (folder / TRACKER).is_file():
        folder = iteration_folder(folder)
    tensors, remarks = _read_tensors(folder)
    config = read_adapter_config(folder / CONFIG)
    promise = promise_of(config, model, folder / CONFIG)
    content = _Content(folder, promise, model)
    for key, tensor in tensors.items():
        content.add(key, tensor)
    content.check_complete(config.bias)
    adapter = content.adapter(config.bias)
    said = _other_base(folder, config.base_model_name_or_path, config.revision, base)
    return replace(adapter, dropout=float(config.lora_dropout), remarks=(*remarks, *promise.remarks, *said))


def _other_base(folder: Path, name: str | None, revision: str | None, base: Path | None) -> Iterator[str]:
    if name and base is not None and Path(name).name != base.resolve().name and Path(name) != base:
        at = f" at revision {revision}" if revision else ""
        yield f"{folder} was trained on {name}{at}; it is loaded onto {base}: check that both are the same model"


def _read_tensors(folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return all tensors of the file that peft would take, and a remark on the one that it would not."""
    path, other = folder / WEIGHTS, folder / PICKLED
    if path.is_file():
        unread = [f"{other} is not read: {WEIGHTS} lies beside it"] if other.is_file() else []
        stored = read_safetensors(inside(folder, path.name))
        return {name: tensor.read() for name, tensor in stored.items()}, unread
    if other.is_file():
        file = TorchFile(inside(folder, other.name))
        return {name: tensor.read() for name, tensor in stored_tensors(file.content)}, []
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {PICKLED}; check --lora-load")


class _Content:
    """The tensors of an adapter's file, sorted by what peft does with each.

    Args:
        folder: of the adapter, for messages.
        promise: what its config says of it.
        model: the architecture.
    """

    def __init__(self, folder: Path, promise: Promise, model: ModelConfig) -> None:
        tensors = hugging_face_tensors(model)
        self._folder, self._promise = folder, promise
        self._is_tied = model.tie_word_embeddings
        self._embedding = tensors["embedding.weight"].name.removesuffix(".weight")
        self._names = {hf.name for hf in tensors.values()} | ({TIED_HEAD} if self._is_tied else set())
        self._halves: dict[str, dict[str, torch.Tensor]] = {}
        self._copies: dict[str, torch.Tensor] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        """Of the base itself: a tied tensor changes for embedding and head."""
        self._adapters: set[str] = set()

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take a tensor of the file by its name, with peft's prefix and the adapter's name in it or without."""
        where = f"{self._folder}: {key}"
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{where} is of {tensor.dtype}, no floating-point number; copy the adapter again"
            )
        if tensor.dtype.itemsize == 1:
            # torch computes with few of the 8-bit types; peft, too, holds them as fp32.
            tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{where} holds values that are no finite numbers; the training that wrote it diverged"
            )
        name = key.removeprefix(PREFIX)
        half, wrapped = _HALF.fullmatch(name) or _EMBEDDING_HALF.fullmatch(name), _WRAPPED.fullmatch(name)
        owner = name.rpartition(".")[0]
        if half:
            if half["adapter"]:
                self._adapters.add(half["adapter"])
            self._add_half(where, half["module"], half["half"], half.re is _EMBEDDING_HALF, tensor)
        elif wrapped:
            self._add_wrapped(where, wrapped["module"], wrapped["part"], wrapped["rest"], tensor)
        elif name in self._names and self._is_saved(owner):
            self._put(self._copies, name, tensor, where)
        elif name in self._names and owner not in self._promise.layers:
            self._put(self._replaced, name, tensor, where)
        else:
            raise self._unread(where)

    def _add_wrapped(self, where: str, module: str, part: str, rest: str, tensor: torch.Tensor) -> None:
        """Take a tensor of a module that peft keeps beside the base's, or of the base's own under it."""
        name = f"{module}.{rest}"
        if part == "base_layer":
            is_promised, into = module in self._promise.layers, self._replaced
        else:
            is_promised = module in self._promise.saved
            into = self._copies if part == "modules_to_save" else self._replaced
        if part == "modules_to_save" and name not in self._names:
            adapter, _, rest = rest.partition(".")
            self._adapters.add(adapter)
            name = f"{module}.{rest}"
        if not is_promised or name not in self._names:
            raise self._unread(where)
        self._put(into, name, tensor, where)

    def _unread(self, where: str) -> CheckpointError:
        return CheckpointError(
            f"{where} is a tensor that {CONFIG} does not speak of, or that this model does not have; the adapter is of "
            "another model, or its two files are not of one adapter"
        )

    def _is_saved(self, module: str) -> bool:
        return any(module == one or module.startswith(f"{one}.") for one in self._promise.saved)

    def _add_half(self, where: str, module: str, half: str, is_embedding: bool, tensor: torch.Tensor) -> None:
        layer = self._promise.layers.get(module)
        if layer is None:
            raise CheckpointError(
                f"{where} belongs to a module that target_modules does not mean in this model; the adapter is of "
                "another model, or its two files are not of one adapter"
            )
        rank_dim = 0 if half == "A" else 1
        if tensor.dim() != 2 or tensor.shape[rank_dim] != layer.rank or 0 in tensor.shape:
            raise CheckpointError(
                f"{where} has shape {list(tensor.shape)}, and {CONFIG} says rank r={layer.rank}; an adapter saved "
                "under ZeRO-3 or FSDP without gathering its weights looks like this: save it again"
            )
        if is_embedding != layer.is_embedding:
            raise CheckpointError(
                f"{where} is not what peft makes beside this kind of module; copy the adapter again"
            )
        self._put(self._halves.setdefault(module, {}), half, tensor, where)

    def _put(self, into: dict[str, torch.Tensor], name: str, tensor: torch.Tensor, where: str) -> None:
        if name in into and not torch.equal(into[name], tensor):
            raise CheckpointError(f"{where} is there twice, with other values; copy the adapter again")
        into[name] = tensor

    def check_complete(self, bias: str) -> None:
        """Compare what was found with what the config promises.

        Args:
            bias: peft's field of that name.
        """
        folder, promise = self._folder, self._promise
        if not self._halves and not self._copies:
            raise CheckpointError(
                f"{folder} holds no tensors of an adapter, so it would change nothing; an adapter saved under ZeRO-3 "
                "or FSDP without gathering its weights looks like this: save it again"
            )
        if len(self._adapters) > 1:
            raise CheckpointError(
                f"{folder} holds tensors of several adapters: {', '.join(sorted(self._adapters))}; save one alone"
            )
        missing = [
            f"{module}.lora_{'embedding_' * layer.is_embedding}{half}"
            for module, layer in promise.layers.items()
            for half in "AB"
            if half not in self._halves.get(module, {})
        ]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {_listed(missing)}, which target_modules promises; copy it again, or say with "
                f"layers_to_transform or exclude_modules in {CONFIG} what it leaves out"
            )
        lacking = sorted(
            name
            for name in self._names
            if self._is_saved(name.rpartition(".")[0]) and name not in self._copies
        )
        if lacking:
            raise CheckpointError(
                f"{folder} lacks {_listed(lacking)}, which modules_to_save promises; copy it again"
            )
        biases = sorted(self._biases(bias) - self._copies.keys() - self._replaced.keys())
        if biases:
            raise CheckpointError(
                f"{folder} lacks {_listed(biases)}, which bias={bias!r} promises; copy it again"
            )

    def _biases(self, bias: str) -> set[str]:
        """Return the biases that the adapter trained."""
        if bias == "none":
            return set()
        biases = {name for name in self._names if name.endswith(".bias")}
        return biases if bias == "all" else {name for name in biases if name[:-5] in self._promise.layers}

    def adapter(self, bias: str) -> Adapter:
        """Return what was found, by what it does to the model.

        Args:
            bias: peft's field of that name.
        """
        updates = {
            module: Update(
                self._halves[module]["A"], self._halves[module]["B"], layer.scale, layer.is_embedding
            )
            for module, layer in self._promise.layers.items()
        }
        saved = {**self._replaced, **self._copies}
        frozen = frozenset(self._replaced.keys() - self._copies.keys() - self._biases(bias))
        unties = self._is_tied and self._resolve_tie(updates, saved)
        return Adapter(self._folder, updates, saved, frozen & saved.keys(), unties)

    def _resolve_tie(self, updates: dict[str, Update], saved: dict[str, torch.Tensor]) -> bool:
        """Find out whether embedding and head of a tied model still are one tensor; what is left is for that.

        Returns:
            Whether they become two.
        """
        embedding = f"{self._embedding}.weight"
        base = [self._replaced[name] for name in (embedding, TIED_HEAD) if name in self._replaced]
        if len(base) == 2 and not torch.equal(*base):
            raise CheckpointError(
                f"{self._folder} holds two values for the tied {embedding} and {TIED_HEAD}; copy it again"
            )
        own = {name: self._copies.get(name, base[0] if base else None) for name in (embedding, TIED_HEAD)}
        first, second = own[embedding], own[TIED_HEAD]
        is_same = torch.equal(first, second) if first is not None and second is not None else first is second
        ours, theirs = updates.get(self._embedding), updates.get(HEAD_MODULE)
        if ours is not None and theirs is not None and self._promise.keeps_tie:
            is_same = is_same and torch.equal(ours.a.T, theirs.b) and torch.equal(ours.b.T, theirs.a)
        elif ours is not None or theirs is not None:
            is_same = False
        if self._promise.keeps_tie and not is_same:
            raise CheckpointError(
                f"{self._folder} holds other values for {embedding} than for {TIED_HEAD}, and {CONFIG} says "
                "ensure_weight_tying; copy it again"
            )
        for name, value in own.items():
            saved.pop(name, None)
            if value is not None and (name == embedding or not is_same):
                saved[name] = value
        if is_same:
            updates.pop(HEAD_MODULE, None)
        return not is_same


def _listed(names: Collection[str]) -> str:
    first = ", ".join(sorted(names)[:4])
    return first if len(names) <= 4 else f"{first} and {len(names) - 4} more"
