"""Models with experts in Megatron-LM's files: under both names of experts, spread over ranks, and back bit for bit."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_ckpt.conversion import Conversion, convert
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights import InitialWeights, WeightSource, open_weights
from ascendspeed_core.weights.external.name_maps import megatron
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.errors import ConfigError
from core.expert_cases import experts_config
from support.families import EXPERT_REFERENCES
from support.models import tiny_config
from support.processes import WorkerPool

LAYOUTS: dict[str, dict[str, int]] = {
    "tp2 pp2": {"tp": 2, "pp": 2},
    "ep2": {"ep": 2},
    "tp2 ep4": {"tp": 2, "ep": 4},
    "tp2 pp2 ep2": {"tp": 2, "pp": 2, "ep": 2},
}


WRITTEN = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE")
"""Families that GPTModel computes without more than experts; see `writers.supported` for the others."""
QUICK = {("Mixtral", True, "ep2"), ("Qwen2-MoE", False, "tp2 pp2 ep2")}


@pytest.mark.parametrize(
    ("name", "grouped", "layout"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.nightly)
        for case in itertools.product(WRITTEN, (False, True), LAYOUTS)
    ],
)
def test_there_and_back(tmp_path: Path, name: str, grouped: bool, layout: str) -> None:
    plan = WritePlan("megatron", shard_layout(3, **LAYOUTS[layout]), transformer_engine=grouped)
    source, written = there_and_back(tmp_path, name, plan)
    assert str(written.layout) == str(plan.layout)
    assert written.check()
    assert all(torch.equal(written.read(key), source.read(key)) for key in source.tensors())


@pytest.mark.parametrize("own_layers", [False, True])
@pytest.mark.parametrize("name", WRITTEN)
def test_torch_dist_there_and_back(tmp_path: Path, name: str, own_layers: bool) -> None:
    plan = WritePlan("torch_dist", shard_layout(3, ep=2), transformer_engine=not own_layers)
    source, written = there_and_back(tmp_path, name, plan)
    assert all(torch.equal(written.read(key), source.read(key)) for key in source.tensors())


@pytest.mark.parametrize("kind", ["megatron", "torch_dist"])
@pytest.mark.parametrize("name", sorted(set(EXPERT_REFERENCES) - set(WRITTEN)))
def test_what_gpt_model_would_compute_otherwise_is_not_written(tmp_path: Path, name: str, kind: Any) -> None:
    plan = WritePlan(kind, shard_layout(3, ep=2), transformer_engine=True)
    with pytest.raises(
        CheckpointError, match=f"--to {kind}: megatron-core's GPTModel has no .*choose --to native"
    ):
        there_and_back(tmp_path, name, plan)
    assert not (tmp_path / "there").exists()


def there_and_back(folder: Path, name: str, plan: WritePlan) -> tuple[WeightSource, WeightSource]:
    """A family's model as it was, and as it is read from what was written of it."""
    EXPERT_REFERENCES[name].save(folder / "hf")
    convert(
        Conversion(
            folder / "hf", folder / "there", plan.kind, write_plan=plan, verify_logits=False, workers=1
        )
    )
    source, written = open_weights(folder / "hf"), open_weights(folder / "there")
    assert written.config == source.config
    assert written.tensors() == source.tensors()
    return source, written


@pytest.mark.parametrize("seed", range(3))
def test_ranks_hold_the_experts_that_megatron_lm_gives_them(tmp_path: Path, seed: int) -> None:
    """Against a plain rule: rank e of ep has experts e E / ep to (e + 1) E / ep, counted from 0 in its file."""
    draw = random.Random(seed)
    count, ep, tp = draw.choice([(4, 2, 1), (8, 4, 2), (6, 3, 1), (8, 2, 2)])
    config = experts_config(count=count, dense_layers=draw.choice([(), (0,), (1, 3)]))
    source, layout = InitialWeights(config, seed), shard_layout(4, tp=tp, ep=ep)
    plan = WritePlan("megatron", layout, transformer_engine=False)
    convert(
        Conversion(source, tmp_path / "there", "megatron", write_plan=plan, verify_logits=False, workers=1)
    )
    for tensor_rank, ep_rank in itertools.product(range(tp), range(ep)):
        place = f"release/mp_rank_{tensor_rank:02d}_{ep_rank:03d}/model_optim_rng.pt"
        state = torch.load(tmp_path / "there" / place, weights_only=False)["model"]
        for local in range(count // ep):
            expert = f"layers.2.mlp.experts.{ep_rank * (count // ep) + local}"
            gate, up, down = (source.read(f"{expert}.{part}_proj.weight") for part in ("gate", "up", "down"))
            stored = f"decoder.layers.2.mlp.experts.local_experts.{local}"
            rows = torch.cat([part.chunk(tp)[tensor_rank] for part in (gate, up)])
            assert torch.equal(state[f"{stored}.linear_fc1.weight"], rows)
            assert torch.equal(state[f"{stored}.linear_fc2.weight"], down.chunk(tp, 1)[tensor_rank])
        assert f"decoder.layers.2.mlp.experts.local_experts.{count // ep}.linear_fc1.weight" not in state


def rewrite(folder: Path, **arguments: Any) -> None:
    """Change the arguments in all files, and take away who wrote them."""
    for path in folder.rglob("model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        del content["ascendspeed"]
        vars(content["args"]).update(arguments)
        torch.save(content, path)
    (folder / "release/ascendspeed.json").unlink()


def test_what_contradicts_is_refused_by_name(tmp_path: Path) -> None:
    config = experts_config()
    source = InitialWeights(config, 0)

    def written(name: str) -> Path:
        plan = WritePlan("megatron", shard_layout(4, ep=2))
        convert(Conversion(source, tmp_path / name, "megatron", write_plan=plan, verify_logits=False))
        return tmp_path / name

    rewrite(written("plain"))
    opened = open_weights(tmp_path / "plain", config=config)
    assert all(torch.equal(opened.read(key), source.read(key)) for key in source.tensors())
    for name, value in {
        "expert_tensor_parallel_size": 2, "moe_router_topk": 3, "expert_model_parallel_size": 4, "num_experts": 8,
    }.items():  # fmt: skip
        rewrite(written(name), **{name: value})
        with pytest.raises(CheckpointError, match=f"{name}={value}"):
            open_weights(tmp_path / name, config=config)
    half = written("half") / "release"
    (half / "mp_rank_00_001").rename(half / "mp_rank_00_002")
    with pytest.raises(CheckpointError, match=r"lacks tensor rank 0 of stage 1"):
        open_weights(tmp_path / "half")
    swapped = written("swapped") / "release"
    (swapped / "mp_rank_00_001").rename(swapped / "other")
    (swapped / "mp_rank_00_000").rename(swapped / "mp_rank_00_001")
    (swapped / "other").rename(swapped / "mp_rank_00_000")
    with pytest.raises(CheckpointError, match="not tensor rank 0 of stage 0, expert-parallel rank 0,"):
        open_weights(tmp_path / "swapped")


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def write(config: ModelConfig, ep: int) -> None:
        plan = WritePlan("megatron", shard_layout(4, ep=ep))
        convert(Conversion(InitialWeights(config, 0), tmp_path / "no", "megatron", write_plan=plan))

    with pytest.raises(ConfigError, match="expert_model_parallel_size=3 does not divide the 4 experts"):
        write(experts_config(), 3)
    with pytest.raises(ConfigError, match="expert_model_parallel_size=2 spreads experts, which this model"):
        write(tiny_config(), 2)


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"score": "sigmoid", "normalised": False}, "sigmoid scores that are not divided by their sum"),
        ({"score_bias": True}, "bias of softmax scores"),
        ({"groups": 2, "groups_per_token": 2}, "groups of experts chosen like that"),
    ],
)
def test_a_choice_that_megatron_core_lacks_is_refused(
    tmp_path: Path, changes: dict[str, Any], lacks: str
) -> None:
    plan = WritePlan("megatron", shard_layout(4))
    with pytest.raises(CheckpointError, match=f"megatron-core's GPTModel has no {lacks}"):
        convert(
            Conversion(
                InitialWeights(experts_config(**changes), 0), tmp_path / "no", "megatron", write_plan=plan
            )
        )


def test_a_format_without_experts_refuses_them(tmp_path: Path) -> None:
    EXPERT_REFERENCES["Mixtral"].save(tmp_path / "hf")
    plan = WritePlan("ascendspeed", shard_layout(3))
    with pytest.raises(CheckpointError, match="--to ascendspeed: experts are not written in this format"):
        convert(Conversion(tmp_path / "hf", tmp_path / "there", "ascendspeed", write_plan=plan))


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("gpt-oss", "experts with biases and no experts with clamped SwiGLU"),
        ("DeepSeek-V3", "groups of experts chosen like that and no multi-head latent attention"),
    ],
)
def test_what_megatron_core_was_not_compared_with_is_refused(tmp_path: Path, name: str, lacks: str) -> None:
    EXPERT_REFERENCES[name].save(tmp_path / "hf")
    plan = WritePlan("megatron", shard_layout(3))
    with pytest.raises(CheckpointError, match=lacks):
        convert(Conversion(tmp_path / "hf", tmp_path / "megatron", "megatron", write_plan=plan))


def their_names() -> dict[str, tuple[int, ...]]:
    """Tensors of megatron-core's own model with experts, one after the other, and a shared one."""
    from support.megatron_on_cpu import install

    install()
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel()
    options: dict[str, Any] = {
        "num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 8, "num_query_groups": 4,
        "kv_channels": 4, "add_bias_linear": False, "gated_linear_unit": True, "normalization": "RMSNorm",
        "num_moe_experts": 4, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 24,
        "moe_layer_freq": [0, 1, 1, 1], "moe_router_topk": 2, "moe_router_enable_expert_bias": True,
        "moe_router_score_function": "sigmoid", "use_cpu_initialization": True, "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_gate": True,
    }  # fmt: skip
    config = TransformerConfig(**options)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    model = GPTModel(
        config, spec, vocab_size=128, max_sequence_length=64, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }


def test_names_are_megatron_cores(workers: WorkerPool) -> None:
    (theirs,) = workers.run(their_names, 1)
    config = experts_config(score="sigmoid", score_bias=True)
    whole = shard_layout(4).stage(0, 0)
    ours = {
        packed.key: packed.shape
        for packed in megatron(False).of_chunk(parameter_shapes(config), config, whole, 128)
    }
    buffers = {name for name in theirs if name.endswith("local_tokens_per_expert")}
    assert ours == {name: shape for name, shape in theirs.items() if name not in buffers}
