"""Calls of tools, thoughts and JSON in the forms of several families: a random model held to each is understood."""

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from ascendspeed_data.prompting import PromptLayout, layout_named
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_infer.answer_form import AnswerForm
from ascendspeed_infer.engine.sequence import GenerationSettings, TokenOutput
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.sampling import SamplingParams
from ascendspeed_infer.serve.text_plan import GrowingText
from support.corpus import make_chat_tokenizer
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install llguidance")

TRL = importlib.util.find_spec("trl")
OLD_MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}"
    "[TOOL_CALLS] [{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
NEW_MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.tool_calls %}"
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% else %}[THINK]{{ m.reasoning_content }}[/THINK]{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
CONTROL = [
    *(
        f"<|{name}|>"
        for name in ("start", "channel", "message", "end", "call", "return", "constrain", "eot_id")
    ),
    *(f"[{name}]" for name in ("TOOL_CALLS", "ARGS", "CALL_ID", "THINK", "/THINK", "INST", "/INST")),
]
MESSAGES: list[Any] = [{"role": "user", "content": "the year it was"}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["x", "y"]}},
    "required": ["a", "kind"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": PARAMETERS}}
    for name in ("add", "sub")
]


def template(name: str) -> str:
    if name.startswith("mistral"):
        return OLD_MISTRAL if name == "mistral 3" else NEW_MISTRAL
    if TRL is None or TRL.origin is None:
        pytest.skip("trl, which has the templates, is not installed: pip install trl")
    return (Path(TRL.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_chat_tokenizer(path / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.save_pretrained(path / "tokenizer")
    config = tiny_config(vocab_size=640, max_position_embeddings=3500)
    save_hugging_face(config, path / "tiny", tokenizer=path / "tokenizer")
    model = LanguageModel.from_pretrained(path / "tiny", device="cpu")
    with running_server(model, layout_named("tokenizer", model.tokenizer), batch_invariant=False) as running:
        yield running
        running.wait_until_idle()


def use(server: Running, name: str, tmp_path: Path) -> PromptLayout:
    """Let the server use another chat template."""
    path = tmp_path / "template.jinja"
    path.write_text(template(name), "utf-8")
    tokenizer = server.served.model.tokenizer
    # The template of gpt-oss prints the day.
    tokenizer.template_values = TemplateValues.of_flags(None, "2026-11-27")
    layout = layout_named(str(path), tokenizer)
    object.__setattr__(server.served, "layout", layout)
    return layout


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("llama3_1", "object"),
        ("gptoss", "channels"),
        ("mistral 3", "list"),
        ("mistral 7", "named"),
        ("qwen3", "marked"),
    ],
)
def test_a_forced_call_is_read(server: Running, name: str, calls: str, tmp_path: Path) -> None:
    layout = use(server, name, tmp_path)
    assert AnswerForm.of(layout.sources, layout.tokenizer).calls == calls
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    sub: Any = {"type": "function", "function": {"name": "sub"}}
    for seed, choice in ((1, "required"), (2, sub)):
        # Longer thoughts than this, which the form of gpt-oss leaves open, are cut off.
        fields: Any = {
            "model": "tiny",
            "messages": MESSAGES,
            "tools": TOOLS,
            "seed": seed,
            "max_tokens": 900,
        }
        if name == "gptoss":
            # A random model rarely ends its thoughts by itself.
            fields["logit_bias"] = {str(layout.tokenizer.special_ids["<|end|>"]): 8}
        answer = client.chat.completions.create(**fields, tool_choice=choice).choices[0]
        assert answer.finish_reason == "tool_calls", answer
        (call,) = answer.message.tool_calls or []
        assert call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert set(arguments) == {"a", "kind"}
        assert call.function.name == "sub" or choice == "required"
        pieces = list(client.chat.completions.create(**fields, tool_choice=choice, stream=True))
        streamed = [one for piece in pieces for one in piece.choices[0].delta.tool_calls or []]
        assert [one.function.arguments for one in streamed if one.function] == [call.function.arguments]
        said = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert said == (answer.message.content or "")


def test_json_in_a_channel(server: Running, tmp_path: Path) -> None:
    layout = use(server, "gptoss", tmp_path)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}}
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, response_format=form, max_tokens=900, reasoning_effort="low",
        logit_bias={str(layout.tokenizer.special_ids["<|end|>"]): 8},
    )  # fmt: skip
    assert set(json.loads(answer.choices[0].message.content or "")) == {"a", "kind"}


def written(server: Running, layout: PromptLayout, answer: str, stop: str = "") -> str:
    """Return the text of an answer whose tokens the engine would give one by one."""
    form = AnswerForm.of(layout.sources, layout.tokenizer)
    settings = GenerationSettings(100, SamplingParams(), (), (stop,) if stop else ())
    text = GrowingText(server.served, [5], settings, reader=form.reader(layout.tokenizer))
    ids = layout.tokenizer.encode_rendered(answer)[0]
    for number in ids:
        text.add([TokenOutput(number, None, None)])
    text.add([TokenOutput(layout.tokenizer.encode_rendered("<|eot_id|>")[0][0], None, "stop")])
    return text.text


def test_marks_that_are_control_are_kept_in_place(server: Running, tmp_path: Path) -> None:
    layout = use(server, "mistral 7", tmp_path)
    answer = 'a[THINK]hm[/THINK]yes[TOOL_CALLS]add[ARGS]{"a": 1}'
    assert written(server, layout, answer) == answer
    # What could begin a stop string is shown before the mark that follows it.
    assert written(server, layout, answer, stop="hmm") == answer
    channels = use(server, "gptoss", tmp_path)
    thought = "<|channel|>analysis<|message|>so th<|end|><|start|>assistant<|channel|>final<|message|>yes"
    assert written(server, channels, thought, stop="the") == "<think>\nso th\n</think>\n\nyes"


def test_effort_is_for_templates_that_read_it(server: Running, tmp_path: Path) -> None:
    layout = use(server, "mistral 3", tmp_path)
    refused = server.client.post(
        "/v1/chat/completions", json={"messages": MESSAGES, "reasoning_effort": "low"}
    )
    assert refused.json()["error"]["message"].startswith(
        "reasoning_effort is not read by the model's chat template"
    )
    object.__setattr__(server.served, "layout", replace(layout, sources=("plain",)))
    refused = server.client.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS})
    assert "of which the chat template has none" in refused.json()["error"]["message"]
