"""Find handlers: built in, from installed packages, or by `module:Class`.

Other packages add theirs under the entry-point group `ascendspeed_data.handlers`.
"""

import importlib
import inspect
from importlib import metadata
from typing import Any

from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean
from ascendspeed_data.handlers import chat, instruction, moss, pairs, text
from ascendspeed_data.handlers.base import SampleHandler, TextHandler

ENTRY_POINTS = "ascendspeed_data.handlers"

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


def find_handler(name: str) -> TextHandler | SampleHandler:
    """Return the handler of that name, built in or from an installed package, or the class `module:Class`.

    Raises:
        ConfigError: there is none; the message lists what there is.
        AscendSpeedError: a module that cannot be imported, or a class that is no handler.
    """
    if ":" in name:
        return _checked(_class_of(name), name)
    built_in = {handler.name: handler for handler in BUILT_IN}
    if name in built_in:
        return _checked(built_in[name], name)
    installed = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
    if name not in installed:
        known = [*built_in, *sorted(installed)]
        raise ConfigError(
            f"handler_name={name} is unknown; there are {', '.join(known)}{did_you_mean(name, known)} "
            "(asd-data handlers describes them; your own is given as module:Class)"
        )
    return _checked(installed[name].load(), name)


def all_handlers() -> list[tuple[TextHandler | SampleHandler, str]]:
    """Return every handler with the place that it comes from."""
    found: list[tuple[TextHandler | SampleHandler, str]] = [
        (_checked(handler, handler.name), "built in") for handler in BUILT_IN
    ]
    for point in sorted(metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        package = point.dist.name if point.dist else point.value
        found.append((_checked(point.load(), point.name), package))
    return found


def _class_of(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise AscendSpeedError(
            f"handler_name={name}: {error}; the module must be importable, for example from PYTHONPATH"
        ) from None
    if not hasattr(loaded, attribute):
        classes = [item for item, value in vars(loaded).items() if inspect.isclass(value)]
        raise AscendSpeedError(
            f"handler_name={name}: {module} has no {attribute}{did_you_mean(attribute, classes)}"
        )
    return getattr(loaded, attribute)


def _checked(maker: Any, name: str) -> TextHandler | SampleHandler:
    handler = maker()
    for attribute in ("name", "columns"):
        if not hasattr(handler, attribute):
            raise AscendSpeedError(
                f"handler_name={name}: {maker.__qualname__} has no attribute {attribute!r}"
            )
    if not isinstance(handler, TextHandler | SampleHandler):
        raise AscendSpeedError(
            f"handler_name={name}: {maker.__qualname__} has neither texts(record, key) nor "
            "samples(record, tokenizer)"
        )
    return handler
