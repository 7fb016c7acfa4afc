"""What column formats add to nested values, and how to take it off.

Parquet and Arrow give each object of a column every key that any of its objects has, null where it was absent, and
keep objects with free keys as lists of pairs (maps).
"""

from collections.abc import Iterator
from typing import Any

from ascendspeed_data.sample import Record


def records_of_batch(batch: Any) -> Iterator[Record]:
    """Yield the records of a pyarrow batch: objects without null keys, maps as objects."""
    import pyarrow

    nested = {field.name: field.type for field in batch.schema if pyarrow.types.is_nested(field.type)}
    for record in batch.to_pylist():
        for name, kind in nested.items():
            record[name] = _plain(record[name], kind)
        yield record


def _plain(value: Any, kind: Any) -> Any:
    import pyarrow

    if value is None:
        return None
    if pyarrow.types.is_map(kind):
        return {str(key): _plain(part, kind.item_type) for key, part in value}
    if pyarrow.types.is_struct(kind):
        return {
            kind.field(number).name: _plain(value[kind.field(number).name], kind.field(number).type)
            for number in range(kind.num_fields)
            if value[kind.field(number).name] is not None
        }
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_plain(part, kind.value_type) for part in value]
    return value


def without_null_keys(value: Any) -> Any:
    """Return a value without the keys of its objects that hold null, at every depth."""
    if isinstance(value, dict):
        return {key: without_null_keys(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_null_keys(part) for part in value]
    return value
