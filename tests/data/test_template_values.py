"""Values of chat templates, thoughts that are kept or dropped, columns by other names, prompts with completions."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.manifest import load_manifest, manifest_path
from ascendspeed_data.prompting import recorded_layout
from ascendspeed_data.tokenizer import load_tokenizer
from support.chat_templates import make_tokenizer, templates
from support.commands import call
from support.records import json_lines, run

DAY = (
    "{{ strftime_now('%d %B %Y') }}{{ '' if enable_thinking else 'quick ' }}{{ mood or '' }}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
THINKS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "hm"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "<think>\nso\n</think>\n\nfour"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values")
    tokenizer = make_tokenizer(path)
    tokenizer.chat_template = templates()["qwen3"][0]
    tokenizer.save_pretrained(path)
    (path / "day.jinja").write_text(DAY)
    return path


def learned(folder: Path, tmp_path: Path) -> list[str]:
    """The learned text of each sample."""
    made, tokenizer = open_dataset(tmp_path / "out"), load_tokenizer(folder)
    rows = made.arrays["labels"]
    return [
        "".join(tokenizer.convert_ids_to_tokens([i for i in rows[number].tolist() if i >= 0]))
        for number in range(len(rows))
    ]


def whole(folder: Path, tmp_path: Path) -> str:
    made, tokenizer = open_dataset(tmp_path / "out"), load_tokenizer(folder)
    return "".join(tokenizer.convert_ids_to_tokens(made.arrays["input_ids"][0].tolist())).replace("Ġ", " ")


def test_a_day_and_values_reach_the_template_and_the_manifest(folder: Path, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "x.jsonl", [{"messages": TALK}])
    template = ("--chat-template", folder / "day.jinja")
    done = run(folder, tmp_path, "MessagesHandler", source, *template)
    assert "'strftime_now' is undefined; give --chat-template-date" in done.complaint
    values = '{"mood": "glad ", "enable_thinking": false}'
    flags = (*template, "--chat-template-date", "2026-02-03", "--chat-template-kwargs", values)
    done = run(folder, tmp_path, "MessagesHandler", source, *flags)
    assert done.status == 0, done.stderr
    assert whole(folder, tmp_path).startswith("03 February 2026quick glad <|im_start|>user")
    manifest = load_manifest(tmp_path / "out_packed")
    assert manifest is not None
    assert manifest.chat_template_date == "2026-02-03"
    assert manifest.chat_template_kwargs == {"mood": "glad ", "enable_thinking": False}
    # A chat has the values of training, and another day.
    tokenizer = load_tokenizer(folder)
    tokenizer.template_values = type(tokenizer.template_values)(day="2026-02-04")
    layout = recorded_layout(manifest, tokenizer)
    assert layout is not None
    shown = "".join(tokenizer.convert_ids_to_tokens(layout.ids(TALK[:1]))).replace("Ġ", " ")
    assert shown.startswith("04 February 2026quick glad <|im_start|>user")
    # A value of the record comes before that of the flag.
    record = {"messages": TALK, "chat_template_kwargs": {"mood": "sad "}}
    run(folder, tmp_path, "MessagesHandler", json_lines(tmp_path / "y.jsonl", [record]), *flags)
    assert "quick sad " in whole(folder, tmp_path)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--chat-template-kwargs", '{"moods": 1}'), "sets 'moods', which the chat template does not read"),
        (("--chat-template-kwargs", "mood"), "chat_template_kwargs=mood is not a JSON object"),
        (("--chat-template-kwargs", '{"messages": []}'), "sets 'messages', which the template gets anyway"),
        (("--chat-template-date", "3.2.2026"), "chat_template_date=3.2.2026 is not a day"),
        (("--reasoning", "hide"), "reasoning=hide is unknown; choose from keep, drop, last"),
        (("--columns", "prompt"), "columns=prompt is not NAME=COLUMN"),
        (("--columns", "a=b,a=c"), "names 'a' twice"),
    ],
)
def test_values_without_sense_are_refused(
    folder: Path, tmp_path: Path, flags: tuple[str, ...], complaint: str
) -> None:
    source = json_lines(tmp_path / "x.jsonl", [{"messages": TALK}])
    done = run(folder, tmp_path, "MessagesHandler", source, *flags)
    assert done.status != 0
    assert complaint in done.complaint


def test_values_for_a_handler_without_a_chat_template_are_refused(folder: Path, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}])
    done = run(folder, tmp_path, "CompletionHandler", source, "--reasoning", "drop")
    assert "are for chat templates, and CompletionHandler uses none" in done.complaint


@pytest.mark.parametrize(
    ("reasoning", "wanted"),
    [
        ("keep", ["<think>Ċhm Ċ</think>ĊĊtwo", "<think>ĊsoĊ</think>ĊĊfour"]),
        ("drop", ["<think>ĊĊ</think>ĊĊtwo", "<think>ĊĊ</think>ĊĊfour"]),
        ("last", ["<think>ĊsoĊ</think>ĊĊfour"]),
    ],
)
def test_thoughts_are_kept_dropped_or_those_of_the_last_turn(
    folder: Path, tmp_path: Path, reasoning: str, wanted: list[str]
) -> None:
    source = json_lines(tmp_path / "x.jsonl", [{"messages": THINKS}])
    done = run(folder, tmp_path, "MessagesHandler", source, "--reasoning", reasoning)
    assert done.status == 0, done.stderr
    assert learned(folder, tmp_path) == [f"{text.replace(' ', '')}<|im_end|>" for text in wanted]
    manifest = load_manifest(tmp_path / "out_packed")
    assert manifest is not None
    assert manifest.reasoning == reasoning
    is_split = len(wanted) > 1
    line = "1 conversations are several samples each: the chat template leaves out thoughts of earlier turns"
    assert (line in done.stderr) == is_split == bool(manifest.split_conversations)
    assert manifest.num_documents == 1
    assert manifest.num_sequences == len(wanted)


def test_manifests_of_version_3_are_read(folder: Path, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "x.jsonl", [{"messages": TALK}])
    run(folder, tmp_path, "MessagesHandler", source)
    path = manifest_path(tmp_path / "out_packed")
    content = json.loads(path.read_text())
    new = (
        "chat_template_kwargs",
        "chat_template_date",
        "reasoning",
        "columns",
        "split_conversations",
        "num_other_prompts",
    )
    old = {name: value for name, value in content.items() if name not in new} | {"format_version": 3}
    now = load_manifest(tmp_path / "out_packed")
    path.write_text(json.dumps(old))
    assert load_manifest(tmp_path / "out_packed") == now


def test_columns_by_other_names_give_the_same_samples(folder: Path, tmp_path: Path) -> None:
    rows: list[Any] = []
    for record, flags in (
        ({"prompt": "one", "response": "two"}, ()),
        ({"question": "one", "answer": "two"}, ("--columns", "prompt=question,response=answer")),
        ({"response": "one", "prompt": "two"}, ("--columns", "prompt=response,response=prompt")),
    ):
        source = json_lines(tmp_path / "x.jsonl", [record])
        done = run(folder, tmp_path, "ResponseHandler", source, *flags)
        assert done.status == 0, done.stderr
        made = open_dataset(tmp_path / "out")
        rows.append([made.arrays[name][0].tolist() for name in ("input_ids", "labels")])
    assert rows[0] == rows[1] == rows[2]
    messages = json_lines(tmp_path / "messages.jsonl", [{"messages": TALK}])
    run(folder, tmp_path, "MessagesHandler", messages)
    made = open_dataset(tmp_path / "out")
    assert [made.arrays[name][0].tolist() for name in ("input_ids", "labels")] == rows[0]
    source = json_lines(tmp_path / "x.jsonl", [{"prompt": "one", "question": "one", "answer": "two"}])
    done = run(folder, tmp_path, "ResponseHandler", source, "--columns", "prompt=question,response=answer")
    assert "line 1: the record has a column 'prompt' beside 'question'" in done.complaint
    done = run(folder, tmp_path, "ResponseHandler", messages, "--columns", "prompt=question")
    assert (
        "line 1: no column 'question' (--columns prompt=question); the record has messages" in done.complaint
    )


def test_completions_are_learned_after_their_prompts(folder: Path, tmp_path: Path) -> None:
    """Texts are encoded together as they stand, as trl does; messages go through the template."""
    tokenizer = load_tokenizer(folder)
    source = json_lines(tmp_path / "x.jsonl", [{"prompt": "the year", "completion": " was it"}])
    assert run(folder, tmp_path, "CompletionHandler", source).status == 0
    made = open_dataset(tmp_path / "out")
    ids = tokenizer.encode("the year was it", add_special_tokens=False)
    start = len(tokenizer.encode("the year", add_special_tokens=False))
    assert made.arrays["input_ids"][0].tolist() == [*ids, tokenizer.eos_id]
    assert made.arrays["labels"][0].tolist() == [-100] * start + [*ids[start:], tokenizer.eos_id]
    record = {"prompt": [*TALK, TALK[0]], "completion": TALK[1:]}
    source = json_lines(tmp_path / "x.jsonl", [record])
    assert run(folder, tmp_path, "MessagesCompletionHandler", source).status == 0
    assert learned(folder, tmp_path) == ["<think>ĊĊ</think>ĊĊtwo<|im_end|>"]


def test_inspect_shows_the_parts_of_the_template_in_a_colour_of_their_own(
    folder: Path, tmp_path: Path
) -> None:
    source = json_lines(tmp_path / "x.jsonl", [{"messages": TALK}])
    run(folder, tmp_path, "MessagesHandler", source)
    done = call("asd-data", "inspect", tmp_path / "out", "--tokenizer-name-or-path", folder, "--color")
    assert done.status == 0, done.stderr
    assert "\x1b[36m<|im_start|>\x1b[0m\x1b[2m" in done.stdout
    assert "\x1b[32mtwo\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in done.stdout
