"""megatron-core itself reads what we write, computes our logits with it, and we read what it writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

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
from support.commands import environment
from support.models import tiny_config
from support.tables import ReportTables
from support.versions import skip_before

CONFIG = tiny_config(vocab_size=300, num_layers=3)
QWEN = tiny_config(
    vocab_size=300,
    num_layers=3,
    family="qwen3",
    qk_norm=True,
    tie_word_embeddings=True,
    rotary_base=1e6,
    head_dim=6,
)
COUNTS = (2, 1)
TESTS = Path(__file__).parents[1]


@pytest.fixture(
    scope="module", params=[CONFIG, pytest.param(QWEN, marks=pytest.mark.nightly)], ids=["LLaMA", "Qwen 3"]
)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return cast(ModelConfig, request.param)


@pytest.fixture(scope="module")
def folder(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of megatron-core made of checkpoints that we wrote."""
    skip_before("megatron-core", "0.14", "does not save torch_dist with this torch")
    folder = tmp_path_factory.mktemp("megatron")
    source = InitialWeights(config, 3)
    layouts = {
        "mp_rank": WritePlan("megatron", shard_layout(3, tp=2), transformer_engine=False),
        "stages": WritePlan(
            "megatron", shard_layout(3, pp=2, layers_of_stages=COUNTS), transformer_engine=False
        ),
        "torch_dist": WritePlan("torch_dist", shard_layout(3, tp=2)),
    }
    job: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "counts": COUNTS,
        "tokens": tokens().tolist(),
    }
    for name, target in layouts.items():
        convert(Conversion(source, folder / name, target.kind, write_plan=target, verify_logits=False))
        job[name] = str(folder / name / "release")
    (folder / "job.json").write_text(json.dumps(job))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "support.run_gpt_model", str(folder),
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


def tokens() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def ours(source: WeightSource) -> torch.Tensor:
    return load_model(source, ParallelMesh(Device("cpu"), Layout()), torch.float32)(
        ModelInput(tokens())
    ).logits


@pytest.mark.parametrize("kind", ["mp_rank", "stages", "torch_dist"])
def test_gpt_model_computes_our_logits_from_what_we_wrote(
    folder: Path, config: ModelConfig, report: ReportTables, kind: str
) -> None:
    theirs, want = torch.load(folder / f"{kind}.pt"), ours(InitialWeights(config, 3))
    difference = float((theirs - want).abs().max())
    report.add(
        "GPTModel of megatron-core against ours, fp32",
        ("checkpoint", "logits, largest difference"),
        kind,
        difference,
    )
    # fp32: the same sums in another order.
    assert difference < 1e-5
    assert float(want.abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["mp_rank", "torch_dist"])
def test_we_read_what_megatron_core_wrote(
    folder: Path, config: ModelConfig, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_weights(folder / "written" / kind)
    assert source.kind == {"mp_rank": "megatron"}.get(kind, kind)
    assert f"architecture taken from its arguments, family {config.family}" in capsys.readouterr().err
    differing = {"bos_token_id": None, "eos_token_ids": (), "initializer_range": 0.02}
    assert source.config == config.model_copy(update=differing)
    for rank in range(2):
        states = torch.load(
            folder / f"written/mp_rank/iter_0000007/mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False
        )["model"]
        # Per group of this rank: its query heads, its key, its value.
        groups, width = config.num_key_value_heads // 2, config.head_dim
        per_group = config.num_attention_heads // config.num_key_value_heads
        packed = states["decoder.layers.1.self_attention.linear_qkv.weight"].view(
            groups, per_group + 2, width, -1
        )
        rows = groups * per_group * width
        q = source.read("layers.1.attention.q_proj.weight")[rank * rows : (rank + 1) * rows]
        assert torch.equal(q.view(groups, per_group, width, -1), packed[:, :per_group])
        v = source.read("layers.1.attention.v_proj.weight").view(2, groups, width, -1)[rank]
        assert torch.equal(v, packed[:, per_group + 1])
        gate, up = states["decoder.layers.2.mlp.linear_fc1.weight"].chunk(2)
        half = config.ffn_hidden_size // 2
        assert torch.equal(source.read("layers.2.mlp.gate_proj.weight")[rank * half :][:half], gate)
        assert torch.equal(source.read("layers.2.mlp.up_proj.weight")[rank * half :][:half], up)
    if kind == "mp_rank":
        assert source.other_contents() == ["optimizer"]
    else:
        (place,) = (folder / "written" / kind).rglob(".metadata")
        metadata = FileSystemReader(place.parent).read_metadata()
        objects = {
            name.partition("/")[0]
            for name, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, BytesStorageMetadata)
        }
        named = {name for left in source.left_out() for name in left.names}
        assert objects
        assert objects <= {*named, *source.other_contents()}


def test_both_of_its_layouts_are_one_model(folder: Path) -> None:
    a, b = (open_weights(folder / "written" / kind) for kind in ("mp_rank", "torch_dist"))
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors())
    assert a.tensors().keys() == b.tensors().keys()
