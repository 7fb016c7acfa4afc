"""Read the JSON files beside a tokenizer: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`.

Only the keys that decide ids are read. A value of another type, or bytes that are not UTF-8, are one line.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from ascendspeed_data.command_line import announce
from ascendspeed_data.errors import DataError

CONFIG_FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE_FILE, TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
"""Names of the chat template that is used if none is named, and of the one for conversations with tools."""

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Named special tokens, in the order in which transformers gives ids to new ones."""

MAX_ID = 2**24
"""All ids are smaller; the largest vocabularies have a few hundred thousand."""


class TokenRecord(BaseModel):
    """A token as the files describe it (`tokenizers.AddedToken`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content: StrictStr = Field(min_length=1)
    lstrip: StrictBool = False
    rstrip: StrictBool = False
    single_word: StrictBool = False
    normalized: StrictBool | None = None
    special: StrictBool | None = None
    type_: Literal["AddedToken"] | None = Field(None, alias="__type")
    id: StrictInt | None = Field(None, ge=0, lt=MAX_ID)


Token = StrictStr | TokenRecord


class NamedTemplate(BaseModel):
    """One of several chat templates."""

    name: StrictStr
    template: StrictStr


class SpecialTokens(BaseModel):
    """`special_tokens_map.json`, and the same keys of `tokenizer_config.json`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    bos_token: Token | None = None
    eos_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    pad_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None

    def named(self) -> dict[str, TokenRecord | None]:
        """Return the named tokens that the file has, `null` among them."""
        return {key: _record(getattr(self, key)) for key in NAMED if key in self.model_fields_set}

    def additional(self) -> list[TokenRecord]:
        """Return the special tokens without a name."""
        extra = self.extra_special_tokens
        found = [
            *(self.additional_special_tokens or ()),
            *(extra.values() if isinstance(extra, dict) else extra or ()),
        ]
        records = [_record(token) for token in found]
        return [record for record in records if record is not None]

    def unknown_names(self) -> dict[str, str]:
        """Return the tokens whose names (`fill_token`) transformers has for one family only."""
        return {
            key: value
            for key, value in (self.model_extra or {}).items()
            if key.endswith("_token") and isinstance(value, str)
        }


class TokenizerConfig(SpecialTokens):
    """The keys of `tokenizer_config.json` that decide ids."""

    tokenizer_class: StrictStr | None = None
    legacy: StrictBool | None = None
    add_prefix_space: StrictBool | None = None
    add_bos_token: StrictBool | None = None
    add_eos_token: StrictBool | None = None
    split_special_tokens: StrictBool | None = None
    sp_model_kwargs: dict[str, Any] | None = None
    added_tokens_decoder: dict[str, TokenRecord] | None = None
    chat_template: StrictStr | list[NamedTemplate] | None = None

    @property
    def is_legacy(self) -> bool:
        """Whether SentencePiece puts a space before each text between two added tokens, as before July 2023."""
        return self.legacy is not False and self.tokenizer_class not in (
            "CodeLlamaTokenizer",
            "CodeLlamaTokenizerFast",
        )


@dataclass(frozen=True)
class TokenizerFiles:
    """The files beside a tokenizer; by default there are none.

    Attributes:
        folder: of the tokenizer.
        has_config: whether there is a `tokenizer_config.json`.
        config: `tokenizer_config.json`.
        special: `special_tokens_map.json`.
        added: id of each token of `added_tokens.json`.
        decoder: tokens of `added_tokens_decoder` by id, or `None`.
        chat_templates: Jinja templates for conversations by name; `default` is the name of a single one.
    """

    folder: Path
    has_config: bool = False
    config: TokenizerConfig = field(default_factory=TokenizerConfig)
    special: SpecialTokens = field(default_factory=SpecialTokens)
    added: dict[str, int] = field(default_factory=dict)
    decoder: dict[int, TokenRecord] | None = None
    chat_templates: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Read the files of a folder.

        Raises:
            DataError: a file is not UTF-8 or not JSON, or a value has another type.
        """
        content = read_json(folder / CONFIG_FILE)
        config = _parse(TokenizerConfig, content, folder / CONFIG_FILE)
        if config.tokenizer_class == "LLaMATokenizer":
            announce(f"{folder / CONFIG_FILE} names LLaMATokenizer, an old name of LlamaTokenizer")
        if config.split_special_tokens:
            raise DataError(
                f"{folder / CONFIG_FILE}: split_special_tokens=true is not supported; special tokens of a text always "
                "become ids, so delete the key"
            )
        return cls(
            folder,
            content is not None,
            config,
            _parse(SpecialTokens, read_json(folder / MAP_FILE), folder / MAP_FILE),
            _added(folder / ADDED_FILE),
            _decoder(config, folder / CONFIG_FILE),
            _templates(config, folder),
        )


def _added(path: Path) -> dict[str, int]:
    content = read_json(path) or {}
    for token, number in content.items():
        if type(number) is not int or not 0 <= number < MAX_ID or not token or not _is_text(token):
            raise DataError(f"{path}: {token!r}: {number!r} is not a token and its id; correct the file")
    return content


def _is_text(token: str) -> bool:
    try:
        token.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoder(config: TokenizerConfig, path: Path) -> dict[int, TokenRecord] | None:
    if config.added_tokens_decoder is None:
        return None
    found: dict[int, TokenRecord] = {}
    for key, record in config.added_tokens_decoder.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < MAX_ID):
            raise DataError(f"{path}: added_tokens_decoder.{key[:40]} is not an id; correct the file")
        found[int(key)] = record
    return found


def _templates(config: TokenizerConfig, folder: Path) -> dict[str, str]:
    """Return the chat templates of a folder by name; those in files replace those of the config, as in transformers."""
    paths = {
        path.name.removesuffix(".jinja"): path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))
    }
    if (folder / TEMPLATE_FILE).is_file():
        if DEFAULT in paths:
            raise DataError(
                f"{folder / TEMPLATE_FILE} and {paths[DEFAULT]} are both the default chat template; delete one"
            )
        paths[DEFAULT] = folder / TEMPLATE_FILE
    if paths:
        return {name: _text(path) for name, path in paths.items()}
    if isinstance(config.chat_template, list):
        names = [item.name for item in config.chat_template]
        for name in names:
            if names.count(name) > 1:
                raise DataError(f"{folder / CONFIG_FILE}: chat_template has {name!r} twice; delete one")
        return {item.name: item.template for item in config.chat_template}
    return {} if config.chat_template is None else {DEFAULT: config.chat_template}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}; correct the file") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; return `None` if there is no such file.

    Raises:
        DataError: the file is not UTF-8, not JSON, not an object, or has a key twice.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; correct the file") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} holds {type(content).__name__}, not a JSON object; correct the file")
    return content


Model = TypeVar("Model", bound=BaseModel)


def _parse(model: type[Model], content: dict[str, Any] | None, path: Path) -> Model:
    try:
        return model.model_validate(content or {})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"][:3]) or "the file"
        raise DataError(
            f"{path}: {where}={str(first['input'])[:60]!r}: {first['msg'].lower()}; correct the file"
        ) from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return found


def _record(token: Token | None) -> TokenRecord | None:
    if token is None or isinstance(token, TokenRecord):
        return token
    return TokenRecord.model_construct(content=token, special=True)
