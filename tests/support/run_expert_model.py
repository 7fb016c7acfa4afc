"""Two processes of megatron-core's GPTModel with experts, half of them on each, read what we wrote and write their own.

Run under torchrun with a folder that holds `job.json`:
    config: our ModelConfig as JSON; tokens: ids, [B, S]
    mp_rank: folder with mp_rank_00_EEE at ep 2, names of its own layers
    torch_dist: folder with metadata.json, names of its own layers
It leaves `mp_rank.pt` and `torch_dist.pt` (logits of each), and `written/mp_rank` and `written/torch_dist` (what it
saved itself at ep 2).
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


def build(config: dict[str, Any], ep: int) -> Any:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer import TransformerConfig

    parallel_state.initialize_model_parallel(1, 1, expert_model_parallel_size=ep)
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    experts = config["experts"]
    is_softmax = experts["score"] == "softmax"
    transformer = TransformerConfig(
        num_layers=config["num_layers"], hidden_size=config["hidden_size"],
        ffn_hidden_size=config["ffn_hidden_size"], num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"], kv_channels=config["head_dim"], normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, layernorm_epsilon=config["norm_epsilon"], pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False, persist_layer_norm=False, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, use_cpu_initialization=True,
        expert_model_parallel_size=ep, num_moe_experts=experts["count"], moe_ffn_hidden_size=experts["ffn_hidden_size"],
        moe_layer_freq=layer_frequency(config), moe_router_topk=experts["per_token"],
        moe_router_score_function=experts["score"], moe_router_enable_expert_bias=experts["score_bias"],
        moe_router_pre_softmax=is_softmax and not experts["normalised"],
        moe_router_topk_scaling_factor=experts["scaling"], moe_router_dtype="fp32",
        moe_router_num_groups=experts["groups"] if experts["groups"] > 1 else None,
        moe_router_group_topk=experts["groups_per_token"] if experts["groups"] > 1 else None,
        moe_shared_expert_intermediate_size=experts["shared_ffn_hidden_size"],
        moe_shared_expert_gate=experts["shared_gate"], moe_token_dispatcher_type="allgather",
    )  # fmt: skip
    return GPTModel(
        transformer,
        get_gpt_decoder_block_spec(transformer, use_transformer_engine=False),
        -(-config["vocab_size"] // 128) * 128,
        config["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=int(config["rotary_base"]),
        share_embeddings_and_output_weights=False,
    ).eval()


def layer_frequency(config: dict[str, Any]) -> int | list[int]:
    """Which layers have experts, as Megatron-LM says it."""
    dense = config["experts"]["dense_layers"]
    return [int(layer not in dense) for layer in range(config["num_layers"])] if dense else 1


@torch.no_grad()
def main(folder: Path) -> None:
    install()
    from megatron.core import dist_checkpointing

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    job = json.loads((folder / "job.json").read_text())
    config, tokens = job["config"], torch.tensor(job["tokens"])
    places = torch.arange(tokens.shape[1]).expand_as(tokens)
    model = build(config, 2)

    def keep(name: str) -> None:
        logits = model(tokens, places, None)[..., : config["vocab_size"]]
        if rank == 0:
            torch.save(logits, folder / f"{name}.pt")

    states = torch.load(
        Path(job["mp_rank"]) / f"mp_rank_00_{rank:03d}/model_optim_rng.pt", weights_only=False
    )
    model.load_state_dict(states["model"], strict=False)
    given, known = states["model"].keys(), dict(model.named_parameters()).keys()
    assert known <= given, known - given
    assert given <= {*known, *dict(model.named_buffers())}
    keep("mp_rank")

    for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("expert_bias"))):
        tensor.zero_()
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, job["torch_dist"])
    model.load_state_dict(loaded["model"], strict=True)
    keep("torch_dist")

    for number, (name, parameter) in enumerate(model.named_parameters()):
        seed = number + 1000 * rank * (".experts." in name)
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    args = Namespace(
        num_experts=config["experts"]["count"], moe_router_topk=config["experts"]["per_token"],
        expert_model_parallel_size=2, expert_tensor_parallel_size=1, tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1, rank=rank, world_size=2,
    )  # fmt: skip
    place = folder / "written" / "mp_rank" / "iter_0000007" / f"mp_rank_00_{rank:03d}"
    place.mkdir(parents=True)
    states = {"args": args, "iteration": 7, "model": model.state_dict_for_save_checkpoint()}
    torch.save(states, place / "model_optim_rng.pt")
    (folder / "written" / "mp_rank" / "latest_checkpointed_iteration.txt").write_text("7")
    place = folder / "written" / "torch_dist"
    place.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "args": args}, str(place))
    dist.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
