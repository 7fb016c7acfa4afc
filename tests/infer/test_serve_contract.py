"""The OpenAPI document and what clients of OpenAI's API expect, over every endpoint."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from ascendspeed_data.prompting import layout_named
from ascendspeed_infer.language_model import LanguageModel
from support.corpus import make_chat_tokenizer
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server

MESSAGES: list[Any] = [{"role": "user", "content": "the year"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("model")
    make_chat_tokenizer(path / "tokenizer")
    config = tiny_config(vocab_size=600, max_position_embeddings=128)
    save_hugging_face(config, path / "tiny", tokenizer=path / "tokenizer")
    own = LanguageModel.from_pretrained(path / "tiny", device="cpu")
    with running_server(own, layout_named("tokenizer", own.tokenizer), batch_invariant=False) as running:
        yield running
        running.wait_until_idle()


def test_the_asynchronous_client_gets_what_the_other_gets(server: Running) -> None:
    options: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    client = openai.OpenAI(**options)
    fields: dict[str, Any] = {"model": "tiny", "temperature": 0}

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(**options) as other:
            found: list[Any] = list(
                await asyncio.gather(
                    other.completions.create(**fields, prompt="the year", max_tokens=8),
                    other.chat.completions.create(**fields, messages=MESSAGES, max_tokens=8),
                    other.responses.create(**fields, input="the year", max_output_tokens=16),
                    other.models.list(),
                )
            )
            stream = await other.chat.completions.create(
                **fields, messages=MESSAGES, max_tokens=8, stream=True
            )
            found.append("".join([piece.choices[0].delta.content or "" async for piece in stream]))
            with pytest.raises(openai.BadRequestError, match="temperature"):
                await other.chat.completions.create(model="tiny", messages=MESSAGES, temperature=5)
            return found

    completion, chat, response, models, streamed = asyncio.run(ask())
    want = client.completions.create(**fields, prompt="the year", max_tokens=8)
    assert completion.choices == want.choices
    answer = client.chat.completions.create(**fields, messages=MESSAGES, max_tokens=8)
    assert chat.choices == answer.choices
    assert streamed == answer.choices[0].message.content
    same = client.responses.create(**fields, input="the year", max_output_tokens=16)
    assert response.output_text == same.output_text
    assert [one.id for one in models.data] == ["tiny"]
    with client.chat.completions.stream(**fields, messages=MESSAGES, max_tokens=8) as events:
        deltas = [one.delta for one in events if one.type == "content.delta"]
    assert "".join(deltas) == answer.choices[0].message.content


def test_offsets_and_usage(server: Running) -> None:
    """Offsets count the characters before each token, of prompt and answer; usage counts ids in and out."""
    body = {
        "prompt": "the year",
        "max_tokens": 8,
        "echo": True,
        "logprobs": 2,
        "temperature": 0,
        "return_token_ids": True,
    }
    answer = server.client.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    shown = choice["logprobs"]
    before = ""
    for token, offset in zip(shown["tokens"], shown["text_offset"], strict=True):
        # Bytes that are no character yet count once they are.
        assert offset <= len(before)
        before += token
    assert shown["text_offset"][0] == 0
    num_prompt, num_new = len(choice["prompt_token_ids"]), len(choice["token_ids"])
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert len(shown["tokens"]) == num_prompt + num_new
    again = server.client.post("/v1/completions", json={**body, "prompt": choice["prompt_token_ids"]}).json()[
        "choices"
    ][0]
    assert again == choice


@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.nightly)])
def test_every_path_keeps_to_the_document(server: Running, count: int) -> None:
    """Requests made from the OpenAPI document, right and wrong ones: none ends with a status of 5xx."""
    schemathesis = pytest.importorskip(
        "schemathesis", reason="schemathesis is not installed: pip install schemathesis"
    )
    from hypothesis import HealthCheck, Phase, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = set()
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            answer = case.call(base_url=server.url)
            assert answer.status_code < 500, answer.content
            assert answer.headers["content-type"]
            tried.add(case.operation.label)

        check()
    assert {
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /v1/responses",
        "GET /v1/models",
    } <= tried
    assert not [line for line in server.log if "Traceback" in line]
