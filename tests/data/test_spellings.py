"""One conversation in the forms that sets have it in: samples and pairs are those of transformers' rendering."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.encoding import encode_samples
from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.tokenizer import load_tokenizer
from support.corpus import make_chat_tokenizer
from support.records import handler, shown_of
from support.tables import ReportTables

Message = dict[str, Any]
SPEAKERS = {
    "system": ("system",),
    "user": ("human", "user", "Human"),
    "assistant": ("gpt", "assistant", "chatgpt"),
}
TEXTS = ("a", "be brief", "", "Zürich 中文\n", " two  spaces", '{"a": 1}', "yes")
HEADER = ("form", "records", "differ")
TITLE = "Forms of conversations and pairs against transformers"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("chat")
    return make_chat_tokenizer(folder), load_tokenizer(folder)


def draw_talk(draw: random.Random) -> list[Message]:
    talk = [{"role": "system", "content": draw.choice(TEXTS)}] if draw.random() < 0.4 else []
    for number in range(draw.randint(1, 3)):
        talk.append({"role": "user", "content": f"{number}{draw.choice(TEXTS)}"})
        talk.append({"role": "assistant", "content": draw.choice(TEXTS)})
    return talk


def spelled_content(text: str, draw: random.Random) -> Any:
    """A text as text, as one part, or, if it is empty, as no part."""
    kind = draw.choice(("text", "input_text", "output_text"))
    forms = (text, text, [{"type": kind, "text": text}], [text], text if text else [])
    return draw.choice(forms)


def spelled_turn(message: Message, draw: random.Random) -> Message:
    """A message as a turn of ShareGPT, or with `role` and `content`, or half of each."""
    content = spelled_content(message["content"], draw)
    speaker = draw.choice(SPEAKERS[message["role"]])
    return draw.choice((
        {"from": speaker, "value": content}, {"role": speaker, "content": content},
        {"role": message["role"], "content": content}, {"from": speaker, "content": content},
        {"role": speaker, "value": content}, {"from": speaker, "value": content, "role": None, "content": None},
    ))  # fmt: skip


def ids_of(name: str, record: Any, tokenizer: Any) -> list[list[int]]:
    samples = handler(name).samples(json.loads(json.dumps(record)), tokenizer)
    rows = encode_samples(samples, tokenizer, ExactEncoder(tokenizer), [], True)
    return [ids.tolist() for ids, _ in rows]


def wanted(theirs: Any, talk: list[Message]) -> list[int]:
    ids: list[int] = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
    return ids


def test_random_forms_of_conversations_equal_transformers(
    tokenizers: tuple[Any, Any], report: ReportTables
) -> None:
    theirs, ours = tokenizers
    draw, differ, count = random.Random(5), [], 200
    for _ in range(count):
        talk = draw_talk(draw)
        as_messages = [{**m, "content": spelled_content(m["content"], draw)} for m in talk]
        mixed = [spelled_turn(m, draw) for m in talk]
        half = [draw.choice((m, {"from": m["role"], "value": m["content"]})) for m in talk]
        for name, record in (
            ("MessagesHandler", {"messages": as_messages}),
            ("MessagesHandler", {"messages": half}),
            ("ShareGPTHandler", {"conversations": mixed}),
            ("ShareGPTHandler", {"conversations": as_messages}),
        ):  # fmt: skip
            if ids_of(name, record, ours) != [wanted(theirs, talk)]:
                differ.append(f"{name} {record}")
    report.add(TITLE, HEADER, "conversations", 4 * count, len(differ))
    assert not differ, differ[0]


def test_random_forms_of_pairs_equal_transformers(tokenizers: tuple[Any, Any], report: ReportTables) -> None:
    """With and without the prompt in the answers, as trl has them, and the prompt as text or as messages."""
    theirs, ours = tokenizers
    draw, differ, count = random.Random(6), [], 200
    for _ in range(count):
        talk = draw_talk(draw)
        prompt, chosen = talk[:-1], {**talk[-1], "content": "yes " + draw.choice(TEXTS)}
        rejected = {**chosen, "content": "no " + draw.choice(TEXTS)}
        records = [
            ("MessagesPairHandler", {"chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}),
            ("MessagesPairHandler", {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}),
            ("MessagesPairHandler", {"prompt": json.dumps(prompt), "chosen": chosen, "rejected": [rejected]}),
            ("MessagesPairHandler", {"prompt": prompt, "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]}),
            ("MessagesPairHandler", {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}),
            ("MessagesPairHandler", {"prompt": prompt, "chosen": chosen["content"], "rejected": [rejected]}),
            ("ShareGPTPairHandler", {
                "conversations": [spelled_turn(m, draw) for m in prompt],
                "chosen": spelled_turn(chosen, draw), "rejected": spelled_turn(rejected, draw),
            }),
        ]  # fmt: skip
        if len(prompt) == 1:
            text = prompt[0]["content"]
            records += [
                ("MessagesPairHandler", {"prompt": text, "chosen": [chosen], "rejected": [rejected]}),
                (
                    "MessagesPairHandler",
                    {"prompt": text, "chosen": chosen["content"], "rejected": rejected["content"]},
                ),
                (
                    "MessagesPairHandler",
                    {"prompt": text, "chosen": [*prompt, chosen], "rejected": [*prompt, rejected]},
                ),
            ]
        expected = [wanted(theirs, [*prompt, chosen]), wanted(theirs, [*prompt, rejected])]
        differ += [f"{name} {record}" for name, record in records if ids_of(name, record, ours) != expected]
    report.add(TITLE, HEADER, "pairs", 7 * count, len(differ))
    assert not differ, differ[0]


@pytest.mark.parametrize(
    ("name", "record", "complaint"),
    [
        ("ShareGPTHandler", {"conversations": [{"value": "a"}]}, "turn 1 of column 'conversations' has no"),
        ("ShareGPTHandler", {"conversations": [{"from": "human"}]}, "has no 'from' and 'value'"),
        ("ShareGPTHandler", {"conversations": [{"role": "user"}]}, "turn 1: 'content' holds NoneType"),
        ("ShareGPTHandler", {"conversations": [{"from": "gpt", "value": "a", "content": "b"}]}, "keep one form"),
        ("ShareGPTHandler", {"conversations": [{"from": "gpt", "value": "a", "role": "user"}]}, "keep one form"),
        ("ShareGPTHandler", {"conversations": [{"from": "me", "value": "a"}]}, "is from 'me'; the role must be"),
        ("MessagesHandler", {"messages": [{"from": "me", "value": "a"}]}, "is from 'me'; the role must be"),
        (
            "MessagesPairHandler",
            {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "user", "content": "q"}],
             "rejected": [{"role": "assistant", "content": "b"}]},
            "one of 'chosen' and 'rejected' begins with the messages of 'prompt'",
        ),
        (
            "MessagesPairHandler",
            {"prompt": "q", "chosen": [{"role": "user", "content": "r"}], "rejected": "b"},
            "the text in 'prompt' is not among the messages",
        ),
        ("MessagesPairHandler", {"prompt": 5, "chosen": "a", "rejected": "b"}, "column 'prompt' holds int"),
        ("MessagesPairHandler", {"prompt": "q", "chosen": 5, "rejected": "b"}, "column 'chosen' is not a list"),
    ],
)  # fmt: skip
def test_forms_that_are_not_clear_are_refused(
    tokenizers: tuple[Any, Any], name: str, record: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as refused:
        shown_of(name, record, tokenizers[1])
    assert complaint in str(refused.value)
