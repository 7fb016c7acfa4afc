"""Calls of tools in answers, messages of several lines, and conversations that are saved and go on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.weights import open_source
from ascendspeed_data.prompting import layout_named
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.channels import ChannelReader
from ascendspeed_infer.chat import Chat, choose_layout
from ascendspeed_infer.config import AnswerConfig
from ascendspeed_infer.conversing import converse
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.tool_calls import find_tool_calls
from support.chat_templates import make_tokenizer, templates
from support.models import save_hugging_face, tiny_config

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"name": "weather", "arguments": {"city": "Bern"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("tools")
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = templates()["qwen3"][0]
    tokenizer.save_pretrained(folder)
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=1024)
    save_hugging_face(config, folder, 1)
    return LanguageModel.from_pretrained(folder, device="cpu")


def new_chat(model: LanguageModel, tools: list[Any] | None = None) -> Chat:
    settings = AnswerConfig(max_new_tokens=4, ignore_eos=True)
    return Chat(model, layout_named("tokenizer", model.tokenizer), settings, "Be brief.", tools)


def spoken(chat: Chat, *lines: str) -> str:
    rest, shown = iter([*lines, "q"]), list[str]()
    converse(chat, lambda prompt: next(rest), shown.append)
    return "".join(shown)


def test_calls_are_found_in_the_forms_of_families() -> None:
    draw = random.Random(5)
    for _ in range(500):
        objects = [
            {
                "name": draw.choice(("weather", "time")),
                key: form({"city": draw.choice(("Bern", "a}b", "</x>"))}),
            }
            for form in (draw.choice((dict, json.dumps)),)
            for key in draw.choices(("arguments", "parameters"), k=draw.randint(1, 3))
        ]
        thoughts = draw.choice(("", "<think>\nHm <tool_call>{}</tool_call>\n</think>\n\n", "Hm</think>"))
        before = draw.choice(("", "I look it up.\n"))
        blocks = "\n".join(f"<tool_call>\n{json.dumps(one)}\n</tool_call>" for one in objects)
        forms = [(thoughts + before + blocks, (thoughts + before).strip())]
        forms += [
            (f"{thoughts}{mark}{json.dumps(objects)}", thoughts.strip()) for mark in ("", "[TOOL_CALLS] ")
        ]
        forms += [(thoughts + json.dumps(objects[0]), thoughts.strip())] if len(objects) == 1 else []
        for answer, text in forms:
            found = find_tool_calls(answer, 3, thinks=thoughts.startswith("Hm"))
            assert found is not None
            assert found.text == text
            assert [one["function"]["name"] for one in found.calls] == [one["name"] for one in objects]
            wanted = [one.get("arguments", one.get("parameters")) for one in objects]
            wanted = [json.loads(one) if isinstance(one, str) else one for one in wanted]
            assert [one["function"]["arguments"] for one in found.calls] == wanted
            assert [one["id"] for one in found.calls] == [f"call{3 + n:05d}" for n in range(len(objects))]
            assert [json.loads(line) for line in found.shown().splitlines()] == [
                one["function"] for one in found.calls
            ]


@pytest.mark.parametrize(
    "answer",
    [
        "", "Hello", "[]", "{}", "3", '{"name": "weather"}', '[{"name": "weather", "arguments": "{"}]', "[" * 100000,
        "<tool_call>{</tool_call>", '{"name": "a", "arguments": {}} and more', '[TOOL_CALLS] [{"name": "a"}]',
        '<think><tool_call>{"name": "a", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "a", "arguments": {}}',
    ],
)  # fmt: skip
def test_what_is_no_call_stays_text(answer: str) -> None:
    assert find_tool_calls(answer) is None


FIELDS = {
    "city": ("string", ("Bern", "42", "a\nb", "<b>", "None", " x ", "[1]")),
    "days": ("integer", (3, -1)),
    "exact": ("boolean", (True, False)),
    "near": ("array", ([1, "a"], [])),
    "more": ({"type": "object"}, ({"a": {"b": None}}, {})),
}


def test_calls_that_write_values_as_text_follow_the_types_of_tools() -> None:
    properties = {
        key: kind if isinstance(kind, dict) else {"type": kind} for key, (kind, _) in FIELDS.items()
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": properties}}}]
    draw = random.Random(6)
    for _ in range(300):
        keys = draw.sample(list(FIELDS), draw.randint(0, 5))
        wanted = {key: draw.choice(FIELDS[key][1]) for key in keys}
        texts = {
            key: value if isinstance(value, str) else draw.choice((json.dumps(value), str(value)))
            if isinstance(value, bool) else json.dumps(value)
            for key, value in wanted.items()
        }  # fmt: skip
        qwen = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
        glm = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n" for key, text in texts.items()
        )
        for inner in (f"\n<function=weather>\n{qwen}</function>\n", f"weather\n{glm}"):
            found = find_tool_calls(f"<tool_call>{inner}</tool_call>", tools=tools)
            assert found is not None, inner
            assert found.calls[0]["function"] == {"name": "weather", "arguments": wanted}
    broken = "<tool_call><function=weather><parameter=city>Bern</function></tool_call>"
    assert find_tool_calls(broken, tools=tools) is None
    assert find_tool_calls("<tool_call>other</tool_call>", tools=tools) is None


def test_answers_in_channels_become_thoughts_and_calls(model: LanguageModel) -> None:
    tokenizer = model.tokenizer
    control = {
        f"<|{name}|>" for name in ("channel", "message", "start", "end", "call", "return", "constrain")
    }

    def read(answer: str) -> str:
        reader, text = ChannelReader(tokenizer), ""
        for token in tokenizer.encode_rendered(answer)[0]:
            piece = next((one for one in control if tokenizer.special_ids.get(one) == token), None)
            text += reader.feed(token, "" if piece else tokenizer.decode([token]))
        return text

    assert (
        read(
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
        )
        == "<think>\nHm\n</think>\n\nYes."
    )
    found = find_tool_calls(
        read(
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
            '<|constrain|>json<|message|>{"city": "Bern"}<|call|>'
        )
    )
    assert found is not None
    assert (found.text, found.calls[0]["function"]) == ("<think>\nHm\n</think>", CALL)
    assert read("<|channel|>analysis<|message|>cut o") == "<think>\ncut o"
    # A model that writes no channels is heard all the same.
    assert read("the year was") == "the year was"
    assert read("today") == "today"
    assert read("the end<|end|>and more") == "the endand more"


def test_a_call_that_cannot_be_read_stays_text_beside_others() -> None:
    found = find_tool_calls('<tool_call>{</tool_call> <tool_call>{"name": "now"}</tool_call>')
    assert found is not None
    assert found.text == "<tool_call>{</tool_call>"
    assert [one["function"] for one in found.calls] == [{"name": "now", "arguments": {}}]
    assert find_tool_calls('<tool_call>{"name": "now"}</tool_call>', thinks=True) is None


def test_calls_and_results_are_fed_as_the_template_writes_them(model: LanguageModel) -> None:
    chat = new_chat(model, TOOLS)
    answer = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    chat.messages = [{"role": "user", "content": "How is it?"}, chat._message(answer)]
    assert chat.called is not None
    assert chat.called.shown() == json.dumps(CALL) + "\n"
    assert "No call of a tool waits" in spoken(new_chat(model, TOOLS), "/result 3")
    shown = spoken(chat, "/result Rain")
    assert "AscendSpeed: " in shown
    assert [one["role"] for one in chat.messages] == ["user", "assistant", "tool", "assistant"]
    rendered = model.tokenizer.decode(chat.layout.ids(chat.history()[:4]))
    assert f"{answer}" in rendered
    assert "<tool_response>\nRain\n</tool_response>" in rendered
    # Two calls are answered one after the other, and only then the model is asked.
    chat.clear()
    chat.messages = [{"role": "user", "content": "How is it?"}, chat._message(answer + answer)]
    assert [one["id"] for one in chat.open_calls()] == ["call00000", "call00001"]
    assert "AscendSpeed: " not in spoken(chat, "/result Rain")
    assert "AscendSpeed: " in spoken(chat, "/result Sun")
    assert [one.get("tool_call_id") for one in chat.messages[2:4]] == ["call00000", "call00001"]


def test_without_tools_an_answer_is_text(model: LanguageModel) -> None:
    answer = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    assert new_chat(model)._message(answer) == {"role": "assistant", "content": answer}


def test_messages_of_several_lines(model: LanguageModel) -> None:
    chat = new_chat(model)
    spoken(chat, '"""one', " two ", "", 'three"""', '"""', "four", '"""', '"""five"""')
    asked = [one["content"] for one in chat.messages if one["role"] == "user"]
    assert asked == ["one\n two \n\nthree", "four", "five"]


def test_conversations_are_saved_and_go_on(model: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    first = new_chat(model, TOOLS)
    spoken(first, "the year", f"/save {path}")
    record = json.loads(path.read_text())
    assert record == {"messages": first.history(), "tools": TOOLS}
    assert record["messages"][0] == {"role": "system", "content": "Be brief."}
    second = new_chat(model, TOOLS)
    spoken(second, "other", f"/load {path}", "it was")
    spoken(first, "it was")
    assert second.messages[:3] == first.messages[:3]
    assert second.layout.ids(second.history()[:4]) == first.layout.ids(first.history()[:4])
    before = list(second.messages)
    for content, said in (
        ("{", "is not JSON"),
        ('{"messages": 3}', "has no list of messages"),
        ('{"messages": [{"role": 3}]}', "key 'role'"),
    ):
        path.write_text(content)
        assert said in spoken(second, f"/load {path}")
        assert second.messages == before
    assert "does not exist" in spoken(second, f"/load {tmp_path / 'none'}")
    assert "names no file" in spoken(second, "/load")
    assert "cannot be written" in spoken(second, f"/save {tmp_path}")


def test_tools_take_the_template_for_them(model: LanguageModel, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    tokenizer = make_tokenizer(folder)
    save_hugging_face(tiny_config(vocab_size=len(tokenizer)), folder)
    own = "{{ tools }}" + templates()["yi"][0]
    tokenizer.chat_template = {"default": templates()["yi"][0], "tool_use": own}
    tokenizer.save_pretrained(folder)
    source, ours = open_source(ModelSourceConfig(load=folder), seed=0), load_tokenizer(folder)
    said: list[str] = []
    assert choose_layout(source, ours, None, said.append, has_tools=True).sources == (own,)
    assert "tool_use" in said[0]
    assert choose_layout(source, ours, None, said.append).sources == (templates()["yi"][0],)
