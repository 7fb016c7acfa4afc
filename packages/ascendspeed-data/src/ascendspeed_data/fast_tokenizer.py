"""Encode with gigatoken if it gives the ids of the tokenizer.

gigatoken (extra `[fast]`) encodes about ten times faster than SentencePiece, but it is young. So a run first compares
both on hard texts and on the start of the input, then on one text of every shard.
"""

import importlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.json_tokenizer import JsonTokenizer
from ascendspeed_data.sentencepiece_tokenizer import SentencePieceTokenizer
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer

PROBE_TEXTS = (
    "", " ", "  ", "a", " a", "  a", "a ", "a  b   c", "\n", "\t", "a\nb\n\n  c\n", "\r\n", "\u00a0x\u3000y", "\ufeffa",
    "1234567890 3.14", "Zürich café naïve", "e\u0301 o\u0308", "中文字符，全角标点。",
    "🙂🏳️‍🌈", "ا ل ع", "½ﬁ Ａ", "\U0010ffff",
    "▁ ▁▁a", "<0x0A><unk>", "x" * 3000, " " * 500, "ab " * 300, "def f(x):\n\treturn  x\n", "https://a.b/c?d=e&f",
)  # fmt: skip
"""Texts on which converted tokenizers are known to differ."""

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
"""Length limit of the text that a run compares in each shard."""


class Encoder(Protocol):
    """Encodes the texts of a run.

    Attributes:
        name: library and version.
    """

    name: str

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without BOS and EOS."""
        ...


class FastEncoder:
    """gigatoken; the tokenizer itself encodes texts on which gigatoken is known to differ.

    Args:
        tokenizer: defines the ids.
        content: a `tokenizer.json` for gigatoken.
    """

    def __init__(self, tokenizer: Tokenizer, content: str) -> None:
        # gigatoken imports awkward at its first batch, and returns lists if Ctrl-C comes then.
        importlib.import_module("awkward")
        import gigatoken

        self.name = gigatoken_version()
        self._tokenizer = tokenizer
        self._backend: Any = gigatoken.Tokenizer.from_json(content).backend

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without BOS and EOS, on one thread.

        A vocabulary may contain the character NUL, which gigatoken uses and SentencePiece never does. The tokens added
        to a SentencePiece model are unknown to gigatoken.
        """
        apart = [index for index, text in enumerate(texts) if "\0" in text or self._finds_added_tokens(text)]
        if apart:
            return self._encode_apart(texts, apart)
        encoded = self._backend.encode_batch(list(texts), parallel=False).layout
        return TokenBatch(encoded.content.data, np.diff(encoded.offsets.data))

    def _finds_added_tokens(self, text: str) -> bool:
        return isinstance(self._tokenizer, SentencePieceTokenizer) and self._tokenizer.finds_added_tokens(
            text
        )

    def _encode_apart(self, texts: Sequence[str], apart: Sequence[int]) -> TokenBatch:
        chosen = set(apart)
        exact = iter(self._tokenizer.encode_without_special_tokens([texts[index] for index in apart]).split())
        others = [text for index, text in enumerate(texts) if index not in chosen]
        fast = iter(self.encode_without_special_tokens(others).split() if others else [])
        parts = [next(exact if index in chosen else fast) for index in range(len(texts))]
        return TokenBatch(np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts)))


@dataclass(frozen=True)
class EncoderChoice:
    """The encoder of a run; small enough to send to every worker.

    Attributes:
        tokenizer: folder or file.
        kind: as given to `--tokenizer-type`.
        fast_content: the `tokenizer.json` for gigatoken, or `None` to encode with the tokenizer itself.
        name: library and version.
        reason: why the run uses this encoder, for the log.
    """

    tokenizer: Path
    kind: str
    fast_content: str | None
    name: str
    reason: str

    def open(self) -> tuple[Tokenizer, Encoder]:
        """Load the tokenizer and its encoder."""
        tokenizer = load_tokenizer(self.tokenizer, self.kind)
        return tokenizer, self.encoder_of(tokenizer)

    def encoder_of(self, tokenizer: Tokenizer) -> Encoder:
        """Return the encoder for `tokenizer`."""
        if self.fast_content is None:
            return ExactEncoder(tokenizer)
        return FastEncoder(tokenizer, self.fast_content)


class ExactEncoder:
    """Encodes with the tokenizer itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.name = exact_encoder_name(tokenizer)
        self._tokenizer = tokenizer

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without BOS and EOS."""
        return self._tokenizer.encode_without_special_tokens(texts)


def choose_encoder(
    tokenizer: SentencePieceTokenizer | JsonTokenizer, kind: str, use_fast: bool, samples: Sequence[str]
) -> EncoderChoice:
    """Choose gigatoken if it is installed and agrees with the tokenizer on `PROBE_TEXTS`, random texts and `samples`.

    Args:
        tokenizer: defines the ids.
        kind: as given to `--tokenizer-type`.
        use_fast: whether gigatoken is allowed.
        samples: texts from the start of the input.
    """

    def exact(reason: str) -> EncoderChoice:
        return EncoderChoice(tokenizer.path, kind, None, exact_encoder_name(tokenizer), reason)

    if not use_fast:
        return exact("--tokenizer-not-use-fast")
    try:
        content = gigatoken_json(tokenizer)
        fast = FastEncoder(tokenizer, content)
    except ImportError:
        return exact(
            "gigatoken is not installed; pip install 'ascendspeed-data[fast]' makes this several times faster"
        )
    except (ValueError, RuntimeError, NotImplementedError, UnicodeDecodeError, KeyError) as error:
        return exact(f"gigatoken cannot read this tokenizer: {_short(str(error))}")
    added = [
        text for token in sorted(tokenizer.added_ids)[:100] for text in (token, f"a {token} b", f"1{token}x")
    ]
    texts = [*PROBE_TEXTS, *_random_texts(), *added, *samples]
    different = first_difference(tokenizer, fast, texts)
    if different is not None:
        return exact(f"gigatoken gives different ids, first for {different[:40]!r}")
    return EncoderChoice(
        tokenizer.path, kind, content, fast.name, f"same ids on {len(texts):,} texts compared"
    )


def first_difference(tokenizer: Tokenizer, fast: Encoder, texts: Sequence[str]) -> str | None:
    """Return the first text that the two encode differently, or `None`."""
    ours, theirs = tokenizer.encode_without_special_tokens(texts), fast.encode_without_special_tokens(texts)
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
            f"{encoder.name} gives different ids than {exact_encoder_name(tokenizer)} for {text[:60]!r}; give "
            "--tokenizer-not-use-fast with --overwrite, and report the text"
        )


def exact_encoder_name(tokenizer: Tokenizer) -> str:
    """Return library and version of the tokenizer."""
    from importlib import metadata

    library = "sentencepiece" if tokenizer.kind == "sentencepiece" else "tokenizers"
    return f"{library} {metadata.version(library)}"


def gigatoken_version() -> str:
    """Return `gigatoken X.Y`."""
    from importlib import metadata

    return f"gigatoken {metadata.version('gigatoken')}"


def gigatoken_json(tokenizer: SentencePieceTokenizer | JsonTokenizer) -> str:
    """Return a `tokenizer.json` with which gigatoken gives the tokenizer's ids.

    It omits the control tokens of a SentencePiece model, because SentencePiece encodes them in a text as plain text.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.to_json()
    data = tokenizer.model_file.read_bytes()
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    content = json.loads(sentencepiece_to_tokenizer_json(data))
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["special"]]
    return json.dumps(content, ensure_ascii=False)


def _random_texts() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(FRAGMENTS, k=draw.randint(1, 30))) for _ in range(500)]


def _short(message: str) -> str:
    return " ".join(message.split())[:120]
