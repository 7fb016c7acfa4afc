"""Find handlers: built in, from installed packages, or by `module:Class`.

Other packages can add handlers in the entry-point group `ascendspeed_data.handlers`.
"""

import importlib
import inspect
from collections.abc import Collection
from importlib import metadata
from typing import Any

from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean
from ascendspeed_data.handlers import chat, completion, instruction, moss, pairs, text
from ascendspeed_data.handlers.base import SampleHandler, TextHandler

ENTRY_POINT_GROUP = "ascendspeed_data.handlers"

BUILT_IN: tuple[type[Any], ...] = (
    text.GeneralPretrainHandler,
    text.AlpacaPretrainHandler,
    text.StackOverflowPythonPretrainHandler,
    instruction.GeneralInstructionHandler,
    instruction.BelleMultiTurnInstructionHandler,
    moss.MOSSInstructionHandler,
    moss.MOSSMultiTurnHandler,
    instruction.LeetcodePythonInstructionHandler,
    chat.ShareGPTHandler,
    chat.MessagesHandler,
    completion.CompletionHandler,
    completion.MessagesCompletionHandler,
    completion.ResponseHandler,
    pairs.TextPairHandler,
    pairs.HHRLHFHandler,
    pairs.AlpacaPairHandler,
    pairs.MessagesPairHandler,
    pairs.ShareGPTPairHandler,
    text.AlpacaPretrainHandler2023,
    instruction.BelleMultiTurnInstructionHandler2023,
    moss.MOSSInstructionHandler2023,
    moss.MOSSMultiTurnHandler2023,
)


OTHER_NAMES = {
    "sharegpt": "ShareGPTHandler",
    "openai": "MessagesHandler",
    "messages": "MessagesHandler",
    "chatml": "MessagesHandler",
    "alpacahandler": "GeneralInstructionHandler",
    "alpacastyle": "GeneralInstructionHandler",
}
"""What the formats are called elsewhere, small letters; of a name that has several the first counts."""


def find_handler(name: str) -> TextHandler | SampleHandler:
    """Return the handler with this name, or an instance of the class `module:Class`.

    Raises:
        ConfigError: the name is unknown; the message lists the known names.
        AscendSpeedError: the module cannot be imported, or the class is not a handler.
    """
    if ":" in name:
        return _make_handler(_import_class(name), name)
    built_in = {handler.name: handler for handler in BUILT_IN}
    if name in built_in:
        return _make_handler(built_in[name], name)
    installed = {point.name: point for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if name not in installed:
        known = [*built_in, *sorted(installed)]
        meant = next((handler for word, handler in OTHER_NAMES.items() if word in name.lower()), None)
        hint = f"; did you mean {meant}?" if meant else did_you_mean(name, known)
        raise ConfigError(
            f"handler_name={name} is unknown{hint}; choose from {', '.join(known)} "
            "(see asd-data handlers), or give your own as module:Class"
        )
    return _make_handler(installed[name].load(), name)


def handlers_for(columns: Collection[str]) -> list[str]:
    """Return the names of built-in handlers of today that read records with these columns, the closest first."""
    fitting = [
        handler
        for handler in BUILT_IN
        if handler.columns and set(handler.columns) <= set(columns) and not handler.name.endswith("2023")
    ]
    # Samples before plain text, and the more columns a handler needs the closer it fits.
    fitting.sort(key=lambda handler: ("Pretrain" in handler.name, -len(handler.columns)))
    return [handler.name for handler in fitting]


def all_handlers() -> list[tuple[TextHandler | SampleHandler, str]]:
    """Return every handler with its origin: `built in` or the name of a package."""
    found: list[tuple[TextHandler | SampleHandler, str]] = [
        (_make_handler(handler, handler.name), "built in") for handler in BUILT_IN
    ]
    for point in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        package = point.dist.name if point.dist else point.value
        found.append((_make_handler(point.load(), point.name), package))
    return found


def _import_class(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise AscendSpeedError(
            f"handler_name={name}: {error}; make the module importable, for example by PYTHONPATH"
        ) from None
    if not hasattr(loaded, attribute):
        classes = [item for item, value in vars(loaded).items() if inspect.isclass(value)]
        raise AscendSpeedError(
            f"handler_name={name}: {module} has no {attribute}{did_you_mean(attribute, classes)}"
        )
    return getattr(loaded, attribute)


def _make_handler(handler_class: Any, name: str) -> TextHandler | SampleHandler:
    handler = handler_class()
    for attribute in ("name", "columns"):
        if not hasattr(handler, attribute):
            raise AscendSpeedError(
                f"handler_name={name}: {handler_class.__qualname__} has no attribute {attribute!r}; add it"
            )
    if not isinstance(handler, TextHandler | SampleHandler):
        raise AscendSpeedError(
            f"handler_name={name}: {handler_class.__qualname__} has neither a method texts(record, key) nor "
            "samples(record, tokenizer); add one"
        )
    return handler
