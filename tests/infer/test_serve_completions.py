"""`/v1/completions`: over HTTP everything is what it is in process, and what is not supported is refused by name."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ascendspeed_infer.language_model import LanguageModel
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server

PROMPTS = ["the year", "it was a time of", "中文 and", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_config(vocab_size=400, max_position_embeddings=256)
    save_hugging_face(config, path, tokenizer=tokenizer_folder)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    """Generates in process; the server has one of its own."""
    return LanguageModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running_server(LanguageModel.from_pretrained(folder, device="cpu")) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: Running, **fields: Any) -> Any:
    answer = server.client.post("/v1/completions", json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refusal(server: Running, status: int = 400, path: str = "/v1/completions", **fields: Any) -> str:
    answer = server.client.post(path, json=fields)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return str(error["message"])


@pytest.mark.parametrize("as_ids", [False, True], ids=["texts", "ids"])
def test_greedy_answers_are_those_of_generate(
    server: Running, client: openai.OpenAI, model: LanguageModel, as_ids: bool
) -> None:
    prompts: Any = [model.tokenizer.encode(one) for one in PROMPTS] if as_ids else PROMPTS
    found = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=20, temperature=0, logprobs=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    want = model.generate(PROMPTS, max_new_tokens=20, return_log_probs=True, batch_invariant=True)
    for choice, one in zip(found.choices, want, strict=True):
        assert choice.text == one.text
        assert tuple(choice.token_ids) == one.token_ids  # type: ignore[attr-defined]
        assert choice.logprobs is not None
        assert tuple(choice.logprobs.token_logprobs or ()) == one.log_probs
        for chosen, top in zip(one.log_probs or (), choice.logprobs.top_logprobs or (), strict=True):
            assert max(top.values()) == chosen
            # Of tokens with the same text one is shown.
            assert 1 <= len(top) <= 4
    assert found.usage is not None
    assert found.usage.completion_tokens == sum(len(one.token_ids) for one in want)
    assert found.usage.prompt_tokens == sum(len(one.prompt_token_ids) for one in want)


def test_draws_are_those_of_generate_under_load(server: Running, model: LanguageModel) -> None:
    """Sixteen clients at once; several texts of one prompt have the seeds that follow."""

    def one(seed: int) -> list[str]:
        prompt = PROMPTS[seed % 4]
        found = ask(server, prompt=prompt, n=2, seed=seed, top_p=0.9, temperature=0.8, max_tokens=5 + seed)
        return [choice["text"] for choice in found["choices"]]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(16)))
    for seed, texts in enumerate(found):
        want = model.generate(
            PROMPTS[seed % 4], num_return_sequences=2, do_sample=True, seed=seed, top_p=0.9, temperature=0.8,
            max_new_tokens=5 + seed, batch_invariant=True,
        )  # fmt: skip
        assert texts == [one.text for one in want]
    server.wait_until_idle()


def test_streams_join_to_the_whole(server: Running, client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "model": "tiny", "prompt": PROMPTS[:2], "n": 2, "seed": 3, "max_tokens": 12, "logprobs": 2,
        "echo": True,
    }  # fmt: skip
    whole = client.completions.create(**fields)
    pieces = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].usage == whole.usage
    assert not pieces[-1].choices
    for choice in whole.choices:
        own = [one for piece in pieces for one in piece.choices if one.index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own][-1] == choice.finish_reason
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [value for one in own for value in getattr(one.logprobs, name)]
            assert joined == getattr(choice.logprobs, name), name


def test_a_prompt_is_scored_as_in_process(server: Running, model: LanguageModel) -> None:
    """As lm-evaluation-harness asks: `echo`, `logprobs`, and no or one new token."""
    ids = [model.tokenizer.encode(one * 12) for one in PROMPTS]
    found = ask(server, prompt=ids, max_tokens=0, echo=True, logprobs=1)
    for choice, own in zip(found["choices"], ids, strict=True):
        shown = choice["logprobs"]
        first, *values = shown["token_logprobs"]
        assert first is None
        assert shown["top_logprobs"][0] is None
        assert len(values) == len(own) - 1
        (score,) = model.loglikelihood_of_ids([(own[:1], own[1:])])
        assert sum(values) == score.logprob
        # In one pass: the same sums in another order.
        want = model.logits(own).float().log_softmax(-1)[range(len(own) - 1), own[1:]]
        assert values == pytest.approx(want.tolist(), abs=1e-5)
        best = [max(top.values()) for top in shown["top_logprobs"][1:]]
        assert all(top >= value for top, value in zip(best, values, strict=True))
        assert "".join(shown["tokens"]) == choice["text"]
        assert choice["finish_reason"] == "length"
    longer = ask(server, prompt=ids, max_tokens=1, echo=True, logprobs=1, temperature=0)
    for one, other in zip(longer["choices"], found["choices"], strict=True):
        assert one["logprobs"]["token_logprobs"][:-1] == other["logprobs"]["token_logprobs"]
        assert len(one["logprobs"]["text_offset"]) == len(other["logprobs"]["text_offset"]) + 1


def test_best_of_takes_the_likeliest(server: Running) -> None:
    fields = {"prompt": "the", "seed": 5, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
    drawn = ask(server, n=6, **fields)["choices"]
    best = ask(server, n=2, best_of=6, **fields)["choices"]
    order = sorted(drawn, key=lambda one: -sum(one["logprobs"]["token_logprobs"]))
    assert [one["text"] for one in best] == [one["text"] for one in order[:2]]


def test_a_stop_string_ends_before_it(server: Running, model: LanguageModel) -> None:
    (whole,) = model.generate("the year", max_new_tokens=20, ignore_eos=True, batch_invariant=True)
    stop = whole.text[7:9]
    (choice,) = ask(server, prompt="the year", max_tokens=20, temperature=0, ignore_eos=True, stop=[stop])[
        "choices"
    ]
    assert choice["text"] == whole.text[: whole.text.index(stop)]
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "temprature": 1}, "the field temprature is unknown; did you mean temperature"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias: 'x' is no id in 0 to 399"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias: Input should be less than or equal to 100"),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty: Input should be less than"),
        ({"prompt": "a", "bad\nname": 1}, "the field 'bad\\nname' is unknown"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
        ({"prompt": "a", "max_tokens": 300}, "max_tokens=300 that is more than"),
        ({"prompt": "a", "n": 999}, "999 texts were asked for, more than the 128 allowed"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of=1 is less than n=2"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "cannot be streamed"),
        ({"prompt": "a", "logprobs": 21}, "logprobs=21 is more than the 20 allowed"),
        ({"prompt": "a", "stop": ["x"] * 17}, "17 stop strings are more than the 16 allowed"),
        ({"prompt": "a", "stop": ""}, "stop holds an empty text"),
        ({"prompt": "a", "stop": ["x" * 257]}, "a stop string of 257 characters is longer than the 256 allowed"),
        ({"prompt": "a", "temperature": 1e-320}, "give 0 for the likeliest token"),
        ({"prompt": "a", "repetition_penalty": 1e-320}, "repetition_penalty: Input should be greater than"),
        ({"prompt": "a", "user": "\ud800"}, "half a surrogate pair"),
        ({"prompt": [4, 400]}, "prompt id 400 is not in 0 to 399"),
        ({"prompt": [[]]}, "the prompt has no token"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": "\ud800"}, "half a surrogate pair"),
        ({}, "prompt: Field required"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature: "),
        ({"prompt": "a", "repetition_penalty": float("inf")}, "repetition_penalty: "),
        ({"prompt": "a", "seed": 2**63 - 1}, "seed: "),
        ({"prompt": "a", "n": True}, "n: "),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options is for stream=true"),
    ],
)  # fmt: skip
def test_refusals(server: Running, fields: dict[str, Any], message: str) -> None:
    answer = server.client.post("/v1/completions", content=json.dumps(fields))
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'"a"', b"\xff", b'{"prompt": "\xed\xa0\x80"}', b"[" * 100_000]
)
def test_bodies_that_are_no_object(server: Running, content: bytes) -> None:
    answer = server.client.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert "the body is" in answer.json()["error"]["message"]


def test_other_routes(server: Running, client: openai.OpenAI, model: LanguageModel) -> None:
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")
    assert "does not exist" in refusal(server, 404, model="other", prompt="a")
    assert "POST /v1/nothing: Not Found" in refusal(server, 404, "/v1/nothing")
    assert server.client.get("/v1/completions").status_code == 405
    for origin, status in (("http://elsewhere", 403), (server.url, 200), ("null", 403)):
        page = {"Origin": origin, "Content-Type": "text/plain"}
        answer = server.client.post(
            "/v1/completions", content=b'{"prompt": "a", "max_tokens": 1}', headers=page
        )
        assert answer.status_code == status, answer.text
        assert not any(name.startswith("access-control") for name in answer.headers)
    for path in ("/health", "/ready", "/version", "/openapi.json"):
        assert server.client.get(path).status_code == 200
    ids = model.tokenizer.encode("it was")
    assert server.client.post("/tokenize", json={"prompt": "it was"}).json()["tokens"] == ids
    assert server.client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "it was"}
    ask(server, prompt="the year", max_tokens=3, ignore_eos=True)
    lines = server.client.get("/metrics").text.splitlines()
    assert "asd_running_texts 0.0" in lines
    assert any(one.startswith('asd_requests_total{path="/v1/completions",status="200"}') for one in lines)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_frees_its_place(server: Running, stream: bool) -> None:
    fields = {"prompt": "the", "n": 8, "max_tokens": 250, "ignore_eos": True, "stream": stream}
    with (
        nullcontext() if stream else pytest.raises(httpx.ReadTimeout),
        server.client.stream("POST", "/v1/completions", json=fields, timeout=30 if stream else 0.2) as answer,
    ):
        next(answer.iter_lines())
    server.wait_until_idle(seconds=5)


def test_limits_and_keys(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    model = LanguageModel.from_pretrained(folder, device="cpu")
    options: dict[str, Any] = {"api_key_file": keys, "lenient": True, "max_body_bytes": 1000}
    with running_server(model, max_num_seqs=1, max_queue=2, **options) as server:
        assert server.client.get("/health").status_code == 200
        for given in ({}, {"Authorization": "Bearer third"}, {"Authorization": "first"}):
            answer = server.client.get("/v1/models", headers=given)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
        server.client.headers["Authorization"] = "Bearer second"
        assert "larger than the 1000 bytes" in refusal(server, 413, prompt="a" * 1000)
        ask(server, prompt="a", strange=1, max_tokens=1)
        assert server.log == ["a request has the field strange, which is unknown and has no effect"]
        assert "asks for 3 texts, more than the 2 that may wait" in refusal(server, prompt="a", n=3)
        # Callers with another key do not see what was asked before.
        cached = []
        for key in ("second", "second", "first"):
            server.client.headers["Authorization"] = f"Bearer {key}"
            usage = ask(server, prompt=[7] * 200, max_tokens=1)["usage"]
            cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == cached[2] == 0
        assert 0 < cached[1] < 200
        with ThreadPoolExecutor(8) as pool:
            fields = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
            found = list(pool.map(lambda _: server.client.post("/v1/completions", json=fields), range(8)))
        assert {one.status_code for one in found} == {200, 429}
        assert all(one.headers["Retry-After"] == "1" for one in found if one.status_code == 429)
        server.wait_until_idle()


def test_a_request_that_takes_too_long(folder: Path) -> None:
    model = LanguageModel.from_pretrained(folder, device="cpu")
    with running_server(model, request_seconds=0.01) as server:
        assert "took longer" in refusal(server, 504, prompt="a", max_tokens=200, ignore_eos=True)
        server.wait_until_idle()


def test_the_longest_texts_fit(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A length that is no multiple of anything, and the cache that the server makes by itself."""
    config = tiny_config(vocab_size=400, max_position_embeddings=101)
    save_hugging_face(config, tmp_path, tokenizer=tokenizer_folder)
    model = LanguageModel.from_pretrained(tmp_path, device="cpu")
    ids = [5 + number % 300 for number in range(102)]
    with running_server(model, cache_tokens=None, max_num_seqs=1) as server:
        ask(server, prompt=ids[:100], max_tokens=1)
        (scored,) = ask(server, prompt=ids, max_tokens=0, echo=True, logprobs=0)["choices"]
        assert "more than max_position_embeddings=101" in refusal(server, prompt=ids[:101], max_tokens=1)
    want = model.loglikelihood_of_ids([(ids[:1], ids[1:])])[0].logprob
    assert sum(scored["logprobs"]["token_logprobs"][1:]) == want
