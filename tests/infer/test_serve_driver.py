"""The engine's driver: from many threads each request gets what it gets alone, and nothing is left behind."""

import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.llm_engine import LLMEngine, RequestOutput
from ascendspeed_infer.engine.sequence import CompletionOutput, GenerationSettings, SamplingRequest
from ascendspeed_infer.sampling import SamplingParams
from ascendspeed_infer.serve.engine_driver import (
    EngineDriver,
    EngineFailedError,
    NewRequest,
    QueueFullError,
    ServerClosingError,
    TimeLimitError,
)
from support.families import REFERENCES

VOCAB, WAIT_SECONDS = 125, 60


class Listener:
    """Collects what a request gets, until it is over."""

    def __init__(self) -> None:
        self.outputs: list[RequestOutput] = []
        self.is_over = threading.Event()

    def __call__(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        if output.is_finished:
            self.is_over.set()

    def last(self) -> RequestOutput:
        assert self.is_over.wait(WAIT_SECONDS)
        return self.outputs[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    REFERENCES["Mistral"].save(folder)
    mesh = ParallelMesh.create(Device("cpu"), Layout())
    return load_model(open_weights(folder), mesh, torch.float32).eval(), mesh


@pytest.fixture
def engine(model: Any) -> LLMEngine:
    made = LLMEngine(*model)
    made.fix_cache(600, max_num_seqs=8)
    return made


@pytest.fixture
def driver(engine: LLMEngine) -> Iterator[EngineDriver]:
    made = EngineDriver(engine, max_waiting=100)
    made.start()
    yield made
    made.close(timeout_seconds=0)


def make_request(number: int, new_tokens: int | None = None) -> SamplingRequest:
    draw = random.Random(number)
    prompt = [draw.randrange(3, VOCAB) for _ in range(draw.randint(1, 30))]
    sampling = SamplingParams(draw.random() < 0.7, 0.8, top_k=20, seed=number)
    settings = GenerationSettings(new_tokens or draw.randint(1, 30), sampling, return_log_probs=True)
    return SamplingRequest(prompt, settings)


def alone(model: Any, number: int) -> list[CompletionOutput]:
    engine, request = LLMEngine(*model), make_request(number)
    engine.add_request("alone", request, batch_invariant=True)
    engine.run()
    return request.outputs()


def check_no_leak(driver: EngineDriver) -> None:
    driver.close(timeout_seconds=WAIT_SECONDS)
    engine = driver.engine
    assert not engine.has_unfinished_requests()
    assert (driver.num_open, engine.num_running) == (0, 0)
    engine.clear_prefix_cache()
    assert engine.free_blocks == engine.num_blocks > 0


def test_random_arrivals_and_cancellations(model: Any, driver: EngineDriver) -> None:
    """What is not cancelled equals the request alone bit for bit; what is cancelled hears nothing more."""
    count, cancelled = 48, set[int]()
    listeners = [Listener() for _ in range(count)]

    def client(own: range) -> None:
        draw = random.Random(own.start)
        for number in own:
            time.sleep(draw.random() * 0.01)
            names = driver.submit([NewRequest(make_request(number), listeners[number], batch_invariant=True)])
            if draw.random() < 0.3:
                time.sleep(draw.random() * 0.02)
                driver.cancel(names)
                if not listeners[number].is_over.is_set():
                    cancelled.add(number)

    threads = [threading.Thread(target=client, args=(range(start, start + 12),)) for start in (0, 12, 24, 36)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in set(range(count)) - cancelled:
        got = listeners[number].last()
        assert list(got.completions) == alone(model, number)
        streamed = [token for output in listeners[number].outputs for token in output.new_tokens]
        assert tuple(token.token_id for token in streamed) == got.completions[0].token_ids
    check_no_leak(driver)
    assert 0 < len(cancelled) < count
    assert not any(listeners[number].is_over.is_set() for number in cancelled)


def test_memory_that_runs_out_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With optimistic admission texts leave the cache and are computed again: bit for bit what they are alone."""
    monkeypatch.setattr("ascendspeed_infer.engine.scheduled_request.GROWTH_TOKENS", 4)
    engine = LLMEngine(*model)
    engine.fix_cache(192, max_num_seqs=8, optimistic_admission=True)
    driver = EngineDriver(engine, max_waiting=100)
    driver.start()
    listeners = [Listener() for _ in range(40)]
    for number, listener in enumerate(listeners):
        driver.submit([NewRequest(make_request(number), listener, batch_invariant=number % 4 != 3)])
    for number, listener in enumerate(listeners):
        (got,), (want,) = listener.last().completions, alone(model, number)
        streamed = [token.token_id for output in listener.outputs for token in output.new_tokens]
        assert tuple(streamed) == got.token_ids
        if number % 4 != 3:
            assert got == want
        else:
            assert len(got.token_ids) == len(want.token_ids)
    assert engine.num_preemptions > 3
    check_no_leak(driver)


def test_a_cancelled_request_leaves_within_a_pass(driver: EngineDriver) -> None:
    listener, other = Listener(), Listener()
    names = driver.submit([NewRequest(make_request(1, new_tokens=34), listener)])
    while len(listener.outputs) < 3:
        time.sleep(0.001)
    driver.cancel(names)
    seen = len(listener.outputs)
    driver.submit([NewRequest(make_request(2, new_tokens=1), other)])
    other.last()
    assert driver.engine.num_running == 0
    assert len(listener.outputs) <= seen + 1
    check_no_leak(driver)


def test_a_full_queue_refuses_all_or_nothing(engine: LLMEngine) -> None:
    driver = EngineDriver(engine, max_waiting=3)
    listeners = [Listener() for _ in range(5)]
    requests = [NewRequest(make_request(number, 5), one) for number, one in enumerate(listeners)]
    with pytest.raises(AscendSpeedError, match="asks for 4 texts, more than the 3 that may wait"):
        driver.submit(requests[:4])
    driver.submit(requests[:2])
    with pytest.raises(QueueFullError, match="2 texts wait already, and at most 3"):
        driver.submit(requests[2:4])
    driver.submit(requests[4:])
    assert driver.num_waiting == 3
    driver.start()
    assert all(listeners[number].last().error is None for number in (0, 1, 4))
    driver.submit(requests[2:4])
    check_no_leak(driver)
    assert all(one.last().completions for one in listeners)


def test_one_impossible_request_of_several_leaves_none(driver: EngineDriver) -> None:
    listener = Listener()
    impossible = SamplingRequest([5] * 20, GenerationSettings(driver.engine.max_model_len))
    with pytest.raises(AscendSpeedError, match="more than max_position_embeddings"):
        driver.submit([NewRequest(make_request(1), listener), NewRequest(impossible, listener)])
    assert not listener.outputs
    check_no_leak(driver)


def test_a_time_limit_ends_one_request(driver: EngineDriver) -> None:
    late, other = Listener(), Listener()
    driver.submit([NewRequest(make_request(1, new_tokens=34), late)], time_limit_seconds=0)
    driver.submit([NewRequest(make_request(2), other)], time_limit_seconds=WAIT_SECONDS)
    assert isinstance(late.last().error, TimeLimitError)
    assert other.last().completions
    check_no_leak(driver)


def test_an_error_ends_its_request_alone(driver: EngineDriver) -> None:
    def fails(new_ids: Any) -> bool:
        raise AscendSpeedError("no such stop")

    bad, good = Listener(), Listener()
    request = SamplingRequest([5, 6], GenerationSettings(5, stop=("x",)), fails)
    driver.submit([NewRequest(request, bad), NewRequest(make_request(3), good)])
    assert str(bad.last().error) == "no such stop"
    assert good.last().completions
    check_no_leak(driver)


def test_closing_drains_and_then_refuses(driver: EngineDriver) -> None:
    listener = Listener()
    driver.submit([NewRequest(make_request(4, new_tokens=20), listener)])
    driver.close(timeout_seconds=WAIT_SECONDS)
    assert listener.last().completions
    with pytest.raises(ServerClosingError):
        driver.submit([NewRequest(make_request(5), listener)])
    check_no_leak(driver)


def test_closing_at_once_tells_those_who_wait(driver: EngineDriver) -> None:
    listener = Listener()
    driver.submit([NewRequest(make_request(4, new_tokens=34), listener)])
    driver.close(timeout_seconds=0)
    assert isinstance(listener.last().error, ServerClosingError)
    check_no_leak(driver)


def test_a_failed_pass_ends_everything(model: Any) -> None:
    """As when a rank is lost; here an id that the model does not have."""
    failures: list[EngineFailedError] = []
    engine = LLMEngine(*model)
    engine.fix_cache(600)
    driver = EngineDriver(engine, 10, failures.append)
    listeners = [Listener(), Listener()]
    driver.submit([NewRequest(SamplingRequest([10**6], GenerationSettings(5)), listeners[0])])
    driver.submit([NewRequest(make_request(1), listeners[1])])
    driver.start()
    assert all(isinstance(one.last().error, EngineFailedError) for one in listeners)
    with pytest.raises(EngineFailedError, match="a pass of the engine failed"):
        driver.submit([NewRequest(make_request(2), listeners[0])])
    driver.close(timeout_seconds=0)
    assert len(failures) == 1
