"""What handlers make of real instruction sets, against a straight-line computation with SentencePiece alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.handlers import SampleHandler, all_handlers, find_handler
from support.commands import call
from support.corpus import write_json_lines
from support.shared_data import SHARED_DATA, TOKENIZERS, needs_shared_data

INSTRUCTION = SHARED_DATA / "instruction"
LLAMA = TOKENIZERS / "llama"
SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)
EOS = 2
Row = tuple[list[int], list[int]]
Encode = Callable[[str], list[int]]


def turns_to_row(
    turns: list[tuple[str, str]], encode: Encode, train_from: int = 0, every: bool = True
) -> Row:
    """Alpaca's layout: each answer ends with the end of a sequence; the text in between is tokenized as one.

    Where the answer begins is found as in 2023: by tokenizing what stands before it.
    """
    ids: list[int] = []
    labels: list[int] = []
    text = f"\n{SYSTEM}\n"
    for number, (user, assistant) in enumerate(turns):
        text += f"### Instruction:\n{user}\n### Response:\n"
        prompt = encode(text)
        whole = encode(text + assistant + "\n")
        assert whole[: len(prompt)] == prompt
        learned = number >= train_from
        if every or number == len(turns) - 1:
            ids += [*whole, EOS]
            answer = [*whole[len(prompt) :], EOS]
            labels += [-100] * len(prompt) + (answer if learned else [-100] * len(answer))
            text = ""
        else:
            text += assistant + "\n"
    return ids, labels


def moss(record: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (
            turn["Human"].replace("<eoh>", "").replace("<|Human|>: ", "").strip(),
            turn["MOSS"].replace("<|MOSS|>:", "").replace("<eom>", "").strip(),
        )
        for turn in record["chat"].values()
        if turn
    ]


def belle(record: dict[str, Any]) -> list[tuple[str, str]]:
    pieces = [piece.split("Assistant:") for piece in record["instruction"].split("Human:") if piece]
    turns = [(user.strip(), answer.strip()) for user, answer in pieces]
    return [*turns[:-1], (turns[-1][0], record["output"].strip())]


def general(record: dict[str, Any], encode: Encode) -> list[Row]:
    return [turns_to_row([(record["instruction"] + "\n" + record["input"], record["output"])], encode)]


def moss_2023_multi(record: dict[str, Any], encode: Encode) -> list[Row]:
    ids: list[int] = []
    labels: list[int] = []
    for user, assistant in moss(record):
        asked, answered = encode(user), encode(assistant)
        ids += [195, *asked, 196, *answered]
        labels += [EOS, *[-100] * len(asked), -100, *answered]
    return [([*ids, EOS], [*labels, EOS])]


def prefixes_2023(record: dict[str, Any], encode: Encode) -> list[Row]:
    turns = moss(record)
    rows = [turns_to_row(turns[:end], encode, end - 1, every=False) for end in range(1, len(turns) + 1)]
    return [(ids[:-1], labels[:-1]) for ids, labels in rows]


def prefixes(record: dict[str, Any], encode: Encode) -> list[Row]:
    turns = moss(record)
    return [turns_to_row(turns[:end], encode, train_from=end - 1) for end in range(1, len(turns) + 1)]


MOSS_FILES = (
    "moss-003-sft-no-tools.jsonl",
    "conversations_with_tools_with_inner_instruction_no_text2img.jsonl",
)
CASES: list[tuple[str, str, int, Callable[[dict[str, Any], Encode], list[Row]]]] = [
    ("GeneralInstructionHandler", "alpaca/alpaca_data.json", 5000, general),
    ("GeneralInstructionHandler", "alpaca_zh_demo.json", 1000, general),
    ("MOSSInstructionHandler", f"moss-003-sft/{MOSS_FILES[1]}", 160, prefixes),
    ("MOSSInstructionHandler2023", f"moss-003-sft/{MOSS_FILES[1]}", 160, prefixes_2023),
    ("MOSSMultiTurnHandler", f"moss-003-sft/{MOSS_FILES[0]}", 60,
     lambda record, encode: [turns_to_row(moss(record), encode)]),
    ("MOSSMultiTurnHandler2023", f"moss-003-sft/{MOSS_FILES[0]}", 60, moss_2023_multi),
    ("BelleMultiTurnInstructionHandler", "belle_multiturn/multiturn_chat_0.8M.readme_sample.json", 1,
     lambda record, encode: [turns_to_row(belle(record), encode)]),
    ("BelleMultiTurnInstructionHandler2023", "belle_multiturn/multiturn_chat_0.8M.readme_sample.json", 1,
     lambda record, encode: [turns_to_row(belle(record), encode, train_from=len(belle(record)) - 1, every=False)]),
]  # fmt: skip


def records_in(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        return json.loads(text)  # type: ignore[no-any-return]
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def make(tmp_path: Path, handler: str, source: Path, tokenizer: Path, *flags: object) -> Any:
    done = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--handler-name", handler,
        "--tokenizer-name-or-path", tokenizer, *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return open_dataset(tmp_path / "out")


@needs_shared_data
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda n: f"{CASES[n][0]}-{Path(CASES[n][1]).stem}")
def test_real_instruction_sets_give_the_expected_ids_and_labels(tmp_path: Path, case: int) -> None:
    handler, name, count, expected = CASES[case]
    model = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    records = records_in(INSTRUCTION / name)[:count]
    assert len(records) == count
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    made = make(tmp_path, handler, source, LLAMA)
    rows = [row for record in records for row in expected(record, lambda text: list(model.encode(text)))]
    ids, mask, labels = (made.arrays[name] for name in ("input_ids", "attention_mask", "labels"))
    assert len(ids) == len(rows)
    for number, (wanted_ids, wanted_labels) in enumerate(rows):
        assert ids[number].tolist() == wanted_ids, number
        assert labels[number].tolist() == wanted_labels, number
        assert mask[number].tolist() == [1] * len(wanted_ids)
    assert ids.info.format == mask.info.format == labels.info.format == "int32"
    assert len(ids.documents) - 1 == count
    assert made.manifest.num_trained_tokens == sum(label != -100 for _, row in rows for label in row)


@needs_shared_data
def test_without_append_eod_the_general_handler_equals_2023(tmp_path: Path) -> None:
    records = records_in(INSTRUCTION / "alpaca_zh_demo.json")[:50]
    source = tmp_path / "x.json"
    source.write_text(json.dumps(records))
    made = make(tmp_path, "GeneralInstructionHandler", source, LLAMA, "--no-append-eod")
    model = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    for number, record in enumerate(records):
        user = record["instruction"] + "\n" + record["input"]
        prompt = f"\n{SYSTEM}\n### Instruction:\n{user}\n### Response:\n"
        ids = model.encode(prompt + record["output"] + "\n")
        masked = len(model.encode(prompt))
        assert made.arrays["input_ids"][number].tolist() == ids
        assert made.arrays["labels"][number].tolist() == [-100] * masked + ids[masked:]


@needs_shared_data
@pytest.mark.parametrize("old", [False, True])
def test_alpaca_text_equals_its_template(tmp_path: Path, old: bool) -> None:
    records = records_in(INSTRUCTION / "alpaca/alpaca_data.json")[:200]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    name = "AlpacaPretrainHandler" + ("2023" if old else "")
    made = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--handler-name", name,
        "--tokenizer-name-or-path", LLAMA,
    )  # fmt: skip
    assert made.status == 0, made.stderr
    dataset = open_dataset(tmp_path / "out_text_document")
    model = sentencepiece.SentencePieceProcessor(model_file=str(LLAMA / "tokenizer.model"))
    for number, record in enumerate(records):
        inputs = f"### Input:\n{record['input']}\n\n" if record["input"] else "###None\n\n" if old else ""
        text = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.USER: Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n### Instruction:\n"
            f"{record['instruction']}\n\n{inputs}### Response: ASSISTANT: {record['output']}"
        )
        assert dataset.ids[number].tolist() == [*model.encode(text), EOS]


def test_stack_overflow_and_leetcode_give_the_expected_samples(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """Made records: no real file of these sets could be had."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    question = {"title": "the first", "question_body": "what is\n\n it?", "answer_body": "x = f(y)"}
    (tmp_path / "so.jsonl").write_text(json.dumps(question))
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / "so.jsonl", "--output-prefix", tmp_path / "so",
        "--handler-name", "StackOverflowPythonPretrainHandler", "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    text = "In python, the first\n### Question:\nwhat is\n\n it?\n### Response:\nx = f(y)\n"
    assert open_dataset(tmp_path / "so_text_document").ids[0].tolist() == [1, *model.encode(text), EOS]

    problem = {
        "code_with_problem": " Add two numbers. \n```python\ndef add(a, b): ...\n```",
        "code_only": "def add(a, b):\n    return a + b",
        "explanation_only": "the sum",
    }
    (tmp_path / "lc.jsonl").write_text(json.dumps(problem))
    made = make(tmp_path, "LeetcodePythonInstructionHandler", tmp_path / "lc.jsonl", tokenizer_folder)
    answer = "def add(a, b):\n    return a + b\nthe sum"
    ids, labels = turns_to_row([("Add two numbers.", answer)], lambda text: list(model.encode(text)))
    assert made.arrays["input_ids"][0].tolist() == [1, *ids]
    assert made.arrays["labels"][0].tolist() == [-100, *labels]


def test_examples_of_listed_handlers_work(tmp_path: Path, tokenizer_folder: Path) -> None:
    rows = json.loads(call("asd-data", "handlers", "--json").stdout)
    assert {row["name"] for row in rows} == {handler.name for handler, _ in all_handlers()}
    listed = call("asd-data", "handlers").stdout
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    for row in rows:
        assert row["name"] in listed
        assert row["summary"]
        source = tmp_path / f"{row['name']}.jsonl"
        source.write_text(json.dumps(row["example"]))
        done = call(
            "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / row["name"], "--handler-name",
            row["name"], "--tokenizer-name-or-path", tokenizer_folder, "--chat-template", template,
            "--tokenizer-not-use-fast",
        )  # fmt: skip
        assert done.status == 0, done.stderr
        handler = find_handler(row["name"])
        prefix = row["name"] if isinstance(handler, SampleHandler) else f"{row['name']}_text_document"
        assert open_dataset(tmp_path / prefix).ids.info.num_tokens > 3


OWN = """
class Shout:
    name = "Shout"
    columns = ("word",)
    def texts(self, record, key):
        return [record["word"].upper(), record["word"]]

class Neither:
    name = "Neither"
    columns = ()
"""


def test_handlers_of_users_are_found(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_handlers_for_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"word": "the"}\n{"word": "was"}\n')
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "out",
        "--handler-name", "own_handlers_for_test:Shout", "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    dataset = open_dataset(tmp_path / "out_text_document")
    texts = ["THE", "the", "WAS", "was"]
    assert [dataset.ids[n].tolist() for n in range(4)] == [[1, *model.encode(text), EOS] for text in texts]
    with pytest.raises(AscendSpeedError, match="has no Shou; did you mean Shout"):
        find_handler("own_handlers_for_test:Shou")
    with pytest.raises(AscendSpeedError, match="has neither a method texts"):
        find_handler("own_handlers_for_test:Neither")
    with pytest.raises(AscendSpeedError, match="make the module importable"):
        find_handler("no_such_module_for_test:X")
    with pytest.raises(
        ConfigError, match=r"did you mean GeneralPretrainHandler\?; choose from GeneralPretrainHandler, "
    ):
        find_handler("GeneralPretrain")


@pytest.mark.parametrize(
    ("handler", "record", "complaint"),
    [
        (
            "GeneralInstructionHandler",
            {"instruction": "a"},
            "line 1: no column 'output' (GeneralInstructionHandler needs it); the record has instruction",
        ),
        ("GeneralInstructionHandler", {"instruction": "a", "output": 3}, "'output' holds int, not text"),
        ("BelleMultiTurnInstructionHandler", {"instruction": "Hello", "output": "a"}, "not with 'Human:'"),
        (
            "BelleMultiTurnInstructionHandler",
            {"instruction": "Human:a", "output": "a"},
            "has no 'Assistant:'",
        ),
        ("MOSSInstructionHandler", {"chat": []}, "holds list, not an object of turns"),
        ("MOSSMultiTurnHandler", {"chat": {"turn_1": {"Human": "a"}}}, "has no text 'MOSS'; it has Human"),
        (
            "ShareGPTHandler",
            {"conversations": [{"from": "dog", "value": "a"}]},
            "is from 'dog'; the role must be one of system",
        ),
        ("MessagesHandler", {"messages": "a"}, "is not a list of turns"),
        ("MessagesHandler", {"messages": [{"role": "assistant", "content": "a"}]}, "no chat template"),
    ],
)
def test_unsuitable_records_are_reported(
    tmp_path: Path, tokenizer_folder: Path, handler: str, record: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "out",
        "--handler-name", handler, "--tokenizer-name-or-path", tokenizer_folder, "--tokenizer-not-use-fast",
    )  # fmt: skip
    assert done.status == 1
    assert complaint in done.complaint
    assert not list(tmp_path.glob("out*"))


def test_options_without_effect_are_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_json_lines(tmp_path / "x.jsonl", ["the"])
    for flags, complaint in (
        (
            ["--handler-name", "AlpacaPretrainHandler", "--json-key", "text"],
            "has no effect: AlpacaPretrainHandler reads",
        ),
        (["--pack", "--seq-length", 8], "--pack needs a handler of samples"),
        (["--handler-name", "GeneralInstructionHandler", "--pack"], "--pack needs --seq-length"),
        (["--json-keys", "text", "text"], "names a column twice"),
    ):
        done = call(
            "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out",
            "--tokenizer-name-or-path", tokenizer_folder, *flags,
        )  # fmt: skip
        assert done.status == 2
        assert complaint in done.complaint
