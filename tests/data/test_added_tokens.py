"""Tokens beside a SentencePiece model have the ids of transformers' slow tokenizer.

The oracle is transformers' `SentencePieceBackend`. transformers 5 has no slow LlamaTokenizer any more, so `SlowLlama`
adds to it what that of transformers 4 did before and after splitting a text.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer import load_tokenizer
from support.tables import ReportTables
from support.token_files import draw_folder, draw_text

SPACE = "▁"


class SlowLlama(SentencePieceBackend):
    """`LlamaTokenizer` of transformers 4.57: without `legacy` only the beginning of a text gets a space."""

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        tokens = super().tokenize(SPACE + text.replace(SPACE, " "), **kwargs)
        if len(tokens) > 1 and tokens[0] == SPACE and tokens[1] in self.all_special_tokens:
            return tokens[1:]
        return tokens

    def build_inputs_with_special_tokens(self, ids: list[int], pair: Any = None) -> list[int]:
        return ids


def compare(seed: int, folder: Path, model: Path, num_texts: int) -> tuple[int, list[str]]:
    """Return how many texts were compared on one folder, and the disagreements."""
    draw = random.Random(seed)
    legacy = draw.random() < 0.5
    contents = draw_folder(draw, folder, model, legacy)
    theirs = SlowLlama.from_pretrained(folder)
    try:
        ours = load_tokenizer(folder)
    except DataError as error:
        ids = list(theirs._added_tokens_encoder.values())
        return 0, [] if len(set(ids)) < len(ids) else [f"{seed}: refused: {error}"]
    wrong = []
    if ours.vocab_size != max(theirs.get_vocab().values()) + 1:
        wrong.append(f"{seed}: vocab_size {ours.vocab_size}")
    for mine, name in (
        (ours.eos_id, "eos"),
        (ours.bos_id, "bos"),
        (ours.pad_id, "pad"),
        (ours.unk_id, "unk"),
    ):
        if mine != getattr(theirs, f"{name}_token_id"):
            wrong.append(f"{seed}: {name} {mine}")
    for _ in range(num_texts):
        text = draw_text(draw, contents)
        wanted = theirs.encode(text, add_special_tokens=False)
        ids, offsets = ours.encode_rendered(text)
        if ids != wanted:
            wrong.append(f"{seed}: rendered {text!r}: {ids} {wanted}")
        if ours.convert_ids_to_tokens(ids) != theirs.convert_ids_to_tokens(ids):
            wrong.append(f"{seed}: tokens {text!r}")
        added = [
            (text[s:e], ours.convert_ids_to_tokens([i])[0])
            for i, (s, e) in zip(ids, offsets, strict=True)
            if i in ours.added_ids.values()
        ]
        if any(found != token and token.strip("▁ \n") not in found for found, token in added):
            wrong.append(f"{seed}: offsets {text!r} {added}")
        plain = text.replace("<s>", "").replace("</s>", "")
        if "<s>" in plain or "</s>" in plain or "<unk>" in plain:
            continue
        wanted = theirs.encode(plain, add_special_tokens=False)
        batch = ours.encode_without_special_tokens([plain, "the", plain]).split()
        if ours.encode(plain, add_special_tokens=False) != wanted or batch[2].tolist() != wanted:
            wrong.append(f"{seed}: plain {plain!r} {ours.encode(plain, add_special_tokens=False)} {wanted}")
        if ours.encode_with_offsets(plain)[0] != wanted:
            wrong.append(f"{seed}: plain offsets {plain!r}")
    return num_texts, wrong


@pytest.mark.parametrize(
    ("folders", "num_texts"), [(120, 25), pytest.param(3000, 60, marks=pytest.mark.nightly)]
)  # fmt: skip
def test_ids_equal_the_slow_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables, folders: int, num_texts: int
) -> None:
    compared, wrong = 0, []
    for seed in range(folders):
        tried, found = compare(seed, tmp_path / str(seed), tokenizer_folder / "tokenizer.model", num_texts)
        compared += tried
        wrong += found
    assert wrong == []
    assert compared > folders * num_texts * 0.8
