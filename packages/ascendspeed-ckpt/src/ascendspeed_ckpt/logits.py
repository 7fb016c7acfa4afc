"""Run two checkpoints on the same tokens and compare the logits."""

from pathlib import Path

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import HOST
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import WeightSource

BATCH, LENGTH = 2, 64


@torch.no_grad()
def compare_logits(
    source: WeightSource, written: WeightSource, folder: Path | None = None
) -> tuple[float, float, str]:
    """Return the largest difference, the largest logit, and who computed the second, on fixed pseudo-random tokens.

    Both are computed in fp32.

    Args:
        source: run by our model.
        written: run by our model, unless transformers can.
        folder: the same as a Hugging Face folder, run by transformers if it knows the architecture.
    """
    config = source.config
    length = min(LENGTH, config.max_position_embeddings)
    tokens = torch.randint(0, config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(0))
    ours = load_model(source, ParallelMesh(HOST, Layout()), torch.float32)(ModelInput(tokens)).logits
    theirs = _of_transformers(folder, tokens) if folder is not None else None
    if theirs is None:
        second = load_model(written, ParallelMesh(HOST, Layout()), torch.float32)(ModelInput(tokens)).logits
        return float((ours - second).abs().max()), float(second.abs().max()), "ours"
    return float((ours - theirs).abs().max()), float(theirs.abs().max()), "transformers"


def _of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor | None:
    """Return logits of transformers' own class, or `None` when it has none for this architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return None
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    logits: torch.Tensor = reference.eval()(tokens).logits
    return logits
