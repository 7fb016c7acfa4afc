"""Find the handler that fits a record, by its columns and their values."""

from collections.abc import Mapping
from typing import Any, Literal

from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import filled
from ascendspeed_data.handlers.pairs import ASSISTANT

Wanted = Literal["samples", "pairs"]

ALPACA, MESSAGES, SHAREGPT = "GeneralInstructionHandler", "MessagesHandler", "ShareGPTHandler"


def detected_handler(record: Mapping[str, Any], wanted: Wanted) -> str:
    """Return the name of the built-in handler that reads records such as this one.

    Args:
        record: the first of the input.
        wanted: whether samples or pairs are wanted.

    Raises:
        DataError: none fits, or several do; the message lists the columns.
    """
    found = _pairs(record) if wanted == "pairs" else _samples(record)
    if len(found) == 1:
        return found[0]
    columns = ", ".join(map(str, record))
    if found:
        raise DataError(
            f"the columns {columns} fit {' and '.join(found)}; give --handler-name with one of them"
        )
    if wanted == "samples" and _pairs(record):
        raise DataError(
            f"the columns {columns} hold pairs of a chosen and a rejected answer; use asd-core dpo"
        )
    raise DataError(
        f"the columns {columns} fit no built-in handler of {wanted}; map them by --columns, such as "
        "prompt=question,response=answer, or give --handler-name (see asd-data handlers)"
    )


def _samples(record: Mapping[str, Any]) -> list[str]:
    has = _filled_columns(record)
    if {"chosen", "rejected"} & has:
        return []
    found = []
    if "messages" in has:
        found.append(MESSAGES)
    if "conversations" in has:
        found.append(SHAREGPT)
    if {"instruction", "output"} <= has:
        found.append(ALPACA)
    if {"prompt", "completion"} <= has:
        is_text = isinstance(record["prompt"], str) and isinstance(record["completion"], str)
        found.append("CompletionHandler" if is_text else "MessagesCompletionHandler")
    if {"prompt", "response"} <= has:
        found.append("ResponseHandler")
    return found


def _pairs(record: Mapping[str, Any]) -> list[str]:
    has = _filled_columns(record)
    if "instruction" in has and (isinstance(record.get("output"), list) or {"chosen", "rejected"} <= has):
        return ["AlpacaPairHandler"]
    if not {"chosen", "rejected"} <= has:
        return []
    if "conversations" in has:
        return ["ShareGPTPairHandler"]
    texts = [record[name] for name in ("chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts) or isinstance(record.get("prompt"), list):
        return ["MessagesPairHandler"]
    if "prompt" in has:
        return ["TextPairHandler"]
    return ["HHRLHFHandler"] if all(ASSISTANT in text for text in texts) else []


def _filled_columns(record: Mapping[str, Any]) -> set[str]:
    return {name for name, value in record.items() if filled(value) or value == ""}
