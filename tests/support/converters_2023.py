"""Write checkpoints of 2023 as its converters did, with torch.save and nothing of ours: plain, and for DeepSpeed.

Rows of query_key_value are, for each head, its query, its key, its value; vocabulary, gate, up and query_key_value are
cut by rows, dense, down_proj and dense_4h_to_h by columns. Padding repeats the last rows of the vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def rows(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp)[rank].clone()


def columns(tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    return tensor.chunk(tp, 1)[rank].clone()


def padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    missing = -tensor.shape[0] % multiple
    return torch.cat([tensor, tensor[-missing:]]) if missing else tensor


def packed(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """Queries, keys and values head by head; with fewer key-value heads, group by group."""
    groups = parts[1].shape[0] // (parts[0].shape[0] // heads)
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], 1).reshape(
        -1, *parts[0].shape[1:]
    )


def llama_rank(
    weights: Mapping[str, torch.Tensor],
    heads: int,
    layers: range,
    tp: int,
    rank: int,
    ends: tuple[bool, bool],
) -> Tensors:
    """One tensor rank of one stage, as `llama/convert_weights_from_huggingface.py` fills `rank_model`."""
    model: Tensors = {}
    if ends[0]:
        model["embedding.word_embeddings.weight"] = rows(
            padded(weights["model.embed_tokens.weight"], 8 * tp), tp, rank
        )
    if ends[1]:
        model["language_model.final_layernorm.weight"] = weights["model.norm.weight"].clone()
        model["lm_head.lm_head.weight"] = rows(padded(weights["lm_head.weight"], 8 * tp), tp, rank)
    for place, number in enumerate(layers):
        theirs, ours = f"model.layers.{number}.", f"language_model.layers.{place}."
        head_dim = weights[f"{theirs}self_attn.q_proj.weight"].shape[0] // heads
        model[f"{ours}attention.rotary_emb.inv_freq"] = 1.0 / 10000.0 ** (
            torch.arange(0, head_dim, 2).float() / head_dim
        )
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" in weights:
                parts = [rows(weights[f"{theirs}self_attn.{part}_proj.{kind}"], tp, rank) for part in "qkv"]
                model[f"{ours}attention.query_key_value.{kind}"] = packed(parts, heads // tp)
        model[f"{ours}attention.dense.weight"] = columns(
            weights[f"{theirs}self_attn.o_proj.weight"], tp, rank
        )
        if f"{theirs}self_attn.o_proj.bias" in weights:
            model[f"{ours}attention.dense.bias"] = weights[f"{theirs}self_attn.o_proj.bias"].clone()
        for part in ("gate", "up"):
            model[f"{ours}mlp.{part}_proj.weight"] = rows(
                weights[f"{theirs}mlp.{part}_proj.weight"], tp, rank
            )
        model[f"{ours}mlp.down_proj.weight"] = columns(weights[f"{theirs}mlp.down_proj.weight"], tp, rank)
        for name in ("input_layernorm", "post_attention_layernorm"):
            model[f"{ours}{name}.weight"] = weights[f"{theirs}{name}.weight"].clone()
    return model


def write_llama(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    heads: int,
    num_layers: int,
    tp: int = 1,
    pp: int = 1,
    deepspeed: bool = False,
    **more: Any,
) -> Path:
    """Write a LLaMA as its converter does; with `deepspeed` under the names of DeepSpeed's engine, of one stage."""
    tracker = "latest" if deepspeed else "latest_checkpointed_iteration.txt"
    (folder / "release").mkdir(parents=True)
    (folder / tracker).write_text("release\n")
    each = num_layers // pp
    for rank in range(tp):
        for stage in range(pp):
            layers = range(stage * each, (stage + 1) * each)
            model = llama_rank(weights, heads, layers, tp, rank, (stage == 0, stage == pp - 1))
            if deepspeed:
                content = {"checkpoint_version": 3.0, "module": model, "dp_world_size": 0, **more}
                path = folder / "release" / f"mp_rank_{rank:02d}_model_states.pt"
            else:
                content = {"checkpoint_version": 3.0, "model": model, **more}
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                path = folder / "release" / name / "model_optim_rng.pt"
            path.parent.mkdir(exist_ok=True)
            torch.save(content, path)
    return folder


def write_bloom_deepspeed(
    folder: Path, weights: Mapping[str, torch.Tensor], num_layers: int, tp: int = 1, pp: int = 1
) -> Path:
    """Write a Bloom as `bloom/convert_weights_from_huggingface.py` does: under `module.module`, layers from 3 on."""
    (folder / "release").mkdir(parents=True)
    (folder / "latest").write_text("release\n")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    embedding = padded(weights["word_embeddings.weight"], 8 * tp)
    sizes = [round(num_layers / pp)] * (pp - 1)
    sizes.append(num_layers - sum(sizes))
    for rank in range(tp):
        for stage in range(pp):
            model: Tensors = {}
            if stage == 0:
                for kind in ("weight", "bias"):
                    model[f"tied_modules.embed.word_embeddings.norm.{kind}"] = weights[
                        f"word_embeddings_layernorm.{kind}"
                    ].clone()
            if stage in (0, pp - 1):
                model["tied_modules.embed.word_embeddings.weight"] = rows(embedding, tp, rank)
            if stage == pp - 1:
                for kind in ("weight", "bias"):
                    model[f"{num_layers + 4}.final_layernorm.{kind}"] = weights[f"ln_f.{kind}"].clone()
            for number in range(sum(sizes[:stage]), sum(sizes[: stage + 1])):
                for name, cut in _BLOOM_LAYER.items():
                    tensor = weights[f"h.{number}.{name}"]
                    model[f"{number + 3}.{name}"] = (
                        cut(tensor, tp, rank) if cut is not None else tensor.clone()
                    )
            content = {"checkpoint_version": 3.0, "module": {"module": model}, "dp_world_size": 0}
            torch.save(content, folder / "release" / f"mp_rank_{stage * tp + rank:02d}_model_states.pt")
    return folder


_BLOOM_LAYER: dict[str, Any] = {
    **{f"input_layernorm.{kind}": None for kind in ("weight", "bias")},
    **{f"post_attention_layernorm.{kind}": None for kind in ("weight", "bias")},
    "self_attention.query_key_value.weight": rows,
    "self_attention.query_key_value.bias": rows,
    "self_attention.dense.weight": columns,
    "self_attention.dense.bias": None,
    "mlp.dense_h_to_4h.weight": rows,
    "mlp.dense_h_to_4h.bias": rows,
    "mlp.dense_4h_to_h.weight": columns,
    "mlp.dense_4h_to_h.bias": None,
}  # fmt: skip
