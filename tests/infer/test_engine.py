"""Requests that come, go and are given up at any time get what each gets alone, and leave no memory behind."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.parallel import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.batch_invariant import CHUNK_TOKENS
from ascendspeed_infer.engine.runner import ModelRunner, check_batch_invariance, decode_one_token, prefill
from ascendspeed_infer.engine.scheduler import Engine, common_prefix
from ascendspeed_infer.engine.sequences import BeamSearch, Generated, GenerationSettings, Text
from ascendspeed_infer.sampling import Sampling
from support.families import REFERENCES
from support.processes import WorkerPool

VOCAB = 125
MAX_ROWS = 8


def load(folder: str, layout: Layout, dtype: torch.dtype = torch.float64) -> tuple[Transformer, ParallelMesh]:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    return load_model(open_weights(Path(folder)), mesh, dtype).eval(), mesh


def make_request(number: int) -> Text | BeamSearch:
    """A request of random length, rule and end; every third begins like others."""
    draw = random.Random(number)
    shared = [random.Random(number % 2).randrange(3, VOCAB) for _ in range(28)]
    prompt = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 16))]
    if number % 3 == 0:
        prompt = shared[: draw.randint(16, 28)] + prompt
    ends = tuple(draw.sample(range(VOCAB), 4)) if draw.random() < 0.5 else ()
    sampling = Sampling(
        draw.random() < 0.5, 0.8, top_k=20, seed=number, repetition_penalty=draw.choice([1.0, 1.3])
    )
    settings = GenerationSettings(draw.randint(1, 20), sampling, ends, with_log_probs=True)
    if number % 10 == 7:
        return BeamSearch(prompt, settings, BeamSettings(3, num_return_sequences=3))
    return Text(prompt, settings)


@dataclass(frozen=True)
class Outcome:
    """What a request got: texts when it was completed, ids so far when it was cancelled."""

    texts: list[Generated]
    cancelled_after: list[int] | None = None


def outcome(request: Text | BeamSearch, is_cancelled: bool = False) -> Outcome:
    if is_cancelled:
        return Outcome([], request.new_ids if isinstance(request, Text) else [])
    done = request.generated()
    return Outcome(done if isinstance(done, list) else [done])


def under_random_load(
    folder: str, layout: Layout, count: int, invariant: torch.dtype | None = None
) -> tuple[list[Outcome], int, int]:
    """Submit requests at random times and cancel some; return what each got, reused tokens and passes.

    Batch-invariant in the format `invariant`, if one is given.
    """
    model, mesh = load(folder, layout, invariant or torch.float64)
    tiles = check_batch_invariance(model, mesh) if invariant else None
    engine = Engine(ModelRunner(model, mesh, 400, tiles), MAX_ROWS, prompt_tokens_per_step=24)
    draw = random.Random(5)
    requests = [make_request(number) for number in range(count)]
    waiting, alive = list(requests), []
    cancelled, passes, busiest = [], 0, 0
    while waiting or engine.is_busy:
        for _ in range(min(draw.choice([0, 0, 0, 2, 5]), len(waiting))):
            alive.append(waiting.pop(0))
            engine.submit(alive[-1])
        if draw.random() < 0.2 and alive:
            unlucky = draw.choice(alive[-15:])
            if engine.cancel(unlucky):
                cancelled.append(unlucky)
        busiest = max(busiest, len(engine.step()))
        passes += 1
    assert busiest > MAX_ROWS // 2
    check_no_leak(engine)
    return [outcome(request, request in cancelled) for request in requests], engine.reused_tokens, passes


def check_against_alone(folder: str, found: list[Outcome], invariant: torch.dtype | None = None) -> None:
    model, mesh = load(folder, Layout(), invariant or torch.float64)
    tiles = check_batch_invariance(model, mesh) if invariant else None
    for number, one in enumerate(found):
        engine = Engine(ModelRunner(model, mesh, 200, tiles), keeps_beginnings=False)
        request = make_request(number)
        engine.submit(request)
        engine.run()
        assert engine.free_blocks == engine.num_blocks
        if one.cancelled_after is not None:
            if isinstance(request, Text):
                assert request.new_ids[: len(one.cancelled_after)] == one.cancelled_after
            continue
        for mine, want in zip(one.texts, outcome(request).texts, strict=True):
            assert (mine.token_ids, mine.finish_reason) == (want.token_ids, want.finish_reason)
            if invariant:
                assert mine == want
                continue
            # The model is in float64: the same sums in other shapes. Beams add up fp32 log-probabilities.
            assert mine.log_probs == pytest.approx(want.log_probs, abs=1e-9 if mine.score is None else 2e-6)


def check_no_leak(engine: Engine) -> None:
    engine.clear_prefix_cache()
    assert engine.free_blocks == engine.num_blocks


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
def test_random_load(workers: WorkerPool, tmp_path: Path, layout: Layout) -> None:
    REFERENCES["Mistral"].save(tmp_path)
    first, *others = workers.run(
        under_random_load, layout.world_size, str(tmp_path), layout, 60 if layout.world_size == 1 else 24
    )
    assert all(other == first for other in others)
    found, reused, passes = first
    check_against_alone(str(tmp_path), found)
    assert sum(one.cancelled_after is not None for one in found) > len(found) // 30
    assert reused > len(found)
    assert passes > len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant(workers: WorkerPool, tmp_path: Path, dtype: torch.dtype) -> None:
    """Tokens and log-probabilities are those of each request alone, bit for bit."""
    REFERENCES["Mistral"].save(tmp_path)
    ((found, reused, _),) = workers.run(under_random_load, 1, str(tmp_path), Layout(), 40, dtype)
    check_against_alone(str(tmp_path), found, dtype)
    # Of shared beginnings only whole chunks of 32 tokens.
    assert reused % CHUNK_TOKENS == 0


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["Mistral", "Bloom"])
def test_500_requests(workers: WorkerPool, tmp_path: Path, name: str) -> None:
    REFERENCES[name].save(tmp_path)
    ((found, reused, _),) = workers.run(under_random_load, 1, str(tmp_path), Layout(), 500)
    check_against_alone(str(tmp_path), found)
    assert sum(one.cancelled_after is not None for one in found) > 20
    assert reused > 1000


@pytest.fixture
def model(tmp_path: Path) -> tuple[Transformer, ParallelMesh]:
    REFERENCES["Llama 3.2"].save(tmp_path)
    return load(str(tmp_path), Layout())


def test_the_functions_that_decode_one_text(model: tuple[Transformer, ParallelMesh]) -> None:
    runner = ModelRunner(*model, 40)
    ids = [5, 9, 11]
    room = runner.cache.reserve(20)
    logits = prefill(runner, room, ids)
    found = []
    for place in range(3, 9):
        found.append(int(logits.argmax()))
        logits = decode_one_token(runner, room, found[-1], place)
    text = Text(ids, GenerationSettings(6))
    engine = Engine(ModelRunner(*model, 40))
    engine.submit(text)
    engine.run()
    assert text.new_ids == found


def test_one_token_in_bf16(tmp_path: Path) -> None:
    REFERENCES["Llama 3.2"].save(tmp_path)
    model, mesh = load(str(tmp_path), Layout(), torch.bfloat16)
    wide, _ = load(str(tmp_path), Layout(), torch.float64)
    runner = ModelRunner(model, mesh, 32)
    room = runner.cache.reserve(9)
    ids = [5, 9, 11, 40, 3, 77]
    prefill(runner, room, ids[:3])
    for place in range(3, 6):
        logits = decode_one_token(runner, room, ids[place], place)
        want = wide(torch.tensor([ids[: place + 1]]))[0, -1].detach()
        assert logits.shape == want.shape
        # Numbers of 8 bits: logits of up to 3 are rounded at 2**-7, sums before them more.
        torch.testing.assert_close(logits.double(), want, rtol=0, atol=0.05)
        assert float(want.abs().max()) > 0.5


def test_first_come_first_served(model: tuple[Transformer, ParallelMesh]) -> None:
    """A large request waits for memory, and small ones that came later do not overtake it."""
    engine = Engine(ModelRunner(*model, 64), keeps_beginnings=False)
    first, large, small = (
        Text([7] * prompt, GenerationSettings(new)) for prompt, new in ((10, 6), (30, 34), (3, 3))
    )
    for one in (first, large, small):
        engine.submit(one)
    order: list[Text] = []
    while engine.is_busy:
        order += [one for one in engine.step() if isinstance(one, Text) and len(one.new_ids) == 1]
        assert engine.free_blocks >= 0
    assert order == [first, large, small]
    assert engine.free_blocks == engine.num_blocks == 4


def test_a_long_prompt_does_not_hold_up_the_others(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = Engine(ModelRunner(*model, 200), prompt_tokens_per_step=10)
    short, long = Text([5], GenerationSettings(12)), Text([*range(3, 53)], GenerationSettings(2))
    engine.submit(short)
    engine.step()
    engine.submit(long)
    while not long.new_ids:
        before = len(short.new_ids)
        engine.step()
        assert len(short.new_ids) == before + 1
    assert len(short.new_ids) == 6


def test_a_prompt_that_goes_on_from_a_complete_text(model: tuple[Transformer, ParallelMesh]) -> None:
    """The next turn of a chat computes only what is new; memory of old texts is given up when it is needed."""
    engine = Engine(ModelRunner(*model, 96))
    turn = Text([*range(3, 23)], GenerationSettings(8))
    engine.submit(turn)
    engine.run()
    follow = [*turn.prompt_ids, *turn.new_ids, 40, 41]
    following = Text(follow, GenerationSettings(4))
    engine.submit(following)
    engine.run()
    # The last new id of the first turn was never read.
    assert engine.reused_tokens == 27
    fresh = Engine(ModelRunner(*model, 96))
    again = Text(follow, GenerationSettings(4))
    fresh.submit(again)
    fresh.run()
    assert fresh.reused_tokens == 0
    assert again.new_ids == following.new_ids
    assert engine.free_blocks < engine.num_blocks
    large = Text([9] * 60, GenerationSettings(4))
    engine.submit(large)
    engine.run()
    assert large.finish_reason == "length"
    check_no_leak(engine)


def test_prompts_that_are_read_at_the_same_time_are_read_once(
    model: tuple[Transformer, ParallelMesh],
) -> None:
    engine = Engine(ModelRunner(*model, 400))
    texts = [Text([*range(3, 43)], GenerationSettings(5, Sampling(True, seed=seed))) for seed in range(4)]
    for text in texts:
        engine.submit(text)
    engine.run()
    assert engine.reused_tokens == 3 * 39
    assert len({tuple(text.new_ids) for text in texts}) > 1


def test_a_callback_that_cancels_and_one_that_fails(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = Engine(ModelRunner(*model, 200))
    other = Text([8, 9], GenerationSettings(6))

    def give_up(text: Text) -> None:
        if len(text.new_ids) == 3:
            assert engine.cancel(text)
            assert engine.cancel(other)

    def fail(new_ids: Sequence[int]) -> bool:
        raise KeyError("a bug of the caller")

    given_up = Text([5], GenerationSettings(9), on_token=give_up)
    engine.submit(given_up)
    engine.submit(other)
    engine.run()
    assert (len(given_up.new_ids), given_up.finish_reason) == (3, None)
    assert other.finish_reason is None
    assert not engine.cancel(other)
    engine.submit(Text([5], GenerationSettings(9), fail))
    with pytest.raises(KeyError, match="a bug of the caller"):
        engine.run()
    assert not engine.is_busy
    check_no_leak(engine)


def test_requests_that_can_never_fit(model: tuple[Transformer, ParallelMesh]) -> None:
    engine = Engine(ModelRunner(*model, 48), max_rows=4)
    for prompt, new, complaint in (
        (0, 4, "the prompt has no token"),
        (
            30,
            30,
            "1 x 60 tokens of prompt and continuation need 4 blocks of the key-value cache, which has 3",
        ),
        (30, 2000, "more than max_position_embeddings"),
    ):
        with pytest.raises(AscendSpeedError, match=complaint):
            engine.submit(Text([5] * prompt, GenerationSettings(new)))
    with pytest.raises(AscendSpeedError, match="5 texts side by side, more than max_rows=4"):
        engine.submit(BeamSearch([5], GenerationSettings(2), BeamSettings(5)))
    with pytest.raises(AscendSpeedError, match="need 6 blocks"):
        engine.submit(BeamSearch([5] * 20, GenerationSettings(2), BeamSettings(3)))
    assert not engine.is_busy


@pytest.mark.parametrize(("first", "second", "common"), [
    ([], [], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3, 4], [1, 2, 9, 4], 2), ([5], [6], 0),
    ([1, 2], [1, 2, 3], 2),
])  # fmt: skip
def test_common_beginning(first: list[int], second: list[int], common: int) -> None:
    assert common_prefix(first, second) == common == common_prefix(second, first)
