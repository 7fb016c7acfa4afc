"""A reader of AscendSpeed's checkpoints of 2023 that shares nothing with ours: only what the format is known to be.

LLaMA-type models: flat names, layers counted within their stage; rows of query_key_value are, for each key-value head
of a rank, its query heads, its key, its value; mlp.proj is a rank's gate above its up; vocabulary, gate, up and
query_key_value are cut by rows, dense and down_proj by columns.
"""

from pathlib import Path
from typing import Any

import torch


def read_llama(run: Path, heads: int, groups: int, vocab_size: int) -> dict[str, torch.Tensor]:
    """All tensors under Hugging Face's names."""
    folder = run / (run / "latest_checkpointed_iteration.txt").read_text().strip()
    files: dict[tuple[int, int], Any] = {}
    for path in folder.glob("mp_rank_*"):
        place = [int(part) for part in path.name.split("_")[2:]]
        loaded = torch.load(path / "model_optim_rng.pt", map_location="cpu", weights_only=False)
        assert loaded["checkpoint_version"] == 3.0
        files[place[0], place[1] if len(place) > 1 else 0] = loaded
    tp, pp = (max(place[i] for place in files) + 1 for i in (0, 1))
    assert all(f["args"].tensor_model_parallel_size == tp for f in files.values())
    chunks = [key for key in ("model", "model0", "model1", "model2", "model3") if key in files[0, 0]]
    result: dict[str, torch.Tensor] = {}
    done = 0
    for chunk in chunks:
        for stage in range(pp):
            ranks = [files[rank, stage][chunk] for rank in range(tp)]
            done += read_stage(result, ranks, done, heads // groups, groups // tp)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert result[name].shape[0] % (128 * tp) == 0
        result[name] = result[name][:vocab_size]
    return result


def read_stage(
    result: dict[str, torch.Tensor],
    ranks: list[dict[str, torch.Tensor]],
    first: int,
    per_group: int,
    groups: int,
) -> int:
    """Join one stage, and return how many layers it has."""
    names = set(ranks[0])
    if "embedding.word_embeddings.weight" in names:
        result["model.embed_tokens.weight"] = joined(ranks, "embedding.word_embeddings.weight", 0)
    if "lm_head.lm_head.weight" in names:
        result["lm_head.weight"] = joined(ranks, "lm_head.lm_head.weight", 0)
        result["model.norm.weight"] = ranks[0]["language_model.final_layernorm.weight"]
    count = 0
    while (prefix := f"language_model.layers.{count}.") + "input_layernorm.weight" in names:
        layer = f"model.layers.{first + count}."
        for theirs, ours in (("input_layernorm", "input_layernorm"), ("post_attention_layernorm",) * 2):
            result[f"{layer}{ours}.weight"] = ranks[0][f"{prefix}{theirs}.weight"]
        kinds: dict[str, list[torch.Tensor]] = {"q": [], "k": [], "v": []}
        for rank in ranks:
            packed = rank[f"{prefix}attention.query_key_value.weight"]
            width = packed.shape[0] // (groups * (per_group + 2))
            packed = packed.view(groups, per_group + 2, width, packed.shape[1])
            for kind, part in zip("qkv", packed.split([per_group, 1, 1], 1), strict=True):
                kinds[kind].append(part.reshape(-1, packed.shape[-1]))
        for kind, parts in kinds.items():
            result[f"{layer}self_attn.{kind}_proj.weight"] = torch.cat(parts)
        result[f"{layer}self_attn.o_proj.weight"] = joined(ranks, f"{prefix}attention.dense.weight", 1)
        if f"{prefix}mlp.proj.weight" in names:
            halves = [rank[f"{prefix}mlp.proj.weight"].chunk(2) for rank in ranks]
            result[f"{layer}mlp.gate_proj.weight"] = torch.cat([gate for gate, _ in halves])
            result[f"{layer}mlp.up_proj.weight"] = torch.cat([up for _, up in halves])
        else:
            for kind in ("gate", "up"):
                result[f"{layer}mlp.{kind}_proj.weight"] = joined(ranks, f"{prefix}mlp.{kind}_proj.weight", 0)
        result[f"{layer}mlp.down_proj.weight"] = joined(ranks, f"{prefix}mlp.down_proj.weight", 1)
        assert f"{prefix}attention.rotary_emb.inv_freq" in names
        count += 1
    return count


def joined(ranks: list[dict[str, torch.Tensor]], name: str, dim: int) -> torch.Tensor:
    return torch.cat([rank[name] for rank in ranks], dim)
