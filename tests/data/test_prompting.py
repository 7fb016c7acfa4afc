"""Prompts of a conversation are, id by id, what training data of the same conversation holds before its answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.manifest import load_manifest
from ascendspeed_data.prompting import LAYOUT_NAMES, layout_named, recorded_layout
from ascendspeed_data.tokenizer import load_tokenizer
from support.commands import call
from support.corpus import CHATML, make_chat_tokenizer

ASKED, ANSWERED, AGAIN, FINALLY = "the year it was", "all of them", "and who would", "not many people"
FIRST = [{"role": "user", "content": ASKED}]
SECOND = [*FIRST, {"role": "assistant", "content": ANSWERED}, {"role": "user", "content": AGAIN}]
MOSS = {
    "turn_1": {"Human": f"<|Human|>: {ASKED}<eoh>\n", "MOSS": f"<|MOSS|>: {ANSWERED}<eom>\n"},
    "turn_2": {"Human": f"<|Human|>: {AGAIN}<eoh>\n", "MOSS": f"<|MOSS|>: {FINALLY}<eom>\n"},
}
BELLE = {
    "instruction": f"Human:{ASKED}\nAssistant:{ANSWERED}\nHuman:{AGAIN}\nAssistant:",
    "output": FINALLY,
}
HH = f"\n\nHuman: {ASKED}\n\nAssistant: {ANSWERED}\n\nHuman: {AGAIN}\n\nAssistant:"
LEETCODE = {"code_with_problem": ASKED, "code_only": ANSWERED, "explanation_only": FINALLY}
WHOLE = [*SECOND, {"role": "assistant", "content": FINALLY}]

CASES: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "GeneralInstructionHandler": ({"instruction": ASKED, "input": "", "output": ANSWERED}, FIRST),
    "LeetcodePythonInstructionHandler": (LEETCODE, FIRST),
    "BelleMultiTurnInstructionHandler": (BELLE, SECOND),
    "BelleMultiTurnInstructionHandler2023": (BELLE, SECOND),
    "MOSSInstructionHandler": ({"chat": MOSS}, SECOND),
    "MOSSInstructionHandler2023": ({"chat": MOSS}, SECOND),
    "MOSSMultiTurnHandler": ({"chat": MOSS}, SECOND),
    "MOSSMultiTurnHandler2023": ({"chat": MOSS}, SECOND),
    "MessagesHandler": ({"messages": WHOLE}, SECOND),
    "MessagesPairHandler": ({"prompt": SECOND, "chosen": WHOLE[-1:], "rejected": WHOLE[1:2]}, SECOND),
    "AlpacaPairHandler": ({"instruction": ASKED, "chosen": ANSWERED, "rejected": FINALLY}, FIRST),
    "TextPairHandler": ({"prompt": ASKED, "chosen": ANSWERED, "rejected": FINALLY}, FIRST),
    "HHRLHFHandler": ({"chosen": HH + f" {FINALLY}", "rejected": HH + f" {ANSWERED}"}, SECOND),
}

ANSWERS = {
    "MessagesPairHandler": ANSWERED,
    "AlpacaPairHandler": FINALLY,
    "TextPairHandler": FINALLY,
    "HHRLHFHandler": ANSWERED,
}
"""Of pairs: the rejected answer, whose sample is the last."""


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    make_chat_tokenizer(folder)
    return folder


def trained(
    tmp_path: Path, handler: str, record: dict[str, Any], tokenizer: Path, *flags: object
) -> tuple[list[int], list[int], Any]:
    """Return ids and labels of the last sample of a pair or conversation, and the manifest."""
    (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n")
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "out",
        "--handler-name", handler, "--tokenizer-name-or-path", tokenizer, *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    made = open_dataset(tmp_path / "out")
    last = len(made.arrays["input_ids"]) - 1
    rows = [made.arrays[name][last].tolist() for name in ("input_ids", "labels")]
    manifest = load_manifest(tmp_path / "out_packed")
    assert manifest is not None
    return rows[0], rows[1], manifest


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("handler", CASES)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte level"])
def test_a_prompt_equals_the_training_ids_before_the_answer(
    tmp_path: Path, tokenizer_folder: Path, chat_folder: Path, kind: str, handler: str, append_eod: bool
) -> None:
    record, messages = CASES[handler]
    folder, flags = chat_folder, ["--append-eod"] if append_eod else []
    if kind == "sentencepiece":
        folder = tokenizer_folder
        (tmp_path / "inst.jinja").write_text(
            "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
        )
        if handler.startswith("Messages"):
            flags += ["--chat-template", str(tmp_path / "inst.jinja")]
    ids, labels, manifest = trained(tmp_path, handler, record, folder, *flags)
    tokenizer = load_tokenizer(folder)
    layout = recorded_layout(manifest, tokenizer)
    assert layout is not None
    prompt = layout.ids(messages)
    assert prompt == ids[: len(prompt)]
    assert labels[len(prompt) - 1] == -100 != labels[len(prompt)]
    answer = tokenizer.decode(ids[len(prompt) :]).strip()
    assert answer.startswith(ANSWERS.get(handler, FINALLY if messages is SECOND else ANSWERED))


def test_plain_text_has_no_prompt_layout(dataset: Path, tokenizer_folder: Path) -> None:
    manifest = load_manifest(dataset)
    assert manifest is not None
    assert recorded_layout(manifest, load_tokenizer(tokenizer_folder)) is None


def test_end_ids_and_stop_strings_end_an_answer(tokenizer_folder: Path, chat_folder: Path) -> None:
    chat = load_tokenizer(chat_folder)
    assert layout_named("tokenizer", chat).end_ids == (chat.special_ids["<|im_end|>"],)
    assert layout_named("baichuan2", chat).end_ids == (195,)
    assert layout_named("hh-rlhf", chat).stop == ("\n\nHuman:",)
    assert layout_named("instruction", chat).stop == ()


def test_layouts_are_found_by_name(tmp_path: Path, tokenizer_folder: Path, chat_folder: Path) -> None:
    chat = load_tokenizer(chat_folder)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert layout_named(str(tmp_path / "chatml.jinja"), chat).ids(SECOND) == layout_named(
        "tokenizer", chat
    ).ids(SECOND)
    assert layout_named("plain", chat).ids(FIRST) == chat.encode(ASKED)
    for name in LAYOUT_NAMES:
        assert layout_named(name, chat).ids(FIRST)
    with pytest.raises(AscendSpeedError, match="did you mean instruction"):
        layout_named("instructions", chat)
    with pytest.raises(AscendSpeedError, match="has no chat template"):
        layout_named("tokenizer", load_tokenizer(tokenizer_folder))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    with pytest.raises(AscendSpeedError, match="not valid"):
        layout_named(str(tmp_path / "bad.jinja"), chat)


@pytest.mark.parametrize("name", ["instruction", "baichuan2", "hh-rlhf", "plain"])
def test_layouts_without_system_messages_refuse_them(chat_folder: Path, name: str) -> None:
    layout = layout_named(name, load_tokenizer(chat_folder))
    with pytest.raises(AscendSpeedError, match="no place for a system message"):
        layout.ids([{"role": "system", "content": "Be kind."}, *FIRST])
    with pytest.raises(AscendSpeedError, match="messages must alternate"):
        layout.ids([*FIRST, *FIRST])
