"""Texts of a model in the middle of its training, for `asd-core pretrain --eval-prompts`."""

from collections.abc import Sequence
from pathlib import Path

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.language_model import LanguageModel


def continue_texts(
    model: Transformer, mesh: ParallelMesh, tokenizer: Path, prompts: Sequence[str], max_new_tokens: int
) -> list[str]:
    """Continue prompts greedily; see `ascendspeed_core.training.eval_prompts.ContinueTexts`."""
    was_training = model.training
    try:
        language_model = LanguageModel(model, load_tokenizer(tokenizer), mesh)
        completions = language_model.generate(list(prompts), max_new_tokens=max_new_tokens)
    finally:
        model.train(was_training)
    return [completion.text for completion in completions]
