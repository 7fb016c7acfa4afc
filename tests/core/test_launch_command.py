"""`asd-core launch-command`: what it prints is valid, quoted, and really starts a run."""

import json
import os
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ascendspeed_core.config.recipes import find_recipe as find
from ascendspeed_core.config.recipes import read_recipe, recipe_names, written_recipe
from ascendspeed_core.observability.metrics import read_metrics
from support.commands import RunningCommand, call, run_command, shell_variables
from support.recipes import scaled

AWKWARD = ["--data-path", "/data/it's here/$HOME", "--save", 'a "quoted" `run`', "--seed", "1"]


def printed(*args: object) -> str:
    done = call("asd-core", "launch-command", *args)
    assert done.status == 0, done.stderr
    return done.stdout


def refusal(*args: object) -> str:
    done = call("asd-core", "launch-command", *args)
    assert done.status != 0
    return done.complaint


def check_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def words_of(line: str) -> list[str]:
    return shlex.split(line)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_on_its_own_devices(name: str) -> None:
    devices = read_recipe(find(name))["recipe"]["devices"]
    for kind in ("slurm", "kubernetes", "ascend"):
        text = printed(name, "--kind", kind)
        if kind == "kubernetes":
            trainer = yaml.safe_load(text)["spec"]["trainer"]
            assert trainer["numNodes"] * 8 == devices
        else:
            check_shell(text)
            assert "--nproc-per-node 8" in text


def test_torchrun_has_a_line_for_each_machine() -> None:
    text = printed("llama-65b", "--hosts", "n0", "n1", "n2", "n3", "--", *AWKWARD)
    check_shell(text)
    lines = [words_of(line) for line in text.splitlines() if line.startswith("torchrun")]
    assert [line[line.index("--node-rank") + 1] for line in lines] == ["0", "1", "2", "3"]
    for line in lines:
        assert line[line.index("-m") :] == ["-m", "ascendspeed_core.cli", "pretrain", "llama-65b", *AWKWARD]
        assert line[line.index("--master-addr") + 1] == "n0"
    assert "--standalone" in printed("llama-7b")


def test_slurm_quotes_twice() -> None:
    text = printed("llama-33b", "--kind", "slurm", "--interface", "ib0", "--", *AWKWARD)
    check_shell(text)
    assert "#SBATCH --nodes=4\n" in text
    assert "#SBATCH --gres=npu:8\n" in text
    assert "export HCCL_SOCKET_IFNAME=ib0" in text
    (line,) = (line for line in text.splitlines() if line.startswith("srun"))
    inner = words_of(line)[-1]
    assert words_of(inner)[-len(AWKWARD) :] == AWKWARD
    assert '--node-rank "$SLURM_NODEID"' in inner
    assert "#SBATCH --gpus-per-node=8\n" in printed("llama-33b", "--kind", "slurm", "--device", "cuda")


def test_kubernetes_is_a_train_job() -> None:
    text = printed(
        "llama3.1-8b", "--kind", "kubernetes", "--device", "cuda", "--image", "a/b:1", "--", *AWKWARD
    )
    job: dict[str, Any] = yaml.safe_load(text)
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["metadata"]["name"] == "llama3-1-8b"
    trainer = job["spec"]["trainer"]
    assert trainer["image"] == "a/b:1"
    assert trainer["command"][-len(AWKWARD) :] == AWKWARD
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 8}
    assert all(isinstance(one["value"], str) for one in trainer["env"])
    npu = yaml.safe_load(printed("llama-7b", "--kind", "kubernetes"))["spec"]["trainer"]
    assert npu["resourcesPerNode"]["requests"] == {"huawei.com/Ascend910": 8}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["llama-7"], "llama-7 is no recipe; did you mean llama-7b"),
        (["llama-65b"], "hosts names 0 machines for nodes=4; give the first one's name"),
        (["llama-65b", "--hosts", "a", "b"], "hosts names 2 machines for nodes=4"),
        (["llama-65b", "--nodes", 3], "which does not divide the 24 processes"),
        (["llama-7b", "--nodes", 3, "--hosts", "a"], "global_batch_size=2048 is not a multiple"),
        (["llama-7b", "--kind", "slrm"], "slrm"),
    ],
)
def test_what_is_refused(args: list[object], words: str) -> None:
    assert words in refusal(*args)


def test_other_numbers_of_devices_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("asd-core", "launch-command", "llama-7b", "--nodes", 2, "--hosts", "a")
    assert "llama-7b is laid out for 8 devices, this is 16" in done.stderr
    done = call(
        "asd-core", "launch-command", "llama-65b", "--nodes", 3, "--hosts", "a", "--",
        "--pipeline-model-parallel-size", 3,
    )  # fmt: skip
    assert "flags change the recipe's layout" in done.stderr
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostfile").write_text("# all\n10.0.0.1 slots=8\n\n10.0.0.2\n")
    assert "hostfile names 2 machines for nodes=4" in refusal("llama-65b", "--kind", "ascend")
    assert "rank" in printed("llama2-70b", "--kind", "ascend", "--devices-per-node", 32)


@pytest.fixture
def small(tmp_path: Path, dataset: Path) -> tuple[Path, list[object]]:
    """A recipe of two processes, and the flags of its run."""
    sections, model, processes = scaled(read_recipe(find("llama-13b-lora")) | {
        "recipe": {"model": "llama-13b", "command": "pretrain", "devices": 2}, "lora": {},
        "parallel": {"tensor_model_parallel_size": 2}, "data": {},
    }, tmp_path)  # fmt: skip
    assert processes == 2
    recipe = tmp_path / "it's small.toml"
    recipe.write_text(written_recipe(sections))
    return recipe, [
        "--", "--model-config", model, "--data-path", dataset, "--data-cache-path", tmp_path / "cache", "--device",
        "cpu", "--save", tmp_path / "the run",
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def losses(folder: Path) -> list[float]:
    return [record["lm_loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_the_lines_of_torchrun_train_on_two_machines(
    small: tuple[Path, list[object]], tmp_path: Path
) -> None:
    recipe, flags = small
    text = printed(
        recipe, "--nodes", 2, "--devices-per-node", 1, "--device", "cpu", "--hosts", "127.0.0.1", "--master-port",
        free_port(), *flags,
    )  # fmt: skip
    lines = [words_of(line) for line in text.splitlines() if line.startswith("torchrun")]
    machines = [RunningCommand("-m", "torch.distributed.run", *line[1:], cwd=tmp_path) for line in lines]
    done = [machine.finish() for machine in machines]
    assert [one.status for one in done] == [0, 0], done[0].stderr + done[1].stderr
    one = run_command(
        "asd-core",
        "pretrain",
        recipe,
        "--nproc-per-node",
        2,
        *flags[1:-1],
        tmp_path / "together",
        cwd=tmp_path,
    )
    assert one.status == 0, one.stderr
    assert losses(tmp_path / "the run") == losses(tmp_path / "together")


STAND_INS = {
    "srun": 'shift; exec "$@"',
    "scontrol": "echo 127.0.0.1",
}
"""What Slurm would do on a cluster of this machine alone."""


@pytest.mark.parametrize("kind", ["slurm", "ascend"])
def test_a_script_trains_on_one_machine(kind: str, small: tuple[Path, list[object]], tmp_path: Path) -> None:
    recipe, flags = small
    (tmp_path / "hostfile").write_text(f"{socket.gethostname()}\n")
    script = tmp_path / "run.sh"
    hosts: list[object] = ["--hostfile", tmp_path / "hostfile"]
    script.write_text(
        printed(recipe, "--kind", kind, "--devices-per-node", 2, "--device", "cpu", *hosts, *flags)
    )
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    variables = shell_variables() | {"SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n[0-0]"}
    variables["PATH"] = os.pathsep.join([str(tmp_path / "bin"), variables["PATH"]])
    done = subprocess.run(
        ["bash", script],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "the run")) == 2
    kept = json.loads((tmp_path / "the run" / "iter_0000002" / "checkpoint.json").read_text())
    assert kept["run"]["recipe"]["name"] == recipe.stem
