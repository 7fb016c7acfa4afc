"""Tokens beside a SentencePiece model, with the ids and the matching of transformers' slow tokenizers.

The files give some tokens an id. Special tokens without one follow the vocabulary, in transformers' order. A text is
split at the longest token that begins first; then the tokens' own rules take white space or give up a match.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ascendspeed_data.command_line import announce
from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer_config import (
    ADDED_FILE,
    CONFIG_FILE,
    MAP_FILE,
    MAX_ID,
    TokenizerFiles,
    TokenRecord,
)

_DECIDING = ("bos_token", "eos_token", "unk_token")
"""Named tokens that decide ids of data; two files must not contradict each other."""


@dataclass(frozen=True)
class AddedToken:
    """A token that a text is split at before the model sees it.

    Attributes:
        content: its text.
        id: its id.
        lstrip: whether it takes the white space before it.
        rstrip: whether it takes the white space after it.
        single_word: whether it only matches next to spaces or the ends of the text.
        special: whether decoding may leave it out.
        named: whether a file lists it as a special token, with or without a name.
    """

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = False
    named: bool = False

    @property
    def rules(self) -> tuple[int, str, bool, bool, bool]:
        """What decides the ids of a text."""
        return self.id, self.content, self.lstrip, self.rstrip, self.single_word


@dataclass(frozen=True)
class SpecialTokenIds:
    """What the files beside a model say.

    Attributes:
        tokens: every added token, the model's own among them.
        named: the token of each name (`eos_token`) that a file has; `None` if it says that there is none.
    """

    tokens: tuple[AddedToken, ...]
    named: dict[str, AddedToken | None]


def resolve_added_tokens(
    files: TokenizerFiles,
    pieces: Sequence[str],
    defaults: dict[str, str | None],
    json_tokens: Sequence[TokenRecord],
) -> SpecialTokenIds:
    """Give each token of the files its id.

    Args:
        files: beside the tokenizer.
        pieces: the model's own, by id.
        defaults: piece that the model itself has for a named token.
        json_tokens: added tokens of a `tokenizer.json` in the same folder.

    Raises:
        DataError: the files contradict each other.
    """
    own = {piece: number for number, piece in enumerate(pieces)}
    decoder, named, additional = _merged(files, own, defaults, json_tokens)
    ids: dict[str, int] = {}
    for number, record in sorted(decoder.items()):
        known = ids.get(record.content, own.get(record.content, number))
        if known != number:
            raise DataError(
                f"{files.folder}: {record.content!r} has the ids {known} and {number} in {_sources(files)}; correct one"
            )
        ids[record.content] = number
        if number < len(pieces) and pieces[number] != record.content:
            announce(
                f"{files.folder}: id {number} is {record.content!r} in {_sources(files)} and {pieces[number]!r} in the "
                "model; both texts have this id"
            )
    _log_unknown_names(files, {*own, *ids})
    special = {record.content for record in (*named.values(), *additional) if record is not None}
    found = {number: _added(record, number, record.content in special) for number, record in decoder.items()}
    next_id = len({found[n].content if n in found else piece for n, piece in enumerate(pieces)} | ids.keys())
    without_id = [record for record in (*named.values(), *additional) if record is not None]
    for record in without_id:
        if record.content in ids:
            continue
        number = own.get(record.content, next_id)
        if number in found:
            raise DataError(
                f"{files.folder}: {record.content!r} has no id, and the next one, {number}, is that of "
                f"{found[number].content!r}; give it an id in {ADDED_FILE}"
            )
        if record.content not in own:
            announce(
                f"{files.folder}: {record.content!r} has no id in the files; it gets the next one, {number}"
            )
            next_id += 1
        ids[record.content] = number
        found[number] = _added(record, number, True)
    by_name = {name: None if record is None else found[ids[record.content]] for name, record in named.items()}
    return SpecialTokenIds(tuple(token for _, token in sorted(found.items())), by_name)


def tokens_beside_json(
    files: TokenizerFiles, vocabulary: dict[str, int]
) -> tuple[dict[int, TokenRecord], dict[str, TokenRecord | None], list[TokenRecord]]:
    """Return what the files beside a `tokenizer.json` add: tokens with ids, named tokens, and all special tokens.

    Raises:
        DataError: the files contradict each other.
    """
    decoder, named, additional = _merged(files, vocabulary, {}, ())
    _log_unknown_names(files, {*vocabulary, *(record.content for record in decoder.values())})
    return decoder, named, _without_repeats([*(record for record in named.values() if record), *additional])


def _log_unknown_names(files: TokenizerFiles, known: set[str]) -> None:
    for name, content in files.config.unknown_names().items():
        if content not in known:
            announce(f"{files.folder}: {name}={content!r} of {CONFIG_FILE} has no id and is not used")


def _added(record: TokenRecord, number: int, named: bool) -> AddedToken:
    return AddedToken(
        record.content,
        number,
        record.lstrip,
        record.rstrip,
        record.single_word,
        special=named or bool(record.special),
        named=named,
    )


def _sources(files: TokenizerFiles) -> str:
    return f"added_tokens_decoder of {CONFIG_FILE}" if files.decoder is not None else ADDED_FILE


def _merged(
    files: TokenizerFiles,
    own: dict[str, int],
    defaults: dict[str, str | None],
    json_tokens: Sequence[TokenRecord],
) -> tuple[dict[int, TokenRecord], dict[str, TokenRecord | None], list[TokenRecord]]:
    """Return tokens with ids, named tokens and further special tokens, with the precedence of transformers.

    With `added_tokens_decoder` transformers reads neither of the other files, so they must say the same.
    """
    config, others = files.config.named(), files.special.named()
    for name, record in (*config.items(), *others.items()):
        if record is not None and not record.content:
            raise DataError(
                f"{files.folder}: {name} is empty; give the token, null for none, or delete the key"
            )
    for name in _DECIDING:
        if name not in config and name not in defaults:
            continue
        one = _content(config[name]) if name in config else defaults.get(name)
        if name in others and _content(others[name]) != one and (name in config or files.decoder is not None):
            raise DataError(
                f"{files.folder}: {name} is {_content(others[name])!r} in {MAP_FILE} and {one!r} in {CONFIG_FILE}; "
                "correct one of them"
            )
    if files.decoder is not None:
        _check_unread(files, own, config)
        return files.decoder, config, _without_repeats(files.config.additional())
    additional = _without_repeats([*files.config.additional(), *files.special.additional()])
    named = {**config, **others}
    special = {record.content for record in (*named.values(), *additional) if record is not None}
    # added_tokens.json has ids only; how a token without a name matches may stand in the list of special tokens.
    with_name = {record.content for record in named.values() if record is not None}
    with_rules = {
        record.content: record
        for record in additional
        if record.content not in with_name and (record.lstrip or record.rstrip or record.single_word)
    }
    decoder: dict[int, TokenRecord] = {}
    listed = [(number, TokenRecord(content=content)) for content, number in files.added.items()]
    for number, record in (*listed, *((token.id or 0, token) for token in json_tokens)):
        if number in decoder and decoder[number].content != record.content:
            raise DataError(
                f"{files.folder}: id {number} is {decoder[number].content!r} and {record.content!r}; correct "
                f"{ADDED_FILE}"
            )
        rules = with_rules.get(record.content, record)
        decoder[number] = rules.model_copy(update={"special": record.special or record.content in special})
    return decoder, named, additional


def _check_unread(files: TokenizerFiles, own: dict[str, int], config: dict[str, TokenRecord | None]) -> None:
    """Compare the files that transformers does not read beside `added_tokens_decoder`."""
    decoder = files.decoder or {}
    ids = {record.content: number for number, record in decoder.items()}
    for content, number in files.added.items():
        if ids.get(content, own.get(content)) != number:
            raise DataError(
                f"{files.folder}: {content!r} is id {number} in {ADDED_FILE}, and "
                f"{ids.get(content, own.get(content, 'missing'))} in added_tokens_decoder of {CONFIG_FILE}; correct one"
            )
    known = {*ids, *own, *(_content(record) for record in (*config.values(), *files.config.additional()))}
    for name, record in files.special.named().items():
        if _content(record) not in (None, _content(config.get(name))):
            if _content(record) not in known:
                raise DataError(_missing(files, f"{name}={_content(record)!r}"))
            announce(
                f"{files.folder}: {name} of {MAP_FILE} is not used; with added_tokens_decoder that of {CONFIG_FILE} "
                "counts"
            )
    for record in files.special.additional():
        if record.content not in known:
            raise DataError(_missing(files, repr(record.content)))


def _missing(files: TokenizerFiles, what: str) -> str:
    return (
        f"{files.folder}: {what} of {MAP_FILE} is not in added_tokens_decoder of {CONFIG_FILE}; add it there or delete "
        f"it from {MAP_FILE}"
    )


def _without_repeats(records: Iterable[TokenRecord]) -> list[TokenRecord]:
    found: dict[str, TokenRecord] = {}
    for record in records:
        found.setdefault(record.content, record)
    return list(found.values())


def _content(record: TokenRecord | None) -> str | None:
    return None if record is None else record.content


def added_tokens_of_json(content: dict[str, object], path: Path) -> list[TokenRecord]:
    """Return the added tokens of a `tokenizer.json`, which transformers' slow tokenizers take over.

    Raises:
        DataError: an entry is not an added token.
    """
    entries = content.get("added_tokens") or []
    try:
        found = [TokenRecord.model_validate(entry) for entry in entries]  # type: ignore[attr-defined]
    except (ValueError, TypeError):
        found = [TokenRecord(content="?", id=None)]
    if any(record.id is None for record in found):
        raise DataError(
            f"{path}: added_tokens holds more than tokens and their ids below {MAX_ID}; correct the file"
        )
    return found


@dataclass(frozen=True)
class TextPart:
    """A part of a text.

    Attributes:
        text: what the model encodes, or the content of a token.
        spans: ranges of characters of the whole text that it comes from.
        token: the added token, or `None` for text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    token: AddedToken | None = None

    def stripped(self, left: bool) -> "TextPart":
        """Return the part without the white space at one of its ends."""
        kept = self.text.lstrip() if left else self.text.rstrip()
        cut = len(self.text) - len(kept)
        positions = self.positions()
        chosen = positions[cut:] if left else positions[: len(positions) - cut]
        return TextPart(kept, tuple((position, position + 1) for position in chosen))

    def positions(self) -> list[int]:
        """Return the position of each character in the whole text."""
        return [position for start, end in self.spans for position in range(start, end)]

    def __add__(self, other: "TextPart") -> "TextPart":
        """Join two parts as text."""
        return TextPart(self.text + other.text, self.spans + other.spans)


class TextSplitter:
    """Splits texts at added tokens.

    Args:
        tokens: what to split at.
    """

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._by_content = {token.content: token for token in tokens}
        self._has_rules = any(token.lstrip or token.rstrip or token.single_word for token in tokens)
        longest_first = sorted(self._by_content, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def finds_any(self, text: str) -> bool:
        """Return whether a token occurs in the text."""
        return self._pattern.search(text) is not None

    def split(self, text: str) -> list[TextPart]:
        """Return the parts of a text in order, none of them empty."""
        parts, start = [], 0
        for match in self._pattern.finditer(text):
            begin, end = match.span()
            if begin > start:
                parts.append(TextPart(text[start:begin], ((start, begin),)))
            parts.append(TextPart(match[0], ((begin, end),)))
            start = end
        if start < len(text):
            parts.append(TextPart(text[start:], ((start, len(text)),)))
        if self._has_rules:
            self._apply_rules(parts)
        return [
            TextPart(part.text, part.spans, self._by_content.get(part.text)) for part in parts if part.text
        ]

    def _apply_rules(self, parts: list[TextPart]) -> None:
        """Let tokens take white space, or become text, one after the other as transformers does."""
        for number in range(len(parts)):
            part = parts[number]
            token = self._by_content.get(part.text)
            if token is None:
                continue
            left = parts[number - 1] if number else TextPart("", ())
            right = parts[number + 1] if number + 1 < len(parts) else TextPart("", ())
            if token.rstrip and right.text:
                parts[number + 1] = right.stripped(left=True)
            if token.lstrip and left.text:
                parts[number - 1] = left.stripped(left=False)
            if token.single_word and left.text and left.text[-1] != " ":
                parts[number - 1] += part
                parts[number] = TextPart("", ())
            elif token.single_word and right.text and right.text[0] != " ":
                parts[number + 1] = part + parts[number + 1]
                parts[number] = TextPart("", ())
