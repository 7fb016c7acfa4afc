"""Names of columns: `--columns prompt=question` gives a handler's column the values of another one."""

from collections.abc import Mapping, Sequence

from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.sample import Record


def columns_of_flag(given: Sequence[str]) -> dict[str, str]:
    """Return the names in the input by the names that a handler reads.

    Args:
        given: `NAME=COLUMN`, one or several with commas.

    Raises:
        ConfigError: a value has another form, or a name occurs twice.
    """
    found: dict[str, str] = {}
    for text in given:
        for pair in text.split(","):
            name, equals, column = (part.strip() for part in pair.partition("="))
            if not (name and equals and column):
                raise ConfigError(f"columns={text} is not NAME=COLUMN,...; give such as prompt=question")
            if name in found or column in found.values():
                twice = name if name in found else column
                raise ConfigError(f"columns={text} names {twice!r} twice; name each column once")
            found[name] = column
    return found


def renamed(record: Record, columns: Mapping[str, str]) -> Record:
    """Return a record whose columns have the names that a handler reads.

    Raises:
        DataError: a column is missing, or the record has one of the new name too.
    """
    if not columns:
        return record
    by_source = {column: name for name, column in columns.items()}
    for name, column in columns.items():
        if column not in record:
            raise DataError(
                f"no column {column!r} (--columns {name}={column}); the record has {', '.join(map(str, record))}"
            )
        if name in record and name not in by_source:
            raise DataError(
                f"the record has a column {name!r} beside {column!r} (--columns {name}={column}); keep one"
            )
    return {by_source.get(column, column): value for column, value in record.items()}
