"""Copy values between two interpreters, one of which is not trusted.

Values of Python's own plain types travel by value, as JSON; whoever decodes trusts nothing but Python's JSON parser.
Objects of any other type stay where they are, and a reference travels. Within one call, containers keep their identity:
the receiver of arguments reports which of them changed, and the sender changes its own objects likewise.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import collections
import enum
import json
import os
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

MAX_FRAME_BYTES = 64 * 1024**2
MAX_SHORT_INT = 2**63
DICT_KINDS: Mapping[str, type] = MappingProxyType(
    {
        "dict": dict,
        "OrderedDict": collections.OrderedDict,
        "Counter": collections.Counter,
        "defaultdict": collections.defaultdict,
    }
)
PLAIN_TYPES: Mapping[str, type] = MappingProxyType(
    {
        one.__name__: one
        for one in (
            bool,
            int,
            float,
            complex,
            str,
            bytes,
            bytearray,
            list,
            tuple,
            dict,
            set,
            frozenset,
            type(None),
        )
    }
)
CONTAINERS = frozenset({list, set, bytearray, collections.deque, *DICT_KINDS.values()})


class WireError(Exception):
    """What came is no valid message."""


class Frames:
    """Messages over two pipes: a length of four bytes, then JSON.

    Args:
        source: descriptor to read from.
        sink: descriptor to write to.
    """

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink

    def send(self, message: object) -> None:
        """Write one message.

        Raises:
            WireError: it is too long, or too deep.
            OSError: the other side is gone.
        """
        try:
            text = json.dumps(message, check_circular=False, separators=(",", ":")).encode("ascii")
        except RecursionError:
            raise WireError("a value is nested too deeply") from None
        if len(text) > MAX_FRAME_BYTES:
            raise WireError(f"a value takes more than {MAX_FRAME_BYTES // 1024**2} MiB")
        left = memoryview(struct.pack("!I", len(text)) + text)
        while left:
            left = left[os.write(self._sink, left) :]

    def receive(self) -> Any:
        """Read one message.

        Raises:
            EOFError: the other side is gone.
            WireError: it is no message.
        """
        (length,) = struct.unpack("!I", self._read(4))
        if length > MAX_FRAME_BYTES:
            raise WireError("a message is too long")
        try:
            return json.loads(self._read(length).decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise WireError(f"a message is no JSON ({type(error).__name__})") from None

    def _read(self, length: int) -> bytes:
        parts, missing = [], length
        while missing:
            part = os.read(self._source, min(missing, 1024**2))
            if not part:
                raise EOFError
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)


class Encoder:
    """Make messages of values.

    Containers are numbered in the order in which they appear, after those that both sides know already.

    Args:
        refer: makes the message of an object of another type.
        records: names of the classes that both sides define, whose objects travel by value.
        known: containers of the same call that the other side has.
    """

    def __init__(
        self, refer: Callable[[object], list[Any]], records: Mapping[type, str], known: Sequence[Any] = ()
    ) -> None:
        self.objects = list(known)
        self._numbers = {id(one): number for number, one in enumerate(known)}
        self._refer, self._records = refer, records

    def encode(self, value: Any) -> Any:
        """Return the message of a value."""
        kind = type(value)
        if value is None or kind is bool or kind is str or kind is float:
            return value
        if kind is int:
            return value if -MAX_SHORT_INT < value < MAX_SHORT_INT else ["i", hex(value)]
        if kind is tuple:
            return ["t", [self.encode(one) for one in value]]
        if isinstance(value, enum.Enum) and kind in self._records:
            return ["E", self._records[kind], value.name]
        if kind in CONTAINERS or kind in self._records:
            if id(value) in self._numbers:
                return ["r", self._numbers[id(value)]]
            self._numbers[id(value)] = number = len(self.objects)
            self.objects.append(value)
            return [self._container_tag(kind), number, self.contents(value)]
        if kind is frozenset:
            return ["f", [self.encode(one) for one in value]]
        return self._encode_other(kind, value)

    def contents(self, value: Any) -> Any:
        """Return the message of what a container holds."""
        kind = type(value)
        if kind is bytearray:
            return value.decode("latin-1")
        if kind is collections.deque:
            return [value.maxlen, [self.encode(one) for one in value]]
        if kind in self._records:
            return [[name, self.encode(one)] for name, one in vars(value).items()]
        if isinstance(value, dict):
            pairs = [[self.encode(key), self.encode(one)] for key, one in value.items()]
            if kind is not collections.defaultdict:
                return pairs
            factory = getattr(value, "default_factory", None)
            return [self.encode(factory) if factory in PLAIN_TYPES.values() else None, pairs]
        return [self.encode(one) for one in value]

    def _container_tag(self, kind: type) -> str:
        return "R:" + self._records[kind] if kind in self._records else kind.__name__

    def _encode_other(self, kind: type, value: Any) -> Any:
        if value is Ellipsis or value is NotImplemented:
            return ["e", repr(value)]
        if isinstance(value, type) and PLAIN_TYPES.get(value.__name__) is value:
            return ["y", value.__name__]
        if isinstance(value, type) and value in self._records:
            return ["C", self._records[value]]
        for tag, (module, name, encode, _) in _RARE.items():
            # The module is not imported for this: without it there is no object of the type.
            if kind.__name__ == name and getattr(sys.modules.get(module), name, None) is kind:
                return [tag, encode(value)]
        if _is_named_tuple(kind):
            return ["n", kind.__name__, list(kind._fields), [self.encode(one) for one in value]]  # type: ignore[attr-defined]
        return self._refer(value)


def _is_named_tuple(kind: type) -> bool:
    """Return whether a type adds names to tuple, and no behaviour that comparisons use."""
    same = (
        "__eq__",
        "__ne__",
        "__lt__",
        "__le__",
        "__gt__",
        "__ge__",
        "__hash__",
        "__getitem__",
        "__iter__",
        "__len__",
    )
    return (
        kind.__bases__ == (tuple,)
        and isinstance(getattr(kind, "_fields", None), tuple)
        and all(getattr(kind, name) is getattr(tuple, name) for name in (*same, "__contains__", "__add__"))
    )


def _texts(*names: str) -> Callable[[Any], list[str]]:
    """Return a function that writes whole numbers, the attributes `names` of a value."""
    return lambda value: [hex(getattr(value, name)) for name in names]


def _numbers(texts: Sequence[str]) -> list[int]:
    return [int(text, 16) for text in texts]


def _moment(kind: Any, text: str) -> Any:
    return kind.fromisoformat(text)


_RARE: Mapping[str, tuple[str, str, Callable[[Any], Any], Callable[[Any, Any], Any]]] = MappingProxyType(
    {
        "b": ("builtins", "bytes", lambda value: value.decode("latin-1"), lambda _, text: text.encode("latin-1")),
        "c": ("builtins", "complex", lambda v: [v.real, v.imag], lambda kind, numbers: kind(*numbers)),
        "g": ("builtins", "range", _texts("start", "stop", "step"), lambda kind, texts: kind(*_numbers(texts))),
        "D": ("decimal", "Decimal", str, lambda kind, text: kind(text)),
        "F": (
            "fractions", "Fraction", _texts("numerator", "denominator"), lambda kind, texts: kind(*_numbers(texts)),
        ),
        "md": ("datetime", "date", lambda value: value.isoformat(), _moment),
        "mt": ("datetime", "time", lambda value: value.isoformat(), _moment),
        "mm": ("datetime", "datetime", lambda value: value.isoformat(), _moment),
        "ml": (
            "datetime", "timedelta", _texts("days", "seconds", "microseconds"),
            lambda kind, texts: kind(*_numbers(texts)),
        ),
    }
)  # fmt: skip
"""Types that are rarely met, by tag: module, name, message of a value, value of a message."""


class Decoder:
    """Make values of messages.

    Args:
        resolve: finds the object of a message that the other side's `refer` made.
        records: classes that both sides define, by name.
        known: containers of the same call that the other side has.
    """

    def __init__(
        self,
        resolve: Callable[[Sequence[Any]], Any],
        records: Mapping[str, type],
        known: Sequence[Any] = (),
    ) -> None:
        self.objects = list(known)
        self._first = [_parts(one) for one in known]
        self._resolve, self._records = resolve, records

    def decode(self, message: Any) -> Any:
        """Return the value of a message.

        Raises:
            WireError: it is none.
        """
        if not isinstance(message, list):
            if isinstance(message, dict):
                raise WireError("an object of JSON is no value")
            return message
        try:
            return self._decode_tagged(*message)
        except WireError:
            raise
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise WireError(f"a message is no value ({type(error).__name__})") from None

    def changes(self) -> list[list[Any]]:
        """Return numbers of containers that no longer hold what they held when they were decoded."""
        return [
            [number, one]
            for number, (one, first) in enumerate(zip(self.objects, self._first, strict=False))
            if not _same_parts(_parts(one), first)
        ]

    def seal(self) -> None:
        """Remember what the containers hold now, for `changes`."""
        self._first = [_parts(one) for one in self.objects]

    def fill(self, number: int, contents: Any) -> None:
        """Replace what a container holds."""
        container = self.objects[number]
        kind = type(container)
        if kind in (list, bytearray):
            container[:] = self._items(kind, contents)
        elif kind is collections.deque:
            container.clear()
            container.extend(self.decode(one) for one in contents[1])
        elif kind is set:
            items = {self.decode(one) for one in contents}
            container.clear()
            container.update(items)
        else:
            if kind is collections.defaultdict:
                container.default_factory = self.decode(contents[0])
                contents = contents[1]
            pairs = [(self.decode(key), self.decode(one)) for key, one in contents]
            held = container if isinstance(container, dict) else vars(container)
            held.clear()
            dict.update(held, pairs)  # Counter's own would count.

    def _items(self, kind: type, contents: Any) -> Any:
        return contents.encode("latin-1") if kind is bytearray else [self.decode(one) for one in contents]

    def _decode_tagged(self, tag: str, *rest: Any) -> Any:
        if tag == "t":
            return tuple([self.decode(one) for one in rest[0]])
        if tag == "r":
            return self.objects[_number(rest[0])]
        if tag == "f":
            return frozenset([self.decode(one) for one in rest[0]])
        if tag == "n":
            made = collections.namedtuple(rest[0], rest[1])  # type: ignore[misc]
            return made(*[self.decode(one) for one in rest[2]])
        if tag in _RARE:
            module, name, _, decode = _RARE[tag]
            return decode(getattr(import_module(module), name), rest[0])
        if tag == "i":
            return int(rest[0], 16)
        if tag == "y":
            return PLAIN_TYPES[rest[0]]
        if tag == "e":
            return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[rest[0]]
        if tag == "C":
            return self._records[rest[0]]
        if tag == "E":
            return self._records[rest[0]][rest[1]]  # type: ignore[index]
        if tag in ("o", "h", "k"):
            return self._resolve([tag, *rest])
        number, contents = rest
        if number != len(self.objects):
            raise WireError("containers are not in order")
        self.objects.append(self._empty(tag, contents))
        self.fill(number, contents)
        return self.objects[number]

    def _empty(self, tag: str, contents: Any) -> Any:
        if tag in DICT_KINDS:
            return DICT_KINDS[tag]()
        if tag.startswith("R:"):
            found: Any = self._records[tag[2:]]
            return found.__new__(found)
        if tag == "deque":
            return collections.deque(maxlen=contents[0])
        return {"list": list, "set": set, "bytearray": bytearray}[tag]()


def _number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise WireError("a number of a container is none")
    return value


def _parts(container: Any) -> list[Any]:
    """Return what a container holds, to compare it later by identity."""
    if isinstance(container, bytearray):
        return [bytes(container)]
    if isinstance(container, dict):
        return [*container.keys(), *container.values()]
    if type(container) in CONTAINERS:
        return list(container)
    return [*vars(container).keys(), *vars(container).values()]


def _same_parts(now: list[Any], first: list[Any]) -> bool:
    if len(now) != len(first):
        return False
    return all(
        a is b or (type(a) is bytes and type(b) is bytes and a == b) for a, b in zip(now, first, strict=True)
    )
