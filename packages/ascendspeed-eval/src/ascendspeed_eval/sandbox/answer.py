"""The side of the answer: run its program, and do what the tests ask, call by call.

Everything in this process may be changed by the answer, so nothing that it says is taken for more than a value.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ascendspeed_eval.sandbox.calls import Peer, shareable_classes
from ascendspeed_eval.sandbox.remote import OPERATORS
from ascendspeed_eval.sandbox.values import PLAIN_TYPES, Frames, WireError


class HandedFunction:
    """A function of the tests; calling it asks them."""

    def __init__(self, side: "AnswerSide", number: int) -> None:
        self._side, self.number = side, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Ask the tests."""
        return self._side.ask(["handed", self.number], args, named)


class AnswerSide(Peer):
    """Serves the tests."""

    def __init__(self, frames: Frames) -> None:
        super().__init__(frames)
        self.namespace: dict[str, Any] = {}
        self._objects: list[object] = []
        self._handles: dict[int, int] = {}

    def run(self) -> None:
        """Serve until the tests end."""
        while True:
            try:
                request = self.frames.receive()
            except EOFError:
                return
            reply = self.serve(*request)
            try:
                self.frames.send(reply)
            except WireError as error:
                self.frames.send(["error", [["OverflowError"], ["t", [str(error)]], [], ""], []])

    def define(self, program: str, names: Sequence[str]) -> None:
        """Run the program, as the benchmark's harness does: in an empty namespace, which is not `__main__`."""
        exec(compile(program + "\n\n", "program.py", "exec"), self.namespace)
        own = shareable_classes(self.namespace)
        self.share_classes({name: own[name] for name in names if name in own})

    def value(self, name: str) -> object:
        """Return what a name, or an expression that stands for a function, means to the program."""
        if name.isidentifier():
            return self.namespace[name]
        return eval(name, self.namespace)

    def function(self, head: Any) -> Callable[..., Any]:
        """Return what does the tests' request."""
        kind = head[0]
        if kind == "define":
            return self.define
        if kind == "value":
            return self.value
        found: Any = self._objects[head[1]]
        if kind == "operator" and head[2] == "__call__":
            return lambda *args, **named: found(*args, **named)
        if kind == "operator":
            of_type = getattr(type(found), head[2])
            return lambda *args: of_type(found, *args)
        do: Callable[..., Any] = {"get": getattr, "set": setattr, "delete": delattr}[kind]  # type: ignore[assignment]
        return lambda *args: do(found, head[2], *args)

    def refer(self, value: object) -> list[Any]:
        """Refer to an object of the program, or to a function of the tests."""
        kind = type(value)
        if kind is HandedFunction:
            return ["k", value.number]  # type: ignore[attr-defined]
        if id(value) not in self._handles:
            self._handles[id(value)] = len(self._objects)
            self._objects.append(value)
        operators = sorted(name for name in OPERATORS if getattr(kind, name, None) is not None)
        bases = [one.__name__ for one in kind.__mro__ if PLAIN_TYPES.get(one.__name__) is one]
        return ["o", self._handles[id(value)], kind.__name__, operators, bases[0] if bases else ""]

    def resolve(self, message: Sequence[Any]) -> Any:
        """Return the object of the program, or what stands for a function of the tests."""
        return self._objects[message[1]] if message[0] == "h" else HandedFunction(self, message[1])


def serve_tests(source: int, sink: int, greeting: object) -> None:
    """Greet the tests, then serve them until they end."""
    frames = Frames(source, sink)
    frames.send(greeting)
    sys.argv = ["program.py"]
    AnswerSide(frames).run()
