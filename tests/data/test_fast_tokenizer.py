"""The fast path gives the ids of the tokenizer itself or is not taken."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.fast_tokenizer import (
    FRAGMENTS,
    FastEncoder,
    choose_encoder,
    gigatoken_json,
    spot_check,
)
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer import load_tokenizer
from support.commands import call, environment
from support.corpus import make_texts, write_json_lines
from support.shared_data import SHARED_DATA, TOKENIZERS, needs_shared_data

needs_gigatoken = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import gigatoken"], capture_output=True, check=False).returncode
    != 0,
    reason="gigatoken is an extra",
)
PRETRAIN = SHARED_DATA / "pretrain"


def odd_texts(count: int) -> list[str]:
    """Fragments strung together, special pieces and NUL among them."""
    draw = random.Random(7)
    fragments = (*FRAGMENTS, "<s>", "</s>", "<unk>", "<0x0A>", "\0", "\u3000", "Ａ", "﷽", "\r", "𝒳")
    return ["".join(draw.choices(fragments, k=draw.randint(1, 25))) for _ in range(count)]


@needs_gigatoken
@needs_shared_data
def test_llama_uses_gigatoken_with_the_ids_of_sentencepiece() -> None:
    tokenizer = load_tokenizer(TOKENIZERS / "llama")
    choice = choose_encoder(tokenizer, "PretrainedFromHF", True, make_texts(20))
    assert choice.name.startswith("gigatoken")
    model = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZERS / "llama" / "tokenizer.model"))
    texts = odd_texts(5000)
    batch = choice.encoder_of(tokenizer).encode_without_special_tokens(texts)
    assert [ids.tolist() for ids in batch.split()] == [model.encode(text) for text in texts]


@needs_gigatoken
@needs_shared_data
@pytest.mark.parametrize("legacy", [True, False])
def test_texts_with_added_tokens_have_the_ids_of_the_tokenizer(tmp_path: Path, legacy: bool) -> None:
    shutil.copy(TOKENIZERS / "llama" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 32000, "<the>": 32001}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": legacy}))
    tokenizer = load_tokenizer(tmp_path)
    choice = choose_encoder(tokenizer, "PretrainedFromHF", True, make_texts(20))
    assert choice.name.startswith("gigatoken")
    draw = random.Random(3)
    texts = [text + draw.choice(("", "<|im_start|>", " <the> ", "\0")) + text for text in odd_texts(1000)]
    batch = choice.encoder_of(tokenizer).encode_without_special_tokens(texts)
    assert [ids.tolist() for ids in batch.split()] == [
        tokenizer.encode(text, add_special_tokens=False) for text in texts
    ]


@needs_gigatoken
@needs_shared_data
@pytest.mark.parametrize("name", ["baichuan-7b", "tok512"])
def test_tokenizers_with_different_ids_do_not_use_gigatoken(name: str) -> None:
    (file,) = (TOKENIZERS / name).glob("*.model")
    choice = choose_encoder(load_tokenizer(file), "PretrainedFromHF", True, make_texts(20))
    assert choice.name.startswith("sentencepiece")
    assert "gives different ids, first for" in choice.reason


@needs_gigatoken
def test_a_vocabulary_that_gigatoken_cannot_read_is_encoded_by_the_tokenizer(
    tmp_path: Path, corpus: Path
) -> None:
    from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece

    folder = train_sentencepiece(
        [str(corpus)], "text", tmp_path / "unigram", TokenizerTraining(400, "unigram")
    )
    choice = choose_encoder(load_tokenizer(folder), "PretrainedFromHF", True, [])
    assert choice.name.startswith("sentencepiece")
    assert "cannot read this tokenizer" in choice.reason


def test_without_the_extra_the_tokenizer_itself_encodes(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A module of that name that cannot be imported stands for a machine without it."""
    (tmp_path / "gigatoken.py").write_text("raise ImportError('no wheel for this machine')\n")
    source = write_json_lines(tmp_path / "x.jsonl", make_texts(50))
    command = [
        sys.executable, "-m", "ascendspeed_data.cli", "preprocess", "--input", source, "--tokenizer-name-or-path",
        tokenizer_folder, "--output-prefix",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, tmp_path / "slow"], env=environment(PYTHONPATH=str(tmp_path)), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "pip install 'ascendspeed-data[fast]'" in done.stderr
    assert call(*["asd-data", *command[3:]], tmp_path / "any").status == 0
    one, two = (open_dataset(tmp_path / f"{name}_text_document") for name in ("slow", "any"))
    assert [one.ids[n].tolist() for n in range(50)] == [two.ids[n].tolist() for n in range(50)]
    assert one.manifest is not None
    assert one.manifest.encoder.startswith("sentencepiece")


@needs_gigatoken
def test_different_ids_during_a_run_stop_it(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder = FastEncoder(tokenizer, gigatoken_json(tokenizer))
    spot_check(tokenizer, encoder, ["", "the text"])

    class Wrong(FastEncoder):
        def encode_without_special_tokens(self, texts: Any) -> TokenBatch:
            batch = super().encode_without_special_tokens(texts)
            return TokenBatch(batch.ids[::-1], batch.lengths)

    wrong = Wrong(tokenizer, gigatoken_json(tokenizer))
    with pytest.raises(
        AscendSpeedError, match=r"gives different ids than sentencepiece .* --tokenizer-not-use-fast"
    ):
        spot_check(tokenizer, wrong, ["the text"])


@needs_gigatoken
def test_the_tokenizer_itself_encodes_texts_with_nul(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    encoder = FastEncoder(tokenizer, gigatoken_json(tokenizer))
    texts = ["a", "b\0c", "", "\0", "the"]
    both = (tokenizer.encode_without_special_tokens(texts), encoder.encode_without_special_tokens(texts))
    assert np.array_equal(both[0].ids, both[1].ids)
    assert np.array_equal(both[0].lengths, both[1].lengths)


def test_eos_of_the_tokenizer_is_not_doubled(tmp_path: Path, tokenizer_folder: Path) -> None:
    from ascendspeed_data.tokenizer import copy_tokenizer

    copy_tokenizer(tokenizer_folder, tmp_path / "t")
    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"add_eos_token": True, "add_bos_token": False})
    )
    source = write_json_lines(tmp_path / "x.jsonl", ["the"])
    for flag in ("--append-eod", "--no-append-eod"):
        done = call(
            "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--overwrite",
            "--tokenizer-name-or-path", tmp_path / "t", flag,
        )  # fmt: skip
        assert done.status == 0, done.stderr
        ids = open_dataset(tmp_path / "out_text_document").ids[0].tolist()
        assert ids.count(2) == 1
        assert ids[-1] == 2
        assert 1 not in ids


@needs_shared_data
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["wikipedia_en.jsonl", "classics_zh.jsonl", "c4_demo.jsonl"])
def test_every_document_of_real_corpora_has_the_ids_of_the_tokenizer(
    tmp_path: Path, name: str, fast: bool
) -> None:
    """megatron-core reads our files; each document is SentencePiece's ids and the end, as the manifest states."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset

    flags = [] if fast else ["--tokenizer-not-use-fast"]
    done = call(
        "asd-data", "preprocess", "--input", PRETRAIN / name, "--output-prefix", tmp_path / "out",
        "--tokenizer-name-or-path", TOKENIZERS / "llama", *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    ours = open_dataset(tmp_path / "out_text_document")
    assert ours.manifest is not None
    assert (ours.manifest.append_eod, ours.manifest.tokenizer.add_bos, ours.manifest.tokenizer.eos_id) == (
        True,
        False,
        2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZERS / "llama" / "tokenizer.model"))
    texts = [json.loads(line)["text"] for line in (PRETRAIN / name).open(encoding="utf-8")]
    theirs = TheirDataset(str(tmp_path / "out_text_document"))
    assert len(theirs) == len(texts) == ours.manifest.num_documents
    for number, ids in enumerate(model.encode(texts, num_threads=2)):
        assert theirs[number].tolist() == [*ids, 2]


@needs_shared_data
def test_parquet_and_lines_give_the_same_bytes(tmp_path: Path) -> None:
    lines = (PRETRAIN / "wikipedia_en.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:400]
    (tmp_path / "x.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, source in (("one", PRETRAIN / "wikipedia_en_400.parquet"), ("two", tmp_path / "x.jsonl")):
        done = call(
            "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / name, "--json-keys", "text",
            "title", "--tokenizer-name-or-path", TOKENIZERS / "llama",
        )  # fmt: skip
        assert done.status == 0, done.stderr
    for ending in ("text_document.bin", "text_document.idx", "title_document.bin", "title_document.idx"):
        assert (tmp_path / f"one_{ending}").read_bytes() == (tmp_path / f"two_{ending}").read_bytes()
