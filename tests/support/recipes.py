"""Recipes at a scale that a test can run: the same features, few and narrow layers, 2 to 4 processes."""

import json
from pathlib import Path
from typing import Any

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.families.published import published_size

MOST_PROCESSES = 4
VOCABULARY, SEQ_LENGTH = 400, 32

Sections = dict[str, dict[str, Any]]


def published(name: str) -> ModelConfig:
    """The architecture of a published size."""
    found = published_size(name)
    assert found is not None, name
    family, config = found
    return family.read_config(config)


def full_layout(recipe: Sections) -> Layout:
    """The layout of a recipe on its own devices."""
    return validate(ParallelConfig, dict(recipe.get("parallel", {}))).layout(recipe["recipe"]["devices"])


def scaled_sizes(recipe: Sections) -> dict[str, int]:
    """Sizes of the axes on at most four processes: 2 where there were more than one, first tp and ep, then pp, dp.

    An axis that no longer fits is left out, but dp stays where the optimizer is sharded over it.
    """
    full = full_layout(recipe)
    sizes = {"tp": min(full.tp, 2), "ep": min(full.ep, 2), "pp": min(full.pp, 2), "dp": min(full.dp, 2)}
    sharded = full.sharded_optimizer or full.zero_stage is not None
    if sizes["tp"] * sizes["pp"] * sizes["dp"] > MOST_PROCESSES:
        sizes["pp" if sharded else "dp"] = 1
    return sizes


def scaled_model(name: str, sizes: dict[str, int]) -> ModelConfig:
    """A small model with everything that makes the published one special."""
    full = published(name)
    ratio = full.num_attention_heads // full.num_key_value_heads
    heads = 8 if ratio == 1 else 2 * ratio
    uneven = full.num_layers % 12 != 0 and name.startswith("bloom-176b")
    changes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // ratio,
        "hidden_size": 4 * heads,
        # Heads of some models are together wider than the residual stream.
        "head_dim": 4 if full.num_attention_heads * full.head_dim == full.hidden_size else 8,
        # Some families say it by the width of the residual stream.
        "ffn_hidden_size": 16 * heads if full.ffn_hidden_size == 4 * full.hidden_size else 48,
        "num_layers": 2 * sizes["pp"] + uneven,
        "max_position_embeddings": 64,
        "initializer_range": 0.05,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": None,
    }
    if full.experts is not None:
        changes["experts"] = full.experts.model_copy(
            update={"count": 8, "per_token": min(full.experts.per_token, 2), "ffn_hidden_size": 16}
        )
        if full.ffn_hidden_size == full.experts.ffn_hidden_size:
            changes["ffn_hidden_size"] = 16
    if full.rotary_scaling is not None and full.rotary_scaling.original_max_position_embeddings is not None:
        changes["rotary_scaling"] = full.rotary_scaling.model_copy(
            update={"original_max_position_embeddings": 16}
        )
    return full.model_copy(update=changes)


def scaled(recipe: Sections, folder: Path, steps: int = 2) -> tuple[Sections, Path, int]:
    """Return a recipe scaled down, the config.json of its model, and how many processes it takes."""
    sizes = scaled_sizes(recipe)
    name = recipe["recipe"]["model"]
    small = {section: dict(values) for section, values in recipe.items() if isinstance(values, dict)}
    model = scaled_model(name, sizes)
    config = folder / f"{name}-{sizes['pp']}.json"
    config.write_text(json.dumps(find_family(model.family).write_config(model)))
    processes = sizes["tp"] * sizes["pp"] * sizes["dp"]
    small["recipe"] = {"command": recipe["recipe"]["command"], "devices": processes}
    for key, axis in (
        ("tensor_model_parallel_size", "tp"),
        ("pipeline_model_parallel_size", "pp"),
        ("expert_model_parallel_size", "ep"),
    ):
        if key in small.get("parallel", {}):
            small["parallel"][key] = sizes[axis]
    small["data"]["seq_length"] = SEQ_LENGTH
    batch = small["batch"]
    micro = batch["micro_batch_size"] = min(batch["micro_batch_size"], 2)
    step = micro * sizes["dp"]
    training, optimizer = small["training"], small["optimizer"]
    if "rampup_batch_size" in batch:
        # The first step has half the samples of the second.
        batch.update(rampup_batch_size=[step, step, step], global_batch_size=2 * step)
        training["train_samples"] = 3 * step
        optimizer.update(lr_decay_samples=3 * step, lr_warmup_samples=1)
    else:
        batch["global_batch_size"] = 2 * step
        small["training"] = {"train_iters": steps} | {k: training[k] for k in ("seed",) if k in training}
        for key in ("lr_decay_iters", "lr_warmup_iters"):
            if key in optimizer:
                optimizer[key] = steps if key == "lr_decay_iters" else 1
    if small["precision"]["dtype"] == "float16":
        # DeepSpeed refuses fp16 on a CPU; the scale begins where no step overflows.
        if "zero_stage" in small.get("parallel", {}):
            small["precision"] = {"dtype": "bfloat16"}
        else:
            small["loss_scaling"] = {"initial_loss_scale": 128.0}
    if "checkpoint_block_layer" in small.get("recompute", {}):
        small["recompute"]["checkpoint_block_layer"] = 1
    return small, config, processes


def kept_features(recipe: Sections) -> dict[str, Any]:
    """What of the layout a scaled recipe must still have."""
    full, sizes = full_layout(recipe), scaled_sizes(recipe)
    return {
        "tp": sizes["tp"],
        "pp": sizes["pp"],
        "dp": sizes["dp"],
        "ep": sizes["ep"],
        "sequence_parallel": full.sequence_parallel,
        "sharded_optimizer": full.sharded_optimizer,
        "zero_stage": full.zero_stage,
    }
