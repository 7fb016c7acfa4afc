"""The fast path: gigatoken, taken only where it gives the ids of the tokenizer itself.

gigatoken (extra `[fast]`) encodes an order of magnitude faster than SentencePiece. It is young, so it is compared with
the tokenizer on texts that are hard and on the beginning of the input before it is used, and on one text of every
shard while it is.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import (
    JsonTokenizer,
    SentencePieceTokenizer,
    TokenBatch,
    Tokenizer,
    load_tokenizer,
)

PROBES = (
    "", " ", "  ", "a", " a", "  a", "a ", "a  b   c", "\n", "\t", "a\nb\n\n  c\n", "\r\n", "\u00a0x\u3000y", "\ufeffa",
    "1234567890 3.14", "Zürich café naïve", "e\u0301 o\u0308", "中文字符，全角标点。",
    "🙂🏳️‍🌈", "ا ل ع", "½ﬁ Ａ", "\U0010ffff",
    "▁ ▁▁a", "<0x0A><unk>", "x" * 3000, " " * 500, "ab " * 300, "def f(x):\n\treturn  x\n", "https://a.b/c?d=e&f",
)  # fmt: skip
"""Texts on which conversions of tokenizers are known to differ."""

FRAGMENTS = (
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "\t",
    "中",
    "é",
    "▁",
    "1",
    "🙂",
    "\u00a0",
    "the",
    "tion",
    "e\u0301",
    "ﬀ",
    ".",
    "_",
)
SPOT_CHECK_CHARACTERS = 4096
"""Longest text that is compared during a run."""


class Encoder(Protocol):
    """What encodes texts of a run.

    Attributes:
        name: of the library, with its version.
    """

    name: str

    def encode_contents(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without what a tokenizer puts around them."""
        ...


class FastEncoder:
    """gigatoken, with the tokenizer itself for the texts that gigatoken is known to read differently.

    Args:
        tokenizer: that the ids are those of.
        content: a `tokenizer.json` for gigatoken.
    """

    def __init__(self, tokenizer: Tokenizer, content: str) -> None:
        import gigatoken

        self.name = gigatoken_version()
        self._tokenizer = tokenizer
        self._backend: Any = gigatoken.Tokenizer.from_json(content).backend

    def encode_contents(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without what the tokenizer puts around them, on one thread.

        A model may hold a piece of the character NUL, which SentencePiece never uses and gigatoken does.
        """
        odd = [place for place, text in enumerate(texts) if "\0" in text]
        if odd:
            return self._encode_apart(texts, odd)
        encoded = self._backend.encode_batch(list(texts), parallel=False).layout
        return TokenBatch(encoded.content.data, np.diff(encoded.offsets.data))

    def _encode_apart(self, texts: Sequence[str], odd: Sequence[int]) -> TokenBatch:
        chosen = set(odd)
        exact = iter(self._tokenizer.encode_contents([texts[place] for place in odd]).split())
        even = [text for place, text in enumerate(texts) if place not in chosen]
        fast = iter(self.encode_contents(even).split() if even else [])
        parts = [next(exact if place in chosen else fast) for place in range(len(texts))]
        return TokenBatch(np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts)))


@dataclass(frozen=True)
class EncoderChoice:
    """How texts are encoded in a run: small enough to be sent to every worker.

    Attributes:
        tokenizer: folder or file.
        kind: as given to `--tokenizer-type`.
        fast_content: the `tokenizer.json` for gigatoken, or `None` for the tokenizer itself.
        name: library and version.
        reason: why this one, for the log.
    """

    tokenizer: Path
    kind: str
    fast_content: str | None
    name: str
    reason: str

    def open(self) -> tuple[Tokenizer, Encoder]:
        """Load the tokenizer and what encodes with its ids."""
        tokenizer = load_tokenizer(self.tokenizer, self.kind)
        return tokenizer, self.encoder_of(tokenizer)

    def encoder_of(self, tokenizer: Tokenizer) -> Encoder:
        """Return what encodes with the ids of `tokenizer`."""
        if self.fast_content is None:
            return ExactEncoder(tokenizer)
        return FastEncoder(tokenizer, self.fast_content)


class ExactEncoder:
    """The tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = exact_name(tokenizer)
        self._tokenizer = tokenizer

    def encode_contents(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without what the tokenizer puts around them."""
        return self._tokenizer.encode_contents(texts)


def choose_encoder(
    tokenizer: SentencePieceTokenizer | JsonTokenizer, kind: str, use_fast: bool, samples: Sequence[str]
) -> EncoderChoice:
    """Take gigatoken if it is there and gives the tokenizer's ids on `PROBES`, made texts and `samples`.

    Args:
        tokenizer: whose ids are wanted.
        kind: as given to `--tokenizer-type`.
        use_fast: whether gigatoken may be used at all.
        samples: texts of the input.
    """

    def exact(reason: str) -> EncoderChoice:
        return EncoderChoice(tokenizer.path, kind, None, exact_name(tokenizer), reason)

    if not use_fast:
        return exact("--tokenizer-not-use-fast")
    try:
        content = _content_for_gigatoken(tokenizer)
        fast = FastEncoder(tokenizer, content)
    except ImportError:
        return exact(
            "gigatoken is not installed; pip install 'ascendspeed-data[fast]' is several times faster"
        )
    except (ValueError, RuntimeError, NotImplementedError, UnicodeDecodeError, KeyError) as error:
        return exact(f"gigatoken does not read this tokenizer: {_short(str(error))}")
    texts = [*PROBES, *_made_texts(), *samples]
    different = first_difference(tokenizer, fast, texts)
    if different is not None:
        return exact(f"gigatoken gives other ids, first for {different[:40]!r}")
    return EncoderChoice(
        tokenizer.path, kind, content, fast.name, f"same ids on {len(texts):,} texts compared"
    )


def first_difference(tokenizer: Tokenizer, fast: Encoder, texts: Sequence[str]) -> str | None:
    """Return the first text to which the two give different ids, or `None`."""
    ours, theirs = tokenizer.encode_contents(texts), fast.encode_contents(texts)
    if np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids):
        return None
    pairs = zip(texts, ours.split(), theirs.split(), strict=True)
    return next(text for text, one, two in pairs if not np.array_equal(one, two))


def spot_check(tokenizer: Tokenizer, encoder: Encoder, texts: Sequence[str]) -> None:
    """Compare one text of a shard with the tokenizer itself.

    Raises:
        AscendSpeedError: the ids differ.
    """
    if not isinstance(encoder, FastEncoder):
        return
    text = next((text for text in texts if 0 < len(text) <= SPOT_CHECK_CHARACTERS), None)
    if text is not None and first_difference(tokenizer, encoder, [text]) is not None:
        raise AscendSpeedError(
            f"{encoder.name} gives other ids than {exact_name(tokenizer)} for {text[:60]!r}; give "
            "--tokenizer-not-use-fast with --overwrite, and report the text"
        )


def exact_name(tokenizer: Tokenizer) -> str:
    """Return library and version of the tokenizer itself."""
    from importlib import metadata

    library = "sentencepiece" if tokenizer.kind == "sentencepiece" else "tokenizers"
    return f"{library} {metadata.version(library)}"


def gigatoken_version() -> str:
    """Return `gigatoken X.Y`."""
    from importlib import metadata

    return f"gigatoken {metadata.version('gigatoken')}"


def _content_for_gigatoken(tokenizer: SentencePieceTokenizer | JsonTokenizer) -> str:
    """Return a `tokenizer.json` from which gigatoken makes the tokenizer's ids.

    Control pieces are left out of a SentencePiece model: SentencePiece takes them, spelled in a text, for text.
    """
    data = tokenizer.model_file.read_bytes()
    if tokenizer.kind != "sentencepiece":
        return data.decode("utf-8")
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = json.loads(sentencepiece_to_tokenizer_json(data))
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return json.dumps(content, ensure_ascii=False)


def _made_texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(FRAGMENTS, k=draw.randint(1, 30))) for _ in range(500)]


def _short(message: str) -> str:
    return " ".join(message.split())[:120]
