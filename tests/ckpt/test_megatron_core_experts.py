"""megatron-core itself reads the experts that we write, computes our logits with them, and we read what it writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from ascendspeed_ckpt import Conversion, convert
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights, WeightSource, open_weights
from ascendspeed_core.weights.shard_layout import shard_layout
from core.expert_cases import experts_config
from support.commands import environment
from support.tables import ReportTables
from support.versions import skip_before

DEEPSEEK = experts_config(score="sigmoid", score_bias=True, scaling=2.5, count=8, per_token=4, groups=4,
                          groups_per_token=2)  # fmt: skip
"""Sigmoid, bias, groups, a shared expert with a gate, a dense layer: stored layer by layer."""
MIXTRAL = experts_config(shared_ffn_hidden_size=None, shared_gate=False, dense_layers=())
QWEN = experts_config(normalised=False, dense_layers=())
TESTS = Path(__file__).parents[1]


@pytest.fixture(
    scope="module",
    params=[DEEPSEEK, *(pytest.param(other, marks=pytest.mark.nightly) for other in (MIXTRAL, QWEN))],
    ids=["as DeepSeek-V3", "as Mixtral", "as Qwen2-MoE"],
)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return cast(ModelConfig, request.param)


def source_of(config: ModelConfig) -> WeightSource:
    return InitialWeights(config, 3)


@pytest.fixture(scope="module")
def folder(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of megatron-core made of checkpoints that we wrote."""
    skip_before("megatron-core", "0.16", "has no moe_shared_expert_gate")
    folder = tmp_path_factory.mktemp("megatron")
    job: dict[str, Any] = {"config": config.model_dump(mode="json"), "tokens": tokens(config).tolist()}
    plans = {"mp_rank": "megatron", "torch_dist": "torch_dist"}
    for name, kind in plans.items():
        plan = WritePlan(kind, shard_layout(config.num_layers, ep=2), transformer_engine=False)  # type: ignore[arg-type]
        convert(Conversion(source_of(config), folder / name, plan.kind, write_plan=plan, verify_logits=False))
        job[name] = str(folder / name / "release")
    (folder / "job.json").write_text(json.dumps(job))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "support.run_expert_model", str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=TESTS,
        env=environment(PYTHONPATH=str(TESTS), TORCHDYNAMO_DISABLE="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def tokens(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def ours(config: ModelConfig) -> torch.Tensor:
    model = load_model(source_of(config), ParallelMesh(Device("cpu"), Layout()), torch.float32).eval()
    return model(ModelInput(tokens(config))).logits


@pytest.mark.parametrize("kind", ["mp_rank", "torch_dist"])
def test_gpt_model_computes_our_logits_from_what_we_wrote(
    folder: Path, config: ModelConfig, report: ReportTables, kind: str
) -> None:
    theirs, want = torch.load(folder / f"{kind}.pt"), ours(config)
    difference = float((theirs - want).abs().max())
    experts = config.experts
    assert experts is not None
    report.add(
        "GPTModel of megatron-core with experts, half on each rank, against ours, fp32",
        ("checkpoint", "scores", "logits, largest difference"),
        kind,
        experts.score,
        difference,
    )
    # fp32: the same sums in another order.
    assert difference < 1e-5
    assert float(want.abs().max()) > 0.1


def test_we_read_what_megatron_core_wrote(folder: Path, config: ModelConfig) -> None:
    spread = open_weights(folder / "written/mp_rank", config=config)
    joined = open_weights(folder / "written/torch_dist", config=config)
    assert spread.tensors().keys() == joined.tensors().keys()
    assert all(torch.equal(spread.read(name), joined.read(name)) for name in spread.tensors())
    experts = config.experts
    assert experts is not None
    half = experts.count // 2
    for rank in range(2):
        place = folder / f"written/mp_rank/iter_0000007/mp_rank_00_{rank:03d}/model_optim_rng.pt"
        state = torch.load(place, weights_only=False)["model"]
        for local in range(half):
            stored = f"decoder.layers.2.mlp.experts.local_experts.{local}"
            expert = f"layers.2.mlp.experts.{rank * half + local}"
            gate, up = state[f"{stored}.linear_fc1.weight"].chunk(2)
            assert torch.equal(spread.read(f"{expert}.gate_proj.weight"), gate)
            assert torch.equal(spread.read(f"{expert}.up_proj.weight"), up)
            assert torch.equal(
                spread.read(f"{expert}.down_proj.weight"), state[f"{stored}.linear_fc2.weight"]
            )
