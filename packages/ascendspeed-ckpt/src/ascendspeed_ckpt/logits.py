"""Run a Hugging Face folder with transformers and with our model, and compare the logits."""

from pathlib import Path

import torch

from ascendspeed_core.config.parallel import Layout
from ascendspeed_core.device import HOST
from ascendspeed_core.parallel.build import load_model
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import WeightSource

BATCH, LENGTH = 2, 64


@torch.no_grad()
def compare_logits(source: WeightSource, folder: Path) -> tuple[float, float]:
    """Return the largest difference and the largest logit on fixed pseudo-random tokens, both models in fp32.

    Args:
        source: the weights, run by our model.
        folder: the same weights as a Hugging Face folder, run by transformers.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = source.config
    length = min(LENGTH, config.max_position_embeddings)
    tokens = torch.randint(0, config.vocab_size, (BATCH, length), generator=torch.Generator().manual_seed(0))
    ours = load_model(source, ParallelMesh(HOST, Layout()), torch.float32)(tokens)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    theirs = reference.eval()(tokens).logits
    return float((ours - theirs).abs().max()), float(theirs.abs().max())
