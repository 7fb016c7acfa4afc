"""Loading reads the slices that a process keeps, once, into their place: counted in bytes of memory."""

import ctypes
import gc
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_ckpt.writers.native import write_native
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_core.weights.files import file_tensor
from ascendspeed_core.weights.files.file_tensor import StoredFile, StoredTensor
from ascendspeed_core.weights.files.safetensors_files import read_safetensors
from ascendspeed_core.weights.source import CheckpointError, TensorInfo
from support.models import tiny_config
from support.processes import WorkerPool

CONFIG = tiny_config(
    vocab_size=8000, hidden_size=768, ffn_hidden_size=2048, num_layers=3, num_attention_heads=12, head_dim=64
)
"""31 million weights: what else a process does in the meantime is small beside them."""
BESIDES_BYTES = 12 << 20
"""Slabs of 2 MB on their way, in two formats, and what Python and the allocator take."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    source = InitialWeights(CONFIG, 3)
    for name in ("float32", "bfloat16", "pickled", "native"):
        (folder / name).mkdir()
    write_hugging_face(source, folder / "float32", None, 1 << 30)
    write_hugging_face(source, folder / "bfloat16", torch.bfloat16, 1 << 30)
    write_hugging_face(source, folder / "pickled", None, 1 << 30, pickled=True)
    write_native(source, folder / "native", None)
    return {path.name: path for path in folder.iterdir()}


def memory(kind: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) * 1024


def loaded(folder: Path, dtype: str, joined: bool, tp: int) -> tuple[int, int]:
    """Load; return the growth of this process's memory at its peak, and the weights' bytes."""
    mesh = ParallelMesh.create(Device("cpu"), Layout(tp=tp))
    # What the first loading in a process imports.
    load_model(InitialWeights(tiny_config(), 0), mesh, torch.float32)
    open_weights(folder).read("final_norm.weight")
    # Memory that is freed only now, or was not given back, would hide growth.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    model = load_model(open_weights(folder), mesh, getattr(torch, dtype), joined)
    peak = memory("VmHWM") - before
    return peak, sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "pickled", "native"])
def test_no_process_holds_more_than_its_own_slices(
    checkpoints: dict[str, Path], workers: WorkerPool, kind: str, joined: bool, tp: int
) -> None:
    for peak, size in workers.run(loaded, tp, checkpoints[kind], "float32", joined, tp):
        assert size > 60e6 * (2 if tp == 1 else 1)
        assert peak < 1.1 * size + BESIDES_BYTES


STRIDES = {
    "rows": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1),
    "every second": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(9, -1, -1),
    "turned": lambda t: t.permute(2, 0, 1),
}


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("limits", [(1 << 21, 1 << 16), (64, 16), (8, 0), (1024, 1 << 16)])
def test_any_slice_of_any_stride(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, limits: tuple[int, int]
) -> None:
    """Whatever is read at once and along."""
    monkeypatch.setattr(file_tensor, "BUFFER_BYTES", limits[0])
    monkeypatch.setattr(file_tensor, "WORTH_A_CALL_BYTES", limits[1])
    whole = torch.arange(7 * 5 * 6, dtype=torch.float32).view(7, 5, 6)
    (tmp_path / "file").write_bytes(b"xyz" + whole.numpy().tobytes())
    view = STRIDES[kind](whole)
    tensor = StoredTensor(
        StoredFile(tmp_path / "file"),
        TensorInfo(tuple(view.shape), view.dtype),
        3 + 4 * view.storage_offset(),
        view.stride(),
    )
    assert torch.equal(tensor.read(), view)
    draw = random.Random(kind)
    for _ in range(30):
        ends = [sorted(draw.choices(range(length + 1), k=2)) for length in view.shape]
        index = tuple(slice(*pair) for pair in ends)
        assert torch.equal(tensor.read(index), view[index])
        assert torch.equal(tensor.read(index[:1]), view[index[:1]])


def test_safetensors_are_read_as_their_own_library_does(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": torch.randn(3, 4).bfloat16(),
        "a": torch.randn(5),
        "none": torch.zeros(0, 3, dtype=torch.float16),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "ids": torch.arange(4),
    }
    save_file(tensors, path, {"format": "pt"})
    found, want = read_safetensors(path), load_file(path)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name].read(), tensor) for name, tensor in want.items())


def written(path: Path, header: object, data: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def entry(shape: object, start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


DAMAGE = {
    "no JSON": (b"{", 4),
    "no object": (["a"], 0),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "a size that is no number": ({"a": entry(["1"], 0, 4)}, 4),
    "a negative size": ({"a": entry([-1], 0, 4)}, 4),
    "an unknown format": ({"a": entry([1], 0, 4, "F31")}, 4),
    "another size than its bytes": ({"a": entry([2], 0, 4)}, 4),
    "tensors on one another": ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8),
    "a gap": ({"a": entry([1], 4, 8)}, 8),
    "too few bytes": ({"a": entry([2], 0, 8)}, 4),
    "too many bytes": ({"a": entry([1], 0, 4)}, 8),
    "offsets that are none": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": 4}}, 4),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_safetensors_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read: .*copy it again$"):
        read_safetensors(written(tmp_path / "x.safetensors", *DAMAGE[damage]))


@pytest.mark.parametrize("content", [b"", b"\1\2", struct.pack("<Q", 1 << 60) + b"{}"])
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "x.safetensors")
    found = read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is cut short"):
        found["a"].read()
