"""`asd-core pretrain` with the acceleration flags of the 2023 system: all at once, resumed without, and refused."""

import json
import re
from pathlib import Path

import pytest

from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from support.commands import call, run_command
from support.models import tiny_config


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> list[object]:
    folder = tmp_path_factory.mktemp("features")
    (folder / "model.json").write_text(
        json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400)))
    )
    return [
        "asd-core", "pretrain", "--model-config", folder / "model.json", "--data-path", dataset, "--seq-length", 32,
        "--global-batch-size", 8, "--train-iters", 6, "--lr", 3e-3, "--data-cache-path", folder / "cache", "--split",
        "90,10,0", "--dtype", "float64", "--device", "cpu", "--eval-iters", 1, "--eval-interval", 3,
    ]  # fmt: skip


ALL = [
    "--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1, "--optimized-pipeline",
    "--manual-mbs", "1,2,3,2", "--checkpoint-activations", "--checkpoint_policy", "custom",
    "--recomputation-layer-num", 2, 1, "--triangle-attn", "--nproc-per-node", 2,
]  # fmt: skip


BUDGET_GIB = 0.0021
"""Between what the run below takes with all layers recomputed and without."""


def test_all_at_once_and_resumed_without(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments, "--save", tmp_path / "plain").status == 0
    done = run_command(*arguments, *ALL, "--save", tmp_path / "all", "--exit-interval", 3)
    assert done.status == 0, done.stderr
    assert "stages: layers 0+2, 1+3" in done.stderr
    assert re.search(
        "kernel: attention +triangle +asked for; by blocks, leaving out those that no query sees", done.stderr
    )
    go_on = [*arguments[:2], "--load", tmp_path / "all", *arguments[4:], "--save", tmp_path / "all"]
    assert call(*go_on).status == 0
    plain, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "all"))
    for key in ("lm_loss", "grad_norm", "consumed_samples"):
        # float64: only the order of sums differs.
        assert [r[key] for r in other] == pytest.approx([r[key] for r in plain], rel=1e-12)
    measured = [[r["validation_loss"] for r in rows if "validation_loss" in r] for rows in (other, plain)]
    assert measured[0] == pytest.approx(measured[1], rel=1e-12)


def test_sizes_that_are_found_by_measuring(arguments: list[object], tmp_path: Path) -> None:
    flags = [
        "--pipeline-model-parallel-size", 2, "--optimized-pipeline", "--manual-mbs", "auto", "--micro-batch-size", 4,
        "--nproc-per-node", 2, "--save", tmp_path / "found",
    ]  # fmt: skip
    done = run_command(*arguments, *flags)
    assert done.status == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "micro-batches: " in line]
    sizes = [int(size) for size in line.split("micro-batches: ")[1].split(";")[0].split(",")]
    assert sum(sizes) == 8
    assert max(sizes) <= 4
    assert read_metrics(tmp_path / "found" / "metrics.jsonl")[-1]["consumed_samples"] == 48


def test_sizes_that_are_found_with_replicas_in_16_bits(arguments: list[object], tmp_path: Path) -> None:
    """Measuring reduces gradients, with an optimizer that takes 16-bit gradients away from their parameters."""
    flags = [
        "--pipeline-model-parallel-size", 2, "--optimized-pipeline", "--manual-mbs", "auto", "--dtype", "bfloat16",
        "--train-iters", 2, "--nproc-per-node", 4, "--save", tmp_path / "found",
    ]  # fmt: skip
    done = run_command(*arguments, *flags)
    assert done.status == 0, done.stderr
    assert "micro-batches: 1,1,1,1;" in done.stderr


def test_recompute_that_fits_a_budget(arguments: list[object], tmp_path: Path) -> None:
    """Found while dropout and an interleaved pipeline are on; the run computes what it computes without recompute."""
    layout = [
        "--pipeline-model-parallel-size",
        2,
        "--num-layers-per-virtual-pipeline-stage",
        1,
        "--nproc-per-node",
        2,
    ]
    both = [*layout, "--hidden-dropout", 0.1, "--micro-batch-size", 2]
    fitted = ["--checkpoint-activations", "--checkpoint-policy", "auto", "--memory-budget-gib", BUDGET_GIB]
    for name, more in (("plain", []), ("fitted", fitted)):
        done = run_command(*arguments, *both, *more, "--save", tmp_path / name)
        assert done.status == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "recompute: pipeline stage" in line]
    assert len(lines) == 2
    for line in lines:
        planned, whole = (float(found) for found in re.findall(r"([0-9.]+) (?:GiB planned|without)", line))
        assert planned <= BUDGET_GIB < whole
    plain, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("plain", "fitted"))
    for key in ("lm_loss", "grad_norm"):
        assert [r[key] for r in other] == [r[key] for r in plain]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--triangle-attn", "--attention", "sdpa"], "triangle_attn and attention=sdpa were both given"),
        (["--checkpoint-block-layer", 2], "means nothing without --checkpoint-activations or --checkpoint-policy"),
        (
            ["--checkpoint-activations", "--memory-budget-gib", 1],
            "memory_budget_gib=1.0 means nothing with checkpoint_policy=full",
        ),
        (
            ["--checkpoint-activations", "--checkpoint-policy", "auto", "--zero-stage", 1, "--dtype", "float32"],
            "checkpoint_policy=auto with zero_stage=1",
        ),
        (
            ["--pipeline-model-parallel-size", 2, "--nproc-per-node", 2, "--pipeline-schedule", "zbv",
             "--checkpoint-activations", "--checkpoint-policy", "auto"],
            "checkpoint_policy=auto counts what one backward pass needs, pipeline_schedule=zbv takes two",
        ),
        (["--optimized-pipeline", "--manual-mbs", "4,4"], "pipeline_model_parallel_size=1, which has no pipeline"),
        (["--optimized-pipeline", "--manual-mbs", "4,5"], "not global_batch_size=8; change one of them"),
        (["--pipeline-schedule", "zbv"], "which has no pipeline"),
        (
            ["--pipeline-model-parallel-size", 2, "--pipeline-schedule", "dualpipev", "--nproc-per-node", 2,
             "--micro-batch-size", 4],
            "a micro-batch for each of its 4 stages, not 2 per step",
        ),
        (
            ["--pipeline-model-parallel-size", 2, "--nproc-per-node", 2, "--checkpoint-activations",
             "--checkpoint-policy", "custom", "--recomputation-layer-num", 1],
            "has 1 numbers for 2 pipeline stages",
        ),
        (
            ["--pipeline-model-parallel-size", 2, "--nproc-per-node", 2, "--num-layers-per-virtual-pipeline-stage", 3],
            "does not divide num_layers=4; choose 1, 2",
        ),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_refusals(arguments: list[object], tmp_path: Path, flags: list[object], complaint: str) -> None:
    done = call(*arguments, *flags, "--save", tmp_path / "run", "--dry-run")
    assert done.status == 2
    assert complaint in done.complaint
    assert not (tmp_path / "run").exists()
