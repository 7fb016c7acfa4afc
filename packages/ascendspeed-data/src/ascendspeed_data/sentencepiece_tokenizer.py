"""A SentencePiece `tokenizer.model`, with the tokens that the files beside it add."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ascendspeed_data.added_tokens import (
    AddedToken,
    TextPart,
    TextSplitter,
    added_tokens_of_json,
    resolve_added_tokens,
)
from ascendspeed_data.command_line import announce
from ascendspeed_data.errors import DataError
from ascendspeed_data.stand_ins import check_literal, written_out
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer_config import CONFIG_FILE, DEFAULT, TokenizerFiles, read_json

SPACE = "▁"
"""How SentencePiece writes a space."""

CLASSES = (
    "LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "LLaMATokenizer", "BaichuanTokenizer",
    "InternLMTokenizer", "PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend",
)  # fmt: skip
"""Classes of transformers, with or without `Fast`, that give the ids of their SentencePiece model."""

_WITHOUT_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec { add_dummy_prefix: false }`; protobuf merges what follows a message into it."""


_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
"""First line of tiktoken's files: bytes of a token in base64, and its rank."""


class SentencePieceTokenizer:
    """A SentencePiece model with the tokens of the files beside it.

    A text is split at added tokens, as transformers' slow tokenizers do. The model's own control pieces and its unknown
    piece are the exception: in a text they are plain text, as for SentencePiece; in a rendered conversation they are
    ids.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path, model_file: Path, files: TokenizerFiles) -> None:
        import sentencepiece

        self.path, self.model_file = path, model_file
        self.named_chat_templates = dict(files.chat_templates)
        self.chat_template = self.named_chat_templates.pop(DEFAULT, None)
        self.template_values = TemplateValues()
        config = files.config
        if config.sp_model_kwargs:
            raise DataError(
                f"{path / CONFIG_FILE}: sp_model_kwargs={config.sp_model_kwargs} is not supported; delete the key"
            )
        if config.tokenizer_class is not None and config.tokenizer_class.removesuffix("Fast") not in CLASSES:
            announce(
                f"{path / CONFIG_FILE}: tokenizer_class={config.tokenizer_class} is not known; the ids are those of "
                f"{model_file.name} and of the tokens in the files beside it"
            )
        content = model_file.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=content + _WITHOUT_DUMMY_PREFIX)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            reason = str(error).strip()
            if _TIKTOKEN.match(content):
                raise DataError(
                    f"{model_file} is not a SentencePiece model but a vocabulary of tiktoken, as beside Meta's own "
                    "weights of Llama 3; use the tokenizer.json of the Hugging Face folder of that model"
                ) from None
            raise DataError(f"{model_file} is not a SentencePiece model: {reason}; copy it again") from None
        self._num_pieces = int(self._model.vocab_size())
        self._is_legacy = config.is_legacy
        # What begins a text without `legacy`.
        self._begin = "" if self._is_legacy or config.add_prefix_space is False else SPACE
        tokens, named, given = self._resolve(files)
        self.bos_id, self.eos_id = named["bos_token"], named["eos_token"]
        self.unk_id, self.pad_id = named["unk_token"], named["pad_token"]
        self._set_tokens(tokens, given)
        for key, stated, number in (
            ("add_bos_token", config.add_bos_token, self.bos_id),
            ("add_eos_token", config.add_eos_token, self.eos_id),
        ):
            if stated and number is None:
                raise DataError(
                    f"{path / CONFIG_FILE}: {key}=true, but there is no {key.removeprefix('add_')}; correct one of them"
                )
        adds_bos = files.has_config if config.add_bos_token is None else config.add_bos_token
        self.prefix_ids = [self.bos_id] if adds_bos and self.bos_id is not None else []
        self.suffix_ids = [self.eos_id] if config.add_eos_token and self.eos_id is not None else []
        self.add_bos = bool(self.prefix_ids)
        settings = [self.add_bos, True] if self.suffix_ids else [self.add_bos]
        self.fingerprint = self._fingerprint(content, settings)

    def _resolve(
        self, files: TokenizerFiles
    ) -> tuple[tuple[AddedToken, ...], dict[str, int | None], set[str]]:
        """Return the added tokens, the ids of the named tokens of which the project makes use, and names in files."""
        try:
            pieces: list[str] = self._model.id_to_piece(list(range(self._num_pieces)))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.model_file} is damaged, a piece is {error}; copy it again") from None
        model = self._model
        own = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "unk_token": model.unk_id(),
            "pad_token": model.pad_id(),
        }
        json_file = files.folder / "tokenizer.json"
        content = read_json(json_file) if self.path.is_dir() else None
        resolved = resolve_added_tokens(
            files,
            pieces,
            {name: pieces[number] if number >= 0 else None for name, number in own.items()},
            added_tokens_of_json(content, json_file) if content is not None else (),
        )
        named: dict[str, int | None] = {}
        for name, number in own.items():
            if name in resolved.named:
                token = resolved.named[name]
                named[name] = None if token is None else token.id
            else:
                named[name] = number if number >= 0 else None
        return resolved.tokens, named, set(resolved.named)

    def _set_tokens(self, tokens: Sequence[AddedToken], given: set[str]) -> None:
        """Decide which tokens a text is split at."""
        model, size = self._model, self._num_pieces
        control = {i: str(model.id_to_piece(i)) for i in range(size) if model.is_control(i)}
        unknown = model.unk_id()
        own = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": unknown}
        named = {number for name, number in own.items() if name not in given}
        tokens = [replace(token, named=True) if token.id in named else token for token in tokens]
        plain = [
            token
            for token in tokens
            if not (
                (token.id in control or token.id == unknown) and model.id_to_piece(token.id) == token.content
            )
        ]
        contents = {token.content for token in tokens}
        undeclared = [
            AddedToken(piece, i, special=True, named=i in named)
            for i, piece in control.items()
            if piece not in contents
        ]
        self.vocab_size = max([size - 1, *(token.id for token in tokens)]) + 1
        self.added_ids = {token.content: token.id for token in plain}
        self.special_ids = {token.content: token.id for token in [*undeclared, *tokens] if token.special}
        self._named = {token.id for token in [*undeclared, *tokens] if token.named}
        self._skipped = {*self.special_ids.values(), *control} - {unknown}
        self._content_of = {token.id: token.content for token in plain}
        self._plain, self._rendered = TextSplitter(plain), TextSplitter([*tokens, *undeclared])
        # Models that strip white space lose the spaces that begin a text, unless `legacy` is false.
        # A special token that is spelled with SentencePiece's space may come up in what its model makes of a text.
        comes_up = any(token.named and SPACE in token.content for token in plain)
        self._always_splits = bool(plain) and not self._is_legacy and (comes_up or not self._keeps_spaces())
        self._rules = [
            [*token.rules, *(() if self._is_legacy else (token.named,))]
            for token in sorted(plain, key=lambda token: token.id)
        ]

    def _keeps_spaces(self) -> bool:
        texts = ("a", " a", "  a", " ", "a  a", "a ")
        return all(self._encode_part(self._whole(text))[0] == self._model.encode(text) for text in texts)

    def _fingerprint(self, content: bytes, settings: list[bool]) -> str:
        """Return the hash of what defines the ids of a text; without added tokens that of earlier versions."""
        digest = hashlib.sha256(content)
        digest.update(json.dumps(settings).encode())
        if self._rules:
            digest.update(json.dumps([self._is_legacy, self._begin, self._rules]).encode())
        return digest.hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return SentencePiece's ids, with BOS and EOS if the config says so."""
        ids = self._ids(text)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, on one thread."""
        if any(map(self.finds_added_tokens, texts)):
            return [self.encode(text) for text in texts]
        encoded: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        return [[*self.prefix_ids, *ids, *self.suffix_ids] for ids in encoded]

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without BOS and EOS, on one thread."""
        found = [bool(self.added_ids) and self.finds_added_tokens(text) for text in texts]
        plain = [text for text, has_tokens in zip(texts, found, strict=True) if not has_tokens]
        encoded: Any = self._model.encode(plain, out_type="numpy", num_threads=1)
        if len(plain) < len(texts):
            rest = iter(encoded)
            encoded = [
                np.array(self._ids(text), np.int32) if has_tokens else next(rest)
                for text, has_tokens in zip(texts, found, strict=True)
            ]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return TokenBatch(np.concatenate(encoded) if len(encoded) else np.empty(0, np.int32), lengths)

    def finds_added_tokens(self, text: str) -> bool:
        """Return whether SentencePiece alone gives other ids, most often because an added token occurs in the text."""
        return self._always_splits or self._plain.finds_any(self._whole(text))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the character range of each.

        If bytes encode a character, all their ranges start at it; only the last range ends after it.
        """
        if not self.finds_added_tokens(text):
            mapped: Any = self._model.encode(text, out_type="offset_mapping")
            return list(mapped["ids"]), list(mapped["offsets"])
        return self._with_offsets(self._encoded_parts(text, self._plain))

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and character ranges of a rendered conversation: the model's control pieces are ids in it."""
        return self._with_offsets(self._encoded_parts(text, self._rendered))

    def encode_literals(
        self, text: str, literals: Mapping[str, str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and ranges of a rendered conversation in which some characters stand for texts."""
        encoded = self._encoded_parts(text, self._rendered, literals)
        own = [number for part, ids, _ in encoded if part.token is None for number in ids]
        check_literal((n for n in own if n != self.unk_id), self.special_ids, self.path)
        return self._with_offsets(encoded)

    def split_rendered(self, text: str) -> list[TextPart] | None:
        """Return the parts of a rendered conversation that are encoded each by itself like a whole text.

        `None` if its texts are encoded in another way than whole texts; `encode_rendered` does that.
        """
        return self._rendered.split(text) if self._is_legacy and not self.added_ids else None

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id."""
        return [self._token_of(int(i)) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens; ids beyond the vocabulary have none."""
        kept = [int(i) for i in ids if int(i) not in self._skipped]
        text, run = "", list[int]()
        for number in [*kept, -1]:
            if number in self._content_of or not 0 <= number < self._num_pieces:
                model = self._model if self._is_legacy or not text else self._bare
                text += model.decode(run) + self._content_of.get(number, "")
                run = []
            else:
                run.append(number)
        return text

    def _token_of(self, number: int) -> str:
        if number in self._content_of:
            return self._content_of[number]
        return str(self._model.id_to_piece(number)) if 0 <= number < self._num_pieces else f"<{number}>"

    def _ids(self, text: str) -> list[int]:
        if not self.finds_added_tokens(text):
            ids: list[int] = self._model.encode(text)
            return ids
        return [number for _, ids, _ in self._encoded_parts(text, self._plain) for number in ids]

    def _whole(self, text: str) -> str:
        """Return the text that is split; without `legacy` its spaces are written first."""
        return text if self._is_legacy else self._begin + text.replace(SPACE, " ")

    def _encoded_parts(
        self, text: str, splitter: TextSplitter, literals: Mapping[str, str] | None = None
    ) -> list[tuple[TextPart, list[int], list[tuple[int, int]]]]:
        """Return the parts of a text with their ids, and the range of each id in the text of the part."""
        parts = splitter.split(self._whole(text)) if text else []
        encoded = [
            (part, [part.token.id], [(0, len(part.text))])
            if part.token is not None
            else (part, *self._encode_literal_part(part.text, literals or {}))
            for part in parts
        ]
        if self._begin and encoded and self._begins_with_lone_space(encoded):
            part, ids, offsets = encoded[0]
            encoded[0] = (part, ids[1:], offsets[1:])
        return encoded

    def _begins_with_lone_space(self, encoded: Sequence[tuple[TextPart, list[int], Any]]) -> bool:
        """Return whether a text begins with a space and a special token; transformers drops such a space."""
        first = [number for _, ids, _ in encoded[:2] for number in ids][:2]
        if len(first) < 2 or first[1] not in self._named:
            return False
        return encoded[0][0].text == SPACE or self._token_of(first[0]) == SPACE

    def _encode_literal_part(
        self, text: str, literals: Mapping[str, str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        if not literals:
            return self._encode_part(text)
        # Character by character: ranges then end where a written-out text ends.
        whole = written_out([(character, literals.get(character, character)) for character in text])
        ids, offsets = self._encode_part(whole.text)
        return ids, whole.ranges(offsets)

    def _encode_part(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        model, lead = (self._model, "") if self._is_legacy else (self._bare, "")
        if not self._is_legacy and text.startswith((SPACE, " ")):
            # Without a dummy prefix SentencePiece drops spaces that begin a text.
            lead = self._token_of(self.unk_id) if self.unk_id is not None else "<unk>"
        mapped: Any = model.encode(lead + text, out_type="offset_mapping")
        skipped = len(model.encode(lead))
        ids = [int(number) for number in mapped["ids"][skipped:]]
        offsets = [(max(s - len(lead), 0), max(e - len(lead), 0)) for s, e in mapped["offsets"][skipped:]]
        if self.added_ids and model.unk_id() in ids:
            # transformers looks a piece up among the added tokens first.
            pieces = model.encode(lead + text, out_type=str)[skipped:]
            unknown = model.unk_id()
            ids = [
                self.added_ids.get(piece, number) if number == unknown else number
                for number, piece in zip(ids, pieces, strict=True)
            ]
        return ids, offsets

    def _with_offsets(
        self,
        parts: Sequence[tuple[TextPart, list[int], list[tuple[int, int]]]],
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Map ranges in the parts to ranges in the whole text."""
        shift = len(self._begin)
        all_ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        for part, ids, offsets in parts:
            positions = [position - shift for position in part.positions()]
            begins = [*positions, positions[-1] + 1]
            all_ids += ids
            found = ((begins[s], begins[e - 1] + 1 if e > s else begins[s]) for s, e in offsets)
            ranges += [(max(start, 0), max(end, 0)) for start, end in found]
        return all_ids, ranges
