"""Handlers: how a record becomes documents.

Other packages add theirs under the entry-point group `ascendspeed_data.handlers`.
"""

from collections.abc import Sequence
from importlib import metadata
from typing import Any, Protocol

from ascendspeed_data.errors import ConfigError, did_you_mean

ENTRY_POINTS = "ascendspeed_data.handlers"


class Handler(Protocol):
    """Turn one record into texts to be tokenized.

    Attributes:
        name: as given to `--handler-name`.
        columns: columns that a record must have; empty when they are those of `--json-key`.
    """

    name: str
    columns: Sequence[str]

    def texts(self, record: dict[str, Any], key: str) -> list[str]:
        """Return the documents of a record for one column."""
        ...


class GeneralPretrainHandler:
    """Each column named by `--json-key` is a document, as it stands."""

    name = "GeneralPretrainHandler"
    columns: Sequence[str] = ()

    def texts(self, record: dict[str, Any], key: str) -> list[str]:
        """Return the column's text."""
        return [record[key]]


def find_handler(name: str) -> Handler:
    """Return the handler of that name, built in or from an installed package.

    Raises:
        ConfigError: there is none; the message lists what there is.
    """
    if name == GeneralPretrainHandler.name:
        return GeneralPretrainHandler()
    installed = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        known = [GeneralPretrainHandler.name, *sorted(installed)]
        raise ConfigError(
            f"handler_name={name} is unknown; there are {', '.join(known)}{did_you_mean(name, known)}"
        )
    handler: Handler = installed[name].load()()
    return handler
