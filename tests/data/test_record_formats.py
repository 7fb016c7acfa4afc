"""The same records in every file format give the same samples."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer import load_tokenizer
from support.records import (
    TALK,
    json_lines,
    learned_of,
    run,
)


def column_formats(folder: Path, records: list[dict[str, Any]]) -> list[Path]:
    """The records as JSON lines, Parquet, Arrow, and CSV with JSON text in its cells."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    with (
        pyarrow.OSFile(str(folder / "x.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table)
    with (folder / "x.csv").open("w", newline="") as cells:
        writer = csv.DictWriter(cells, list(table.column_names))
        writer.writeheader()
        for record in records:
            writer.writerow({
                name: value if isinstance(value, str) or value is None else json.dumps(value)
                for name, value in record.items()
            })  # fmt: skip
    return [
        json_lines(folder / "x.jsonl", records),
        *(folder / f"x.{end}" for end in ("parquet", "arrow", "csv")),
    ]


def ids_of(prefix: Path) -> list[tuple[list[int], list[int]]]:
    made = open_dataset(prefix)
    ids, labels = made.arrays["input_ids"], made.arrays["labels"]
    return [(ids[n].tolist(), labels[n].tolist()) for n in range(len(ids))]


def test_every_file_format_gives_the_same_samples(byte_level_folder: Path, tmp_path: Path) -> None:
    """What Parquet, Arrow and CSV add (null keys, empty cells) is not learned."""
    (tmp_path / "chat.jinja").write_text(
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ m.content }}{{ m.name }}<|im_end|>{% endfor %}"
    )
    draw = random.Random(5)
    records: list[dict[str, Any]] = []
    for number in range(12):
        talk: list[dict[str, Any]] = [dict(TALK[0])]
        if number % 2:
            arguments = {draw.choice(("city", "unit", "day")): draw.choice(("a", "b"))}
            talk += [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
                },
                {"role": "tool", "content": "3", "name": "f"},
            ]
        talk.append(
            {"role": "assistant", "content": "x", **({"weight": draw.randrange(2)} if number % 3 else {})}
        )
        talk.append({"role": "assistant", "content": "y"})
        record: dict[str, Any] = {"messages": talk, "system": draw.choice(("", "be"))}
        if number % 4:
            properties = {draw.choice(("city", "unit")): {"type": "string"}}
            record["tools"] = [{"name": "f", "parameters": {"properties": properties}}]
        records.append(record)
    records[0] |= {"tools": []}
    rows = []
    for source in column_formats(tmp_path, records):
        done = run(
            byte_level_folder, tmp_path, "MessagesHandler", source, "--chat-template", tmp_path / "chat.jinja"
        )
        assert done.status == 0, (source, done.stderr)
        rows.append(ids_of(tmp_path / "out"))
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert len(rows[0]) == 12


def test_turns_in_an_object_of_lists_are_a_list(chat_tokenizer: Any) -> None:
    columns = {key: [m[key] for m in TALK] for key in ("role", "content")} | {"weight": [None, 0, None, None]}
    assert learned_of("MessagesHandler", {"messages": columns}, chat_tokenizer) == "four<|im_end|>"
    with pytest.raises(DataError, match="different lengths"):
        learned_of("MessagesHandler", {"messages": {"role": ["user"], "content": []}}, chat_tokenizer)


def test_maps_of_arrow_are_objects(byte_level_folder: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    function = pyarrow.struct(
        [("name", pyarrow.string()), ("arguments", pyarrow.map_(pyarrow.string(), pyarrow.string()))]
    )
    message = pyarrow.struct([
        ("role", pyarrow.string()), ("content", pyarrow.string()),
        ("tool_calls", pyarrow.list_(pyarrow.struct([("function", function)]))),
    ])  # fmt: skip
    talk = [
        {"role": "user", "content": "a", "tool_calls": None},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": [("city", "Oslo")]}}],
        },
    ]
    table = pyarrow.table({"messages": pyarrow.array([talk], pyarrow.list_(message))})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "chat.jinja").write_text(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    done = run(
        byte_level_folder,
        tmp_path,
        "MessagesHandler",
        tmp_path / "x.parquet",
        "--chat-template",
        tmp_path / "chat.jinja",
    )
    assert done.status == 0, done.stderr
    assert 'f{"city": "Oslo"}' in load_tokenizer(byte_level_folder).decode(ids_of(tmp_path / "out")[0][0])
