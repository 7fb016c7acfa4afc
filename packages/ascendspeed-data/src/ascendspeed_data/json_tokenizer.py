"""A `tokenizer.json`, with the tokens that the files beside it add."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_data.added_tokens import TextPart, tokens_beside_json
from ascendspeed_data.command_line import announce
from ascendspeed_data.errors import DataError
from ascendspeed_data.stand_ins import FIRST_STAND_IN, check_literal, written_out
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.tokenizer_config import CONFIG_FILE, DEFAULT, TokenizerFiles, TokenRecord


class JsonTokenizer:
    """A `tokenizer.json` with the tokens of the files beside it."""

    kind = "tokenizer.json"

    def __init__(self, path: Path, json_file: Path, files: TokenizerFiles) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self.path, self.model_file = path, json_file
        self.named_chat_templates = dict(files.chat_templates)
        self.chat_template = self.named_chat_templates.pop(DEFAULT, None)
        self.template_values = TemplateValues()
        self._content = json_file.read_bytes()
        try:
            self._tokenizer = FastTokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exception
            raise DataError(f"{json_file} is not a tokenizer: {error}") from None
        self._refuse_dropout()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        before = self._added_tokens()
        named = self._add_tokens(files)
        self._is_extended = self._added_tokens() != before
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id, self.eos_id = named.get("bos_token"), named.get("eos_token")
        self.unk_id, self.pad_id = named.get("unk_token"), named.get("pad_token")
        self.prefix_ids, self.suffix_ids = self._prefix_and_suffix()
        self.add_bos = self.bos_id is not None and self.prefix_ids[:1] == [self.bos_id]
        self._check_config(files)
        tokens = self._tokenizer.get_added_tokens_decoder()
        self.added_ids = {token.content: number for number, token in tokens.items()}
        self.special_ids = {token.content: number for number, token in tokens.items() if token.special}
        self._renamed: tuple[dict[str, str], Any] | None = None
        extension = json.dumps(self._added_tokens()).encode() if self._is_extended else b""
        self.fingerprint = hashlib.sha256(self._content + extension).hexdigest()

    def _add_tokens(self, files: TokenizerFiles) -> dict[str, int | None]:
        """Add the tokens of the files, as transformers does, and return the ids of named tokens.

        Raises:
            DataError: a token gets another id than the files say.
        """
        from tokenizers import AddedToken

        def added(record: TokenRecord, special: bool) -> AddedToken:
            normalized = not record.special if record.normalized is None else record.normalized
            return AddedToken(
                record.content, single_word=record.single_word, lstrip=record.lstrip, rstrip=record.rstrip,
                normalized=normalized, special=special,
            )  # fmt: skip

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        decoder, named, special = tokens_beside_json(files, vocabulary)
        contents = {record.content for record in special}
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        known |= {record.content for record in decoder.values()}
        new = [
            added(record, bool(record.special) or record.content in contents)
            for _, record in sorted(decoder.items())
        ]
        new += [added(record, True) for record in special if record.content not in known]
        self._tokenizer.add_tokens(new)
        for number, record in decoder.items():
            got = self._tokenizer.token_to_id(record.content)
            if got != number:
                raise DataError(
                    f"{self.path}: {record.content!r} is id {number} in the files beside tokenizer.json, which makes "
                    f"it {got}; correct one of them"
                )
        stated = {record.content for record in decoder.values()}
        for record in special:
            if record.content not in vocabulary and record.content not in stated:
                next_id = self._tokenizer.token_to_id(record.content)
                announce(
                    f"{self.path}: {record.content!r} has no id in the files; it gets the next one, {next_id}"
                )
        return {
            name: None if record is None else self._tokenizer.token_to_id(record.content)
            for name, record in named.items()
        }

    def _check_config(self, files: TokenizerFiles) -> None:
        """Refuse a config that says something else than `tokenizer.json` about what begins or ends a text.

        transformers 4 followed the config for some classes, transformers 5 follows `tokenizer.json`.
        """
        config = files.config
        # Without a named token, whatever the post-processor adds is taken for it.
        begin = [self.bos_id] if self.bos_id is not None else self.prefix_ids[:1]
        end = [self.eos_id] if self.eos_id is not None else self.suffix_ids[-1:]
        for key, stated, found in (
            ("add_bos_token", config.add_bos_token, {bool(begin) and self.prefix_ids[:1] == begin}),
            ("add_eos_token", config.add_eos_token, {bool(end) and self.suffix_ids[-1:] == end}),
            ("add_prefix_space", config.add_prefix_space, _prefix_spaces(json.loads(self._content))),
        ):
            if stated is not None and found and stated not in found:
                raise DataError(
                    f"{files.folder / CONFIG_FILE}: {key}={str(stated).lower()}, but {self.model_file.name} does "
                    f"{'not ' if stated else ''}add it; correct one of them, or delete the key to go by "
                    f"{self.model_file.name}"
                )

    def _refuse_dropout(self) -> None:
        """Refuse BPE-dropout, which draws other ids for the same text each time."""
        model = json.loads(self._content).get("model") or {}
        if model.get("dropout"):
            raise DataError(
                f"{self.model_file}: model.dropout={model['dropout']} leaves merges out at random, so a text has other "
                "ids each time; set it to null"
            )

    def _added_tokens(self) -> list[list[object]]:
        """Return what decides how a text is split at added tokens."""
        return [
            [n, t.content, t.single_word, t.lstrip, t.rstrip, t.normalized, t.special]
            for n, t in sorted(self._tokenizer.get_added_tokens_decoder().items())
        ]

    def to_json(self) -> str:
        """Return a `tokenizer.json` that gives the ids, the tokens of the other files included."""
        return str(self._tokenizer.to_str()) if self._is_extended else self._content.decode("utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode_without_special_tokens(self, texts: Sequence[str]) -> TokenBatch:
        """Return the ids of several texts without prefix and suffix."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return TokenBatch.from_lists([encoding.ids for encoding in encoded])

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text and the character range of each."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def encode_rendered(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and character ranges of a rendered conversation."""
        return self.encode_with_offsets(text)

    def encode_literals(
        self, text: str, literals: Mapping[str, str]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and ranges of a rendered conversation in which some characters stand for texts, not for control.

        The control tokens get other names, which no text spells; those of the conversation are renamed before the texts
        are written out.
        """
        added = {piece: self.added_ids[piece] for piece in literals.values() if piece in self.added_ids}
        control = {**self.special_ids, **added}
        longest_first = sorted(control, key=len, reverse=True)
        first = FIRST_STAND_IN + len(literals)
        names = {piece: chr(first + number) for number, piece in enumerate(longest_first)}
        if self._renamed is None or self._renamed[0] != names:
            self._renamed = names, _renamed(self.to_json(), names)
        renamed = self._renamed[1]
        replaced = {**names, **literals}
        pattern = re.compile("|".join(map(re.escape, [*longest_first, *literals])) or r"(?!)")
        parts, done = list[tuple[str, str]](), 0
        for found in pattern.finditer(text):
            kept = text[done : found.start()]
            parts += [(kept, kept), (found[0], replaced[found[0]])]
            done = found.end()
        whole = written_out([*parts, (text[done:], text[done:])])
        own = {renamed.token_to_id(name): control[piece] for piece, name in names.items()}
        encoded = renamed.encode(whole.text, add_special_tokens=False)
        ids = [own.get(number, number) for number in encoded.ids]
        check_literal((number for number in encoded.ids if number not in own), control, self.path)
        return ids, whole.ranges(encoded.offsets)

    def split_rendered(self, text: str) -> list[TextPart] | None:
        """Return the whole text: the tokenizer finds special tokens itself."""
        return [TextPart(text, ((0, len(text)),))]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the token of each id."""
        return [self._tokenizer.id_to_token(int(i)) or f"<{int(i)}>" for i in ids]

    def _prefix_and_suffix(self) -> tuple[list[int], list[int]]:
        """Return the ids that the post-processor adds before and after a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
        raise DataError(
            f"{self.path}: the post-processor changes ids inside a text, which is not supported; use another tokenizer"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        text: str = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


def _renamed(content: str, names: Mapping[str, str]) -> Any:
    """Return a tokenizer whose special tokens have other names; their ids are new ones."""
    from tokenizers import Tokenizer as FastTokenizer

    fields = json.loads(content)
    fields["added_tokens"] = [
        {**token, "content": names.get(token["content"], token["content"])}
        for token in fields["added_tokens"]
    ]
    # Templates of the post-processor name special tokens; a text without prefix needs none.
    fields["post_processor"] = None
    tokenizer = FastTokenizer.from_str(json.dumps(fields))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _prefix_spaces(content: dict[str, Any]) -> set[bool]:
    """Return whether the parts of a `tokenizer.json` that may begin a text with a space do so."""
    found: set[bool] = set()
    parts = [content.get("normalizer"), content.get("pre_tokenizer")]
    while parts:
        part = parts.pop() or {}
        parts += [*part.get("normalizers", ()), *part.get("pretokenizers", ())]
        if part.get("type") == "ByteLevel" and "add_prefix_space" in part:
            found.add(bool(part["add_prefix_space"]))
        elif part.get("type") == "Metaspace":
            found.add(part.get("prepend_scheme", "always") != "never")
        elif part.get("type") == "Prepend":
            found.add(True)
    return found
