"""Prompts in lines: texts, or JSON with ids, seeds, and what belongs to a prompt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError

Format = Literal["text", "jsonl"]


@dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
        prompt: text or ids.
        seed: of its draws, if it has one of its own.
        beside: what else its line holds; goes into the answer's.
    """

    prompt: str | list[int]
    seed: int | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)


def text_of(file: Path) -> str:
    """Return the text of a file of prompts."""
    if not file.is_file():
        raise AscendSpeedError(f"prompt_file={file} does not exist; check --prompt-file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"prompt_file={file} is not UTF-8: {error}") from None


def asked_in(text: str, format_: Format, where: str) -> list[PromptRecord]:
    """Return the prompts in lines of text; empty lines of JSON are left out.

    Raises:
        ConfigError: there is none.
        DataError: a line is not JSON, or holds no prompt.
    """
    # Not splitlines, which also cuts at characters that belong to a text.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if format_ == "jsonl":
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        asked = [_asked_in_json(line, f"{where}, line {number}") for number, line in numbered]
    else:
        asked = [PromptRecord(line) for line in lines]
    if not asked:
        raise ConfigError(
            f"no prompt given ({where} is empty); give --prompt TEXT, --prompt-file FILE, or lines on stdin"
        )
    return asked


def _asked_in_json(line: str, where: str) -> PromptRecord:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    beside = value if isinstance(value, dict) else {"prompt": value}
    prompts = [beside[name] for name in ("prompt", "prompt_token_ids") if name in beside]
    if len(prompts) != 1 or not _is_prompt(prompts[0]):
        raise DataError(
            f"{where} holds no prompt; give a text, a list of ids, or an object with prompt or prompt_token_ids"
        )
    seed = beside.get("seed")
    if seed is not None and type(seed) is not int:
        raise DataError(f"{where}: seed={seed!r} is no whole number")
    rest = {name: one for name, one in beside.items() if name not in ("prompt", "prompt_token_ids", "seed")}
    return PromptRecord(prompts[0], seed, rest)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(one) is int for one in value))
