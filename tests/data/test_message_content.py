"""Messages in the forms that other programs write: parts, tools, tool calls, thoughts, and what templates leave out."""

import json
from typing import Any

import pytest

from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import TEMPLATE_VARIABLES
from ascendspeed_data.literal_pieces import LiteralTokenizer
from ascendspeed_data.prompting import layout_named
from support.records import (
    PLAIN,
    PROMPT,
    TALK,
    encoded,
    learned_of,
    shown_of,
)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "part 1 has the type 'image_url'"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}, "part 2 has the type 'input_audio'"),
        ({"content": [{"type": "text", "text": 1}]}, "part 1 has no text 'text'"),
        ({"content": [{"type": "text", "text": "a", "weight": 0}]}, "part 1 has 'weight'"),
        ({"content": [1]}, "part 1 holds int"),
        ({"content": {"text": "a"}}, "'content' holds dict, not text or a list"),
        ({"content": 5}, "'content' holds int"),
        ({"content": None}, "no text 'content'"),
        ({"content": {}}, "no text 'content'"),
        ({"content": "a", "name": "Ann"}, "key 'name' (role 'assistant'): the chat template does not read it"),
        ({"content": "a", "reasoning_content": "hm"}, "key 'reasoning_content'"),
        ({"content": None, "refusal": "no"}, "content, refusal"),
        ({"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "key 'tool_calls'"),
        ({"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}, "holds list, not"),
        ({"content": "a", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "which is not JSON"),
        ({"content": "a", "tool_calls": [{"function": {"arguments": "{}"}}]}, "has no text 'name'"),
        ({"content": "a", "tool_calls": "f()"}, "key 'tool_calls' holds the text 'f()', which is not JSON"),
        ({"content": "a", "images": ["x.png"]}, "key 'images' holds media"),
        ({"content": "a", "mask": 1}, "key 'mask' says which part"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_learned_name_number_and_key(
    chat_tokenizer: Any, message: dict[str, Any], complaint: str
) -> None:
    record = {"messages": [TALK[0], {"role": "assistant", **message}]}
    error = str(encoded(record, "MessagesHandler", chat_tokenizer))
    assert "message 2: " in error
    assert complaint in error
    pair = {"prompt": [TALK[0]], "chosen": [{"role": "assistant", **message}], "rejected": [TALK[1]]}
    error = str(encoded(pair, "MessagesPairHandler", chat_tokenizer))
    assert "message 2: " in error
    assert complaint in error


def test_templates_that_leave_a_role_out_are_refused(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    record = {"messages": [{"role": "system", "content": "be"}, *TALK]}
    assert "message 1: key 'content' (role 'system')" in str(
        encoded(record, "MessagesHandler", chat_tokenizer)
    )


@pytest.mark.parametrize("name", TEMPLATE_VARIABLES.names)
def test_variables_of_templates_are_honoured_or_refused(chat_tokenizer: Any, name: str) -> None:
    value: Any = {
        "enable_thinking": False,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"brief": "very"},
    }.get(name, [{"name": "f", "parameters": {}}])
    read = "brief" if name == "chat_template_kwargs" else name
    record = {"messages": TALK, name: value}
    assert repr(read) in str(encoded(record, "MessagesHandler", chat_tokenizer))
    chat_tokenizer.chat_template = f"{{{{ {read} | tojson }}}}{PLAIN}"
    for given in (value, json.dumps(value)):
        if name == "reasoning_effort" and given != value:
            continue
        shown = shown_of("MessagesHandler", {**record, name: given}, chat_tokenizer)
        assert shown.startswith(json.dumps("very" if read == "brief" else value))
    if name == "chat_template_kwargs":
        error = encoded({**record, name: {"messages": []}}, "MessagesHandler", chat_tokenizer)
        assert "sets 'messages'" in str(error)


def test_tools_as_text_in_all_forms_reach_the_template_as_objects(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + PLAIN
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    text = {"type": "function", "function": {"name": "weather", "parameters": json.dumps(parameters)}}
    shown = {
        shown_of("MessagesHandler", {"messages": TALK, "tools": tools}, chat_tokenizer)
        for tools in ([tool], json.dumps([tool]), [json.dumps(tool)], [text], json.dumps([json.dumps(text)]))
    }
    assert len(shown) == 1
    assert shown.pop().startswith(json.dumps(tool))
    for wrong in ("weather", [1], '{"name": "weather"}', ["weather"]):
        with pytest.raises(DataError, match="column 'tools'"):
            shown_of("MessagesHandler", {"messages": TALK, "tools": wrong}, chat_tokenizer)


def test_arguments_print_as_their_text_and_act_as_objects(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
        "{{ c.function.name }}{{ a is mapping }}{{ a | tojson }}{{ a }}{{ 'x' + a + 'y' }}{{ a ~ '' }}"
        "{{ a.items() | list | length }}"
        "{{ '%s' | format(a) }}{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    text = '{"a":null}'
    call_ = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": text}}],
    }
    shown = shown_of("MessagesHandler", {"messages": [TALK[0], call_]}, chat_tokenizer)
    assert f'fTrue{{"a": null}}{text}x{text}y{text}1{text}<|im_end|>' in shown
    as_object = {**call_, "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}
    assert (
        shown_of("MessagesHandler", {"messages": [TALK[0], as_object]}, chat_tokenizer).count('{"a": null}')
        == 5
    )


def test_sharegpt_function_calls_are_tool_calls(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
    )
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "3 degrees"},
    ]
    learned = learned_of("ShareGPTHandler", {"conversations": turns}, chat_tokenizer)
    assert learned == 'weather{"city": "Oslo"}<|im_end|>3 degrees<|im_end|>'
    turns[1]["value"] = '{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}'
    assert learned_of("ShareGPTHandler", {"conversations": turns}, chat_tokenizer) == learned
    # The roles of ms-swift, in turns and in messages.
    turns[1]["from"], turns[2]["from"] = "tool_call", "tool_response"
    assert learned_of("ShareGPTHandler", {"conversations": turns}, chat_tokenizer) == learned
    roles = ("user", "tool_call", "tool_response", "assistant")
    messages = [{"role": role, "content": turn["value"]} for role, turn in zip(roles, turns, strict=True)]
    assert learned_of("MessagesHandler", {"messages": messages}, chat_tokenizer) == learned
    spelled = [*messages[:2], {"role": "tool_response", "content": "<tool_call>"}, messages[3]]
    literal = LiteralTokenizer(chat_tokenizer, ["<tool_call>"])
    assert literal.masked(spelled)[2]["content"] == literal.mask("<tool_call>", is_of_user=True)
    for wrong in ("weather()", '{"name": "weather"}', "[]x"):
        turns[1]["value"] = wrong
        with pytest.raises(DataError, match="turn 2: the function call"):
            learned_of("ShareGPTHandler", {"conversations": turns}, chat_tokenizer)


def test_prompts_go_through_the_same_door(chat_tokenizer: Any) -> None:
    plain = layout_named("instruction", chat_tokenizer)
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}]}]
    assert plain.ids(parts) == plain.ids([TALK[0]])
    for layout in (plain, layout_named("tokenizer", chat_tokenizer)):
        with pytest.raises(DataError, match=r"message 1: .*'name'"):
            layout.ids([{**TALK[0], "name": "Ann"}])
        with pytest.raises(DataError, match=r"message 1: .*'images'"):
            layout.ids([{**TALK[0], "images": ["x"]}])
        with pytest.raises(DataError, match=r"message 1: .*type 'image'"):
            layout.ids([{"role": "user", "content": [{"type": "image"}]}])
