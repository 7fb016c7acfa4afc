"""Tokens beside a SentencePiece model have the ids of transformers' slow tokenizer.

The oracle is transformers' `SentencePieceBackend`. transformers 5 has no slow LlamaTokenizer any more, so `SlowLlama`
adds to it what that of transformers 4 did before and after splitting a text.
"""

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.prompting import layout_named
from ascendspeed_data.tokenizer import load_tokenizer
from support.commands import call
from support.corpus import make_texts
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
        for piece in {"<s>", "</s>"} - set(theirs.all_special_tokens) - theirs._added_tokens_encoder.keys():
            # Rendered text holds the model's control pieces as ids, whether or not a file names them.
            text = text.replace(piece, "")
        wanted = theirs.encode(text, add_special_tokens=False)
        ids, offsets = ours.encode_rendered(text)
        if ids != wanted:
            wrong.append(f"{seed}: rendered {text!r}: {ids} {wanted}")
        if ours.convert_ids_to_tokens(ids) != theirs.convert_ids_to_tokens(ids):
            wrong.append(f"{seed}: tokens {text!r}")
        numbers = set(ours.added_ids.values()) - set(range(400))
        ranges = [(s, e, i) for i, (s, e) in zip(ids, offsets, strict=True) if i in numbers]
        named = ((text[s:e], ours.convert_ids_to_tokens([i])[0]) for s, e, i in ranges)
        if any(found.replace(SPACE, " ") != token.replace(SPACE, " ") for found, token in named):
            wrong.append(f"{seed}: offsets {text!r} {ranges}")
        plain = text.replace("<s>", "").replace("</s>", "")
        if "<s>" in plain or "</s>" in plain or "<unk>" in plain or not ours.added_ids:
            # A control piece in a plain text is text, and a folder without added tokens has SentencePiece's own ids.
            continue
        wanted = theirs.encode(plain, add_special_tokens=False)
        batch = ours.encode_without_special_tokens([plain, "the", plain]).split()
        if ours.encode(plain, add_special_tokens=False) != wanted or batch[2].tolist() != wanted:
            wrong.append(f"{seed}: plain {plain!r} {ours.encode(plain, add_special_tokens=False)} {wanted}")
        if ours.encode_with_offsets(plain)[0] != wanted:
            wrong.append(f"{seed}: plain offsets {plain!r}")
    return num_texts, wrong


@pytest.mark.parametrize(
    ("folders", "num_texts"), [(100, 20), pytest.param(3000, 60, marks=pytest.mark.nightly)]
)
def test_ids_equal_the_slow_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables, folders: int, num_texts: int
) -> None:
    compared, wrong = 0, []
    for seed in range(folders):
        tried, found = compare(seed, tmp_path / str(seed), tokenizer_folder / "tokenizer.model", num_texts)
        compared += tried
        wrong += found
    report.add(
        "tokens beside tokenizer.model, against transformers' slow tokenizer",
        ("folders", "texts", "disagreements"),
        folders, compared, len(wrong),
    )  # fmt: skip
    assert wrong == []
    assert compared > folders * num_texts * 0.8


@pytest.mark.parametrize("seed", [1217, 1599, 2895])
def test_special_tokens_that_the_model_has_as_pieces(
    tmp_path: Path, tokenizer_folder: Path, seed: int
) -> None:
    """Folders that name such a token as special: transformers drops a lone space before it, wherever it came from."""
    assert compare(seed, tmp_path / "folder", tokenizer_folder / "tokenizer.model", 60)[1] == []


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_folder(folder: Path, model_folder: Path, more: dict[str, Any], special: bool = True) -> Path:
    """Write a tokenizer folder with the two tokens of ChatML; `more` are further keys of its config."""
    size = load_tokenizer(model_folder).vocab_size
    tokens = {"<|im_start|>": size, "<|im_end|>": size + 1}
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>",
        "chat_template": CHATML, "add_bos_token": True,
        "additional_special_tokens": list(tokens) if special else [], **more,
    }  # fmt: skip
    folder.mkdir()
    shutil.copy(model_folder / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("more", [{}, {"legacy": False}], ids=["legacy", "not legacy"])
def test_conversations_equal_apply_chat_template(
    tmp_path: Path, tokenizer_folder: Path, more: dict[str, Any]
) -> None:
    folder = chat_folder(tmp_path / "tokenizer", tokenizer_folder, more)
    theirs = SlowLlama.from_pretrained(folder)
    texts = iter(make_texts(120, seed=5))
    talks = [
        [{"role": role, "content": next(texts)} for _ in range(turns) for role in ("user", "assistant")]
        for turns in (1, 2, 3) * 10
    ]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    done = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--handler-name",
        "MessagesHandler", "--tokenizer-name-or-path", folder,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    made = open_dataset(tmp_path / "out")
    assert made.manifest is not None
    ours = load_tokenizer(folder)
    assert made.manifest.tokenizer.vocab_size == ours.vocab_size == len(theirs)
    assert made.manifest.tokenizer.eos_id == theirs.eos_token_id == ours.vocab_size - 1
    layout = layout_named("tokenizer", ours)
    assert layout.end_ids == (theirs.eos_token_id,)
    for number, talk in enumerate(talks):
        ids = theirs.apply_chat_template(talk, return_dict=True)["input_ids"]
        assert made.arrays["input_ids"][number].tolist() == ids
        prompt = theirs.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert layout.ids(talk[:-1]) == prompt == ids[: len(prompt)]
        labels = made.arrays["labels"][number].tolist()
        # Each answer and the token that ends it are learned, the line end after it is not.
        learned = [token for token, label in zip(ids, labels, strict=True) if label != -100]
        assert learned.count(theirs.eos_token_id) == len(talk) // 2
        last = ids[len(prompt) : len(ids) - ids[::-1].index(theirs.eos_token_id)]
        assert learned[-len(last) :] == last
        answers = "".join(m["content"] for m in talk if m["role"] == "assistant")
        assert "".join(ours.decode(learned).split()) == "".join(answers.split())


def test_a_token_that_is_not_special_ends_an_answer_too(tmp_path: Path, tokenizer_folder: Path) -> None:
    folder = chat_folder(tmp_path / "tokenizer", tokenizer_folder, {"eos_token": "</s>"}, special=False)
    ours = load_tokenizer(folder)
    assert "<|im_end|>" not in ours.special_ids
    assert layout_named("tokenizer", ours).end_ids == (ours.added_ids["<|im_end|>"],)


def test_folders_without_added_tokens_keep_ids_and_fingerprint(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """As version 0.1.0 computed it."""
    content = (tokenizer_folder / "tokenizer.model").read_bytes()
    shutil.copytree(tokenizer_folder, tmp_path / "own")
    ours = load_tokenizer(tmp_path / "own")
    assert ours.fingerprint == hashlib.sha256(content + b"[true]").hexdigest()
    config = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {
        str(number): {"content": piece, "special": True}
        for number, piece in enumerate(("<unk>", "<s>", "</s>"))
    }
    (tmp_path / "own" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "own").fingerprint == ours.fingerprint
    assert ours.encode("a</s>b") == load_tokenizer(tmp_path / "own").encode("a</s>b")
    folder = chat_folder(tmp_path / "chat", tokenizer_folder, {})
    assert load_tokenizer(folder).fingerprint != ours.fingerprint


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"added_tokens.json": {"</s>": 9000}}, r"'</s>' has the ids 2 and 9000 in added_tokens.json"),
        ({"added_tokens.json": {"<x>": "9"}}, "'<x>': '9' is not a token and its id"),
        ({"added_tokens.json": {"<x>": -1}}, "'<x>': -1 is not a token and its id"),
        ({"added_tokens.json": {"<x>": 2**40}}, "is not a token and its id"),
        ({"added_tokens.json": ["<x>"]}, "added_tokens.json holds list, not a JSON object"),
        ({"tokenizer_config.json": {"eos_token": 5}}, r"tokenizer_config.json: eos_token.*='5'"),
        ({"tokenizer_config.json": {"eos_token": ""}}, "eos_token is empty"),
        ({"tokenizer_config.json": {"add_bos_token": "yes"}}, "add_bos_token='yes'"),
        ({"tokenizer_config.json": {"add_bos_token": True, "bos_token": None}}, "add_bos_token=true, but there is no"),
        ({"tokenizer_config.json": {"add_eos_token": True, "eos_token": None}}, "add_eos_token=true, but there is no"),
        ({"tokenizer_config.json": {"chat_template": 7}}, "chat_template"),
        ({"tokenizer_config.json": {"sp_model_kwargs": {"enable_sampling": True}}}, "sp_model_kwargs"),
        ({"tokenizer_config.json": {"split_special_tokens": True}}, "split_special_tokens=true"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "added_tokens_decoder.x"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": 1}}}}, "added_tokens_decoder.9"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"9": {"content": "<x>", "odd": 1}}}}, "odd"),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {}}, "added_tokens.json": {"<x>": 9000}},
            r"'<x>' is id 9000 in added_tokens.json, and missing in added_tokens_decoder",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {}}, "special_tokens_map.json": {"pad_token": "<x>"}},
            r"pad_token='<x>' of special_tokens_map.json is not in added_tokens_decoder",
        ),
        (
            {"tokenizer_config.json": {"eos_token": "</s>"}, "special_tokens_map.json": {"eos_token": "<s>"}},
            "eos_token is '<s>' in special_tokens_map.json and '</s>' in tokenizer_config.json",
        ),
        (
            {"added_tokens.json": {"<x>": 401}, "special_tokens_map.json": {"additional_special_tokens": ["<y>"]}},
            "'<y>' has no id, and the next one, 401, is that of '<x>'",
        ),
        ({"tokenizer_config.json": b"\xff{}"}, "tokenizer_config.json is not JSON"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
        ({"special_tokens_map.json": b'{"a": 1, "a": 2}'}, "the key 'a' occurs twice"),
        ({"added_tokens.json": b'{"\\ud800": 9000}'}, "is not a token and its id"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other_or_are_damaged_are_one_line(
    tmp_path: Path, tokenizer_folder: Path, files: dict[str, Any], complaint: str
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=complaint) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_special_token_without_id_gets_the_next_one(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    ours = load_tokenizer(tmp_path)
    assert (ours.eos_id, ours.vocab_size) == (400, 401)
    assert "'<|end|>' has no id in the files; it gets the next one, 400" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GemmaTokenizer", "ChatGLMTokenizer", None])
def test_a_class_that_is_not_known_is_named(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], name: str | None
) -> None:
    """Such a class may add tokens that stand in no file."""
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    load_tokenizer(tmp_path)
    said = capsys.readouterr().err
    assert ("tokenizer_class=ChatGLMTokenizer is not known" in said) == (name == "ChatGLMTokenizer")
    assert len(said.splitlines()) == (name == "ChatGLMTokenizer")


def test_ids_outside_the_vocabulary_have_no_text(tmp_path: Path, tokenizer_folder: Path) -> None:
    ours = load_tokenizer(chat_folder(tmp_path / "chat", tokenizer_folder, {}))
    ids = ours.encode("the man", add_special_tokens=False)
    assert ours.decode([*ids, 401, 9999]) == "the man"
    assert ours.convert_ids_to_tokens([401, 9999]) == ["<|im_end|>", "<9999>"]


VALUES = (None, True, 7, -1, 1.5, "", "x", [], {}, [None], {"content": 7}, {"content": "x"}, [["x"]], 2**80)
"""JSON values of every type."""


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Return the bytes of a JSON file with one value of another type, or with some bytes changed, cut or added."""
    kind = draw.choice(("value", "value", "bits", "cut", "bytes"))
    position = draw.randrange(len(content))
    if kind == "bits":
        return (
            content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[position + 1 :]
        )
    if kind == "cut":
        return content[:position]
    if kind == "bytes":
        return content[:position] + draw.randbytes(4) + content[position:]
    loaded = json.loads(content)
    at = loaded
    while isinstance(at, dict | list) and at:
        key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if not isinstance(at[key], dict | list) or not at[key] or draw.random() < 0.3:
            at[key] = draw.choice(VALUES)
            break
        at = at[key]
    return json.dumps(loaded).encode()


@pytest.mark.parametrize("rounds", [300, pytest.param(20000, marks=pytest.mark.nightly)])
def test_damaged_files_load_or_are_one_line(
    tmp_path: Path, tokenizer_folder: Path, report: ReportTables, rounds: int
) -> None:
    refused = 0
    for seed in range(rounds):
        draw = random.Random(seed)
        folder = tmp_path / str(seed)
        draw_folder(draw, folder, tokenizer_folder / "tokenizer.model", draw.random() < 0.5)
        file = draw.choice(sorted(folder.glob("*.json")))
        file.write_bytes(damaged(draw, file.read_bytes()))
        try:
            load_tokenizer(folder).encode("the <|im_start|> x")
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(folder) in str(error)
        shutil.rmtree(folder)
    report.add(
        "damaged files beside a tokenizer", ("files", "refused in one line", "tracebacks"), rounds, refused, 0
    )
    assert refused > rounds // 5
