"""Tokens drawn at random for the files beside a SentencePiece model, and texts in which they occur."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

CONTENTS = (
    "<|im_start|>", "<|im_end|>", "<|im", "<|", "[PAD]", "<tool>", "</tool>", "<tool> x", "the", " x", "of ", "中文",
    "文", "é", "\n\n", "a", "▁b", "<s>x", "[INST]", "[/INST]", "🙂", "1", "<0x0A>", "user", "th", "he",
)  # fmt: skip
"""Some begin or end with others, some overlap, some are ordinary words or pieces."""

WORDS = (
    "a", "b", " ", "  ", "\n", "\t", "the", "other", " of", "user", "assistant", "Zürich", "中文字符", "é", "x", "1984",
    "▁", ".", "\u00a0", "🙂", "<|im_sep|>", "INST",
)  # fmt: skip

STYLES = ("decoder", "added", "added and map", "map", "all")
"""Which files name the tokens: `added_tokens_decoder`, `added_tokens.json`, `special_tokens_map.json`."""


def draw_folder(draw: random.Random, folder: Path, model: Path, legacy: bool) -> list[str]:
    """Write a tokenizer folder with tokens of one of the `STYLES`, and return their contents."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    own = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    style = draw.choice(STYLES)
    contents = draw.sample(CONTENTS, draw.randint(1, 6))
    if style != "decoder":
        contents = [content for content in contents if content not in own] or ["<|im_end|>"]
    ids: dict[str, int] = {}
    number = len(own)
    for content in contents:
        if content in own:
            ids[content] = own[content]
            continue
        number += draw.choice((0, 0, 0, 0, 1, 5))
        ids[content] = number
        number += 1
    if style == "map":
        ids = {}
    records = {content: _record(draw, content, style in ("decoder", "all")) for content in contents}
    special = [content for content in contents if records[content]["special"]]
    config: dict[str, Any] = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if special and draw.random() < 0.5:
        config["eos_token"] = draw.choice(special)
    if draw.random() < 0.3:
        config["pad_token"] = "<pad>" if style == "map" else draw.choice(contents)
    files: dict[str, Any] = {"tokenizer_config.json": config}
    if style in ("decoder", "all"):
        config["additional_special_tokens"] = special
        own_records = {
            str(own[piece]): _record(draw, piece, False, True) for piece in ("<unk>", "<s>", "</s>")
        }
        draw_from = {str(ids[content]): record for content, record in records.items()}
        config["added_tokens_decoder"] = own_records | draw_from
    if style in ("added", "added and map", "all"):
        files["added_tokens.json"] = ids
    if style in ("added and map", "map", "all"):
        names = {
            key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str)
        }
        files["special_tokens_map.json"] = names | {"additional_special_tokens": special}
    folder.mkdir(parents=True)
    shutil.copy(model, folder / "tokenizer.model")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return contents


def _record(
    draw: random.Random, content: str, with_rules: bool, special: bool | None = None
) -> dict[str, Any]:
    rules = {key: with_rules and draw.random() < 0.25 for key in ("lstrip", "rstrip", "single_word")}
    return {
        "content": content,
        **rules,
        "normalized": draw.random() < 0.5,
        "special": draw.random() < 0.6 if special is None else special,
    }


def draw_text(draw: random.Random, contents: list[str]) -> str:
    """Return words and tokens strung together."""
    fragments = (*WORDS, *contents, *contents, "<s>", "</s>")
    return "".join(draw.choices(fragments, k=draw.randint(0, 12)))
