"""Thoughts are told from answers in texts that grow, and tools come from a file."""

import json
import random
import re
from itertools import groupby
from pathlib import Path

import pytest

from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.prompting import layout_named
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_infer.commands.chat import read_tools
from ascendspeed_infer.thinking import ThoughtSplitter, opens_thoughts
from support.corpus import make_chat_tokenizer

PIECES = ("<think>", "</think>", "<", "<th", "ink>", "</", "so ", "\n", "a", "<b>", "</thinking>")


def split_whole(text: str, is_open: bool) -> str:
    """The answer of a whole text, by a regular expression."""
    text = "<think>" + text if is_open else text
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("is_open", [False, True])
def test_parts_of_a_text_that_grows_are_those_of_the_whole(is_open: bool) -> None:
    draw = random.Random(3)
    thought = 0
    for _ in range(2000):
        pieces = [draw.choice(PIECES) for _ in range(draw.randint(0, 12))]
        text = "".join(pieces)
        splitter = ThoughtSplitter(is_open)
        parts = []
        while text:
            size = draw.randint(1, 5)
            parts += splitter.feed(text[:size])
            text = text[size:]
        parts += splitter.end()
        whole = "".join(pieces)
        assert "".join(part for part, _ in parts) == whole
        assert "".join(part for part, is_thought in parts if not is_thought) == split_whole(whole, is_open)
        assert all(part for part, _ in parts)
        thought += any(is_thought for is_thought, _ in groupby(flag for _, flag in parts))
    assert thought > 300


def test_text_is_shown_as_soon_as_no_mark_can_follow() -> None:
    splitter = ThoughtSplitter()
    assert splitter.feed("so <") == [("so ", False)]
    assert splitter.feed("b") == [("<b", False)]
    assert splitter.feed("<think>hm") == [("<think>", True), ("hm", True)]
    assert splitter.feed("</think>yes") == [("</think>", True), ("yes", False)]
    assert splitter.end() == []


def test_a_mark_that_is_spelled_in_many_tokens_opens_thoughts(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer.encode("What is it? <think>\n")
    assert len(tokenizer.encode("<think>")) > 4
    assert opens_thoughts(tokenizer, ids)
    assert not opens_thoughts(tokenizer, tokenizer.encode("<think>What is it?</think>\n"))


def test_tools_of_a_file_reach_the_template_and_only_a_template(tmp_path: Path) -> None:
    make_chat_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    tools = read_tools(tmp_path / "tools.json")
    asked = [{"role": "user", "content": "a"}]
    ids = layout_named("tokenizer", tokenizer).with_tools(tools).ids(asked)
    assert tokenizer.decode(ids) == json.dumps([tool]) + "a"
    with pytest.raises(ConfigError, match="tools are for chat templates, and no template has no place"):
        layout_named("plain", tokenizer).with_tools(tools)
    (tmp_path / "tools.json").write_text('{"name": "weather"}')
    with pytest.raises(AscendSpeedError, match=r"tools=.*tools\.json"):
        read_tools(tmp_path / "tools.json")
    with pytest.raises(AscendSpeedError, match=r"tools=.*none\.json"):
        read_tools(tmp_path / "none.json")
