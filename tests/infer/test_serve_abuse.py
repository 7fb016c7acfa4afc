"""What clients, signals and lost ranks do to a server: no answer is wrong, and nothing is left behind."""

import gc
import json
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from ascendspeed_infer.language_model import LanguageModel
from support.commands import RunningCommand
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server
from support.tables import ReportTables

PROMPTS = ["the year", "it was a time of", "中文 and", "a", "the year it was " * 6]
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_config(vocab_size=400, max_position_embeddings=256)
    save_hugging_face(config, path, tokenizer=tokenizer_folder)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    """With less memory than its texts need, so that some must leave it."""
    own = LanguageModel.from_pretrained(folder, device="cpu")
    options = {"cache_tokens": 768, "optimistic_admission": True, "max_queue": 512, "max_num_seqs": 16}
    with running_server(own, **options) as running:
        yield running
        running.wait_until_idle()


def open_sockets() -> int:
    return sum(one.status == psutil.CONN_ESTABLISHED for one in psutil.Process().net_connections("tcp"))


def check_sockets(before: int) -> None:
    end = time.monotonic() + 20
    while open_sockets() > before:
        assert time.monotonic() < end, "sockets are left open"
        time.sleep(0.05)


def stream_until(server: Running, number: int, stops_after: int | None) -> str:
    """Read a stream, or its first events only; return the text."""
    fields = {
        "prompt": PROMPTS[number % 5], "max_tokens": 120 + number % 60, "seed": number, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    text, events = "", 0
    with httpx.stream("POST", f"{server.url}/v1/completions", json=fields, timeout=WAIT_SECONDS) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line or line == "data: [DONE]":
                continue
            text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            events += 1
            if stops_after is not None and events > stops_after:
                break
    return text


@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.nightly)])
def test_streams_of_which_half_are_left(server: Running, model: LanguageModel, count: int) -> None:
    server.client.close()
    server.wait_until_idle()
    before, preempted = open_sockets(), server.served.driver.engine.num_preemptions
    draw = random.Random(count)
    stops = [draw.randint(0, 10) if number % 2 else None for number in range(count)]
    with ThreadPoolExecutor(count) as pool:
        texts = list(pool.map(lambda number: stream_until(server, number, stops[number]), range(count)))
    server.wait_until_idle(60)
    check_sockets(before)
    if count > 100:
        assert server.served.driver.engine.num_preemptions > preempted
    for number in range(0, count, 2):
        (want,) = model.generate(
            PROMPTS[number % 5], max_new_tokens=120 + number % 60, seed=number, do_sample=True, ignore_eos=True,
            batch_invariant=True,
        )  # fmt: skip
        assert texts[number] == want.text


VALUES: dict[str, list[Any]] = {
    "prompt": [*PROMPTS, ["a", "the"], [5, 6], [[7], [8, 9]], [], "", [400], [-1], 5, None, {"a": 1}, "x" * 3000],
    "max_tokens": [0, 1, 5, 300, -1, "5", 10**30, 2.5],
    "n": [1, 2, 200, 0, True],
    "best_of": [1, 3, -1],
    "echo": [True, False, "yes"],
    "logprobs": [0, 1, 5, 21, -1, True],
    "temperature": [0, 0.5, 2, 3, -1, float("1e300"), "hot"],
    "top_p": [0.1, 1, 0, 1.5],
    "top_k": [-1, 1, 5, 10**9],
    "seed": [0, 1, -(2**62), 2**63, None],
    "stop": ["the", ["a", "b"], [""], ["x"] * 17, 5],
    "stream": [True, False, 1],
    "stream_options": [{"include_usage": True}, {"other": 1}, 5],
    "logit_bias": [{"5": 100}, {"5": -100}, {"x": 1}, {"5": 1000}, {"-1": 0}],
    "presence_penalty": [0, 2, -2, 5],
    "frequency_penalty": [0, 0.5, -3],
    "repetition_penalty": [1, 1.5, 0, 1e-300],
    "ignore_eos": [True],
    "suffix": ["x"],
    "model": ["tiny", "other", 5],
    "user": ["me"],
    "new\nline": [1],
}  # fmt: skip


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_random_parameters(folder: Path, count: int) -> None:
    own = LanguageModel.from_pretrained(folder, device="cpu")
    with running_server(own, max_body_bytes=2000) as server:

        def one(number: int) -> tuple[int, str]:
            draw = random.Random(number)
            names = draw.sample(sorted(VALUES), draw.randint(0, 6))
            # Of half the requests only values that may be right.
            fields = {name: draw.choice(VALUES[name][: 2 if number % 2 else None]) for name in names}
            if number % 2:
                fields = {"prompt": "a", **fields, "seed": 1}
                for name in ("suffix", "model", "new\nline"):
                    fields.pop(name, None)
            answer = server.client.post("/v1/completions", json=fields)
            return answer.status_code, answer.text

        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(one, range(count)))
        server.wait_until_idle()
        failures = [text for status, text in found if status not in (200, 400, 404, 413)]
        assert not failures, server.log
        assert sum(status == 200 for status, _ in found) > count // 5
        for status, text in found:
            if status != 200:
                assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
                assert "Traceback" not in text
        # The server is as it was: the same seed gives the same.
        again = [one(number) for number in range(1, count, 16)]
        for (status, text), (other_status, other) in zip(found[1::16], again, strict=True):
            assert status == other_status
            if status == 200 and text.startswith("{"):
                assert json.loads(text)["choices"] == json.loads(other)["choices"]
        assert not server.log


@pytest.mark.parametrize(("clients", "rounds"), [(6, 2), pytest.param(32, 8, marks=pytest.mark.nightly)])
def test_rounds_of_load_leave_nothing(
    server: Running, clients: int, rounds: int, report: ReportTables
) -> None:
    """Streams, streams that are left, refused and broken requests, again and again."""
    process = psutil.Process()

    def one(number: int) -> None:
        if number % 4 == 3:
            for body in (b"{", b'{"prompt": 5}', b'{"prompt": "a", "max_tokens": 9999}'):
                assert httpx.post(f"{server.url}/v1/completions", content=body).status_code == 400
        else:
            stream_until(server, number, 2 if number % 4 == 1 else None)

    def counts() -> tuple[int, int, float]:
        server.wait_until_idle(60)
        gc.collect()
        return process.num_fds(), process.num_threads(), process.memory_info().rss / 2**20

    with ThreadPoolExecutor(clients) as pool:
        found = []
        for _ in range(rounds):
            list(pool.map(one, range(clients)))
            found.append(counts())
    end = time.monotonic() + 20
    while (last := counts())[0] > found[0][0]:
        assert time.monotonic() < end, f"file descriptors: {[one[0] for one in found]}"
        time.sleep(0.05)
    assert last[1] <= found[0][1], "threads are left"
    # The first rounds fill caches of the allocator and of torch; a leak grows by each round.
    grown = last[2] - found[rounds // 2][2]
    for number, (files, threads, mebibytes) in enumerate(found, 1):
        report.add(
            f"a server after rounds of {clients} clients", ("round", "file descriptors", "threads", "memory MiB"),
            number, files, threads, f"{mebibytes:.0f}",
        )  # fmt: skip
    assert grown < 16


@pytest.mark.parametrize("count", [8, pytest.param(48, marks=pytest.mark.nightly)])
def test_sigterm_under_load_ends_every_stream(folder: Path, model: LanguageModel, count: int) -> None:
    """Streams that are open are answered to their end, what comes later is refused, and the process ends."""
    command = RunningCommand(
        "asd-infer", "serve", "--load", folder, "--port", 0, "--device", "cpu", "--dtype", "float32",
        "--batch-invariant", "--drain-seconds", 100,
    )  # fmt: skip
    begun, texts = threading.Semaphore(0), [""] * count
    ends = [""] * count

    def read(url: str, number: int) -> None:
        fields = {
            "prompt": PROMPTS[number % 5],
            "max_tokens": 100,
            "seed": number,
            "stream": True,
            "ignore_eos": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=WAIT_SECONDS) as answer:
            assert answer.status_code == 200
            is_first = True
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    texts[number] += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                ends[number] = line or ends[number]
                if is_first:
                    begun.release()
                    is_first = False

    try:
        end = time.monotonic() + WAIT_SECONDS
        while "serving tiny on " not in command.stderr:
            assert time.monotonic() < end, command.stderr
            time.sleep(0.05)
        url = command.stderr.partition("serving tiny on ")[2].split()[0]
        readers = [threading.Thread(target=read, args=(url, number)) for number in range(count)]
        for one in readers:
            one.start()
        for _ in readers:
            assert begun.acquire(timeout=WAIT_SECONDS)
        command.send_signal(signal.SIGTERM)
        for one in readers:
            one.join(WAIT_SECONDS)
        done = command.finish(timeout=WAIT_SECONDS)
    finally:
        command.kill_session()
    assert done.status == 0, done.stderr
    assert ends == ["data: [DONE]"] * count
    for number in range(count):
        (want,) = model.generate(
            PROMPTS[number % 5], max_new_tokens=100, seed=number, do_sample=True, ignore_eos=True,
            batch_invariant=True,
        )  # fmt: skip
        assert texts[number] == want.text


def test_a_slow_reader_holds_nobody_up(server: Running) -> None:
    """It never reads its stream of many tokens: others are answered, and its texts end."""
    body = json.dumps(
        {"prompt": "the", "n": 4, "max_tokens": 150, "logprobs": 20, "ignore_eos": True, "stream": True}
    )
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        assert stream_until(server, 3, None)
        server.wait_until_idle(60)


def test_large_and_broken_bodies(server: Running) -> None:
    before = open_sockets()
    for content in (b"x" * 10_000_000, b'{"prompt": "' + b"a" * 10_000_000 + b'"}'):
        assert httpx.post(f"{server.url}/v1/completions", content=content).status_code == 413
    for content in (
        b"{",
        b'{"prompt": "a"',
        b'{"prompt": "\xff"}',
        b'{"prompt": NaN}',
        b"[" * 50_000,
        b'{"a":' * 9_000,
    ):
        assert httpx.post(f"{server.url}/v1/completions", content=content).status_code == 400
    # A body that is announced and never comes.
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as cut:
        cut.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    server.wait_until_idle()
    check_sockets(before)


def test_a_drain_that_takes_too_long_tells_the_clients(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    told: list[str] = []

    def read(url: str, has_begun: threading.Event) -> None:
        fields = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True, "n": 8}
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=WAIT_SECONDS) as answer:
            for line in answer.iter_lines():
                has_begun.set()
                told.append(line)

    begun = threading.Event()
    with running_server(model, drain_seconds=0) as server:
        reader = threading.Thread(target=read, args=(server.url, begun))
        reader.start()
        assert begun.wait(WAIT_SECONDS)
    reader.join(WAIT_SECONDS)
    lines = [line for line in told if line]
    assert lines[-1] == "data: [DONE]"
    assert "the server is shutting down" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]


@pytest.mark.parametrize(
    ("victim", "is_busy"),
    [
        (1, True),
        pytest.param(1, False, marks=pytest.mark.nightly),
        pytest.param(0, True, marks=pytest.mark.nightly),
    ],
)
def test_a_rank_that_dies_ends_the_server(folder: Path, victim: int, is_busy: bool) -> None:
    command = RunningCommand(
        "asd-infer", "serve", "--load", folder, "--port", 0, "--device", "cpu", "--dtype", "float32",
        "--tensor-model-parallel-size", 2, "--nproc-per-node", 2, "--max-num-seqs", 256,
    )  # fmt: skip
    try:
        end = time.monotonic() + WAIT_SECONDS
        while "serving tiny on " not in command.stderr:
            assert time.monotonic() < end, command.stderr
            time.sleep(0.05)
        url = command.stderr.partition("serving tiny on ")[2].split()[0]
        # The launcher starts the ranks in their order, and nothing else.
        ranks = sorted(psutil.Process(command.pid).children(), key=lambda one: one.pid)
        assert len(ranks) == 2
        lines: list[str] = []
        if is_busy:
            fields = {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True, "n": 100}
            try:
                with httpx.stream(
                    "POST", f"{url}/v1/completions", json=fields, timeout=WAIT_SECONDS
                ) as answer:
                    for line in answer.iter_lines():
                        if not lines:
                            ranks[victim].kill()
                        lines.append(line)
            except httpx.HTTPError:
                assert victim == 0
        else:
            ranks[victim].kill()
        killed = time.monotonic()
        done = command.finish(timeout=60)
        assert time.monotonic() - killed < 30
    finally:
        command.kill_session()
    if is_busy and victim == 1:
        assert "the server failed; its log says why" in "".join(lines[-4:])
    assert done.status != 0
    assert f"process {victim} of 2 ended with status {-signal.SIGKILL}" in done.stderr
    assert not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in ranks)
