"""Two processes of megatron-core's GPTModel read checkpoints that we wrote, and write ones that we are to read.

Run under torchrun with a folder that holds `job.json`:
    config: our ModelConfig as JSON; tokens: ids, [B, S]
    mp_rank: folder with mp_rank_* at tp 2, names of its own layers
    stages: the same at pp 2, uneven
    torch_dist: folder with metadata.json
It leaves `mp_rank.pt`, `stages.pt`, `torch_dist.pt` (logits of each), `written/mp_rank` and `written/torch_dist`
(what it saved itself at tp 2).
"""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.megatron_on_cpu import install


def build(config: dict[str, Any], tp: int, pp: int, counts: tuple[int, int] | None = None) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    uneven = (
        {"num_layers_in_first_pipeline_stage": counts[0], "num_layers_in_last_pipeline_stage": counts[1]}
        if counts
        else {}
    )
    is_rms = config["norm"] == "rmsnorm"
    transformer = TransformerConfig(
        num_layers=config["num_layers"], hidden_size=config["hidden_size"],
        ffn_hidden_size=config["ffn_hidden_size"], num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"], kv_channels=config["head_dim"],
        normalization="RMSNorm" if is_rms else "LayerNorm", gated_linear_unit=config["mlp"] == "swiglu",
        activation_func=torch.nn.functional.silu, add_bias_linear=False, add_qkv_bias=config["qkv_bias"],
        qk_layernorm=config["qk_norm"], hidden_dropout=0.0, attention_dropout=0.0,
        layernorm_epsilon=config["norm_epsilon"], tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32, gradient_accumulation_fusion=False, persist_layer_norm=False,
        bias_activation_fusion=False, bias_dropout_fusion=False, masked_softmax_fusion=False,
        apply_rope_fusion=False, use_cpu_initialization=True, **uneven,
    )  # fmt: skip
    rows = -(-config["vocab_size"] // (128 * tp)) * 128 * tp
    return GPTModel(
        transformer,
        get_gpt_layer_local_spec(normalization="RMSNorm" if is_rms else None, qk_layernorm=config["qk_norm"]),
        rows,
        config["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        rotary_base=int(config["rotary_base"]),
        share_embeddings_and_output_weights=config["tie_word_embeddings"],
    ).eval()


@torch.no_grad()
def logits_of(
    model: Any, tokens: torch.Tensor, vocab_size: int, stage: int | None = None
) -> torch.Tensor | None:
    """Logits of the whole vocabulary; of stages, on the last one."""
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    if stage == 0:
        dist.send(model(tokens, places, None).contiguous(), 1)
        return None
    if stage == 1:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
        dist.recv(hidden, 0)
        model.set_input_tensor(hidden)
    mine = model(tokens, places, None).contiguous()
    if stage is not None:
        return mine[..., :vocab_size]
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine)
    return torch.cat(parts, -1)[..., :vocab_size]


def main(folder: Path) -> None:
    install()
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.enums import AttnBackend

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    job = json.loads((folder / "job.json").read_text())
    config, tokens = job["config"], torch.tensor(job["tokens"])

    def keep(name: str, logits: torch.Tensor | None, by: int = 0) -> None:
        if rank == by:
            torch.save(logits, folder / f"{name}.pt")

    model = build(config, 2, 1)
    states = torch.load(Path(job["mp_rank"]) / f"mp_rank_{rank:02d}/model_optim_rng.pt", weights_only=False)
    model.load_state_dict(states["model"], strict=True)
    keep("mp_rank", logits_of(model, tokens, config["vocab_size"]))

    for parameter in model.parameters():
        parameter.data.zero_()
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, job["torch_dist"])
    model.load_state_dict(loaded["model"], strict=True)
    keep("torch_dist", logits_of(model, tokens, config["vocab_size"]))
    assert loaded["args"].num_layers == config["num_layers"]

    for number, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number + rank))
        if parameter.dim() == 1:
            parameter.data = torch.ones_like(parameter)
    args = Namespace(
        **{key: config[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")},
        group_query_attention=True, num_query_groups=config["num_key_value_heads"], kv_channels=config["head_dim"],
        max_position_embeddings=config["max_position_embeddings"], norm_epsilon=config["norm_epsilon"],
        rotary_base=int(config["rotary_base"]), swiglu=True, normalization="RMSNorm", position_embedding_type="rope",
        untie_embeddings_and_output_weights=not config["tie_word_embeddings"], qk_layernorm=config["qk_norm"],
        vocab_size=config["vocab_size"], params_dtype=torch.float32,
        attention_backend=AttnBackend.auto, tensor_model_parallel_size=2, pipeline_model_parallel_size=1,
        rank=rank, world_size=2,
    )  # fmt: skip
    place = folder / "written" / "mp_rank" / "iter_0000007" / f"mp_rank_{rank:02d}"
    place.mkdir(parents=True)
    states = {
        "args": args,
        "iteration": 7,
        "model": model.state_dict_for_save_checkpoint(),
        "optimizer": {"step": 3},
    }
    torch.save(states, place / "model_optim_rng.pt")
    (folder / "written" / "mp_rank" / "latest_checkpointed_iteration.txt").write_text("7")
    dist.barrier()
    place = folder / "written" / "torch_dist"
    place.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "args": args}, str(place))

    staged = build(config, 1, 2, tuple(job["counts"]))
    states = torch.load(Path(job["stages"]) / f"mp_rank_00_{rank:03d}/model_optim_rng.pt", weights_only=False)
    staged.load_state_dict(states["model"], strict=True)
    keep("stages", logits_of(staged, tokens, config["vocab_size"], rank), by=1)
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
