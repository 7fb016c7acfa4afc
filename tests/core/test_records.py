"""Runs that begin with records: their samples are those of `asd-data preprocess`, and what a chat feeds."""

from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.commands.records import config_with_records
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import AscendSpeedError, DataError
from ascendspeed_data.handlers import kind_of
from ascendspeed_data.handlers.detection import detected_handler
from ascendspeed_data.handlers.registry import BUILT_IN, find_handler
from ascendspeed_data.prompting import recorded_layout
from ascendspeed_data.tokenizer import load_tokenizer
from support.chat_templates import Draw, make_tokenizer, templates
from support.records import json_lines, run

QUESTIONS = [{"question": f"how {n}", "answer": f"so {n}"} for n in range(4)]
MAP = ("prompt=question,response=answer",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "model"
    tokenizer = make_tokenizer(path)
    tokenizer.chat_template = templates()["qwen3"][0]
    tokenizer.save_pretrained(path)
    return path


def config(folder: Path, tmp_path: Path, source: Path, kind: Any = FinetuneConfig, **more: Any) -> Any:
    given = {
        "load": folder,
        "save": tmp_path / "run",
        "data": (str(source),),
        "seq_length": 64,
        "train_iters": 1,
    }
    wanted: Any = "pairs" if kind is DpoConfig else "samples"
    return config_with_records(kind, None, {**given, **more}, wanted)


def arrays(prefix: Path) -> list[bytes]:
    names = [f"{prefix}_packed_{array}_document" for array in ("input_ids", "labels", "attention_mask")]
    return [Path(name + ending).read_bytes() for name in names for ending in (".bin", ".idx")]


def test_samples_are_those_of_preprocess_and_are_made_once(folder: Path, tmp_path: Path) -> None:
    source = json_lines(tmp_path / "x.jsonl", QUESTIONS)
    made = config(folder, tmp_path, source, columns=MAP)
    assert made.data.is_instruction_dataset
    (prefix,) = made.data.data_path
    assert Path(prefix).parent == tmp_path / "run-data"
    assert run(folder, tmp_path, "ResponseHandler", source, "--columns", MAP[0]).status == 0
    assert arrays(Path(prefix)) == arrays(tmp_path / "out")
    before = Path(f"{prefix}_packed_labels_document.bin").stat().st_mtime_ns
    assert config(folder, tmp_path, source, columns=MAP).data.data_path == (prefix,)
    assert Path(f"{prefix}_packed_labels_document.bin").stat().st_mtime_ns == before
    packed = config(folder, tmp_path, source, columns=MAP, pack=True).data.data_path
    json_lines(source, QUESTIONS[:3])
    changed = config(folder, tmp_path, source, columns=MAP).data.data_path
    assert len({packed, changed, (prefix,)}) == 3
    assert len(open_dataset(Path(changed[0])).ids) == 3


def test_training_ids_are_those_that_a_chat_feeds_at_each_turn(folder: Path, tmp_path: Path) -> None:
    """Conversations with tools and thoughts: each answer is learned after the prompt of a chat with these messages."""
    draw = Draw("chat")
    drawn = [draw.conversation("mixed") for _ in range(12)]
    source = json_lines(tmp_path / "x.jsonl", [one.record for one in drawn])
    dataset = open_dataset(Path(config(folder, tmp_path, source).data.data_path[0]))
    tokenizer = load_tokenizer(folder)
    assert dataset.manifest is not None
    layout = recorded_layout(dataset.manifest, tokenizer)
    assert layout is not None
    turns = 0
    for number, one in enumerate(drawn):
        begin, end = (int(edge) for edge in dataset.ids.documents[number : number + 2])
        samples = [
            (dataset.arrays["input_ids"][row].tolist(), dataset.arrays["labels"][row].tolist())
            for row in range(begin, end)
        ]
        with_tools = layout.with_tools(one.tools) if one.tools else layout
        for at, message in enumerate(one.messages):
            if message["role"] == "assistant":
                fed = with_tools.ids(one.messages[:at])
                found = [
                    labels for ids, labels in samples if ids[: len(fed)] == fed and labels[len(fed)] != -100
                ]
                assert len(found) == 1, one.record
                turns += 1
    assert turns > 20


def test_each_format_is_detected(folder: Path, tmp_path: Path) -> None:
    """Examples of the handlers that training on records can find by themselves."""
    found = {}
    for kind in BUILT_IN:
        handler: Any = find_handler(kind.name)
        if kind_of(handler) == "text":
            continue
        for wanted in ("samples", "pairs"):
            try:
                found.setdefault(detected_handler(handler.example, wanted), []).append(handler.name)  # type: ignore[arg-type]
            except DataError:
                continue
    plain = {name: names[0] for name, names in found.items()}
    assert plain == {name: name for name in plain}
    assert set(plain) >= {
        "MessagesHandler", "ShareGPTHandler", "GeneralInstructionHandler", "CompletionHandler", "ResponseHandler",
        "MessagesCompletionHandler", "AlpacaPairHandler", "MessagesPairHandler", "ShareGPTPairHandler",
        "TextPairHandler", "HHRLHFHandler",
    }  # fmt: skip


def test_pairs_go_to_dpo_and_not_to_finetune(folder: Path, tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    source = json_lines(tmp_path / "x.jsonl", [pair])
    assert len(open_dataset(Path(config(folder, tmp_path, source, DpoConfig).data.data_path[0])).ids) == 2
    with pytest.raises(AscendSpeedError, match="pairs of a chosen and a rejected answer; use asd-core dpo"):
        config(folder, tmp_path, source)
    with pytest.raises(
        AscendSpeedError, match="TextPairHandler makes pairs, and this command trains on samples"
    ):
        config(folder, tmp_path, source, handler_name="TextPairHandler")


@pytest.mark.parametrize(
    ("record", "more", "complaint"),
    [
        ({"a": "b"}, {}, r"the columns a fit no built-in handler of samples; map them by --columns"),
        ({"messages": [], "prompt": "a", "response": "b"}, {"handler_name": "Messages"}, "handler_name=Messages"),
        ({"prompt": "a", "response": "b"}, {"data_path": ("x",)}, "data and data_path were both given"),
        ({"prompt": "a", "response": "b"}, {"save": None}, "give --save"),
        ({"prompt": "a", "response": "b"}, {"data": ()}, "data_path is missing"),
        ({"prompt": "a", "response": "b"}, {"load": Path("nowhere")}, "has no tokenizer to read --data with"),
        (
            {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "response": "b"},
            {},
            "fit MessagesHandler and ResponseHandler; give --handler-name",
        ),
    ],
)  # fmt: skip
def test_records_that_cannot_be_trained_on_are_refused(
    folder: Path, tmp_path: Path, record: dict[str, Any], more: dict[str, Any], complaint: str
) -> None:
    source = json_lines(tmp_path / "x.jsonl", [record])
    with pytest.raises(AscendSpeedError, match=complaint):
        config(folder, tmp_path, source, **more)
