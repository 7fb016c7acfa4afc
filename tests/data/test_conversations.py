"""Conversations drawn at random through templates of several styles: ids and labels against transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.chat_template import ChatTemplate
from ascendspeed_data.conversation import conversation_of
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.handlers.chat import MessagesHandler
from ascendspeed_data.prompting import layout_named
from ascendspeed_data.sample_encoding import encode_samples
from ascendspeed_data.tokenizer import load_tokenizer
from support.conversations import STYLES, Draw, Drawn, learned_spans, template_of
from support.corpus import make_chat_tokenizer
from support.tables import ReportTables

COUNT = 120


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("chat")
    theirs = make_chat_tokenizer(folder)
    return theirs, load_tokenizer(folder)


def rendered(
    theirs: Any, template: str, messages: list[Any], tools: Any = None, **more: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Text and generation spans by transformers' own renderer.

    `apply_chat_template` takes null keys off before it calls this, so that templates cannot ask for a null content.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), spans = render_jinja_template(
        [messages], tools=tools, chat_template=template, **more, **theirs.special_tokens_map
    )
    return text, spans[0] if spans else []


def expected(theirs: Any, style: str, drawn: Drawn) -> tuple[list[int], list[int]]:
    """Ids and labels as transformers renders and tokenizes them."""
    marked = template_of(style, marked=True)
    text, spans = rendered(theirs, marked, drawn.messages, drawn.tools, return_assistant_tokens_mask=True)
    assert text == rendered(theirs, template_of(style, marked=False), drawn.messages, drawn.tools)[0]
    encoded = theirs(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = learned_spans(spans, drawn.learned)
    labels = [
        token if any(begin < last and first < end for begin, end in wanted) else -100
        for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def compare(tokenizers: tuple[Any, Any], style: str, seed: int, count: int) -> tuple[int, list[str]]:
    """The number of conversations compared, and those that differ."""
    theirs, ours = tokenizers
    handler, draw = MessagesHandler(), Draw(style, seed)
    compared, differ = 0, []
    for _ in range(count):
        drawn = draw.conversation()
        ids, labels = expected(theirs, style, drawn)
        for marked in (False, True):
            ours.chat_template = template_of(style, marked)
            (sample,) = handler.samples(json.loads(json.dumps(drawn.record)), ours)
            ((made, learned),) = encode_samples([sample], ours, ExactEncoder(ours), [], True)
            compared += 1
            if made.tolist() != ids or learned.tolist() != labels:
                differ.append(json.dumps(drawn.record))
    return compared, differ


@pytest.mark.parametrize("style", STYLES)
def test_random_conversations_equal_transformers(
    tokenizers: tuple[Any, Any], style: str, report: ReportTables
) -> None:
    compared, differ = compare(tokenizers, style, seed=1, count=COUNT)
    header = ("style", "conversations", "differ")
    report.add(
        "Conversations through chat templates against transformers", header, style, compared, len(differ)
    )
    assert compared == 2 * COUNT
    assert not differ, differ[0]


@pytest.mark.nightly
@pytest.mark.parametrize("style", STYLES)
def test_many_random_conversations_equal_transformers(tokenizers: tuple[Any, Any], style: str) -> None:
    import time

    seed = time.time_ns()
    _, differ = compare(tokenizers, style, seed, 3000)
    assert not differ, (seed, differ[0])


@pytest.mark.parametrize("style", STYLES)
def test_random_prompts_equal_transformers(
    tokenizers: tuple[Any, Any], style: str, tmp_path: Path, report: ReportTables
) -> None:
    theirs, ours = tokenizers
    template = template_of(style, marked=False)
    (tmp_path / "chat.jinja").write_text(template)
    layout, draw = layout_named(str(tmp_path / "chat.jinja"), ours), Draw(style, 2)
    for _ in range(COUNT):
        drawn = draw.conversation()
        messages = MessagesHandler().messages(drawn.record)
        last = max(number for number, message in enumerate(messages) if message["role"] == "user")
        prompt, _ = rendered(theirs, template, drawn.messages[: last + 1], add_generation_prompt=True)
        ids = layout.ids(messages[: last + 1])
        assert ids == theirs(prompt, add_special_tokens=False)["input_ids"], drawn.record
    report.add(
        "Prompts through chat templates against transformers", ("style", "prompts", "differ"), style, COUNT, 0
    )


def test_answers_that_are_shown_differently_later_have_samples_of_their_own(
    tokenizers: tuple[Any, Any],
) -> None:
    """Where a template shows only the last answer with its thoughts, each answer is the last of a sample."""
    _, ours = tokenizers
    ours.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    turns = [
        {"role": role, "content": text}
        for role, text in (
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("assistant", "e"),
        )
    ]
    for weights in ((0, 1, 1), (1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 0, 1), (1, 1, 0)):
        weighed = iter(weights)
        messages = [{**m, "weight": next(weighed)} if m["role"] == "assistant" else m for m in turns]
        samples = ChatTemplate.from_tokenizer(ours).samples(conversation_of(messages))
        learned = [
            "".join(str(segment.content) for segment in sample.segments if segment.trained)
            for sample in samples
        ]
        shown = [f"<think></think>{text}<|im_end|>" for text in "bde"]
        assert learned == [text for text, weight in zip(shown, weights, strict=True) if weight]
