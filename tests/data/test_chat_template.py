"""Conversations through chat templates, against transformers' own rendering and masks."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import open_dataset
from support.commands import call
from support.corpus import make_chat_tokenizer, make_texts
from support.shared_data import TOKENIZERS, needs_shared_data

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def conversations(count: int = 40) -> list[list[dict[str, str]]]:
    texts = iter(make_texts(count * 8, seed=4))
    made = []
    for number in range(count):
        turns = [{"role": "system", "content": next(texts)}] if number % 3 == 0 else []
        for _ in range(1 + number % 3):
            turns += [{"role": "user", "content": next(texts)}, {"role": "assistant", "content": next(texts)}]
        made.append(turns)
    return made


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    return make_chat_tokenizer(tmp_path / "tokenizer")


def preprocess(
    tmp_path: Path, handler: str, records: list[dict[str, Any]], tokenizer: Path, *flags: object
) -> Any:
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--handler-name", handler,
        "--tokenizer-name-or-path", tokenizer, "--overwrite", *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return open_dataset(tmp_path / "out")


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_chatml_ids_and_labels_equal_transformers(
    tmp_path: Path, theirs: Any, marked: bool, fast: bool
) -> None:
    talks = conversations()
    (tmp_path / "marked.jinja").write_text(MARKED)
    flags = (["--chat-template", tmp_path / "marked.jinja"] if marked else []) + (
        [] if fast else ["--tokenizer-not-use-fast"]
    )
    made = preprocess(
        tmp_path, "MessagesHandler", [{"messages": talk} for talk in talks], tmp_path / "tokenizer", *flags
    )
    for number, talk in enumerate(talks):
        # Both templates give one text; the marked one lets transformers compute the mask.
        wanted = theirs.apply_chat_template(
            talk, chat_template=MARKED, return_assistant_tokens_mask=True, return_dict=True
        )
        ids = made.arrays["input_ids"][number].tolist()
        assert ids == theirs.apply_chat_template(talk, return_dict=True)["input_ids"] == wanted["input_ids"]
        mask = wanted["assistant_masks"]
        assert made.arrays["labels"][number].tolist() == [
            token if learned else -100 for token, learned in zip(ids, mask, strict=True)
        ]
        assert sum(mask) > 0


def test_sharegpt_and_messages_give_the_same_samples(tmp_path: Path, theirs: Any) -> None:
    talks = conversations(10)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    records = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in talk]} for talk in talks
    ]
    one = preprocess(tmp_path, "ShareGPTHandler", records, tmp_path / "tokenizer")
    rows = [one.arrays["labels"][number].tolist() for number in range(10)]
    two = preprocess(
        tmp_path, "MessagesHandler", [{"messages": talk} for talk in talks], tmp_path / "tokenizer"
    )
    assert rows == [two.arrays["labels"][number].tolist() for number in range(10)]


@needs_shared_data
def test_special_tokens_of_a_sentencepiece_template_become_ids(tmp_path: Path) -> None:
    """SentencePiece takes `</s>` in a text for text, so the template's own are placed as ids."""
    import sentencepiece

    path = TOKENIZERS / "llama"
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    (tmp_path / "llama2.jinja").write_text(LLAMA_2)
    talks = [[m for m in talk if m["role"] != "system"] for talk in conversations(20)]
    made = preprocess(
        tmp_path, "MessagesHandler", [{"messages": talk} for talk in talks], path, "--chat-template",
        tmp_path / "llama2.jinja",
    )  # fmt: skip
    for number, talk in enumerate(talks):
        ids: list[int] = []
        labels: list[int] = []
        for user, assistant in zip(talk[::2], talk[1::2], strict=True):
            prompt = f"[INST] {user['content']} [/INST]"
            whole = model.encode(f"{prompt} {assistant['content']} ")
            asked = model.encode(prompt)
            assert whole[: len(asked)] == asked
            ids += [1, *whole, 2]
            labels += [-100] * (1 + len(asked)) + [*whole[len(asked) :], 2]
        assert made.arrays["input_ids"][number].tolist() == ids
        assert made.arrays["labels"][number].tolist() == labels


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% if %}", "the chat template is not valid"),
        (
            "{{ raise_exception('roles must alternate') }}",
            "does not support the conversation: roles must alternate",
        ),
        ("{{ ''.__class__.__mro__ }}", "does not support the conversation"),
        (
            "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}",
            "mark it in the template with",
        ),
    ],
)
def test_unusable_templates_are_refused(tmp_path: Path, theirs: Any, template: str, complaint: str) -> None:
    (tmp_path / "t.jinja").write_text(template)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": conversations(3)[2]}))
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "out",
        "--handler-name", "MessagesHandler", "--tokenizer-name-or-path", tmp_path / "tokenizer", "--chat-template",
        tmp_path / "t.jinja",
    )  # fmt: skip
    assert done.status == 1
    assert complaint in done.complaint
