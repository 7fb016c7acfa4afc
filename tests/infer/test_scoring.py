"""Log-likelihoods equal those computed one by one with transformers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ascendspeed_core.build import build_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.model_runner import check_batch_invariance
from ascendspeed_infer.generation import score
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.scoring import encode_pair, inputs_of_ids
from support.corpus import make_texts
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool

LIMIT = 24
VOCAB = 500
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


def ours(folder: str, tp: int, limit: int) -> list[tuple[float, bool, int]]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    model = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32", parallel=parallel)
    scores = model.loglikelihood(PAIRS, max_tokens=limit)
    return [(score.logprob, score.is_greedy, score.truncated_tokens) for score in scores]


@pytest.mark.parametrize(("tp", "limit"), [(1, 64), (2, 64), (1, LIMIT)])
def test_scores(workers: WorkerPool, folder: Path, tp: int, limit: int) -> None:
    want: list[Any] = theirs(folder, limit)
    for found in workers.run(ours, tp, str(folder), tp, limit):
        # fp32 sums in another order, added up over a continuation's tokens: sums of about 100 round at 1e-5.
        assert [row[0] for row in found] == pytest.approx([row[0] for row in want], rel=1e-6, abs=1e-5)
        assert [row[1:] for row in found] == [row[1:] for row in want]
    assert any(row[2] for row in want) == (limit == LIMIT)


def test_a_continuation_longer_than_the_model_is_refused(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    with pytest.raises(AscendSpeedError, match="more than the 5 that the model takes"):
        model.loglikelihood([("a", " text of many more tokens than five")], max_tokens=5)
    pairs = [("the", " year"), ("a", " text of many more tokens than five"), ("it", " was")]
    first, second, third = model.loglikelihood_each(pairs, max_tokens=5)
    assert isinstance(second, AscendSpeedError)
    assert "more than the 5 that the model takes" in str(second)
    assert [first, third] == model.loglikelihood([pairs[0], pairs[2]], max_tokens=5)


def test_spaces_between_context_and_continuation_belong_to_the_continuation(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert encode_pair(tokenizer, "the year ", "was") == encode_pair(tokenizer, "the year", " was")
    before, after = encode_pair(tokenizer, "the year", " was")
    assert tokenizer.decode(before + after) == "the year was"


def made_pairs(count: int) -> list[tuple[list[int], list[int]]]:
    """Pairs that share examples, contexts, or nothing; continuations of one token and of many."""
    draw = random.Random(3)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, VOCAB) for _ in range(length)]

    examples, pairs = [ids(90), ids(37)], []
    while len(pairs) < count:
        context = draw.choice([*examples, []]) + ids(draw.randint(1, 40))
        pairs += [(context, ids(draw.choice([1, 1, 2, 7, 70]))) for _ in range(draw.randint(1, 4))]
    return pairs


def scored_in_company(layout: Layout, dtype: torch.dtype) -> tuple[list[float], list[float], list[float]]:
    """Log-likelihoods of pairs alone, all together, and together in another order and company."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    config = tiny_config(
        vocab_size=VOCAB, hidden_size=192, ffn_hidden_size=344, head_dim=24, max_position_embeddings=256
    )
    torch.manual_seed(0)
    model = build_model(config, mesh, dtype).eval()
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(len(name) + 17 * mesh.tp_rank * ("norm" not in name))
        parameter.data.normal_(float(parameter.dim() == 1), 0.08, generator=generator)
    check_batch_invariance(model, mesh)
    engine, pairs = LLMEngine(model, mesh), made_pairs(40)
    alone = [score(engine, inputs_of_ids([pair]))[0].logprob for pair in pairs]
    together = [one.logprob for one in score(engine, inputs_of_ids(pairs))]
    order = random.Random(4).sample(range(len(pairs)), len(pairs))
    others = [([5, 6, 7], [8]), *(pairs[number] for number in order), ([9] * 50, [4])]
    mixed = score(engine, inputs_of_ids(others))[1:-1]
    by_number = {number: one.logprob for number, one in zip(order, mixed, strict=True)}
    return alone, together, [by_number[number] for number in range(len(pairs))]


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_company_changes_no_bit(workers: WorkerPool, layout: Layout, dtype: torch.dtype) -> None:
    for alone, together, mixed in workers.run(scored_in_company, layout.world_size, layout, dtype):
        assert len(set(alone)) > 35
        assert alone == together == mixed


def test_pairs_of_ids_with_nothing_in_them(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    with pytest.raises(AscendSpeedError, match="0 ids of context and 1 of continuation"):
        model.loglikelihood_of_ids([([], [4])])
