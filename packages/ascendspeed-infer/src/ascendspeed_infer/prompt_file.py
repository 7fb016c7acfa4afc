"""Prompts in lines: texts, or JSON with ids, seeds, and what belongs to a prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.small_files import parse_json, read_text

Format = Literal["text", "jsonl"]


@dataclass(frozen=True)
class PromptRecord:
    """One prompt.

    Attributes:
        prompt: text or ids.
        seed: seed of its draws, if its line has one.
        extra_fields: what else its line holds; it goes into the line of the answer.
        where: file and line, for messages; empty for a single prompt.
    """

    prompt: str | list[int]
    seed: int | None = None
    extra_fields: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


def read_prompt_file(file: Path) -> str:
    """Return the text of a file of prompts."""
    return read_text(file, f"prompt_file={file}", "save it as UTF-8", option="--prompt-file")


def read_prompts(text: str, format_: Format, where: str) -> list[PromptRecord]:
    """Return the prompts in lines of text; empty lines of JSON are left out.

    Raises:
        ConfigError: there is none.
        DataError: a line is not JSON, or holds no prompt.
    """
    # A byte order mark says how the file is stored; it is no part of the first prompt.
    text = text.removeprefix("\ufeff")
    # Not splitlines, which also cuts at characters that belong to a text.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    if format_ == "jsonl":
        numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        records = [_read_json_line(line, f"{where}, line {number}") for number, line in numbered]
    else:
        records = [
            PromptRecord(line, where=f"{where}, line {number}") for number, line in enumerate(lines, 1)
        ]
    if not records:
        raise ConfigError(
            f"no prompt given ({where} is empty); give --prompt TEXT, --prompt-file FILE, or lines on stdin"
        )
    return records


def _read_json_line(line: str, where: str) -> PromptRecord:
    value: Any = parse_json(line, object, where, "correct it")
    fields = value if isinstance(value, dict) else {"prompt": value}
    prompts = [fields[name] for name in ("prompt", "prompt_token_ids") if name in fields]
    if len(prompts) != 1 or not _is_prompt(prompts[0]):
        raise DataError(
            f"{where} holds no prompt; give a text, a list of ids, or an object with prompt or prompt_token_ids"
        )
    seed = fields.get("seed")
    if seed is not None and type(seed) is not int:
        raise DataError(f"{where}: seed={seed!r} is not a whole number")
    extra = {name: one for name, one in fields.items() if name not in ("prompt", "prompt_token_ids", "seed")}
    return PromptRecord(prompts[0], seed, extra, where)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(one) is int for one in value))
