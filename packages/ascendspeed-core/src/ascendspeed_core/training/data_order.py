"""What decides the samples of a run, as a checkpoint keeps it: a run that goes on must read the same ones.

Settings are compared by what they mean. Files are the same if their content is, under whatever path; weights of a
blend and shares of a split are the same if their proportions are.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_core.config.data import DOCUMENT_OPTIONS, OWN_PATHS, DataConfig
from ascendspeed_core.config.split import SPLITS, split_fractions
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.data.content import dataset_content, describe_change
from ascendspeed_core.launch import announce
from ascendspeed_data.data_path import parse_blend
from ascendspeed_data.errors import AscendSpeedError, ConfigError

HELD_OUT = ("validation", "test")
"""Keys of held-out data of its own."""

ORDER_OPTIONS = (*DOCUMENT_OPTIONS, "no_shuffle")
"""Options of the data that release 0.1.0 kept with the others, or did not know."""

CLOSE = 1e-9
"""Relative difference of proportions that are the same, as decimals are rounded."""


def data_order(config: PretrainConfig, more: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the samples of a run and their order; the number of epochs does too, see `order_digest`.

    Args:
        config: of the run.
        more: what the objective adds.
    """
    data = config.data
    order: dict[str, Any] = {
        "data": _parts(data, 0),
        "split": data.shares(0),
        "seq_length": data.seq_length,
        "seed": config.training.seed,
    }
    if data.has_own_paths:
        order |= {SPLITS[number]: _parts(data, number) for number in (1, 2)}
    return order | {name: getattr(data, name) for name in ORDER_OPTIONS} | dict(more)


def _parts(data: DataConfig, split_index: int) -> list[dict[str, Any]]:
    prefixes, given = data.blend(split_index)
    weights: Sequence[float | None] = given or [None] * len(prefixes)
    return [
        {"name": Path(prefix).name, "weight": weight, "content": dataset_content(prefix)}
        for prefix, weight in zip(prefixes, weights, strict=True)
    ]


def check_data_order(
    where: str, run: Mapping[str, Any], before: Mapping[str, Any], now: Mapping[str, Any]
) -> None:
    """Check that a run goes on with the samples that it began with.

    Args:
        where: its checkpoint, for messages.
        run: the options that the checkpoint keeps, in the sections of today.
        before: the `data_order` of the checkpoint.
        now: that of the run.

    Raises:
        AscendSpeedError: an option or a file would change samples or their order.
    """
    stored = run.get("data", {})
    before = {name: bool(stored.get(name, False)) for name in ORDER_OPTIONS} | dict(before)
    changed = [_change_of_files(before.get("data"), now["data"])]
    changed += [
        f"{key} was {before.get(key)}, is {value}"
        for key, value in now.items()
        if key not in ("data", *HELD_OUT) and not _is_same(key, before.get(key), value)
    ]
    found = [text for text in changed if text]
    if found:
        raise AscendSpeedError(
            f"{where}: the samples or their order would change ({'; '.join(found)}), so data would be seen twice or "
            "never; keep these options and the data, stop early with --exit-interval, or give --finetune to start the "
            "data anew"
        )
    for key in HELD_OUT:
        text = _change_of_files(before.get(key, []), now.get(key, []))
        if text:
            announce(f"{key}: {text}; its losses do not continue those of the run so far")


def as_it_began(
    before: Mapping[str, Any], data: DataConfig, now: Mapping[str, Any]
) -> tuple[DataConfig, dict[str, Any]]:
    """Return the options of the data, and their order, with parts, weights and shares as a run began with them.

    Proportions that mean the same may differ in their last bits, and then round to another number of samples; parts in
    another sequence are drawn in another one.

    Args:
        before: the `data_order` of a checkpoint that means the same.
        data: the options given.
        now: their `data_order`.
    """
    update: dict[str, Any] = {}
    order = dict(now)
    for split_index, key in enumerate(("data", *HELD_OUT)):
        known, parts = _listed(before.get(key)), now.get(key)
        if known is None or not parts or _change_of_files(known, parts):
            continue
        indices, prefixes = _matching_indices(known, parts), data.blend(split_index)[0]
        weights = [part["weight"] for part in known]
        words: list[str] = []
        for index, weight in zip(indices, weights, strict=True):
            words += [prefixes[index]] if weight is None else [repr(weight), prefixes[index]]
        update[OWN_PATHS[split_index] if data.has_own_paths else "data_path"] = tuple(words)
        order[key] = [
            parts[index] | {"weight": weight} for index, weight in zip(indices, weights, strict=True)
        ]
    if not data.has_own_paths and "split" in before:
        update["split"] = order["split"] = before["split"]
    return data.model_copy(update=update), order


def _is_same(key: str, before: Any, now: Any) -> bool:
    if key == "split" and isinstance(before, str) and isinstance(now, str):
        return _is_close(split_fractions(before), split_fractions(now))
    return bool(before == now)


def _is_close(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(math.isclose(a, b, rel_tol=CLOSE) for a, b in zip(one, other, strict=True))


def _listed(data: Any) -> list[dict[str, Any]] | None:
    """Return the parts of a blend; release 0.1.0 kept names and weights as they were typed, and no content."""
    if not isinstance(data, list) or not data:
        return None
    if all(isinstance(part, dict) for part in data):
        return data
    try:
        names, given = parse_blend([str(word) for word in data])
    except ConfigError:
        return None
    weights: Sequence[float | None] = given or [None] * len(names)
    return [
        {"name": name, "weight": weight, "content": None} for name, weight in zip(names, weights, strict=True)
    ]


def _change_of_files(before: Any, now: list[dict[str, Any]]) -> str | None:
    """Say how files or weights of a blend differ from before; `None` if they mean the same."""
    known = _listed(before)
    if known is None:
        return f"the data was {_named(before)}, is {_names(now)}" if before or now else None
    if len(known) != len(now):
        return f"the data was {_names(known)}, is {_names(now)}"
    now = [now[index] for index in _matching_indices(known, now)]
    for old, new in zip(known, now, strict=True):
        text = _change_of_part(old, new)
        if text:
            return f"the data {new['name']} is not what it was: {text}"
    if not _is_close(_fractions(known), _fractions(now)):
        return f"the blend was {_names(known)}, is {_names(now)}"
    return None


def _change_of_part(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    if old["content"] is None:
        return None if old["name"] == new["name"] else f"it was {old['name']}"
    return describe_change(old["content"], new["content"])


def _matching_indices(known: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return for each part of a blend which of today's parts it is; they may be given in another sequence.

    The same data twice goes by weight. Where a part is missing, all are taken in their sequence.
    """
    before, today = _fractions(known), _fractions(now)
    left, found = list(range(len(now))), []
    for number, part in enumerate(known):
        same = [index for index in left if _change_of_part(part, now[index]) is None]
        if not same:
            return list(range(len(now)))
        found.append(min(same, key=lambda index: abs(today[index] - before[number])))
        left.remove(found[-1])
    return found


def _fractions(parts: Sequence[Mapping[str, Any]]) -> list[float]:
    weights = [1.0 if part["weight"] is None else float(part["weight"]) for part in parts]
    return [weight / math.fsum(weights) for weight in weights]


def _names(parts: Sequence[Mapping[str, Any]]) -> str:
    words = [
        part["name"] if part["weight"] is None else f"{part['weight']:g} {part['name']}" for part in parts
    ]
    return " ".join(words) or "none"


def _named(before: Any) -> str:
    return " ".join(map(str, before)) if isinstance(before, list) and before else "none"
