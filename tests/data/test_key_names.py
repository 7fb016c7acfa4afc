"""Masks, media and the like under names that no table lists are refused by name; descriptions are counted."""

import random
from typing import Any

import pytest

from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import field_of
from support.records import TALK, counted, encoded
from support.tables import ReportTables

LEARN = ("train", "trainable", "training", "loss", "weight", "weights", "weighted", "learn", "learnable", "supervise",
         "supervised", "finetune", "grad", "gradient", "backprop")  # fmt: skip
LEAVE_OUT = ("masked", "ignore", "ignored", "skip", "skipped", "exclude")
LEADS = ("is", "do", "use for", "token", "message", "sample", "turn", "my", "in", "to be", "should")
ENDS = ("flag", "value", "on", "this", "me", "score", "message", "turn")
HARMLESS: tuple[tuple[str, Any], ...] = (
    ("training_source", "web"), ("train_split", "train"), ("loss_step", 7), ("learning_rate", 0.1), ("num_labels", 3),
    ("constraint", 1), ("glossary", [1]), ("is_lossless", True), ("trainer_id", 5), ("weight_kg", 80),
    ("difficulty", 3), ("score", 0.5), ("labelers", ["Ann", "Bo"]), ("label_name", "good"),
    ("training_args", {"lr": 1}),
    ("system_fingerprint", "fp_1"), ("image_count", 2), ("image_id", "a"), ("has_image", False),
    ("thinking_time", "3 s"),
    ("reasoning_tokens", 5), ("imagined", "x"), ("systematic", "x"), ("rethink", "x"), ("reasoning_level", "high"),
    ("strain", 0), ("maskotten", "x"), ("flossy", False), ("quality", 0), ("annotations", [0]), ("audio_len", 0),
)  # fmt: skip


def spelled(words: list[str], draw: random.Random) -> str:
    """Words as a name in one of the usual ways."""
    parts = [part for word in words for part in word.split()]
    way = draw.randrange(4)
    if way == 0:
        return "_".join(parts)
    if way == 1:
        return "-".join(parts)
    if way == 2:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    return "_".join(parts).upper()


def test_random_names_of_masks_are_refused_unless_they_say_what_holds(
    chat_tokenizer: Any, report: ReportTables
) -> None:
    draw = random.Random(4)
    tried, refused, differ = 0, 0, []
    for _ in range(400):
        leaves_out = draw.random() < 0.3
        stem = draw.choice(LEAVE_OUT if leaves_out else LEARN)
        words = [*([draw.choice(LEADS)] if draw.random() < 0.6 else []), stem]
        words += [draw.choice(ENDS)] if draw.random() < 0.4 else []
        negated = draw.random() < 0.2
        name = spelled([*(["not"] if negated else []), *words], draw)
        if field_of(name, "message") is not None or field_of(name, "record") is not None:
            continue
        number = draw.choice((0, 1, 0, 1, 0.5, 2))
        value = draw.choice((number, float(number), [number], [number, number], str(number)))
        value = bool(number) if number in (0, 1) and draw.random() < 0.5 else value
        learns = None if number not in (0, 1) else bool(number) ^ leaves_out ^ negated
        for role, record in (
            ("assistant", {"messages": [TALK[0], {**TALK[1], name: value}]}),
            ("user", {"messages": [{**TALK[0], name: value}, TALK[1]]}),
            ("record", {"messages": TALK[:2], name: value}),
        ):
            made = encoded(record, "MessagesHandler", chat_tokenizer)
            tried += 1
            fits = learns is (role != "user")
            is_right = (
                isinstance(made, DataError) and repr(name) in str(made) and "by its name" in str(made)
                if not fits
                else not isinstance(made, DataError) and any(name in key for key in made.unused_columns)
            )
            refused += isinstance(made, DataError)
            if not is_right:
                differ.append(f"{role} {name}={value!r}: {made}")
    header = ("keys", "refused", "judged wrongly")
    report.add("Masks under names that no table lists", header, tried, refused, len(differ))
    assert not differ, differ[:3]
    assert 300 < refused < tried - 200


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_descriptions_are_counted(chat_tokenizer: Any, name: str, value: Any) -> None:
    made = counted({"messages": TALK[:2], name: value}, "MessagesHandler", chat_tokenizer)
    assert made.unused_columns == {name: 1}
    made = counted({"messages": [TALK[0], {**TALK[1], name: value}]}, "MessagesHandler", chat_tokenizer)
    assert made.unused_columns == {f"message key {name!r}": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_on", "assistant"), ("mask_roles", ["user"]), ("loss_roles", ["assistant", "tool"]),
        ("training_spans", [{"start": 0, "end": 3}]), ("loss_weights", {"assistant": 1, "user": 0.5}), ("label", 0),
        ("is_masked", "true"), ("token_masks", [[0, 1], [1]]), ("skip_training", True), ("notrain", 1), ("isMasked", 1),
    ],
)  # fmt: skip
def test_masks_in_other_forms_are_refused(chat_tokenizer: Any, name: str, value: Any) -> None:
    record = {"messages": TALK[:2], name: value}
    assert f"column {name!r}" in str(encoded(record, "MessagesHandler", chat_tokenizer))
    record = {"messages": [TALK[0], {**TALK[1], name: value}]}
    assert f"message 2: key {name!r}" in str(encoded(record, "MessagesHandler", chat_tokenizer))
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", name: value}]}
    assert f"message 2: key {name!r}" in str(encoded(record, "ShareGPTHandler", chat_tokenizer))
    record = {"chat": {"turn_1": {"Human": "a", "MOSS": "b", name: value}}}
    assert repr(name) in str(encoded(record, "MOSSMultiTurnHandler", chat_tokenizer))
    part = {"type": "text", "text": "b", name: value}
    record = {"messages": [TALK[0], {"role": "assistant", "content": [part]}]}
    assert f"part 1 has {name!r}" in str(encoded(record, "MessagesHandler", chat_tokenizer))
    call = {"function": {"name": "f", "arguments": "{}", name: value}}
    for calls in ([call], [{"function": {"name": "f"}, name: value}]):
        record = {"messages": [TALK[0], {"role": "assistant", "content": "b", "tool_calls": calls}]}
        assert f"has the key {name!r}" in str(encoded(record, "MessagesHandler", chat_tokenizer))


def test_columns_that_say_what_holds_anyway_are_no_fault(chat_tokenizer: Any) -> None:
    neutral = {"train_on_inputs": False, "mask_history": False, "train_on_prompt": "false", "masked": False}
    plain = counted({"messages": TALK}, "MessagesHandler", chat_tokenizer)
    made = counted({"messages": TALK, **neutral}, "MessagesHandler", chat_tokenizer)
    assert made == plain
    for name in neutral:
        error = str(encoded({"messages": TALK, name: True}, "MessagesHandler", chat_tokenizer))
        assert f"column {name!r} says which part" in error
    talk = [{**TALK[0], "masked": True}, {**TALK[1], "masked": False, "ignore_loss": 0}]
    assert counted({"messages": talk}, "MessagesHandler", chat_tokenizer) == counted(
        {"messages": TALK[:2]}, "MessagesHandler", chat_tokenizer
    )
    for wrong in ([{**TALK[0], "masked": False}, TALK[1]], [TALK[0], {**TALK[1], "no_loss": 1}]):
        assert "says which part" in str(encoded({"messages": wrong}, "MessagesHandler", chat_tokenizer))


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("image_path", "x.png", "media"), ("imageFiles", ["x.png"], "media"), ("pixel_values", [[0.1]], "media"),
        ("video_b64", "aaa", "media"), ("systemPrompt", "be", "system"), ("sys_msg", "be", "system"),
        ("system_instructions", "be", "system"), ("sysprompt", "be", "system"), ("chain_of_thought", "hm", "thoughts"),
        ("reasoning_trace", "hm", "thoughts"), ("think", "hm", "thoughts"), ("cot", "hm", "thoughts"),
        ("thinking_blocks", [{"thinking": "hm"}], "thoughts"), ("reasoningContent", "hm", "'reasoning_content'"),
        ("tool-calls", [{"name": "f"}], "'tool_calls'"), ("toolCalls", [{"name": "f"}], "'tool_calls'"),
    ],
)  # fmt: skip
def test_content_under_other_names_is_refused(
    chat_tokenizer: Any, name: str, value: Any, complaint: str
) -> None:
    record = {"messages": TALK[:2], name: value}
    error = str(encoded(record, "MessagesHandler", chat_tokenizer))
    assert f"column {name!r}" in error
    assert complaint in error
    record = {"messages": [TALK[0], {**TALK[1], name: value}]}
    error = str(encoded(record, "MessagesHandler", chat_tokenizer))
    assert f"message 2: key {name!r}" in error
    assert complaint in error


def test_answers_under_other_roles_are_refused(chat_tokenizer: Any) -> None:
    for role in ("gpt", "model", "bot", "Assistant", "ASSISTANT", "AI"):
        record = {"messages": [*TALK[:2], {"role": "user", "content": "a"}, {"role": role, "content": "b"}]}
        error = str(encoded(record, "MessagesHandler", chat_tokenizer))
        assert f"message 4: an answer of the role {role!r} would not be learned" in error


def test_further_questions_of_alpaca_are_refused(chat_tokenizer: Any) -> None:
    record = {"instruction": "i", "input": "", "output": "o", "chosen": "a", "rejected": "b"}
    for handler in ("GeneralInstructionHandler", "AlpacaPairHandler"):
        for name in ("query", "context"):
            error = str(encoded({**record, name: "more"}, handler, chat_tokenizer))
            assert f"column {name!r} is part of the conversation" in error
