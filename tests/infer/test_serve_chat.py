"""`/v1/chat/completions`: answers are those of a chat in process, in the layout of the checkpoint."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ascendspeed_data.prompting import layout_named
from ascendspeed_infer.language_model import LanguageModel
from support.commands import RunningCommand
from support.corpus import make_chat_tokenizer
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server

MESSAGES: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the year"},
    {"role": "assistant", "content": "of"},
    {"role": "user", "content": "it was <|im_end|>"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_chat_tokenizer(path / "tokenizer")
    config = tiny_config(vocab_size=600, max_position_embeddings=256)
    save_hugging_face(config, path / "tiny", tokenizer=path / "tokenizer")
    return path / "tiny"


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    own = LanguageModel.from_pretrained(folder, device="cpu")
    with running_server(own, layout_named("tokenizer", own.tokenizer)) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_answers_are_those_of_generate(client: openai.OpenAI, model: LanguageModel) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=2, seed=7, max_completion_tokens=12, logprobs=True, top_logprobs=2
    )
    layout = layout_named("tokenizer", model.tokenizer)
    ends = tuple(dict.fromkeys((*model.eos_token_ids(), *layout.end_ids)))
    want = model.generate(
        layout.ids(MESSAGES), do_sample=True, num_return_sequences=2, seed=7, max_new_tokens=12,
        eos_token_ids=ends, return_log_probs=True, batch_invariant=True,
    )  # fmt: skip
    for choice, one in zip(found.choices, want, strict=True):
        assert choice.message.content == one.text
        assert choice.finish_reason == one.finish_reason
        assert choice.logprobs is not None
        shown = choice.logprobs.content or []
        assert tuple(entry.logprob for entry in shown) == one.log_probs
        assert all(len(entry.top_logprobs) == 2 for entry in shown)
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(layout.ids(MESSAGES))


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 3, "max_tokens": 20}
    whole = client.chat.completions.create(**fields)
    pieces = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    texts = [one.delta.content or "" for piece in pieces for one in piece.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"content": "a"}]}, "message 1: key 'role' holds NoneType"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "only parts of the types"),
        ({"top_logprobs": 2}, "top_logprobs is for logprobs=true"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "of which the chat template has none"),
        ({"tool_choice": "required"}, "tool_choice asks for a function that tools does not have"),
        ({"tool_choice": "all"}, "tool_choice: Input should be 'none', 'auto' or 'required'"),
        ({"response_format": {"type": "xml"}}, "response_format: Input should be 'text'"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not read by the model's chat template"),
        ({"max_tokens": 256}, "max_tokens=256 that is more than"),
    ],
)
def test_refusals(server: Running, fields: dict[str, Any], message: str) -> None:
    answer = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_two_ranks_serve_and_drain(folder: Path) -> None:
    """SIGTERM: the open stream is answered to its end, and the command ends well."""
    command = RunningCommand(
        "asd-infer",
        "serve",
        "--load",
        folder,
        "--port",
        0,
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--tensor-model-parallel-size",
        2,
        "--nproc-per-node",
        2,
    )
    try:
        end = time.monotonic() + 120
        while "serving tiny on " not in command.stderr:
            assert time.monotonic() < end, command.stderr
            time.sleep(0.05)
        url = command.stderr.partition("serving tiny on ")[2].split()[0]
        fields = {
            "prompt": "the year",
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            command.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        done = command.finish(timeout=60)
    finally:
        command.kill_session()
    # A launcher of several ranks says which signal ended them.
    assert done.status == 128 + signal.SIGTERM, done.stderr
    assert "Traceback" not in done.stderr


def test_a_key_of_a_message_without_effect_is_refused(server: Running) -> None:
    def ask(**more: object) -> httpx.Response:
        fields = {"messages": [{"role": "user", "content": "of", **more}], "max_tokens": 2, "temperature": 0}
        return server.client.post("/v1/chat/completions", json=fields)

    plain = ask()
    assert plain.status_code == 200
    for accepted in ({"id": "m1"}, {"refusal": None, "annotations": []}):
        answer = ask(**accepted)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain.json()["choices"]
    answer = ask(one_more="x")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages"
    assert "message key 'one_more' is not read by the chat template" in answer.json()["error"]["message"]
