"""Runs under megatron-core: any engine goes on from any other's checkpoint, and all commands train."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.weights import NativeSource
from core import megatron_cases, zero_cases
from core.megatron_comparison import SHARDS_WITH_TRANSFORMER_ENGINE
from core.test_megatron_experts import DEEPSEEK, DEEPSEEK_V3
from support.models import save_hugging_face, tiny_config
from support.pairs import make_pairs
from support.processes import WorkerPool
from support.versions import skip_before

MEGATRON: dict[str, Any] = {"engine": "megatron"}
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
INTERLEAVED = PP2 | {"num_layers_per_virtual_pipeline_stage": 1}
SHARDED = {"use_distributed_optimizer": True}
# Name, processes, options.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "megatron dp2 sharded": (2, MEGATRON | SHARDED),
    "megatron pp2 interleaved": (2, MEGATRON | INTERLEAVED),
    "dp2 pp2 sharded": (4, PP2 | SHARDED),
    "megatron tp2 sp": (2, MEGATRON | TP2 | {"sequence_parallel": True}),
    "DeepSpeed dp2 zero3": (2, {"zero_stage": 3}),
    "megatron tp2 dp2 sharded": (4, MEGATRON | TP2 | SHARDED),
    "one process": (1, {}),
    "megatron alone": (1, MEGATRON),
    "megatron dp2 ep2": (2, MEGATRON | {"expert_model_parallel_size": 2}),
}
DENSE = tuple(name for name in RUNS if "ep2" not in name)
QUICK = ("megatron dp2 sharded", "tp2", "megatron pp2 interleaved")


@pytest.fixture
def options(tmp_path: Path, dataset: Path) -> dict[str, Any]:
    # Tensor-parallel processes do not divide the vocabulary; the head is tied, so a last stage has a copy of it.
    config = find_family("llama").write_config(tiny_config(vocab_size=401, tie_word_embeddings=True))
    (tmp_path / "model.json").write_text(json.dumps(config))
    return {
        "model_config_file": tmp_path / "model.json", "data_path": (str(dataset),), "seq_length": 16,
        "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 6, "split": "100,0,0", "lr": 1e-3,
        "save_interval": 3, "data_cache_path": tmp_path / "cache", "adam_eps": 1e-3, "device": "cpu",
    }  # fmt: skip


def run(
    name: str, case: str, options: dict[str, Any], workers: WorkerPool, megatron_workers: WorkerPool
) -> None:
    """Run `train_run` or `resave` with the engine and layout of a row of `RUNS`."""
    world, layout = RUNS[name]
    is_megatron = "engine" in layout
    if is_megatron and "sharded" in name:
        skip_before("megatron-core", "0.13", SHARDS_WITH_TRANSFORMER_ENGINE)
    pool = megatron_workers if is_megatron else workers
    cases = megatron_cases if is_megatron else zero_cases
    pool.run(getattr(cases, case), world, options | layout)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    source = NativeSource(folder)
    source.check()
    return {name: source.stored.read(name) for name in source.stored.names() if not name.startswith("rng/")}


@pytest.mark.parametrize("names", [QUICK, pytest.param(DENSE, marks=pytest.mark.nightly)], ids=len)
def test_resaved_by_other_engines_nothing_changes(
    names: tuple[str, ...],
    options: dict[str, Any],
    tmp_path: Path,
    workers: WorkerPool,
    megatron_workers: WorkerPool,
) -> None:
    """Each reads what the one before wrote; bf16, so that there are master weights."""
    options |= {"dtype": "bfloat16", "train_iters": 3}
    run("megatron tp2 sp", "train_run", options | {"save": tmp_path / "first"}, workers, megatron_workers)
    first = stored(tmp_path / "first")
    assert {name.split("/")[0] for name in first} == {"model", "optimizer"}
    assert any(name.startswith("optimizer/master/") for name in first)
    source = {key: value for key, value in options.items() if key != "model_config_file"}
    for before, now in itertools.pairwise(["first", *names]):
        paths = {"load": tmp_path / before, "save": tmp_path / now}
        run(now, "resave", source | paths, workers, megatron_workers)
        again = stored(tmp_path / now)
        assert again.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], again[name])] == [], now


def test_resaved_experts(
    options: dict[str, Any], tmp_path: Path, workers: WorkerPool, megatron_workers: WorkerPool
) -> None:
    """DeepSeek's model: latents, experts, and biases of routers, which are fp32 and no optimizer's."""
    experts = Experts(**DEEPSEEK | {"shared_ffn_hidden_size": 32})
    model = tiny_config(family="deepseek_v3", vocab_size=401, **DEEPSEEK_V3 | {"experts": experts})
    (tmp_path / "model.json").write_text(json.dumps(find_family("deepseek_v3").write_config(model)))
    options |= {"dtype": "bfloat16", "train_iters": 3, "moe_router_bias_update_rate": 1e-3}
    run("megatron dp2 ep2", "train_run", options | {"save": tmp_path / "first"}, workers, megatron_workers)
    first = stored(tmp_path / "first")
    assert float(first["model/layers.1.mlp.router.bias"].abs().max()) > 0
    del options["model_config_file"]
    before = "first"
    for now in ("one process", "megatron pp2 interleaved"):
        run(
            now,
            "resave",
            options | {"load": tmp_path / before, "save": tmp_path / now},
            workers,
            megatron_workers,
        )
        again = stored(tmp_path / now)
        assert again.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], again[name])] == [], now
        before = now


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("megatron dp2 sharded", "one process"),
        *(
            pytest.param(before, after, marks=pytest.mark.nightly)
            for before, after in (
                ("one process", "megatron tp2 dp2 sharded"),
                ("tp2", "megatron pp2 interleaved"),
                ("megatron tp2 sp", "dp2 pp2 sharded"),
                ("DeepSpeed dp2 zero3", "megatron tp2 sp"),
                ("megatron pp2 interleaved", "megatron dp2 sharded"),
            )
        ),
    ],
)
def test_going_on_under_another_engine(
    before: str,
    after: str,
    options: dict[str, Any],
    tmp_path: Path,
    workers: WorkerPool,
    megatron_workers: WorkerPool,
) -> None:
    run(before, "train_run", options | {"save": tmp_path / "whole"}, workers, megatron_workers)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    del options["model_config_file"]
    options |= {"save": tmp_path / "rest", "load": tmp_path / "whole" / "iter_0000003"}
    run(after, "train_run", options, workers, megatron_workers)
    rest = read_metrics(tmp_path / "rest" / "metrics.jsonl")
    assert [record["iteration"] for record in rest] == [4, 5, 6]
    for key in ("lm_loss", "grad_norm", "learning_rate", "consumed_samples"):
        expected = [record[key] for record in whole[3:]]
        # fp32 sums in another order; a lost moment or step count shows in the third digit.
        assert [record[key] for record in rest] == pytest.approx(expected, rel=2e-6), key


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("command", "layout"),
    [
        # Of several lengths, so that stages tell each other shapes.
        ("finetune", PP2 | {"variable_seq_lengths": True, "pad_to_multiple_of": 1}),
        ("finetune", TP2 | {"sequence_parallel": True}),
        ("dpo", TP2),
        ("dpo", PP2),
    ],
)
def test_tuning(
    command: str,
    layout: dict[str, Any],
    sets: tuple[Path, Path],
    tokenizer_folder: Path,
    options: dict[str, Any],
    tmp_path: Path,
    workers: WorkerPool,
    megatron_workers: WorkerPool,
) -> None:
    """Instruction tuning and preference tuning report what one process of ours does, held-out pairs included."""
    prefix = sets[0] if command == "finetune" else make_pairs(tmp_path, tokenizer_folder)
    options |= {
        "data_path": (str(prefix),), "split": "80,20,0", "seq_length": 64, "eval_iters": 1, "eval_interval": 3,
        "lr": 1e-3,
    }  # fmt: skip
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "model")
    options["load"] = tmp_path / "model"
    del options["model_config_file"]
    if command == "finetune":
        options["is_instruction_dataset"] = True
    workers.run(megatron_cases.train_run, 1, options | {"save": tmp_path / "ours"}, command)
    theirs = options | MEGATRON | layout | {"save": tmp_path / "theirs"}
    megatron_workers.run(megatron_cases.train_run, 2, theirs, command)
    ours, found = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("ours", "theirs"))
    keys = [
        key for key in ours[-1] if key.startswith(("lm_loss", "grad_norm", "validation_", "reward", "dpo"))
    ]
    assert any(key.startswith("validation_") for key in keys)
    # The reference of dpo is a model of ours: at first the rewards are 0, or what rounding makes of it.
    keys = [key for key in keys if key != "reward_accuracy"]
    for key in keys:
        # fp32 sums in another order.
        expected = pytest.approx([record[key] for record in ours if key in record], rel=5e-5, abs=1e-6)
        assert [record[key] for record in found if key in record] == expected, key
