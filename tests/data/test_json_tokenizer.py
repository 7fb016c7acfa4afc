"""A `tokenizer.json` with tokens of the files beside it has the ids of transformers' fast tokenizer."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer import load_tokenizer
from support.corpus import make_texts
from support.tables import ReportTables
from support.token_files import CONTENTS, draw_text

SIZE = 400


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        make_texts(), trainers.BpeTrainer(vocab_size=SIZE, special_tokens=["<unk>", "<s>", "</s>"])
    )
    return str(made.to_str())


def draw_files(draw: random.Random, folder: Path, content: str) -> list[str]:
    """Write `tokenizer.json` and the other files, with some of the tokens that they may add."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(content)
    size = max(json.loads(content)["model"]["vocab"].values()) + 1
    contents = draw.sample(CONTENTS, draw.randint(1, 5))
    vocabulary = json.loads(content)["model"]["vocab"]
    new = [token for token in contents if token not in vocabulary]
    ids = {token: size + number for number, token in enumerate(new)}
    ids |= {token: vocabulary[token] for token in contents if token in vocabulary}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    style = draw.choice(("decoder", "added", "map"))
    if style == "decoder":
        config["added_tokens_decoder"] = {
            str(number): {
                "content": token,
                **{key: draw.random() < 0.25 for key in ("lstrip", "rstrip", "single_word", "normalized")},
                "special": draw.random() < 0.5,
            }
            for token, number in ids.items()
        }
        if draw.random() < 0.5:
            config["eos_token"] = draw.choice(contents)
    elif style == "added":
        (folder / "added_tokens.json").write_text(json.dumps(ids))
    else:
        (folder / "special_tokens_map.json").write_text(
            json.dumps({"eos_token": "</s>", "additional_special_tokens": contents})
        )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return contents


@pytest.mark.parametrize(
    ("folders", "num_texts"), [(60, 20), pytest.param(2000, 50, marks=pytest.mark.nightly)]
)
def test_ids_equal_the_fast_tokenizer(
    tmp_path: Path, tokenizer_json: str, report: ReportTables, folders: int, num_texts: int
) -> None:
    wrong: list[object] = []
    for seed in range(folders):
        draw = random.Random(seed)
        contents = draw_files(draw, tmp_path / str(seed), tokenizer_json)
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / str(seed))
        ours = load_tokenizer(tmp_path / str(seed))
        if (ours.vocab_size, ours.eos_id) != (len(theirs), theirs.eos_token_id):
            wrong.append((seed, ours.vocab_size, ours.eos_id))
        for _ in range(num_texts):
            text = draw_text(draw, contents)
            wanted = theirs(text, add_special_tokens=False).input_ids
            if (
                ours.encode(text, add_special_tokens=False) != wanted
                or ours.encode_rendered(text)[0] != wanted
            ):
                wrong.append((seed, text))
    report.add(
        "tokens beside tokenizer.json, against transformers' fast tokenizer",
        ("folders", "texts", "disagreements"),
        folders, folders * num_texts, len(wrong),
    )  # fmt: skip
    assert wrong == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"added_tokens.json": {"<x>": 9000}}, "'<x>' is id 9000 in the files beside tokenizer.json, which makes it"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"7": {"content": "</s>"}}}},
            "'</s>' is id 7 in the files beside tokenizer.json, which makes it 2",
        ),
        ({"tokenizer_config.json": {"eos_token": 7}}, "eos_token"),
        ({"tokenizer_config.json": {"eos_token": ""}}, "eos_token is empty"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(
    tmp_path: Path, tokenizer_json: str, files: dict[str, Any], complaint: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=complaint):
        load_tokenizer(tmp_path)


def test_the_fingerprint_changes_with_added_tokens_only(tmp_path: Path, tokenizer_json: str) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    alone = load_tokenizer(tmp_path)
    declared = {
        str(number): {"content": token, "special": True} for token, number in alone.special_ids.items()
    }
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": declared}))
    assert load_tokenizer(tmp_path).fingerprint == alone.fingerprint
    declared[str(alone.vocab_size)] = {"content": "<x>", "special": True}
    config.write_text(json.dumps({"eos_token": "<x>", "added_tokens_decoder": declared}))
    assert load_tokenizer(tmp_path).fingerprint != alone.fingerprint


@pytest.mark.parametrize("post_processor", [None, "BOS", "EOS", "both"])
def test_what_begins_and_ends_a_text(
    tmp_path: Path, tokenizer_json: str, report: ReportTables, post_processor: str | None
) -> None:
    """A config may repeat what `tokenizer.json` does, and is refused by name if it says something else.

    transformers 5 gives the ids of `tokenizer.json`, transformers 4 those of the config.
    """
    content = json.loads(tokenizer_json)
    adds_bos, adds_eos = post_processor in ("BOS", "both"), post_processor in ("EOS", "both")
    pieces = [*(["<s>"] * adds_bos), None, *(["</s>"] * adds_eos)]
    template = [
        {"SpecialToken": {"id": piece, "type_id": 0}} if piece else {"Sequence": {"id": "A", "type_id": 0}}
        for piece in pieces
    ]
    ids = {"<s>": 1, "</s>": 2}
    content["post_processor"] = post_processor and {
        "type": "TemplateProcessing", "single": template, "pair": [*template, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {piece: {"id": piece, "ids": [ids[piece]], "tokens": [piece]} for piece in pieces if piece},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tried = refused = 0
    stated = (None, True, False)
    for bos, eos, space in itertools.product(stated, stated, stated):
        says = {"add_bos_token": bos, "add_eos_token": eos, "add_prefix_space": space}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        config |= {key: value for key, value in says.items() if value is not None}  # type: ignore[misc]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        does = {"add_bos_token": adds_bos, "add_eos_token": adds_eos, "add_prefix_space": False}
        contradictions = [key for key, value in says.items() if value is not None and value != does[key]]
        tried += 1
        if contradictions:
            refused += 1
            with pytest.raises(DataError, match=f"{contradictions[0]}=.* correct one of them"):
                load_tokenizer(tmp_path)
            continue
        theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert load_tokenizer(tmp_path).encode("the other man") == theirs("the other man").input_ids
    report.add(
        "configs beside tokenizer.json that say what begins and ends a text",
        ("post-processor", "configs", "refused by name", "disagreements with transformers"),
        post_processor or "none", tried, refused, 0,
    )  # fmt: skip
    assert refused == tried - 8


@pytest.mark.parametrize(
    ("part", "scheme", "adds"),
    [
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}, False),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}, True),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}, True),
        (
            "pre_tokenizer",
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
                ],
            },
            True,
        ),
    ],
)
def test_where_a_space_may_be_added(
    tmp_path: Path, tokenizer_json: str, part: str, scheme: dict[str, Any], adds: bool
) -> None:
    content = json.loads(tokenizer_json) | {"pre_tokenizer": None, part: scheme}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": adds}))
    load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": not adds}))
    with pytest.raises(DataError, match="add_prefix_space"):
        load_tokenizer(tmp_path)


def test_ids_that_are_drawn_at_random_are_refused(tmp_path: Path, tokenizer_json: str) -> None:
    content = json.loads(tokenizer_json)
    content["model"]["dropout"] = 0.0
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode("the day") == PreTrainedTokenizerFast.from_pretrained(
        tmp_path
    ).encode("the day")
    content["model"]["dropout"] = 0.3
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"model\.dropout=0\.3 .*set it to null"):
        load_tokenizer(tmp_path)
