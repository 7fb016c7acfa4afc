"""Calls between the process of the tests and the process of the answer.

Both sides ask and serve by the same messages: a request holds a head, arguments and named arguments; a reply holds a
result or an exception, and the containers among the arguments that changed. While one side waits for a reply, the other
may ask, since tests may hand over functions. Neither side reaches more of the other than what it was given.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import builtins
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ascendspeed_eval.sandbox.values import Decoder, Encoder, Frames, WireError


class Peer(ABC):
    """One side of the calls.

    Args:
        frames: messages to and from the other side.
    """

    def __init__(self, frames: Frames) -> None:
        self.frames = frames
        self.classes: dict[str, type] = {}
        self._names: dict[type, str] = {}

    def share_classes(self, classes: Mapping[str, type]) -> None:
        """Let objects of these classes travel by value; the other side has classes of the same names."""
        self.classes = dict(classes)
        self._names = {one: name for name, one in classes.items()}

    def ask(
        self, head: Sequence[Any], args: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        """Ask the other side and return its result, or raise its exception."""
        raised, value = self.exchange(head, args, named or {})
        if raised:
            raise value
        return value

    def exchange(
        self, head: Sequence[Any], args: Sequence[Any], named: Mapping[str, Any]
    ) -> tuple[bool, Any]:
        """Ask the other side.

        Returns:
            Whether it raised an exception; its result, or the exception.

        Raises:
            EOFError, OSError: the other side is gone.
            WireError: it broke the rules of messages.
        """
        encoder = Encoder(self.refer, self._names)
        self.frames.send([head, encoder.encode(tuple(args)), encoder.encode(dict(named))])
        asked = len(encoder.objects)
        while True:
            reply = self.frames.receive()
            if not (isinstance(reply, list) and len(reply) == 3):
                raise WireError("a message has not three parts")
            if reply[0] in ("ok", "error"):
                break
            self.frames.send(self.serve(*reply))
        kind, result, changes = reply
        decoder = Decoder(self.resolve, self.classes, encoder.objects)
        value = decoder.decode(result) if kind == "ok" else self._exception(decoder, result)
        _apply(decoder, changes, asked)
        return kind == "error", value

    def serve(self, head: Any, args: Any, named: Any) -> list[Any]:
        """Do what the other side asks, and return the reply."""
        decoder = Decoder(self.resolve, self.classes)
        given, given_names = decoder.decode(args), decoder.decode(named)
        if not isinstance(given, tuple) or not isinstance(given_names, dict):
            raise WireError("arguments are none")
        decoder.seal()
        encoder = Encoder(self.refer, self._names, decoder.objects)
        try:
            message = ["ok", encoder.encode(self.function(head)(*given, **given_names))]
        except WireError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the one who asked
            encoder = Encoder(self.refer, self._names, decoder.objects)
            message = ["error", _exception_message(encoder, error)]
        return [*message, [[number, encoder.contents(one)] for number, one in decoder.changes()]]

    @abstractmethod
    def function(self, head: Any) -> Callable[..., Any]:
        """Return what a request asks to call."""

    @abstractmethod
    def refer(self, value: object) -> list[Any]:
        """Return a reference to an object that stays here."""

    @abstractmethod
    def resolve(self, message: Sequence[Any]) -> Any:
        """Return the object that a reference means."""

    def _exception(self, decoder: Decoder, message: Any) -> BaseException:
        """Make an exception like the other side's, of the nearest class that both know."""
        if not (isinstance(message, list) and len(message) == 4 and isinstance(message[0], list)):
            raise WireError("an exception is none")
        names, args, attributes, text = message
        given = decoder.decode(args)
        if not (isinstance(given, tuple) and isinstance(attributes, list) and isinstance(text, str)):
            raise WireError("an exception is none")
        base: type[BaseException] = next(filter(None, map(self._exception_class, names)), Exception)
        kind = base
        if names[0] != base.__name__:
            name = names[0] if names[0].isidentifier() and names[0].isascii() else "Exception"
            kind = type(name, (base,), {"__str__": lambda _: text})
        try:
            made = kind(*given)
        except Exception:  # noqa: BLE001 - its arguments are not those of its class
            made = kind.__new__(kind, *given)
        _set_attributes(made, decoder, attributes)
        return made

    def _exception_class(self, name: Any) -> type[BaseException] | None:
        if not isinstance(name, str):
            raise WireError("a name of a class is none")
        found = self.classes.get(name) or getattr(builtins, name, None)
        return found if isinstance(found, type) and issubclass(found, BaseException) else None


def _set_attributes(error: BaseException, decoder: Decoder, attributes: list[Any]) -> None:
    try:
        error.__dict__.update({str(name): decoder.decode(one) for name, one in attributes})
    except (TypeError, ValueError) as broken:
        raise WireError(f"attributes of an exception are none ({type(broken).__name__})") from None


def _apply(decoder: Decoder, changes: Any, known: int) -> None:
    try:
        for number, contents in changes:
            if not (type(number) is int and 0 <= number < known):
                raise WireError("a changed container is unknown")
            decoder.fill(number, contents)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise WireError(f"a change is none ({type(error).__name__})") from None


def _exception_message(encoder: Encoder, error: BaseException) -> list[Any]:
    names = [one.__name__ for one in type(error).__mro__[:-1]]
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an exception may break when it is shown
        text = ""
    attributes = [[name, encoder.encode(one)] for name, one in vars(error).items()]
    return [names, encoder.encode(tuple(error.args)), attributes, text]


def shareable_classes(namespace: Mapping[str, Any]) -> dict[str, type]:
    """Return the classes of a namespace whose objects can be made anew from their attributes."""
    return {
        name: one for name, one in namespace.items() if isinstance(one, type) and _is_shareable(name, one)
    }


def _is_shareable(name: str, kind: type) -> bool:
    if kind.__module__ != "builtins" or kind.__name__ != name or getattr(builtins, name, None) is kind:
        return False
    if isinstance(kind, enum.EnumType):
        return True
    plain = (
        getattr(kind, "__new__", None) is object.__new__ and type(kind) is type and kind.__dictoffset__ != 0
    )
    return (plain and not any("__slots__" in vars(one) for one in kind.__mro__[:-1])) or (
        issubclass(kind, BaseException) and type(kind) is type
    )
