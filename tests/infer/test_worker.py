"""Followers run what rank 0 decides, until it shuts down: all kinds of work, an error, and calls alike afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.control_channel import BUFFER_BYTES, open_channel
from ascendspeed_infer.language_model import LanguageModel
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool

PROMPTS = ["the year", "it was a time of", "中文 and", "a"]
PAIRS = [("the year", " was"), ("it was a ", "time"), ("of the and", " his her")]
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(tiny_config(vocab_size=400), path, tokenizer=tokenizer_folder)
    return path


def all_kinds(model: LanguageModel) -> list[Any]:
    """Batches, draws, beams, streams, batch-invariant texts, scores, logits: what a model can be asked."""
    found: list[Any] = [
        model.generate(PROMPTS, max_new_tokens=6, ignore_eos=True),
        model.generate(PROMPTS[:2], max_new_tokens=5, do_sample=True, num_return_sequences=2, seed=3),
        model.generate("the", max_new_tokens=5, num_beams=3, num_return_sequences=2),
        model.generate(PROMPTS, max_new_tokens=4, batch_invariant=True, return_log_probs=True),
        list(model.generate("it was", stream=True, max_new_tokens=5)),
        [(score.logprob, score.is_greedy) for score in model.loglikelihood(PAIRS)],
        model.logits([1, 5, 9]).tolist(),
    ]
    stream = model.generate("it was a", stream=True, max_new_tokens=9, ignore_eos=True)
    found.append([next(stream), next(stream)])
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(AscendSpeedError, match="more than max_position_embeddings"):
        model.generate("the", max_new_tokens=5000)
    session = model.engine.new_session()
    turns = ("it was a time of the year and", "it was a time of the year and then it")
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
    return found + [list(model.stream(turn, session=session, **options)) for turn in turns]


def lead_or_follow(folder: str, parallel: dict[str, int]) -> list[Any]:
    """What rank 0 finds with followers, and what every rank finds when all call alike before and after."""
    model = LanguageModel.from_pretrained(
        folder, device="cpu", dtype="float64", parallel=ParallelConfig(**parallel)
    )
    found: list[Any] = [all_kinds(model)]
    with model.lead_or_follow() as leads:
        if leads:
            found.append(all_kinds(model))
    return [*found, all_kinds(model)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_followers_run_what_the_leader_decides(workers: WorkerPool, folder: Path, layout: str) -> None:
    leader, follower = workers.run(lead_or_follow, 2, str(folder), LAYOUTS[layout])
    alike, led, after = leader
    assert led == alike == after
    assert follower == [alike, alike]


def interrupted(folder: str) -> tuple[bool, list[int]]:
    """The leader's program fails in the middle of its requests: the followers are released all the same."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    model = LanguageModel.from_pretrained(folder, device="cpu", parallel=parallel)
    has_failed = False
    try:
        with model.lead_or_follow() as leads:
            if leads:
                stream = model.generate("it was", stream=True, max_new_tokens=9, ignore_eos=True)
                next(stream)
                raise ValueError("a bug of the caller")
    except ValueError:
        has_failed = True
    (one,) = model.generate("it was", max_new_tokens=4, ignore_eos=True)
    return has_failed, list(one.token_ids)


def test_an_error_of_the_leader_releases_the_followers(workers: WorkerPool, folder: Path) -> None:
    (leader_failed, leader), (follower_failed, follower) = workers.run(interrupted, 2, str(folder))
    assert (leader_failed, follower_failed) == (True, False)
    assert leader == follower


def echoed(sizes: list[int]) -> list[int] | None:
    """Send texts of some sizes from rank 0 to rank 1, which returns what it got."""
    channel = open_channel([[0, 1]])
    assert channel is not None
    if channel.is_leader:
        for size in sizes:
            channel.send("x" * size)
        return None
    return [len(channel.receive()) for _ in sizes]


def test_values_of_any_size(workers: WorkerPool) -> None:
    """Below, at and above the size that one broadcast takes."""
    sizes = [0, 5, *range(BUFFER_BYTES - 60, BUFFER_BYTES + 3), 100_000]
    assert workers.run(echoed, 2, sizes) == [None, sizes]


def test_one_process_makes_no_collective(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    for name in ("broadcast", "broadcast_object_list", "all_reduce", "all_gather", "new_group", "barrier"):
        monkeypatch.setattr(torch.distributed, name, None)
    with model.lead_or_follow() as leads:
        assert leads
        assert len(all_kinds(model)) == 10
