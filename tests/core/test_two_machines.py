"""Two torchrun agents, each in a working directory of its own, as on two machines."""

import json
import shutil
import socket
from pathlib import Path

import pytest

from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.training.checkpoint import saved_iterations
from support.commands import Finished, RunningCommand, call, command_line
from support.models import tiny_config


@pytest.fixture
def machines(tmp_path: Path, dataset: Path) -> list[Path]:
    """Two working directories, each with a copy of the data and the model's config."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        for suffix in (".bin", ".idx", ".manifest.json"):
            shutil.copy(f"{dataset}{suffix}", folder / f"corpus{suffix}")
        config = find_family("llama").write_config(tiny_config(vocab_size=400))
        (folder / "model.json").write_text(json.dumps(config))
    return folders


ARGUMENTS: list[object] = [
    "asd-core", "pretrain", "--model-config", "model.json", "--data-path", "corpus", "--data-cache-path", "cache",
    "--seq-length", 32, "--micro-batch-size", 2, "--global-batch-size", 8, "--train-iters", 8, "--lr", 3e-3,
    "--split", "90,10,0", "--eval-iters", 1, "--eval-interval", 4,
]  # fmt: skip


def torchrun(machines: list[Path], *flags: object) -> list[Finished]:
    """Run on all machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = command_line(*ARGUMENTS, *flags)[2:]
    agents = [
        RunningCommand(
            "-m", "torch.distributed.run", "--nnodes", len(machines), "--nproc-per-node", 2, "--node-rank", rank,
            "--master-addr", "127.0.0.1", "--master-port", port, "--module", *module, cwd=folder,
        )
        for rank, folder in enumerate(machines)
    ]  # fmt: skip
    return [agent.finish(timeout=240) for agent in agents]


def test_two_machines_train_save_and_resume(
    machines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of sample indices is each machine's own; the run's folder is shared."""
    flags = ["--tensor-model-parallel-size", 2, "--use-distributed-optimizer", "--save", tmp_path / "run"]
    for more in (["--exit-interval", 4], []):
        done = torchrun(machines, *flags, "--auto-resume", *more)
        assert [machine.status for machine in done] == [0, 0], done
    assert "rank 2: the cache of sample indices is not shared; building it here too" in done[1].stderr
    assert "resumed at iteration 4" in done[0].stderr
    caches = [sorted(path.name for path in (folder / "cache").iterdir()) for folder in machines]
    assert caches[0] == caches[1]
    assert len(caches[0]) >= 6
    assert saved_iterations(tmp_path / "run") == [4, 8]

    monkeypatch.chdir(machines[0])
    assert call(*ARGUMENTS, "--save", tmp_path / "one").status == 0
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "run"))
    for key in ("lm_loss", "grad_norm"):
        # fp32: the sums run in another order.
        assert [r[key] for r in two] == pytest.approx([r[key] for r in one], rel=1e-4)
    measured = [[r["validation_loss"] for r in rows if "validation_loss" in r] for rows in (two, one)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)
    assert len(measured[0]) == 2


def test_a_folder_for_results_that_is_not_shared(machines: list[Path]) -> None:
    done = torchrun(machines, "--save", "run")
    assert all(machine.status for machine in done)
    assert "save=run of rank 2 is not the folder of rank 0; give a path on a file" in done[1].stderr


def test_data_that_differs(machines: list[Path], tmp_path: Path) -> None:
    """Same documents, same lengths; on the second machine the tokens are turned by one place."""
    content = (machines[1] / "corpus.bin").read_bytes()
    (machines[1] / "corpus.bin").write_bytes(content[2:] + content[:2])
    done = torchrun(machines, "--save", tmp_path / "run")
    assert all(machine.status for machine in done)
    assert "the training samples of rank 2 are not those of rank 0" in done[1].stderr
