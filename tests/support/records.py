"""Small records, what handlers make of them, and a template to show it."""

import json
from pathlib import Path
from typing import Any

from ascendspeed_data.encoding import Counts, ShardEncoder
from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.handlers import SampleHandler, find_handler
from ascendspeed_data.reading.shards import Shard
from support.commands import Finished, call

PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}" + PROMPT
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def handler(name: str) -> SampleHandler:
    found = find_handler(name)
    assert isinstance(found, SampleHandler)
    return found


def run(folder: Path, tmp_path: Path, name: str, source: Path, *flags: object) -> Finished:
    return call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--handler-name", name,
        "--tokenizer-name-or-path", folder, "--overwrite", *flags,
    )  # fmt: skip


def json_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def learned_of(name: str, record: Any, tokenizer: Any) -> str:
    samples = handler(name).samples(record, tokenizer)
    return "".join(str(s.content) for sample in samples for s in sample.segments if s.trained)


def shown_of(name: str, record: Any, tokenizer: Any) -> str:
    samples = handler(name).samples(record, tokenizer)
    return "".join(str(s.content or "") for sample in samples for s in sample.segments)


def encoded(record: dict[str, Any], name: str, tokenizer: Any) -> Counts | DataError:
    """What the encoder of records makes of one record: its counts, or the error."""
    encoder = ShardEncoder(find_handler(name), ("text",), True, tokenizer, ExactEncoder(tokenizer))
    try:
        made = encoder.encode(Shard(0, Path("x.jsonl"), 0, 1, [json.loads(json.dumps(record))]))
    except DataError as error:
        assert "x.jsonl, record 1: " in str(error)
        return error
    return next(iter(made.values())).counts


def counted(record: dict[str, Any], name: str, tokenizer: Any) -> Counts:
    """The counts of a record that is no error."""
    made = encoded(record, name, tokenizer)
    assert isinstance(made, Counts), (name, record, made)
    return made


def encoded_samples(
    name: str, tokenizer: Any, records: list[dict[str, Any]], parse_special: bool = False
) -> tuple[list[tuple[list[int], list[int]]], Counts]:
    """Ids and labels of each sample that the encoder of records makes, and its counts."""
    encoder = ShardEncoder(
        find_handler(name), ("text",), True, tokenizer, ExactEncoder(tokenizer), parse_special
    )
    made = encoder.encode(Shard(0, Path("x.jsonl"), 0, 1, json.loads(json.dumps(records))))[""]
    ends = made.lengths.cumsum()
    ids, labels = made.arrays["input_ids"], made.arrays["labels"]
    rows = [
        (ids[end - length : end].tolist(), labels[end - length : end].tolist())
        for end, length in zip(ends, made.lengths, strict=True)
    ]
    return rows, made.counts
