"""Ids are those of the library that owns the format."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.json_tokenizer import JsonTokenizer
from ascendspeed_data.sentencepiece_tokenizer import SentencePieceTokenizer
from ascendspeed_data.tokenizer import copy_tokenizer, load_tokenizer
from support.corpus import make_texts
from support.shared_data import TOKENIZERS, needs_shared_data

TRICKY = [
    "Hello world",
    " leading",
    "  two leading",
    "trailing ",
    "a  b   c",
    "line\nline\n\n  indented\n\ttab",
    "1234567890 3.14",
    "Zürich café naïve",
    "中文字符，全角标点。",
    "🙂🏳️‍🌈",
    "<s> </s> <unk>",
    "▁ lower one eighth block",
    "e\u0301 combining",
    "\u00a0no-break\u3000ideographic",
    "",
]


@needs_shared_data
@pytest.mark.parametrize("name", ["llama", "internlm", "baichuan-7b", "tok512"])
def test_ids_equal_sentencepiece_on_published_models(name: str) -> None:
    (file,) = (TOKENIZERS / name).glob("*.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = load_tokenizer(file)
    texts = [*TRICKY, *make_texts(50)]
    assert ours.encode_batch(texts) == [reference.encode(text) for text in texts]
    assert [ours.encode(text) for text in texts] == ours.encode_batch(texts)
    assert [ours.decode(ids) for ids in ours.encode_batch(texts)] == [
        reference.decode(reference.encode(text)) for text in texts
    ]
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.unk_id) == (
        reference.vocab_size(), reference.bos_id(), reference.eos_id(), reference.unk_id(),
    )  # fmt: skip


def test_transformers_reads_a_trained_folder(tokenizer_folder: Path) -> None:
    ours = load_tokenizer(tokenizer_folder)
    theirs = AutoTokenizer.from_pretrained(tokenizer_folder)
    # Doubled and leading spaces are left out: transformers' conversion splits them differently from SentencePiece.
    for text in make_texts(40):
        plain = " ".join(text.split())
        assert ours.encode(plain) == theirs(plain).input_ids
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (1, 2, 0)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert ours.decode(ours.encode("the café 中文")) == "the café 中文"


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(
        make_texts(), trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"])
    )
    made.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>"},
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_ids_of_tokenizer_json_equal_transformers(json_folder: Path) -> None:
    ours, theirs = load_tokenizer(json_folder), AutoTokenizer.from_pretrained(json_folder)
    assert isinstance(ours, JsonTokenizer)
    assert ours.encode_batch(TRICKY) == [theirs(text).input_ids for text in TRICKY]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, len(theirs))


def test_tokenizer_json_is_used_if_both_files_exist(json_folder: Path, tokenizer_folder: Path) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", json_folder)
    assert load_tokenizer(json_folder).kind == "tokenizer.json"


def test_code_next_to_a_tokenizer_never_runs(tokenizer_folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(tokenizer_folder, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    assert not (tmp_path / "ran").exists()


def test_the_fingerprint_changes_with_the_ids_only(tokenizer_folder: Path, tmp_path: Path) -> None:
    original = load_tokenizer(tokenizer_folder).fingerprint
    copy_tokenizer(tokenizer_folder, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == original
    config_file = tmp_path / "copy" / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) | {"add_bos_token": False}
    config_file.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "copy").fingerprint != original


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda p: None, "does not exist; check --tokenizer-name-or-path"),
        (lambda p: p.mkdir(), "has neither tokenizer.json nor tokenizer.model"),
        (lambda p: (p.mkdir(), (p / "tokenizer.model").write_bytes(b"no model")), "is not a SentencePiece model"),
        (lambda p: (p.mkdir(), (p / "tokenizer.json").write_text("{}")), "is not a tokenizer"),
        (
            lambda p: (p.mkdir(), (p / "vocab.json").write_text("{}")),
            r"only vocab\.json; write a tokenizer\.json .*save_pretrained",
        ),
        (
            lambda p: (p.mkdir(), (p / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")),
            r"a vocabulary of tiktoken.*use the tokenizer\.json",
        ),
    ],
)  # fmt: skip
def test_files_that_are_not_tokenizers_are_reported(tmp_path: Path, make: object, complaint: str) -> None:
    make(tmp_path / "t")  # type: ignore[operator]
    with pytest.raises(DataError, match=complaint):
        load_tokenizer(tmp_path / "t")


def test_an_unknown_tokenizer_type_is_refused(tokenizer_folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean PretrainedFromHF"):
        load_tokenizer(tokenizer_folder, "PretrainedFromHf")


def test_the_tokenizer_class_of_2023_loads_with_a_log_line(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_tokenizer(tokenizer_folder, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "LLaMATokenizer"}))
    assert load_tokenizer(tmp_path).encode("the") == load_tokenizer(tokenizer_folder).encode("the")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "names LLaMATokenizer, an old name of LlamaTokenizer" in said[0]


def test_sentencepiece_tokenizer_type_requires_tokenizer_model(
    json_folder: Path, tokenizer_folder: Path
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", json_folder)
    assert load_tokenizer(json_folder, "SentencePieceTokenizer").kind == "sentencepiece"
    assert load_tokenizer(json_folder, "HuggingFaceTokenizer").kind == "tokenizer.json"
