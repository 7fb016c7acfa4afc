"""Models with experts in Megatron-LM's files: under both names of experts, and back bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_ckpt.conversion import Conversion, convert
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.external.name_maps import megatron
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import CheckpointError
from core.expert_cases import experts_config
from support.families import EXPERT_REFERENCES
from support.processes import WorkerPool


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", EXPERT_REFERENCES)
def test_there_and_back(tmp_path: Path, name: str, grouped: bool) -> None:
    EXPERT_REFERENCES[name].save(tmp_path / "hf")
    plan = WritePlan("megatron", shard_layout(3, tp=2, pp=2), transformer_engine=grouped)
    convert(Conversion(tmp_path / "hf", tmp_path / "megatron", "megatron", write_plan=plan))
    source, written = open_weights(tmp_path / "hf"), open_weights(tmp_path / "megatron")
    assert written.config == source.config
    assert all(torch.equal(written.read(key), source.read(key)) for key in source.tensors())


def test_formats_without_experts_refuse_them(tmp_path: Path) -> None:
    EXPERT_REFERENCES["Mixtral"].save(tmp_path / "hf")
    for kind in ("ascendspeed", "torch_dist"):
        plan = WritePlan(kind, shard_layout(3))  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=f"--to {kind}: experts are not written in this format"):
            convert(Conversion(tmp_path / "hf", tmp_path / kind, kind, write_plan=plan))  # type: ignore[arg-type]


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
