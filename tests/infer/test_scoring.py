"""Log-likelihoods equal those computed one by one with transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.scoring import encode_pair
from support.corpus import make_texts
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool

LIMIT = 24
PAIRS = [
    ("the year was", " new"),
    ("the year was ", "new"),
    ("", "the year"),
    ("it", " self and many more"),
    *((text[:40], text[40:60]) for text in make_texts(12, seed=8) if len(text) > 60),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(tiny_config(vocab_size=400), path, tokenizer=tokenizer_folder)
    return path


def theirs(folder: Path, limit: int) -> list[tuple[float, bool, int]]:
    """One pair at a time, without padding: the definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    found = []
    for context, continuation in PAIRS:
        before, after = encode_pair(tokenizer, context, continuation)
        ids = before + after
        cut = max(len(ids) - (limit + 1), 0)
        ids = ids[cut:]
        with torch.no_grad():
            scores = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)[-len(after) :]
        targets = torch.tensor(after)
        found.append(
            (
                float(scores.gather(1, targets[:, None]).sum()),
                bool((scores.argmax(-1) == targets).all()),
                cut,
            )
        )
    return found


def ours(folder: str, tp: int, batch_size: int, limit: int) -> list[tuple[float, bool, int]]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    model = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", parallel=parallel)
    scores = model.loglikelihood(PAIRS, batch_size=batch_size, max_tokens=limit)
    return [(score.logprob, score.is_greedy, score.truncated_tokens) for score in scores]


@pytest.mark.parametrize(("tp", "batch_size", "limit"), [(1, 1, 64), (1, 5, 64), (2, 5, 64), (1, 5, LIMIT)])
def test_scores(workers: WorkerPool, folder: Path, tp: int, batch_size: int, limit: int) -> None:
    want: list[Any] = theirs(folder, limit)
    for found in workers.run(ours, tp, str(folder), tp, batch_size, limit):
        # fp32 sums in another order, added up over a continuation's tokens: sums of about 100 round at 1e-5.
        assert [row[0] for row in found] == pytest.approx([row[0] for row in want], rel=1e-6, abs=1e-5)
        assert [row[1:] for row in found] == [row[1:] for row in want]
    assert any(row[2] for row in want) == (limit == LIMIT)


def test_a_continuation_longer_than_the_model_is_refused(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    with pytest.raises(AscendSpeedError, match="more than the 5 that the model takes"):
        model.loglikelihood([("a", " text of many more tokens than five")], max_tokens=5)


def test_spaces_between_context_and_continuation_belong_to_the_continuation(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert encode_pair(tokenizer, "the year ", "was") == encode_pair(tokenizer, "the year", " was")
    before, after = encode_pair(tokenizer, "the year", " was")
    assert tokenizer.decode(before + after) == "the year was"
