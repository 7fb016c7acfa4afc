"""Training on a device that torch takes for an NPU: the same losses as on the CPU, through the commands of a user."""

import json
import os
import re
from pathlib import Path

import pytest

import support
from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.weights import NativeSource, open_weights
from support.commands import call, run_command
from support.models import tiny_config
from support.npu_lookalike import pretended_package


@pytest.fixture
def with_npu(tmp_path: Path) -> str:
    """PYTHONPATH under which torch finds the device."""
    tests = Path(support.__file__).parents[1]
    return os.pathsep.join([str(pretended_package(tmp_path / "site")), str(tests)])


def arguments(folder: Path, dataset: Path, dtype: str) -> list[object]:
    model = folder / "model.json"
    model.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return [
        "asd-core", "pretrain", "--model-config", model, "--data-path", dataset, "--seq-length", 32,
        "--micro-batch-size", 2, "--global-batch-size", 8, "--train-iters", 5, "--lr", 3e-3, "--split", "90,10,0",
        "--eval-iters", 1, "--eval-interval", 5, "--dtype", dtype, "--data-cache-path", folder / "cache",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ([], "float32"),
        pytest.param(
            ["--tensor-model-parallel-size", 2, "--nproc-per-node", 2], "float32", marks=pytest.mark.nightly
        ),
        (["--tensor-model-parallel-size", 2, "--nproc-per-node", 2, "--sequence-parallel"], "bfloat16"),
        pytest.param(
            ["--pipeline-model-parallel-size", 2, "--nproc-per-node", 2], "float32", marks=pytest.mark.nightly
        ),
        (["--nproc-per-node", 2, "--use-distributed-optimizer"], "float32"),
    ],
    ids=["one device", "tp2", "tp2 + sp, bf16", "pp2", "dp2 + sharded optimizer"],
)
def test_training_equals_the_cpu(
    dataset: Path, tmp_path: Path, with_npu: str, flags: list[object], dtype: str
) -> None:
    command = arguments(tmp_path, dataset, dtype)
    done = run_command(*command, *flags, "--save", tmp_path / "npu", PYTHONPATH=with_npu)
    assert done.status == 0, done.stderr
    assert "device: npu (auto; found npu, cpu)" in done.stderr
    for operator in ("attention", "rms_norm", "rotary", "swiglu", "adamw"):
        assert re.search(f"kernel: {operator} +npu ", done.stderr)
    cpu = call(*command, "--save", tmp_path / "cpu", "--device", "cpu")
    assert cpu.status == 0, cpu.stderr
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("npu", "cpu"))
    assert ours[-1]["lm_loss"] < ours[0]["lm_loss"] - 0.02
    for key in ("lm_loss", "grad_norm"):
        # Sums run in another order, and npu_apply_adam_w rounds otherwise than torch's fused AdamW.
        limit = 1e-4 if dtype == "float32" else 3e-2
        assert [r[key] for r in ours] == pytest.approx([r[key] for r in theirs], rel=limit)
    source = open_weights(tmp_path / "npu")
    assert isinstance(source, NativeSource)
    assert [name for name in source.stored.names() if name.startswith("device_rng/")]


def test_a_device_that_is_found_is_taken_and_said(with_npu: str) -> None:
    done = run_command(
        "asd-infer", "generate", "--load", "/nowhere/model", "--prompt", "x", PYTHONPATH=with_npu
    )
    assert "checkpoint /nowhere/model does not exist" in done.complaint
