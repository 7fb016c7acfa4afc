"""Tiny models made on the spot."""

from pathlib import Path
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.tokenizer import copy_tokenizer


def tiny_config(**changes: Any) -> ModelConfig:
    """A four-layer LLaMA with grouped-query attention."""
    values: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 128,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.08,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**(values | changes))


def save_hugging_face(config: ModelConfig, folder: Path, seed: int = 0, tokenizer: Path | None = None) -> Any:
    """Make a random model with transformers, save it, with the files of a tokenizer if given, and return it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ascendspeed_core.models.families import find_family

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**find_family(config.family).write_config(config)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.08)
    model.save_pretrained(folder)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return model.eval()
