"""A `tokenizer.json` with tokens of the files beside it has the ids of transformers' fast tokenizer."""

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
