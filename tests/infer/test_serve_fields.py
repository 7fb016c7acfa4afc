"""What a request may ask for: adapters by name, penalties, forms of answers, calls of tools, the Responses API."""

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from ascendspeed_data.prompting import layout_named
from ascendspeed_infer.language_model import LanguageModel
from support import peft_adapters
from support.corpus import CHATML, make_chat_tokenizer
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server

CALLS = (
    "{% if style %}{{ style }}{% endif %}"
    "{% if tools %}<|im_start|>system\nCall as <tool_call>: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    + CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
        "{% endfor %}{% if m.tool_call_id %} of {{ m.tool_call_id }}{% endif %}",
    )
)
TARGETS = {
    "a": ["q_proj", "down_proj"],
    "b": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
}
PROMPT = "the year it was a time of"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 999},
                "kind": {"enum": ["x", "y"]},
            },
            "required": ["a", "kind"],
            "additionalProperties": False,
        },
    },
}
OTHER = {
    "type": "function",
    "function": {"name": "stop", "parameters": {"type": "object", "maxProperties": 0}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_chat_tokenizer(path / "tokenizer")
    tokenizer.chat_template = CALLS
    tokenizer.save_pretrained(path / "tokenizer")
    save_hugging_face(
        tiny_config(vocab_size=640, max_position_embeddings=1024), path / "tiny", tokenizer=path / "tokenizer"
    )
    for seed, (name, targets) in enumerate(TARGETS.items(), 1):
        rank = 4 * seed
        options = {"r": rank, "lora_alpha": 3 * rank, "target_modules": targets}
        peft_adapters.make(path / "tiny", path / name, options, seed)
    return path


def load(folder: Path) -> LanguageModel:
    adapters = {name: folder / name for name in TARGETS}
    return LanguageModel.from_pretrained(folder / "tiny", device="cpu", adapters=adapters)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    own = load(folder)
    with running_server(own, layout_named("tokenizer", own.tokenizer)) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(server: Running, path: str = "/v1/completions", **fields: Any) -> Any:
    answer = server.client.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_adapters_are_those_of_peft(folder: Path, model: LanguageModel) -> None:
    """Both stacked beside one base: each gives the logits of peft's model of it alone."""
    for name in TARGETS:
        with model.with_adapter(name):
            ids = peft_adapters.TOKENS[0].tolist()
            found = model.loglikelihood_of_ids([(ids[:1], ids[1:])])[0].logprob
        want = peft_adapters.reloaded_logits(folder / "tiny", folder / name).log_softmax(-1)
        want = want[range(len(ids) - 1), ids[1:]].sum()
        # fp32 sums in another order over 7 tokens.
        assert found == pytest.approx(float(want), abs=2e-5), name


def test_adapters_and_base_in_one_batch(server: Running, client: openai.OpenAI, model: LanguageModel) -> None:
    """Sixteen clients at once, each with a model of its own: bit for bit what each gives in process."""
    names = [None, *TARGETS]
    assert [one.id for one in client.models.list()] == ["tiny", *TARGETS]

    def one(number: int) -> Any:
        name = names[number % 3] or "tiny"
        return ask(server, model=name, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=0)

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(18)))
    texts = set()
    for number, answer in enumerate(found):
        with model.with_adapter(names[number % 3]):
            (want,) = model.generate(PROMPT, max_new_tokens=12, return_log_probs=True, batch_invariant=True)
        assert answer["choices"][0]["text"] == want.text
        assert tuple(answer["choices"][0]["logprobs"]["token_logprobs"]) == want.log_probs
        assert answer["model"] == (names[number % 3] or "tiny")
        texts.add(want.text)
    assert len(texts) == 3


def test_penalties_and_bias_are_openais(server: Running, model: LanguageModel) -> None:
    """Against a loop over the logits of whole texts: bias, then each token's own count."""
    bias = {str(token): random.Random(token).uniform(-3, 3) for token in range(0, 600, 7)}
    fields = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": bias}
    answer = ask(
        server, prompt=PROMPT, max_tokens=24, temperature=0, ignore_eos=True, return_token_ids=True, **fields
    )
    choice = answer["choices"][0]
    prompt, new = choice["prompt_token_ids"], list[int]()
    for token in choice["token_ids"]:
        logits = model.logits([*prompt, *new])[-1].double()
        for name, value in bias.items():
            logits[int(name)] += value
        for one in set(new):
            logits[one] -= 0.7 + 0.4 * new.count(one)
        # The likeliest up to what another order of sums changes.
        assert logits[token] >= logits.max() - 1e-4
        new.append(token)
    plain = ask(server, prompt=PROMPT, max_tokens=24, temperature=0, ignore_eos=True)
    assert plain["choices"][0]["text"] != choice["text"]
    only = ask(server, prompt=PROMPT, max_tokens=3, seed=1, logit_bias={"65": 100}, return_token_ids=True)
    assert only["choices"][0]["token_ids"] == [65] * 3
    refused = server.client.post("/v1/completions", json={"prompt": "a", "logit_bias": {"640": 1}})
    assert refused.json()["error"]["message"] == "logit_bias: '640' is no id in 0 to 639"


def nested(depth: int) -> dict[str, Any]:
    return {"properties": {"a": nested(depth - 1)}} if depth else {"type": "string"}


def test_answers_of_a_form(server: Running, client: openai.OpenAI) -> None:
    """A random model writes what fits, however it is drawn; JSON that is not cut off can be read."""
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install llguidance")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "n": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, response_format=form, seed=seed, max_tokens=200
        )
        assert answer.choices[0].finish_reason == "stop"
        value = json.loads(answer.choices[0].message.content or "")
        assert set(value) == {"name", "n"}
        assert len(value["name"]) <= 5
        assert 0 <= value["n"] <= 99
    whole = client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, seed=1, max_tokens=40
    )
    assert (whole.choices[0].message.content or "").lstrip().startswith("{")
    for wrong, message in (
        ({"type": "json_schema"}, "json_schema is for the type json_schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
            "the form cannot be held to",
        ),
        ({"type": "json_schema", "json_schema": {"schema": nested(400)}}, "the form cannot be held to"),
        ({"type": "xml"}, "response_format: Input should be"),
        ({"type": "text", "more": 1}, "the field more is unknown"),
    ):
        refused = server.client.post(
            "/v1/chat/completions", json={"messages": MESSAGES, "response_format": wrong}
        )
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


def test_tools_that_must_be_called(server: Running, client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install llguidance")
    fields: Any = {"model": "tiny", "messages": MESSAGES, "tools": [TOOL, OTHER], "max_tokens": 300}
    named = {"type": "function", "function": {"name": "add"}}
    for choice, seeds in (("required", (0, 1)), (named, (2,))):
        for seed in seeds:
            answer = client.chat.completions.create(**fields, tool_choice=choice, seed=seed).choices[0]
            assert answer.finish_reason == "tool_calls"
            (call,) = answer.message.tool_calls or []
            arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
            if call.function.name == "add":  # type: ignore[union-attr]
                assert isinstance(arguments["a"], int)
                assert arguments["kind"] in ("x", "y")
            else:
                assert choice == "required"
                assert arguments == {}
            pieces = list(
                client.chat.completions.create(**fields, tool_choice=choice, seed=seed, stream=True)
            )
            streamed = [one for piece in pieces for one in piece.choices[0].delta.tool_calls or []]
            assert [one.function.arguments for one in streamed] == [call.function.arguments]  # type: ignore[union-attr]
    for wrong in ({}, {"type": "function"}, {"type": "function", "function": {"name": 'a"|b'}},
                  {"type": "function", "function": {"name": "a", "parameters": [1]}}):  # fmt: skip
        refused = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": [wrong]})
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith("tools: ")
    none = {"type": "function", "function": {"name": "other"}}
    refused = server.client.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "tools": [TOOL], "tool_choice": none}
    )
    assert "tool_choice asks for a function that tools does not have" in refused.json()["error"]["message"]


def test_variables_of_the_template(client: openai.OpenAI, model: LanguageModel) -> None:
    def num_prompt_tokens(**fields: Any) -> int:
        found = client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=1, extra_body=fields
        )
        assert found.usage is not None
        return found.usage.prompt_tokens

    more = len(model.tokenizer.encode("in short words", add_special_tokens=False))
    plain = num_prompt_tokens()
    assert num_prompt_tokens(chat_template_kwargs={"style": "in short words"}) == plain + more
    assert num_prompt_tokens() == plain
    with pytest.raises(openai.BadRequestError, match="which the template does not read"):
        num_prompt_tokens(chat_template_kwargs={"other": 1})
    with pytest.raises(openai.BadRequestError, match="messages"):
        num_prompt_tokens(chat_template_kwargs={"messages": []})


def test_responses_are_chats(server: Running, client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "input": PROMPT, "instructions": "be brief", "max_output_tokens": 12}
    found = client.responses.create(**fields, temperature=0)
    chat = client.chat.completions.create(
        model="tiny", temperature=0, max_completion_tokens=12,
        messages=[{"role": "system", "content": "be brief"}, *MESSAGES],
    )  # fmt: skip
    assert found.output_text == chat.choices[0].message.content
    assert found.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert found.usage is not None
    assert chat.usage is not None
    assert found.usage.total_tokens == chat.usage.total_tokens
    events = list(client.responses.create(**fields, temperature=0, stream=True))
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert (
        "".join(one.delta for one in events if one.type == "response.output_text.delta") == found.output_text
    )
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == found.output_text
    parts: Any = [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}]
    same = client.responses.create(**(fields | {"input": parts}), temperature=0)
    assert same.output_text == found.output_text
    for wrong, message in (
        ({"input": []}, "input is empty"),
        ({"input": [{"type": "image"}]}, "items of the type 'image'"),
        ({"input": "a", "previous_response_id": "x"}, "previous_response_id is not supported"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "only functions are supported"),
    ):
        refused = server.client.post("/v1/responses", json=wrong)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]


def test_responses_call_tools(client: openai.OpenAI) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed: pip install llguidance")
    tool: Any = {"type": "function", **TOOL["function"], "strict": True}  # type: ignore[dict-item]
    found = client.responses.create(
        model="tiny", input=PROMPT, tools=[tool], tool_choice="required", max_output_tokens=300
    )
    (call,) = found.output
    assert call.type == "function_call"
    assert call.name == "add"
    again = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": PROMPT},
            {
                "type": "function_call",
                "call_id": call.call_id,
                "name": call.name,
                "arguments": call.arguments,
            },
            {"type": "function_call_output", "call_id": call.call_id, "output": "3"},
        ],
        tools=[tool],
        max_output_tokens=4,
    )
    assert again.usage is not None
    assert again.usage.output_tokens <= 4


def test_greedy_with_a_mask_takes_the_likeliest_that_fits() -> None:
    from ascendspeed_infer.sampling import SamplingParams, sample_token

    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    allowed = torch.tensor([False, False, True, True])
    assert sample_token(logits, SamplingParams(), allowed=allowed).token_id == 2
