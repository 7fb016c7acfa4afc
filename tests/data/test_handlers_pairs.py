"""Pairs for preference tuning: what handlers make of each layout, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer import load_tokenizer
from support.commands import call
from support.corpus import make_texts

SYSTEM = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request. Please note that you need to think through your response "
    "logically and step by step."
)
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</assistant>{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] }}</{{ m['role'] }}>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK, GOOD, BAD = "who had been there", "all of the people", "not one of them"
END = "\0"
"""Stands in what is expected for the end-of-sequence id, after which text is tokenized anew."""
Talk = list[dict[str, str]]


def said(*texts: str) -> Talk:
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def preprocess(folder: Path, handler: str, records: list[Any], tokenizer: Path, *flags: object) -> Any:
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", folder / "out", "--handler-name", handler,
        "--tokenizer-name-or-path", tokenizer, "--overwrite", *flags,
    )  # fmt: skip


def made(folder: Path, handler: str, records: list[Any], tokenizer: Path, *flags: object) -> Dataset:
    done = preprocess(folder, handler, records, tokenizer, *flags)
    assert done.status == 0, done.stderr
    dataset = open_dataset(folder / "out")
    assert dataset.is_pairs
    assert call("asd-data", "verify", folder / "out").status == 0
    return dataset


def split(dataset: Dataset, tokenizer: Path, sample: int) -> tuple[str, str]:
    """Text of what is not learned and of what is; the end id, which must be there, is left out."""
    opened = load_tokenizer(tokenizer)
    ids, learned = dataset.ids[sample].tolist(), dataset.trained(sample).tolist()
    start = learned.index(True)
    assert all(learned[start:])
    assert ids[-1] == opened.eos_id
    whole = opened.decode(ids[:-1])
    prompt = opened.decode(ids[:start])
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :]


LAYOUTS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "text": (
        "TextPairHandler",
        {"prompt": f"Q: {ASK}\nA:", "chosen": f" {GOOD}", "rejected": f" {BAD}"},
        f"Q: {ASK}\nA:", f" {GOOD}", f" {BAD}",
    ),
    "hh": (
        "HHRLHFHandler",
        {k: f"\n\nHuman: the\n\nAssistant: of\n\nHuman: {ASK}\n\nAssistant: {a}"
         for k, a in (("chosen", GOOD), ("rejected", BAD))},
        f"\n\nHuman: the\n\nAssistant: of\n\nHuman: {ASK}\n\nAssistant:", f" {GOOD}", f" {BAD}",
    ),
    "hh that parts earlier": (
        "HHRLHFHandler",
        {"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}\n\nHuman: so\n\nAssistant: it is",
         "rejected": f"\n\nHuman: {ASK}\n\nAssistant: {BAD}"},
        f"\n\nHuman: {ASK}\n\nAssistant:", f" {GOOD}\n\nHuman: so\n\nAssistant: it is", f" {BAD}",
    ),
    "ranking": (
        "AlpacaPairHandler",
        {"instruction": ASK, "input": "there", "chosen": GOOD, "rejected": BAD, "history": [["the", "of"]]},
        f"\n{SYSTEM}\n### Instruction:\nthe\n### Response:\nof\n{END}### Instruction:\n{ASK}\nthere\n### Response:\n",
        f"{GOOD}\n", f"{BAD}\n",
    ),
    "comparison": (
        "AlpacaPairHandler",
        {"instruction": ASK, "input": "", "output": [GOOD, BAD]},
        f"\n{SYSTEM}\n### Instruction:\n{ASK}\n\n### Response:\n", f"{GOOD}\n", f"{BAD}\n",
    ),
    "ultrafeedback": (
        "MessagesPairHandler",
        {"prompt": "the", "chosen": said("the", "of", ASK, GOOD), "rejected": said("the", "of", ASK, BAD)},
        f"<user>the</user>\n<assistant>of</assistant>\n<user>{ASK}</user>\n<assistant>",
        f"{GOOD}</assistant>\n", f"{BAD}</assistant>\n",
    ),
    "prompt messages": (
        "MessagesPairHandler",
        {"prompt": said(ASK), "chosen": [{"role": "assistant", "content": GOOD}],
         "rejected": [{"role": "assistant", "content": BAD}]},
        f"<user>{ASK}</user>\n<assistant>", f"{GOOD}</assistant>\n", f"{BAD}</assistant>\n",
    ),
    "texts of a chat": (
        "MessagesPairHandler",
        {"prompt": ASK, "chosen": GOOD, "rejected": BAD},
        f"<user>{ASK}</user>\n<assistant>", f"{GOOD}</assistant>\n", f"{BAD}</assistant>\n",
    ),
    "sharegpt": (
        "ShareGPTPairHandler",
        {"system": "be", "conversations": [{"from": "human", "value": ASK}],
         "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
        f"<system>be</system>\n<user>{ASK}</user>\n<assistant>", f"{GOOD}</assistant>\n", f"{BAD}</assistant>\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_format_of_pairs_gives_the_expected_samples(
    tmp_path: Path, tokenizer_folder: Path, layout: str
) -> None:
    handler, record, prompt, chosen, rejected = LAYOUTS[layout]
    (tmp_path / "chat.jinja").write_text(CHAT)
    data = made(tmp_path, handler, [record], tokenizer_folder, "--chat-template", tmp_path / "chat.jinja")
    tokenizer = load_tokenizer(tokenizer_folder)

    def through_tokenizer(text: str) -> str:
        first, *more = text.split(END)
        ids = tokenizer.encode(first)
        for piece in more:
            ids = [*ids, tokenizer.eos_id or 0, *tokenizer.encode(piece)[len(tokenizer.prefix_ids) :]]
        return tokenizer.decode(ids)

    assert data.ids.documents.tolist() == [0, 2]
    assert [int((data.ids[n] == tokenizer.eos_id).sum()) for n in (0, 1)] == [1 + prompt.count(END)] * 2
    for sample, answer in enumerate((chosen, rejected)):
        before, learned = split(data, tokenizer_folder, sample)
        # Where a token lies across the edge it is learned, so the learned text may begin a little earlier.
        assert before + learned == through_tokenizer(prompt + answer)
        assert learned.lstrip(" \n>:").startswith(answer.lstrip(" \n"))
        assert through_tokenizer(prompt).startswith(before)


def test_marked_templates_train_the_last_answer_only(tmp_path: Path, tokenizer_folder: Path) -> None:
    handler, record, *_ = LAYOUTS["ultrafeedback"]
    labels = []
    for name, template in (("chat", CHAT), ("marked", MARKED)):
        (tmp_path / name).write_text(template)
        data = made(tmp_path, handler, [record], tokenizer_folder, "--chat-template", tmp_path / name)
        opened = load_tokenizer(tokenizer_folder)
        labels.append([
            opened.decode(data.ids[n][data.trained(n)].tolist()).strip() for n in (0, 1)
        ])  # fmt: skip
    assert labels[0] == labels[1]
    assert GOOD in labels[0][0]
    assert ASK not in labels[0][0]


def test_every_command_handles_pairs(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = make_texts(90, seed=3)
    records = [
        {"prompt": a + "\n", "chosen": b, "rejected": c}
        for a, b, c in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    ]
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    done = preprocess(tmp_path, "TextPairHandler", [*records, same], tokenizer_folder)
    assert done.status == 0, done.stderr
    assert "1 pairs with equal answers skipped" in done.stderr
    assert "30 documents" in done.stderr
    first = tmp_path / "out"
    manifest = open_dataset(first).manifest
    assert manifest is not None
    assert (manifest.kind, manifest.num_documents, manifest.num_sequences) == ("pairs", 30, 60)
    shown = json.loads(call("asd-data", "inspect", first, "--json", "--documents", 1).stdout)["documents"][0]
    assert shown["chosen"]["num_tokens"] == len(open_dataset(first).ids[0])
    assert shown["rejected"]["ids"] == open_dataset(first).ids[1].tolist()[:64]
    plain = call("asd-data", "inspect", first, "--tokenizer-name-or-path", tokenizer_folder).stdout
    assert "document 0, chosen (" in plain
    assert "document 0, rejected (" in plain
    merged = call("asd-data", "merge", first, first, "--output-prefix", tmp_path / "twice")
    assert merged.status == 0, merged.stderr
    twice = open_dataset(tmp_path / "twice")
    assert twice.is_pairs
    assert len(twice.ids.documents) == 61
    assert call("asd-data", "verify", tmp_path / "twice").status == 0
    from ascendspeed_core.config.training import DataConfig
    from ascendspeed_core.data.gpt_dataset import check_data

    prefix = str(open_dataset(first).prefixes["input_ids"])
    with pytest.raises(DataError, match="holds pairs with labels"):
        check_data(DataConfig(data_path=(prefix,), seq_length=8), (1, 0, 0))


def test_workers_do_not_change_the_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = make_texts(90, seed=3)
    records = [{"prompt": a, "chosen": b, "rejected": a} for a, b in pairwise(texts)]
    contents = []
    for workers, size in ((1, 4096), (2, 1)):
        flags = ("--workers", workers, "--shard-size", size)
        data = made(tmp_path, "TextPairHandler", records, tokenizer_folder, *flags)
        contents.append([
            p.with_name(p.name + end).read_bytes() for p in data.prefixes.values() for end in (".bin", ".idx")
        ])  # fmt: skip
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("handler", "record", "complaint"),
    [
        ("TextPairHandler", {"prompt": "a", "chosen": "b"}, "rejected"),
        ("HHRLHFHandler", {"chosen": "b", "rejected": "c"}, "does not contain '\\n\\nAssistant:'"),
        ("HHRLHFHandler", {"chosen": "x\n\nAssistant: b", "rejected": "y\n\nAssistant: c"}, "the same prompt"),
        ("AlpacaPairHandler", {"instruction": "a", "chosen": "b"}, "a pair needs both"),
        ("AlpacaPairHandler", {"instruction": "a", "output": ["b"]}, "no pair"),
        ("AlpacaPairHandler", {"instruction": "a", "output": ["b", "c"], "history": "d"}, "'history'"),
        ("MessagesPairHandler", {"chosen": "b", "rejected": "c"}, "'prompt' must be text or messages too"),
        ("MessagesPairHandler", {"chosen": [], "rejected": said("a", "b")}, "column 'chosen'"),
        ("MessagesPairHandler", {"prompt": "z", "chosen": said("a", "b"), "rejected": said("a", "c")}, "'prompt'"),
        ("MessagesPairHandler", {"chosen": said("a", "b"), "rejected": said("a")}, "no assistant message"),
        ("ShareGPTPairHandler", {"conversations": [{"from": "human", "value": "a"}], "chosen": "b",
                                 "rejected": "c"}, "turn 1"),
    ],
)  # fmt: skip
def test_records_without_a_pair_are_reported(
    tmp_path: Path, tokenizer_folder: Path, handler: str, record: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    flags = ("--chat-template", tmp_path / "chat.jinja")
    done = preprocess(tmp_path, handler, [record], tokenizer_folder, *flags)
    assert done.status == 1
    assert complaint in done.complaint
    assert "pairs.jsonl" in done.complaint


def test_pairs_are_not_packed(tmp_path: Path, tokenizer_folder: Path) -> None:
    record = {"prompt": "a", "chosen": "b", "rejected": "c"}
    flags = ("--pack", "--seq-length", 64)
    done = preprocess(tmp_path, "TextPairHandler", [record], tokenizer_folder, *flags)
    assert done.status == 2
    assert "leave --pack out" in done.complaint
