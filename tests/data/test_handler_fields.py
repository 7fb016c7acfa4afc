"""Records with more in them than a handler reads: every key is honoured, refused by name, or counted."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import FIELDS, LEARNED, MESSAGE_CONTENT, field_of, filled
from ascendspeed_data.handlers import all_handlers
from ascendspeed_data.manifest import read_manifest
from support.commands import call
from support.records import (
    PLAIN,
    TALK,
    counted,
    encoded,
    json_lines,
    learned_of,
    run,
    shown_of,
)
from support.tables import ReportTables

FILLED: tuple[Any, ...] = ("text", 2, 0.5, ["a"], {"a": 1}, 0, False)
EMPTY: tuple[Any, ...] = (None, "", [], {})
SAY_NO_IF_FALSE = ("masked", "mask_loss", "ignore", "ignored", "ignore_loss", "skip", "no_loss", "no_train")
NEUTRAL_COLUMNS = ("train_on_input", "train_on_inputs", "train_on_prompt", "mask_history", "masked")
HANDLERS_PAGE = Path(__file__).parents[2] / "docs" / "handlers.md"
COLUMNS: dict[str, Any] = {
    "system": "zebra",
    "history": [["zebra", "zebra"]],
    "tools": [{"name": "zebra"}],
    "weight": 0,
    "images": ["zebra"],
    "id": "zebra",
}


@pytest.mark.parametrize("key", LEARNED.names)
def test_every_spelling_of_a_weight_masks(chat_tokenizer: Any, key: str) -> None:
    for off, on in ((0, 1), (0.0, 1.0), (False, True)):
        talk = [dict(m) for m in TALK]
        talk[1][key], talk[3][key], talk[0][key] = off, on, off
        assert learned_of("MessagesHandler", {"messages": talk}, chat_tokenizer) == "four<|im_end|>"
        shared = [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"], key: m.get(key)}
            for m in talk
        ]
        assert learned_of("ShareGPTHandler", {"conversations": shared}, chat_tokenizer) == "four<|im_end|>"
    for value in (0.5, 2, -1, "1", [1], float("nan")):
        with pytest.raises(DataError, match=rf"message 2: key '{key}' is .*only 0 and 1"):
            learned_of("MessagesHandler", {"messages": [TALK[0], {**TALK[1], key: value}]}, chat_tokenizer)
    with pytest.raises(DataError, match=rf"message 1: key '{key}' is 1 for the role 'user'"):
        learned_of("MessagesHandler", {"messages": [{**TALK[0], key: 1}, TALK[1]]}, chat_tokenizer)
    with pytest.raises(DataError, match="contradict"):
        more = {key: 1, next(name for name in LEARNED.names if name != key): 0}
        learned_of("MessagesHandler", {"messages": [TALK[0], {**TALK[1], **more}]}, chat_tokenizer)


def test_conversations_whose_answers_all_have_weight_0_are_skipped_and_counted(
    byte_level_folder: Path, tmp_path: Path
) -> None:
    masked = [m | {"weight": 0} if m["role"] == "assistant" else m for m in TALK]
    source = json_lines(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": masked}])
    done = run(byte_level_folder, tmp_path, "MessagesHandler", source)
    assert done.status == 0, done.stderr
    assert "1 records with nothing to learn skipped" in done.stderr
    done = run(
        byte_level_folder,
        tmp_path,
        "MessagesHandler",
        json_lines(tmp_path / "x.jsonl", [{"messages": masked}]),
    )
    assert done.status == 1
    assert "something to learn" in done.complaint


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.level}-{field.names[0]}")
def test_filled_keys_that_are_not_honoured_are_refused_by_name(
    chat_tokenizer: Any, field: Any, report: ReportTables
) -> None:
    tried = 0
    for name in field.names:
        for value in (*FILLED, *EMPTY):
            in_message = field.level == "message"
            if in_message and name == "content":
                continue
            record: dict[str, Any] = {
                "messages": [TALK[0], {**TALK[1], name: value}] if in_message else TALK[:2]
            }
            record |= {} if in_message else {name: value}
            made = encoded(record, "MessagesHandler", chat_tokenizer)
            neutral = (
                field_of(name, field.level) is LEARNED and isinstance(value, int | float) and value in (0, 1)
            )
            neutral |= field is MESSAGE_CONTENT and value is False
            neutral |= name == "label" and isinstance(value, str)
            neutral |= name == "system" and isinstance(value, str)
            neutral |= value in (0, False) and name in (SAY_NO_IF_FALSE if in_message else NEUTRAL_COLUMNS)
            tried += 1
            if not filled(value) or neutral:
                assert not isinstance(made, DataError), (name, value, made)
            else:
                assert isinstance(made, DataError), (name, value)
                assert name in str(made), (name, value, made)
    report.add(
        "Keys that change what is learned, filled and empty", ("keys", "values tried"), field.names[0], tried
    )


def test_no_handler_drops_a_column_without_a_word(chat_tokenizer: Any, report: ReportTables) -> None:
    """Each handler with its example, each known column and unknown ones: used, refused by name or counted."""
    draw = random.Random(6)
    values = ("zebra", ["zebra"], {"zebra": 1}, 0)
    chat_tokenizer.chat_template = PLAIN
    names = [name for field in FIELDS if field.level == "record" for name in field.names]
    names += ["id", "source", "meta_instruction", "score_chosen", "prompt_id", "text_2"]
    outcomes = {"used": 0, "refused": 0, "counted": 0, "say what holds": 0}
    for found, _ in all_handlers():
        example = dict(getattr(found, "example", {}))
        before = counted(example, found.name, chat_tokenizer)
        assert before.unused_columns == {}
        for name in dict.fromkeys(names):
            if name in example:
                continue
            value = draw.choice(values)
            made = encoded({**example, name: value}, found.name, chat_tokenizer)
            if isinstance(made, DataError):
                assert name in str(made), (found.name, name, value, made)
                outcomes["refused"] += 1
            elif name in made.unused_columns:
                outcomes["counted"] += 1
            elif name in NEUTRAL_COLUMNS and value == 0:
                outcomes["say what holds"] += 1
            else:
                assert made.num_text_bytes != before.num_text_bytes, (found.name, name, value)
                outcomes["used"] += 1
    header = ("used", "refused by name", "counted and named", "say what holds anyway")
    report.add("Columns that handlers do not need", header, *outcomes.values())
    assert outcomes["refused"] > 100, outcomes
    assert outcomes["counted"] > 100, outcomes


def test_keys_that_have_no_effect_are_counted(byte_level_folder: Path, tmp_path: Path) -> None:
    records = [
        {"messages": [{**m, "timestamp": n} for m in TALK], "id": n, "source": "" if n % 2 else "web"}
        for n in range(10)
    ]
    source = json_lines(tmp_path / "x.jsonl", records)
    # Shards of 1 KiB, so that counts of several are added.
    done = run(byte_level_folder, tmp_path, "MessagesHandler", source, "--shard-size", 1)
    assert done.status == 0, done.stderr
    line = "not used: id (10 records), source (5 records), message key 'timestamp' (10 records)"
    assert line in done.stderr
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest is not None
    assert manifest.unused_columns == {"id": 10, "source": 5, "message key 'timestamp'": 10}
    merged = call(
        "asd-data", "merge", tmp_path / "out", tmp_path / "out", "--output-prefix", tmp_path / "twice"
    )
    assert merged.status == 0, merged.stderr
    assert read_manifest(tmp_path / "twice_packed.manifest.json").unused_columns["id"] == 20


def test_text_names_columns_that_are_not_learned(byte_level_folder: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"text": "one two", "url": "a", "weight": 0.5}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    for source in (json_lines(tmp_path / "x.jsonl", records), tmp_path / "x.parquet"):
        done = run(byte_level_folder, tmp_path, "GeneralPretrainHandler", source)
        assert done.status == 0, done.stderr
        assert "not used: url (3 records), weight (3 records)" in done.stderr


def test_moss_names_what_its_rule_leaves_out(chat_tokenizer: Any) -> None:
    turn = {
        "Human": "<|Human|>: a <eoh>\n",
        "Inner Thoughts": "t",
        "Commands": "c",
        "Tool Responses": "r",
        "MOSS": "b",
    }
    for name in ("MOSSInstructionHandler", "MOSSMultiTurnHandler", "MOSSMultiTurnHandler2023"):
        counts = counted(
            {"meta_instruction": "m", "chat": {"turn_1": turn, "turn_2": turn}}, name, chat_tokenizer
        )
        keys = ("Inner Thoughts", "Commands", "Tool Responses")
        assert counts.unused_columns == {"meta_instruction": 1} | {f"key {key!r} of turns": 1 for key in keys}
        error = encoded({"chat": {"turn_1": {**turn, "weight": 0}}}, name, chat_tokenizer)
        assert "turn_1 of column 'chat': key 'weight'" in str(error)


def test_alpaca_learns_history_under_its_system_text(chat_tokenizer: Any) -> None:
    record = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]], "system": "be brief"}
    shown = shown_of("GeneralInstructionHandler", record, chat_tokenizer)
    assert shown == (
        "\nbe brief\n### Instruction:\na\n### Response:\nb\n### Instruction:\nc\n\n### Response:\nd\n"
    )
    assert learned_of("GeneralInstructionHandler", record, chat_tokenizer) == "b\nNoned\nNone"
    pair = {**record, "chosen": "d", "rejected": "e"}
    assert learned_of("AlpacaPairHandler", pair, chat_tokenizer) == "d\nNonee\nNone"
    assert shown_of("AlpacaPairHandler", pair, chat_tokenizer).startswith("\nbe brief\n### Instruction:\na\n")
    as_text = {**record, "history": json.dumps(record["history"])}
    assert shown_of("GeneralInstructionHandler", as_text, chat_tokenizer) == shown
    for wrong in ("a", [["a"]], [["a", 1]], {"a": "b"}, "[1]"):
        with pytest.raises(DataError, match="'history'"):
            shown_of("GeneralInstructionHandler", {**record, "history": wrong}, chat_tokenizer)


def test_system_column_is_the_first_message(chat_tokenizer: Any) -> None:
    for name, record in (
        ("MessagesHandler", {"messages": TALK[:2]}),
        (
            "ShareGPTHandler",
            {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        ),
    ):
        assert shown_of(name, {**record, "system": "be"}, chat_tokenizer).startswith(
            "<system>be<|im_end|><user>one"
        )
    both = {"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"}
    with pytest.raises(DataError, match="'system' is filled, and the conversation has a system message too"):
        shown_of("MessagesHandler", both, chat_tokenizer)


def outcome(name: str, found: Any, tokenizer: Any) -> str:
    """What a handler does with a filled column."""
    example = dict(found.example)
    made = encoded({**example, name: COLUMNS[name]}, found.name, tokenizer)
    if isinstance(made, DataError):
        return "refused"
    if name in made.unused_columns:
        return "counted"
    assert made.num_text_bytes != counted(example, found.name, tokenizer).num_text_bytes
    return "used"


def test_the_page_says_what_becomes_of_each_key(chat_tokenizer: Any) -> None:
    """The tables of docs/handlers.md are those of the code; a difference prints the right ones."""
    chat_tokenizer.chat_template = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + PLAIN
    keys = ["| of | keys | |", "|---|---|---|"]
    keys += [
        f"| {field.level} | {', '.join(f'`{name}`' for name in field.names)} | {field.use} |"
        for field in FIELDS
    ]
    rows: dict[tuple[str, ...], list[str]] = {}
    for found, origin in all_handlers():
        if origin == "built in" and not found.name.endswith("2023"):
            rows.setdefault(tuple(outcome(name, found, chat_tokenizer) for name in COLUMNS), []).append(
                f"`{found.name}`"
            )
    columns = [
        f"| handlers | {' | '.join(f'`{name}`' for name in COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    columns += [f"| {', '.join(names)} | {' | '.join(outcomes)} |" for outcomes, names in rows.items()]
    page = HANDLERS_PAGE.read_text()
    for table in ("\n".join(keys), "\n".join(columns)):
        assert table in page, table
