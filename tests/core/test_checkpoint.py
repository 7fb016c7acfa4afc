"""Checkpoints: any layout reads what any layout wrote; damage and malice are refused by name."""

import io
import json
import pickle
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.checkpoint import (
    CheckpointWriter,
    Retention,
    TrainState,
    load_optimizer,
    load_random_state,
    saved_iterations,
)
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, NativeSource, open_weights
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.source import CheckpointError
from core.training_cases import TensorShard, join, micro_batches
from support.models import tiny_config
from support.processes import WorkerPool

CONFIG = tiny_config(tie_word_embeddings=True, vocab_size=125)


class Setup:
    """A model and its optimizer on this process."""

    def __init__(self, source: Any, layout: Layout, dtype_name: str) -> None:
        self.mesh = ParallelMesh.create(Device("cpu"), layout)
        self.model = load_model(source, self.mesh, getattr(torch, dtype_name))
        self.engine = NativeEngine(self.model, OptimizerConfig(lr=1e-3), self.mesh)

    def step(self, number: int) -> float:
        batches = micro_batches(CONFIG.vocab_size, number, self.mesh, 4, masked=True)
        return train_step(self.model, self.engine, batches, self.mesh).loss

    def pieces(self) -> dict[str, TensorShard]:
        """Everything that is here."""
        slices = parameter_slices(self.model, self.mesh)
        state = {f"optimizer/{name}": piece for name, piece in self.engine.optimizer.state().items()}
        return {name: (slices[name], p.detach()) for name, p in self.model.named_parameters()} | state


def write(
    folder: str, layout: Layout, dtype_name: str, steps: int = 3, in_background: bool = False
) -> dict[str, TensorShard]:
    """Train some steps, save, and return everything that is here; saved in the background, train on meanwhile."""
    setup = Setup(InitialWeights(CONFIG, 5), layout, dtype_name)
    for number in range(steps):
        setup.step(number)
    pieces = {name: (part, tensor.clone()) for name, (part, tensor) in setup.pieces().items()}
    writer = CheckpointWriter(Path(folder), setup.mesh, in_background=in_background)
    writer.save(TrainState(steps, steps * 16, 0, steps, {}), setup.model, setup.engine, {})
    if in_background:
        setup.step(steps)
    writer.wait()
    return pieces


def read(
    folder: str, layout: Layout, dtype_name: str, more_steps: int
) -> tuple[dict[str, TensorShard], list[float]]:
    """Load, return everything that is here, and the losses of further steps."""
    source = open_weights(Path(folder))
    assert isinstance(source, NativeSource)
    setup = Setup(source, layout, dtype_name)
    load_optimizer(source, setup.engine, source.description["optimizer_steps"])
    load_random_state(source, setup.mesh)
    pieces = {name: (part, tensor.clone()) for name, (part, tensor) in setup.pieces().items()}
    return pieces, [setup.step(3 + number) for number in range(more_steps)]


def joined(ranks: list[dict[str, TensorShard]]) -> dict[str, torch.Tensor]:
    """All tensors whole, from what all ranks hold; copies must be equal."""
    names = {name for pieces in ranks for name in pieces}
    return {name: join([pieces[name] for pieces in ranks if name in pieces]) for name in names}


def read_by_torch(run: Path) -> dict[str, torch.Tensor]:
    """All tensors as torch's own reader of distributed checkpoints finds them."""
    from torch.distributed.checkpoint import FileSystemReader, load

    (folder,) = run.glob("iter_*")
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def losses_without_a_stop(layout: Layout, dtype_name: str, steps: int) -> list[float]:
    setup = Setup(InitialWeights(CONFIG, 5), layout, dtype_name)
    return [setup.step(number) for number in range(steps)]


SHARDED = Layout(tp=2, dp=2, sharded_optimizer=True)
CUT = Layout(cp=2, dp=2, sharded_optimizer=True)


@pytest.mark.parametrize(
    ("writer", "dtype_name"),
    [
        (Layout(), "float32"),
        (Layout(tp=2), "bfloat16"),
        pytest.param(Layout(tp=8), "float32", marks=pytest.mark.nightly),
        (Layout(tp=2, dp=2), "float32"),
        (Layout(pp=3), "bfloat16"),
        (Layout(tp=2, pp=2, sequence_parallel=True), "float32"),
        (SHARDED, "bfloat16"),
        (Layout(pp=2, dp=4, sharded_optimizer=True), "float32"),
        (CUT, "bfloat16"),
    ],
    ids=str,
)
def test_any_layout_reads_what_any_layout_wrote(
    workers: WorkerPool, tmp_path: Path, writer: Layout, dtype_name: str
) -> None:
    written = joined(workers.run(write, writer.world_size, str(tmp_path), writer, dtype_name))
    for reader in (
        Layout(),
        Layout(tp=4),
        Layout(dp=4, sharded_optimizer=True),
        Layout(pp=4),
        Layout(tp=2, pp=2),
        SHARDED,
    ):
        found = workers.run(read, reader.world_size, str(tmp_path), reader, dtype_name, 0)
        tensors = joined([pieces for pieces, _ in found])
        assert tensors.keys() == written.keys()
        assert all(torch.equal(tensors[name], written[name]) for name in written), reader
    torchs = {name.removeprefix("model/"): tensor for name, tensor in read_by_torch(tmp_path).items()}
    assert {name for name in torchs if not name.startswith("rng/")} == written.keys()
    assert all(torch.equal(torchs[name], written[name]) for name in written)
    source = open_weights(tmp_path)
    assert source.config == CONFIG
    assert all(torch.equal(source.read(name), written[name]) for name in source.tensors())
    assert source.read("embedding.weight", (slice(30, 70), slice(3, 9))).equal(
        written["embedding.weight"][30:70, 3:9]
    )
    if dtype_name == "bfloat16":
        masters = [name for name in written if name.startswith("optimizer/master/")]
        assert all(written[name].dtype == torch.float32 for name in masters)
        assert len(masters) == len(source.tensors())


@pytest.mark.parametrize("dtype_name", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2), Layout(dp=2), Layout(pp=2), SHARDED, CUT], ids=str
)
def test_a_resumed_run_goes_on_bit_for_bit(
    workers: WorkerPool, tmp_path: Path, layout: Layout, dtype_name: str
) -> None:
    workers.run(write, layout.world_size, str(tmp_path), layout, dtype_name)
    _, losses = workers.run(read, layout.world_size, str(tmp_path), layout, dtype_name, 4)[0]
    without = workers.run(losses_without_a_stop, layout.world_size, layout, dtype_name, 7)[0]
    assert losses == without[3:]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), SHARDED], ids=str)
def test_saving_in_the_background_keeps_the_moment(
    workers: WorkerPool, tmp_path: Path, layout: Layout
) -> None:
    """The step that was taken while the files were written is not in them."""
    written = joined(
        workers.run(write, layout.world_size, str(tmp_path), layout, "float32", in_background=True)
    )
    found = joined([read(str(tmp_path), Layout(), "float32", 0)[0]])
    assert all(torch.equal(found[name], written[name]) for name in written)


def write_several(folder: str, layout: Layout, iterations: list[int], retention: Retention) -> list[str]:
    setup = Setup(InitialWeights(CONFIG, 5), layout, "float32")
    writer = CheckpointWriter(Path(folder), setup.mesh, retention)
    for iteration in iterations:
        writer.save(TrainState(iteration, 0, 0, 0, {}), setup.model, setup.engine, {})
    return sorted(path.name for path in Path(folder).iterdir())


def test_retention(workers: WorkerPool, tmp_path: Path) -> None:
    (tmp_path / "iter_0000099.incomplete").mkdir()
    names = workers.run(
        write_several, 2, str(tmp_path), Layout(tp=2), list(range(10, 90, 10)), Retention(2, 30)
    )[0]
    kept = ["iter_0000030", "iter_0000060", "iter_0000070", "iter_0000080"]
    assert names == [*kept, "latest_checkpointed_iteration.txt"]


def write_where_it_cannot(folder: str, layout: Layout, broken_rank: int) -> list[str]:
    """Save, then save again where one rank's file cannot be made; the errors of both ways to save."""
    setup = Setup(InitialWeights(CONFIG, 5), layout, "float32")
    errors = []
    for iteration, in_background in ((1, False), (2, False), (3, True)):
        writer = CheckpointWriter(Path(folder), setup.mesh, in_background=in_background)
        setup.mesh.barrier()
        if iteration > 1 and setup.mesh.rank == broken_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            writer.save(TrainState(iteration, 0, 0, 0, {}), setup.model, setup.engine, {})
            writer.wait()
        except CheckpointError as error:
            errors.append(str(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return errors


@pytest.mark.parametrize("broken_rank", [0, 1])
def test_a_full_disk_leaves_what_was_there(workers: WorkerPool, tmp_path: Path, broken_rank: int) -> None:
    """One process may write 1,000 bytes and no more; all processes learn of it."""
    for errors in workers.run(write_where_it_cannot, 2, str(tmp_path), Layout(tp=2), broken_rank):
        assert len(errors) == 2
        assert all(
            "no space is left on the disk (File too large); free some; earlier ones are as they were" in error
            for error in errors
        ), errors
    assert saved_iterations(tmp_path) == [1]
    assert open_weights(tmp_path).config == CONFIG


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write(str(folder), Layout(), "float32", 1)
    return folder


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/ascendspeed-was-here"),))


def evil(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(_Evil()))


def leads_out(folder: Path) -> None:
    content = (folder / ".metadata").read_bytes()
    (name,) = (p.name for p in folder.glob("*.distcp"))
    (folder / ".metadata").write_bytes(
        content.replace(name.encode(), ("../" + "x" * 20)[: len(name)].encode())
    )


def change_description(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps(content | changes))

    return change


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (path,) = folder.glob(name)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return change


def wider(folder: Path) -> None:
    change_description(model=tiny_config(tie_word_embeddings=True, vocab_size=126).model_dump(mode="json"))(
        folder
    )


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled code": (evil, "refused"),
    "a path that leads out": (leads_out, "outside the folder; refused"),
    "metadata cut short": (cut(".metadata", 0.5), "is damaged"),
    "no metadata": (lambda f: (f / ".metadata").unlink(), "the checkpoint is incomplete"),
    "tensors cut short": (cut("*.distcp", 0.3), "is cut short"),
    "no tensors": (lambda f: [p.unlink() for p in f.glob("*.distcp")], "is missing, though the index"),
    "no description": (lambda f: (f / "checkpoint.json").unlink(), "is missing or incomplete; complete are none"),
    "a description cut short": (cut("checkpoint.json", 0.5), "is not JSON"),
    "other shapes": (wider, "embedding.weight is .125, 32., the model's is .126, 32."),
    "a newer format": (change_description(format_version=99), "format_version=99"),
    "an unknown key": (change_description(model={"color": 1}), "no valid model config"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused(checkpoint: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "run")
    apply, complaint = DAMAGE[damage]
    apply(tmp_path / "run" / "iter_0000001")
    with pytest.raises(CheckpointError, match=complaint) as raised:
        load_model(open_weights(tmp_path / "run"), ParallelMesh(Device("cpu"), Layout()), torch.float32)
    assert "\n" not in str(raised.value)
    assert not Path("/tmp/ascendspeed-was-here").exists()


def test_a_flipped_byte_is_found(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run")
    (path,) = (tmp_path / "run" / "iter_0000001").glob("*.distcp")
    before = open_weights(tmp_path / "run").read("embedding.weight")
    source = open_weights(tmp_path / "run")
    content = bytearray(path.read_bytes())
    place = source.stored._metadata.storage_data  # type: ignore[union-attr]
    start = next(entry.offset for index, entry in place.items() if index.fqn == "model/embedding.weight")
    raw = before.numpy().tobytes()
    content[content.index(raw[:64], start)] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged at model/embedding\.weight"):
        source.read("embedding.weight")


def test_trackers_that_lead_nowhere(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "run")
    tracker = tmp_path / "run" / "latest_checkpointed_iteration.txt"
    for text, complaint in (
        ("7", "names iteration 7.*complete are iter_0000001"),
        ("release?", "not an iteration"),
    ):
        tracker.write_text(text)
        with pytest.raises(CheckpointError, match=complaint):
            open_weights(tmp_path / "run")
    assert open_weights(tmp_path / "run" / "iter_0000001").config == CONFIG


def test_folders_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; check --load"):
        open_weights(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is not a checkpoint of a known kind"):
        open_weights(tmp_path)


def test_weights_of_a_seed_do_not_depend_on_how_they_are_read() -> None:
    source = InitialWeights(CONFIG, 7)
    for name, info in source.tensors().items():
        tensor = source.read(name)
        assert tensor.shape == info.shape
        rows = slice(1, max(info.shape[0] // 2, 2))
        index = (rows, *(slice(0, n) for n in info.shape[1:]))
        assert torch.equal(source.read(name, index), tensor[rows])
    assert not torch.equal(
        InitialWeights(CONFIG, 8).read("embedding.weight"), source.read("embedding.weight")
    )


@pytest.mark.parametrize("offset", [0, 1, 3, 64])
def test_tensors_with_strides_inside_a_larger_file(tmp_path: Path, offset: int) -> None:
    """An archive may begin at any byte of a file, and a tensor in it may be transposed or skip elements."""
    tensors = {
        "transposed": torch.arange(12.0).view(3, 4).T,
        "every second": torch.arange(6.0).view(2, 3)[:, ::2],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(5.0),
    }
    archive = io.BytesIO()
    torch.save(tensors, archive)
    path = tmp_path / "larger.bin"
    path.write_bytes(b"x" * offset + archive.getvalue())
    found = dict(stored_tensors(TorchFile(path, offset, len(archive.getvalue())).content))
    assert found.keys() == tensors.keys()
    for name, stored in found.items():
        assert torch.equal(stored.read(), tensors[name])
