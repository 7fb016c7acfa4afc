"""The side of the tests: functions and objects of the answer, which stay in its process.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ascendspeed_eval.sandbox.calls import Peer
from ascendspeed_eval.sandbox.values import PLAIN_TYPES, Frames, WireError

DECIDING = frozenset(
    {f"__{name}__" for name in ("lt", "le", "gt", "ge", "eq", "ne", "bool", "contains")}
    | {
        f"__{prefix}{name}__"
        for prefix in ("", "r", "i")
        for name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow", "lshift", "rshift",
                     "and", "xor", "or")
    }
)  # fmt: skip
"""Operators whose result the answer's own class decides, though the test's values stand beside it."""

DELIVERING = frozenset(
    f"__{name}__"
    for name in (
        "call", "iter", "next", "len", "getitem", "setitem", "delitem", "reversed", "length_hint", "int", "float",
        "complex", "index", "round", "trunc", "floor", "ceil", "neg", "pos", "abs", "invert", "enter", "exit", "bytes",
    )
)  # fmt: skip
"""Other operators: what they return is compared by the tests."""

ALWAYS = ("__eq__", "__ne__", "__repr__", "__str__", "__format__")
OPERATORS = DECIDING | DELIVERING | {*ALWAYS, "__hash__"}


class AnswerGoneError(BaseException):
    """The process of the answer ended or broke the rules; no `except Exception` of a test goes on from it."""


class TestsSide(Peer):
    """What the tests know of the answer.

    Attributes:
        broken: why the process of the answer can no longer be asked.
        own_operations: operators of the answer's own classes, and its names, that the tests used.
    """

    def __init__(self, frames: Frames) -> None:
        super().__init__(frames)
        self.broken: str | None = None
        self.own_operations = 0
        self._handed: list[Callable[..., Any]] = []
        self._objects: dict[int, Any] = {}
        self._kinds: dict[tuple[str, tuple[str, ...], str], type] = {}

    def exchange(self, head: Sequence[Any], args: Sequence[Any], named: Any) -> tuple[bool, Any]:
        """Ask the answer.

        Raises:
            AnswerGoneError: there is no answer that could be used, now or before.
        """
        if self.broken is None:
            try:
                return super().exchange(head, args, named)
            except EOFError:
                self.broken = "ended"
            except OSError as error:
                self.broken = f"ended ({error.strerror})"
            except (WireError, RecursionError, MemoryError) as error:
                self.broken = f"was stopped: {str(error) or type(error).__name__}"
        raise AnswerGoneError(self.broken)

    def operate(self, handle: int, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Use an operator of an object of the answer."""
        self.own_operations += name in DECIDING
        return self.ask(["operator", handle, name], args, named)

    def function(self, head: Any) -> Callable[..., Any]:
        """Return a function that the tests handed over; the answer may call nothing else."""
        if not (isinstance(head, list) and len(head) == 2 and head[0] == "handed"):
            raise WireError("a request of the answer is none")
        return self._found_handed(head[1])

    def refer(self, value: object) -> list[Any]:
        """Refer to an object of the answer, or hand over a function.

        Raises:
            WireError: it is neither, so it cannot leave the tests.
        """
        kind = type(value)
        if kind in self._kinds.values():
            return ["h", object.__getattribute__(value, "_remote_handle")]
        if not callable(value) or isinstance(value, type):
            raise WireError(f"the tests hand over an object of class {kind.__name__}, which cannot be copied")
        self._handed.append(value)
        return ["k", len(self._handed) - 1]

    def resolve(self, message: Sequence[Any]) -> Any:
        """Return what stands for an object of the answer, or the function that the tests had handed over."""
        if message[0] == "k" and len(message) == 2:
            return self._found_handed(message[1])
        tag, handle, name, operators, base = message
        valid = isinstance(name, str) and isinstance(operators, list) and OPERATORS.issuperset(operators)
        if not (tag == "o" and type(handle) is int and valid and base in (*PLAIN_TYPES, "")):
            raise WireError("a reference is none")
        if handle not in self._objects:
            self._objects[handle] = self._stand_in(handle, name, tuple(operators), base)
        return self._objects[handle]

    def _found_handed(self, number: Any) -> Callable[..., Any]:
        if not (type(number) is int and 0 <= number < len(self._handed)):
            raise WireError("the answer asks for what it was not given")
        return self._handed[number]

    def _stand_in(self, handle: int, name: str, operators: tuple[str, ...], base: str) -> Any:
        key = (name, operators, base)
        if key not in self._kinds:
            self._kinds[key] = self._new_class(name, {*operators, *ALWAYS}, base)
        made: Any = object.__new__(self._kinds[key])
        object.__setattr__(made, "_remote_handle", handle)
        return made

    def _new_class(self, name: str, operators: set[str], base: str) -> type:
        """Make a class with the operators that a class of the answer has; each asks the answer."""

        def operator(name: str) -> Callable[..., Any]:
            return lambda own, *args, **named: self.operate(own._remote_handle, name, args, named)

        def ask(kind: str) -> Callable[..., Any]:
            return lambda own, name, *args: self.ask([kind, own._remote_handle, name], args)

        members: dict[str, Any] = {one: operator(one) for one in operators}
        members["__hash__"] = members.get("__hash__")
        members.update(__getattr__=ask("get"), __setattr__=ask("set"), __delattr__=ask("delete"))
        members["__doc__"] = property(lambda own: self.ask(["get", own._remote_handle, "__doc__"]))
        members["__slots__"] = ("_remote_handle",)
        if base:
            members["__class__"] = property(lambda _: PLAIN_TYPES[base])
        return type(name if name.isidentifier() and name.isascii() else "Remote", (), members)
