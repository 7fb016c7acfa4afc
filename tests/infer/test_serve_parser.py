"""Thoughts and tool calls of an answer are found however it is cut into pieces."""

import json
import random

import pytest

from ascendspeed_infer.serve.answer_parser import AnswerParser

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CASES = [
    ("just text\n", False, ("", "just text\n", [])),
    ("<think>\nhm\n\nwell\n</think>\n\nyes", False, ("hm\n\nwell", "yes", [])),
    ("hm</think>yes", True, ("hm", "yes", [])),
    ("never closed", True, ("never closed", "", [])),
    (f"I call {CALL} and {CALL}", False, ("", "I call  and ", ["add", "add"])),
    (f"<think>{CALL}</think>{CALL}", False, (CALL, "", ["add"])),
    ("<tool_call>no json</tool_call>!", False, ("", "<tool_call>no json</tool_call>!", [])),
    ("<tool_call>[1]</tool_call>", False, ("", "<tool_call>[1]</tool_call>", [])),
    ('cut <tool_call>{"name": "a', False, ("", 'cut <tool_call>{"name": "a', [])),
    ('[{"name": "add", "arguments": {"a": 1}}] ', False, ("", "", ["add"])),
    ('</think> {"name": "add", "parameters": "{\\"a\\": 1}"}', True, ("", "", ["add"])),
    ('{"name": "Bern", "size": 3}', False, ("", '{"name": "Bern", "size": 3}', [])),
    ("a < b <tool", False, ("", "a < b <tool", [])),
    ('I look [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', False, ("", "I look ", ["add"])),
    (
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]sub[CALL_ID]a1B[ARGS]{"a": 1}',
        False,
        ("", "", ["add", "sub"]),
    ),
    (
        '{"name": "add", "parameters": {"a": 1}}; {"name": "sub", "parameters": {"a": 1}}',
        False,
        ("", "", ["add", "sub"]),
    ),
    ('{"type": "function", "name": "add", "parameters": {"a": 1}}', False, ("", "", ["add"])),
    ("[TOOL_CALLS] are marks", False, ("", "[TOOL_CALLS] are marks", [])),
    ("see [TOOL_", False, ("", "see [TOOL_", [])),
    ('[TOOL_CALLS]add[ARGS]{"a": ', False, ("", '[TOOL_CALLS]add[ARGS]{"a": ', [])),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("seed", range(4))
def test_pieces_give_the_whole(case: int, seed: int) -> None:
    text, thinks, (reasoning, content, names) = CASES[case]
    draw = random.Random(seed)
    parser, parts, rest = AnswerParser(thinks, has_tools=True), [], text
    while rest:
        size = len(rest) if seed == 0 else draw.randint(1, 5)
        parts.append(parser.feed(rest[:size], is_last=size >= len(rest)))
        rest = rest[size:]
    assert "".join(one.reasoning for one in parts) == reasoning
    assert "".join(one.content for one in parts) == content
    calls = [call for one in parts for call in one.calls]
    assert [call["function"]["name"] for call in calls] == names
    assert [call["index"] for call in calls] == list(range(parser.num_calls))
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in calls)


def test_other_marks_of_thoughts() -> None:
    parser = AnswerParser(thinks=False, has_tools=True, marks=("[THINK]", "[/THINK]"))
    parts = [parser.feed(one, is_last=one == "s.", num_tokens=1) for one in ("[THINK]h", "m[/THINK]ye", "s.")]
    assert "".join(one.reasoning for one in parts) == "hm"
    assert "".join(one.content for one in parts) == "yes."
    assert parser.num_reasoning_tokens == 2


def test_without_tools_calls_are_text() -> None:
    parser = AnswerParser(thinks=False, has_tools=False)
    assert parser.feed(CALL, is_last=True).content == CALL
