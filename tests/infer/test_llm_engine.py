"""The engine's loop: requests that come and go at any time get what each gets alone, and leave no memory."""

import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.llm_engine import LLMEngine
from ascendspeed_infer.engine.model_runner import ModelRunner, decode_one_token, prefill
from ascendspeed_infer.engine.prefix_cache import common_prefix_length
from ascendspeed_infer.engine.scoring_request import ScoringRequest
from ascendspeed_infer.engine.sequence import (
    BeamSearchRequest,
    CompletionOutput,
    GenerationSettings,
    Request,
    SamplingRequest,
)
from ascendspeed_infer.generation import score, stream_tokens
from ascendspeed_infer.sampling import SamplingParams
from ascendspeed_infer.scoring import inputs_of_ids
from support.families import REFERENCES
from support.processes import WorkerPool

VOCAB = 125
MAX_NUM_SEQS = 8


def load(folder: str, layout: Layout, dtype: torch.dtype = torch.float64) -> tuple[Transformer, ParallelMesh]:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    return load_model(open_weights(Path(folder)), mesh, dtype).eval(), mesh


def make_request(number: int) -> SamplingRequest | BeamSearchRequest:
    """A request of random length, rule and end; every third begins like others."""
    draw = random.Random(number)
    shared = [random.Random(number % 2).randrange(3, VOCAB) for _ in range(28)]
    prompt = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 16))]
    if number % 3 == 0:
        prompt = shared[: draw.randint(16, 28)] + prompt
    ends = tuple(draw.sample(range(VOCAB), 4)) if draw.random() < 0.5 else ()
    sampling = SamplingParams(
        draw.random() < 0.5, 0.8, top_k=20, seed=number, repetition_penalty=draw.choice([1.0, 1.3])
    )
    settings = GenerationSettings(draw.randint(1, 20), sampling, ends, return_log_probs=True)
    if number % 10 == 7:
        return BeamSearchRequest(prompt, settings, BeamSettings(3, num_return_sequences=3))
    return SamplingRequest(prompt, settings)


@dataclass(frozen=True)
class Outcome:
    """What a request got: completions when it was finished, ids so far when it was aborted."""

    completions: list[CompletionOutput]
    aborted_after: list[int] | None = None


def outcome(request: SamplingRequest | BeamSearchRequest, is_aborted: bool = False) -> Outcome:
    if is_aborted:
        return Outcome([], request.new_ids if isinstance(request, SamplingRequest) else [])
    return Outcome(request.outputs())


def run_random_load(engine: LLMEngine, count: int, batch_invariant: bool) -> tuple[list[Outcome], int]:
    """Add requests at random times and abort some; return what each got, and the number of passes."""
    draw = random.Random(5)
    requests = [make_request(number) for number in range(count)]
    waiting, alive = list(range(count)), []
    aborted, passes, busiest = set[int](), 0, 0
    while waiting or engine.has_unfinished_requests():
        for _ in range(min(draw.choice([0, 0, 0, 2, 5]), len(waiting))):
            alive.append(waiting.pop(0))
            engine.add_request(str(alive[-1]), requests[alive[-1]], batch_invariant)
        if draw.random() < 0.2 and alive:
            unlucky = draw.choice(alive[-15:])
            if not requests[unlucky].is_finished:
                engine.abort_request(str(unlucky))
                aborted.add(unlucky)
        busiest = max(busiest, len(engine.step()))
        passes += 1
    assert busiest > MAX_NUM_SEQS // 2
    check_no_leak(engine)
    return [outcome(request, number in aborted) for number, request in enumerate(requests)], passes


def under_random_load(
    folder: str, layout: Layout, count: int, invariant: torch.dtype | None = None, leads: bool = False
) -> tuple[list[Outcome], int, int] | None:
    """Run a random load; return what each got, reused tokens and passes.

    Batch-invariant in the format `invariant`, if one is given. With `leads`, rank 0 alone has the requests and the
    others follow; they return nothing.
    """
    model, mesh = load(folder, layout, invariant or torch.float64)
    engine = LLMEngine(model, mesh, cache_tokens=400, max_num_seqs=MAX_NUM_SEQS, prefill_tokens_per_step=24)
    if not leads:
        if invariant:
            engine.check_batch_invariance()
        found, passes = run_random_load(engine, count, invariant is not None)
        return found, passes, engine.reused_tokens
    with engine.lead_or_follow() as is_leader:
        if not is_leader:
            return None
        found, passes = run_random_load(engine, count, invariant is not None)
        return found, passes, engine.reused_tokens


def check_against_alone(folder: str, found: list[Outcome], invariant: torch.dtype | None = None) -> None:
    model, mesh = load(folder, Layout(), invariant or torch.float64)
    engine = LLMEngine(model, mesh, enable_prefix_caching=False)
    for number, one in enumerate(found):
        request = make_request(number)
        engine.add_request("alone", request, invariant is not None)
        engine.run()
        assert engine.free_blocks == engine.num_blocks
        if one.aborted_after is not None:
            if isinstance(request, SamplingRequest):
                assert request.new_ids[: len(one.aborted_after)] == one.aborted_after
            continue
        for mine, want in zip(one.completions, outcome(request).completions, strict=True):
            assert (mine.token_ids, mine.finish_reason) == (want.token_ids, want.finish_reason)
            if invariant:
                assert mine == want
                continue
            # The model is in float64: the same sums in other shapes. Beams add up fp32 log-probabilities.
            assert mine.log_probs == pytest.approx(want.log_probs, abs=1e-9 if mine.score is None else 2e-6)


def check_no_leak(engine: LLMEngine) -> None:
    engine.clear_prefix_cache()
    assert engine.free_blocks == engine.num_blocks


@pytest.mark.parametrize("leads", [False, True], ids=["all call alike", "rank 0 leads"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
def test_random_load(workers: WorkerPool, tmp_path: Path, layout: Layout, leads: bool) -> None:
    REFERENCES["Mistral"].save(tmp_path)
    first, *others = workers.run(
        under_random_load,
        layout.world_size,
        str(tmp_path),
        layout,
        60 if layout.world_size == 1 else 24,
        None,
        leads,
    )
    assert all(other == (None if leads else first) for other in others)
    found, passes, reused = first
    check_against_alone(str(tmp_path), found)
    assert sum(one.aborted_after is not None for one in found) > len(found) // 30
    assert reused > len(found)
    assert passes > len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant(workers: WorkerPool, tmp_path: Path, dtype: torch.dtype) -> None:
    """Tokens and log-probabilities are those of each request alone, bit for bit."""
    REFERENCES["Mistral"].save(tmp_path)
    ((found, _, reused),) = workers.run(under_random_load, 1, str(tmp_path), Layout(), 40, dtype)
    check_against_alone(str(tmp_path), found, dtype)
    assert reused > len(found)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["Mistral", "Bloom"])
def test_500_requests(workers: WorkerPool, tmp_path: Path, name: str) -> None:
    REFERENCES[name].save(tmp_path)
    ((found, _, reused),) = workers.run(under_random_load, 1, str(tmp_path), Layout(), 500)
    check_against_alone(str(tmp_path), found)
    assert sum(one.aborted_after is not None for one in found) > 20
    assert reused > 1000


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2)], ids=str)
def test_200_requests_with_followers(workers: WorkerPool, tmp_path: Path, layout: Layout) -> None:
    REFERENCES["Llama 3.2"].save(tmp_path)
    (found, _, _), *_ = workers.run(
        under_random_load, layout.world_size, str(tmp_path), layout, 200, None, True
    )
    check_against_alone(str(tmp_path), found)


@pytest.fixture
def model(tmp_path: Path) -> tuple[Transformer, ParallelMesh]:
    REFERENCES["Llama 3.2"].save(tmp_path)
    return load(str(tmp_path), Layout())


def sampled(prompt: list[int], new: int, **settings: Any) -> SamplingRequest:
    return SamplingRequest(prompt, GenerationSettings(new, **settings))


def run_alone(model: tuple[Transformer, ParallelMesh], request: SamplingRequest) -> list[int]:
    engine = LLMEngine(*model)
    engine.add_request("alone", request)
    engine.run()
    return request.new_ids


def test_the_functions_that_decode_one_text(model: tuple[Transformer, ParallelMesh]) -> None:
    runner = ModelRunner(*model, 40)
    ids = [5, 9, 11]
    slot = runner.cache.reserve(20)
    logits = prefill(runner, slot, ids)
    found = []
    for position in range(3, 9):
        found.append(int(logits.argmax()))
        logits = decode_one_token(runner, slot, found[-1], position)
    assert run_alone(model, sampled(ids, 6)) == found


def test_one_token_in_bf16(tmp_path: Path) -> None:
    REFERENCES["Llama 3.2"].save(tmp_path)
    model, mesh = load(str(tmp_path), Layout(), torch.bfloat16)
    wide, _ = load(str(tmp_path), Layout(), torch.float64)
    runner = ModelRunner(model, mesh, 32)
    slot = runner.cache.reserve(9)
    ids = [5, 9, 11, 40, 3, 77]
    prefill(runner, slot, ids[:3])
    for position in range(3, 6):
        logits = decode_one_token(runner, slot, ids[position], position)
        want = wide(ModelInput(torch.tensor([ids[: position + 1]]))).logits[0, -1].detach()
        assert logits.shape == want.shape
        # Numbers of 8 bits: logits of up to 3 are rounded at 2**-7, sums before them more.
        torch.testing.assert_close(logits.double(), want, rtol=0, atol=0.05)
        assert float(want.abs().max()) > 0.5


def test_first_come_first_served(model: tuple[Transformer, ParallelMesh]) -> None:
    """A large request waits for memory, and small ones that came later do not overtake it."""
    engine = LLMEngine(*model, cache_tokens=64, enable_prefix_caching=False)
    requests = {
        name: sampled([7] * prompt, new)
        for name, prompt, new in (("first", 10, 6), ("large", 30, 34), ("small", 3, 3))
    }
    for name, one in requests.items():
        engine.add_request(name, one)
    order: list[str] = []
    while engine.has_unfinished_requests():
        order += [one.request_id for one in engine.step() if len(requests[one.request_id].new_ids) == 1]
        assert engine.free_blocks >= 0
    assert order == ["first", "large", "small"]
    assert engine.free_blocks == engine.num_blocks == 4


def test_a_long_prompt_does_not_hold_up_the_others(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = LLMEngine(*model, cache_tokens=200, prefill_tokens_per_step=10)
    short, long = sampled([5], 12), sampled([*range(3, 53)], 2)
    engine.add_request("short", short)
    engine.step()
    engine.add_request("long", long)
    while not long.new_ids:
        before = len(short.new_ids)
        engine.step()
        assert len(short.new_ids) == before + 1
    assert len(short.new_ids) == 6


def test_a_prompt_that_goes_on_from_a_finished_text(model: tuple[Transformer, ParallelMesh]) -> None:
    """The next turn of a chat computes only what is new; memory of old texts is given up when it is needed."""
    engine = LLMEngine(*model, cache_tokens=96)
    turn = sampled([*range(3, 23)], 8)
    engine.add_request("turn", turn, cache_salt="chat")
    engine.run()
    follow = [*turn.prompt_ids, *turn.new_ids, 40, 41]
    stranger = sampled(follow, 4)
    engine.add_request("stranger", stranger, cache_salt="another")
    engine.run()
    assert engine.reused_tokens == 0
    following = sampled(follow, 4)
    engine.add_request("following", following, cache_salt="chat")
    engine.run()
    # The last new id of the first turn was never read.
    assert engine.reused_tokens == 27
    assert stranger.new_ids == following.new_ids == run_alone(model, sampled(follow, 4))
    assert engine.free_blocks < engine.num_blocks
    large = sampled([9] * 60, 4)
    engine.add_request("large", large)
    engine.run()
    assert large.finish_reason == "length"
    check_no_leak(engine)


def test_prompts_that_are_read_at_the_same_time_are_read_once(
    model: tuple[Transformer, ParallelMesh],
) -> None:
    engine = LLMEngine(*model, cache_tokens=400)
    requests = [sampled([*range(3, 43)], 5, sampling=SamplingParams(True, seed=seed)) for seed in range(4)]
    for number, one in enumerate(requests):
        engine.add_request(str(number), one)
    engine.run()
    assert engine.reused_tokens == 3 * 39
    assert len({tuple(one.new_ids) for one in requests}) > 1


def test_each_step_reports_its_tokens(model: tuple[Transformer, ParallelMesh]) -> None:
    """Streaming: every token once, the reason with the last; the finished request brings its completion."""
    engine = LLMEngine(*model, cache_tokens=200)
    wanted = {"a": sampled([5, 6], 7, return_log_probs=True), "b": sampled([8] * 5, 3)}
    beams = BeamSearchRequest([4, 5], GenerationSettings(4), BeamSettings(2))
    for name, request in {**wanted, "beams": beams}.items():
        engine.add_request(name, request)
    tokens: dict[str, list[int]] = {"a": [], "b": [], "beams": []}
    finished = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += [one.token_id for one in output.new_tokens]
            for one in output.new_tokens:
                assert (one.finish_reason is not None) == output.is_finished
                assert (one.log_prob is not None) == (output.request_id == "a")
            if output.is_finished:
                finished[output.request_id] = output.completions
    assert tokens == {"a": wanted["a"].new_ids, "b": wanted["b"].new_ids, "beams": []}
    assert finished == {name: tuple(one.outputs()) for name, one in {**wanted, "beams": beams}.items()}


def test_an_abort_frees_the_slot_within_one_step(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = LLMEngine(*model, cache_tokens=64)
    large, waiting, small = sampled([5] * 20, 44), sampled([9] * 40, 20), sampled([3], 4)
    engine.add_request("large", large)
    engine.add_request("waiting", waiting)
    for _ in range(3):
        engine.step()
    assert (len(large.new_ids), waiting.new_ids, engine.free_blocks) == (3, [], 0)
    engine.abort_request("large")
    engine.abort_request("waiting")
    engine.add_request("small", small)
    engine.step()
    assert (len(large.new_ids), len(small.new_ids)) == (3, 1)
    assert engine.free_blocks == 3
    engine.run()
    assert (large.finish_reason, waiting.new_ids) == (None, [])
    assert small.new_ids == run_alone(model, sampled([3], 4))
    # The names are free again, and aborting what is over changes nothing.
    engine.abort_request("small")
    engine.add_request("large", sampled([3], 1))
    engine.run()
    check_no_leak(engine)


def test_an_error_of_one_request_ends_no_other(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = LLMEngine(*model, cache_tokens=200)

    def fail(new_ids: Sequence[int]) -> bool:
        if len(new_ids) == 2:
            raise KeyError("a bug of the caller")
        return False

    failing = SamplingRequest([5], GenerationSettings(9), fail)
    other = sampled([8, 9], 6)
    engine.add_request("failing", failing)
    engine.add_request("other", other)
    errors = []
    while engine.has_unfinished_requests():
        errors += [(one.request_id, one.is_finished, str(one.error)) for one in engine.step() if one.error]
    assert errors == [("failing", True, "'a bug of the caller'")]
    assert failing.is_finished
    assert other.new_ids == run_alone(model, sampled([8, 9], 6))
    check_no_leak(engine)
    with pytest.raises(KeyError, match="a bug of the caller"):
        list(stream_tokens(engine, SamplingRequest([5], GenerationSettings(9), fail)))


def test_an_interrupt_between_pass_and_choice_loses_no_token(
    model: tuple[Transformer, ParallelMesh],
) -> None:
    engine = LLMEngine(*model, cache_tokens=200)

    def interrupt(new_ids: Sequence[int]) -> bool:
        raise KeyboardInterrupt

    other = sampled([8, 9], 6)
    engine.add_request("interrupted", SamplingRequest([5], GenerationSettings(9), interrupt))
    engine.add_request("other", other)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.abort_request("interrupted")
    engine.run()
    assert other.new_ids == run_alone(model, sampled([8, 9], 6))
    check_no_leak(engine)


def test_streams_and_scores_side_by_side(model: tuple[Transformer, ParallelMesh]) -> None:
    """Callers that share an engine get what each gets alone, whoever steps; one may stop early."""
    engine = LLMEngine(*model)
    pairs = [([5, 6, 7, *range(20, 60)], [8, 9]), ([5, 6, 7, *range(20, 55)], [70] * 40)]
    (want_scores, want) = (score(engine, inputs_of_ids(pairs)), run_alone(model, sampled([4, 5], 12)))
    first = stream_tokens(engine, sampled([4, 5], 12))
    started = [next(first).token_id for _ in range(3)]
    left = stream_tokens(engine, sampled([7] * 30, 20))
    next(left)
    assert score(engine, inputs_of_ids(pairs)) == want_scores
    left.close()  # type: ignore[attr-defined]
    assert started + [one.token_id for one in first] == want
    assert not engine.has_unfinished_requests() or engine.step() == []
    check_no_leak(engine)


def test_requests_that_can_never_fit(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = LLMEngine(*model, cache_tokens=48, max_num_seqs=4)
    refused: list[tuple[Request | ScoringRequest, str]] = [
        (sampled([], 4), "the prompt has no token"),
        (
            sampled([5] * 30, 30),
            "1 x 60 tokens of prompt and continuation need 4 blocks of the key-value cache, which has 3",
        ),
        (sampled([5] * 30, 2000), "more than max_position_embeddings"),
        (
            BeamSearchRequest([5], GenerationSettings(2), BeamSettings(5)),
            "5 sequences side by side, more than max_num_seqs=4",
        ),
        (BeamSearchRequest([5] * 20, GenerationSettings(2), BeamSettings(3)), "need 6 blocks"),
        (ScoringRequest(inputs_of_ids([([5] * 60, [6])]), engine.shapes), "need 4 blocks"),
    ]
    for request, complaint in refused:
        with pytest.raises(AscendSpeedError, match=complaint):
            engine.add_request("refused", request)
    assert not engine.has_unfinished_requests()
    engine.add_request("a", sampled([5], 2))
    with pytest.raises(AscendSpeedError, match="request_id=a is the name of an unfinished request"):
        engine.add_request("a", sampled([5], 2))


def test_the_cache_grows_between_requests_unless_it_is_fixed(
    model: tuple[Transformer, ParallelMesh],
) -> None:
    engine = LLMEngine(*model)
    assert engine.num_blocks == 0
    small, large = sampled([5] * 4, 4), sampled([6] * 40, 4)
    engine.add_request("small", small)
    engine.step()
    assert engine.num_blocks == 1
    engine.add_request("large", large)
    engine.run()
    assert engine.num_blocks == 3
    assert large.new_ids == run_alone(model, sampled([6] * 40, 4))
    engine.shutdown()
    assert (engine.num_blocks, engine.has_unfinished_requests()) == (0, False)


def added_from_threads(folder: str) -> list[list[int]]:
    """Requests that other threads add while the loop runs."""
    engine = LLMEngine(*load(folder, Layout()), cache_tokens=2000)
    requests = [sampled([number + 3] * (number + 1), 6) for number in range(12)]
    threads = [
        threading.Thread(target=engine.add_request, args=(str(number), one))
        for number, one in enumerate(requests)
    ]
    for thread in threads:
        thread.start()
    while not all(one.is_finished for one in requests):
        engine.step()
    for thread in threads:
        thread.join()
    return [one.new_ids for one in requests]


def test_requests_may_come_from_other_threads(tmp_path: Path) -> None:
    REFERENCES["Llama 3.2"].save(tmp_path)
    model = load(str(tmp_path), Layout())
    for number, found in enumerate(added_from_threads(str(tmp_path))):
        assert found == run_alone(model, sampled([number + 3] * (number + 1), 6))


@pytest.mark.parametrize(("first", "second", "common"), [
    ([], [], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3, 4], [1, 2, 9, 4], 2), ([5], [6], 0),
    ([1, 2], [1, 2, 3], 2),
])  # fmt: skip
def test_common_prefix_length(first: list[int], second: list[int], common: int) -> None:
    assert common_prefix_length(first, second) == common == common_prefix_length(second, first)
