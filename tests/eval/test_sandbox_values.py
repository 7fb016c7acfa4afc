"""What passes between tests and program: every value arrives as it was, and no message does more than fail."""

import collections
import datetime
import decimal
import fractions
import json
import os
import random
import struct
from typing import Any

import pytest

from ascendspeed_eval.sandbox.remote import AnswerGoneError, TestsSide
from ascendspeed_eval.sandbox.values import Decoder, Encoder, Frames, WireError
from support.tables import ReportTables

TestsSide.__test__ = False  # type: ignore[attr-defined]  # Its name is no test's.
TITLE, HEADER = "Messages between tests and program", ("what", "drawn", "failures")


def scalar(draw: random.Random) -> Any:
    return draw.choice(
        [
            lambda: None,
            lambda: draw.random() < 0.5,
            lambda: draw.randint(-3, 3),
            lambda: draw.randint(-(2 ** draw.choice([62, 63, 64, 500])), 2 ** draw.choice([62, 63, 64, 500])),
            lambda: draw.choice([0.0, -0.0, float("inf"), 1e-320, draw.uniform(-1, 1), draw.uniform(-1, 1) * 1e300]),
            lambda: complex(draw.random(), -draw.random()),
            lambda: "".join(chr(draw.choice([65, 0, 10, 0xE9, 0xD800, 0x1F600])) for _ in range(draw.randint(0, 4))),
            lambda: draw.randbytes(draw.randint(0, 4)),
            lambda: range(draw.randint(-5, 5), draw.randint(-5, 5), draw.choice([-2, 1, 3])),
            lambda: decimal.Decimal(draw.randint(-999, 999)) / 100,
            lambda: fractions.Fraction(draw.randint(-9, 9), draw.randint(1, 9)),
            lambda: datetime.date.fromordinal(draw.randint(1, 10**6)),
            lambda: datetime.timedelta(draw.randint(-9, 9), draw.randint(0, 9), draw.randint(0, 9)),
            lambda: draw.choice([int, list, type(None), Ellipsis, NotImplemented]),
        ]
    )()  # fmt: skip


def value(draw: random.Random, depth: int, seen: list[Any]) -> Any:
    """Draw a value; some containers appear twice, and some hold themselves."""
    if seen and draw.random() < 0.15:
        return draw.choice(seen)
    if depth == 0 or draw.random() < 0.4:
        return scalar(draw)
    kind = draw.choice(
        ["list", "tuple", "dict", "set", "frozenset", "deque", "bytearray", "Counter", "defaultdict"]
    )
    size = draw.randint(0, 4)
    if kind in ("set", "frozenset"):
        return {"set": set, "frozenset": frozenset}[kind](
            draw.choices([1, 2.5, "a", (1, "b"), None, b"c"], k=size)
        )
    if kind == "tuple":
        return tuple(value(draw, depth - 1, seen) for _ in range(size))
    if kind == "Counter":
        return collections.Counter(draw.choices("abc", k=size))
    made: Any = {"list": list, "dict": dict, "deque": collections.deque, "bytearray": bytearray,
                 "defaultdict": lambda: collections.defaultdict(list)}[kind]()  # fmt: skip
    seen.append(made)
    for number in range(size):
        if kind == "bytearray":
            made.append(number)
        elif kind in ("dict", "defaultdict"):
            made[draw.choice([number, str(number), (number, None)])] = value(draw, depth - 1, seen)
        else:
            made.append(value(draw, depth - 1, seen))
    return made


def shape(one: Any, known: dict[int, int]) -> Any:
    """Describe a value to the last bit: types, order of lists and dicts, and which containers are the same."""
    kind = type(one)
    if kind in (list, dict, set, bytearray, collections.deque, collections.Counter, collections.defaultdict):
        if id(one) in known:
            return ("same as", known[id(one)])
        known[id(one)] = len(known)
    if isinstance(one, dict):
        factory = getattr(one, "default_factory", None)
        return (kind.__name__, factory, [(shape(k, known), shape(v, known)) for k, v in one.items()])
    if kind in (set, frozenset):
        return (kind.__name__, sorted(map(repr, one)))
    if kind in (list, tuple, collections.deque):
        return (kind.__name__, getattr(one, "maxlen", 0), [shape(v, known) for v in one])
    return (kind.__name__, repr(one))


def refuse(_: object) -> list[Any]:
    raise AssertionError("no value here needs a reference")


def test_values_arrive_as_they_were(report: ReportTables) -> None:
    draw, failures, count = random.Random(5), 0, 3000
    for _ in range(count):
        sent = value(draw, 4, [])
        message = json.loads(json.dumps(Encoder(refuse, {}).encode(sent)))
        got = Decoder(refuse, {}).decode(message)
        failures += shape(got, {}) != shape(sent, {})
    report.add(TITLE, HEADER, "values, there and back", count, failures)
    assert failures == 0


def test_changes_of_arguments_arrive(report: ReportTables) -> None:
    """One side changes what it got at random; the other side's own containers then hold the same."""
    draw, failures, count = random.Random(6), 0, 2000
    for _ in range(count):
        seen: list[Any] = []
        sent = [value(draw, 3, seen) for _ in range(3)]
        encoder = Encoder(refuse, {})
        there = Decoder(refuse, {})
        got = there.decode(json.loads(json.dumps(encoder.encode(sent))))
        there.seal()
        for one in draw.sample(there.objects, draw.randint(0, len(there.objects))):
            change(one, draw, there.objects)
        back = Encoder(refuse, {}, there.objects)
        reply = json.loads(
            json.dumps([back.encode(got), [[n, back.contents(one)] for n, one in there.changes()]])
        )
        here = Decoder(refuse, {}, encoder.objects)
        result = here.decode(reply[0])
        for number, contents in reply[1]:
            here.fill(number, contents)
        failures += result is not sent or shape(sent, {}) != shape(got, {})
    report.add(TITLE, HEADER, "changes of arguments", count, failures)
    assert failures == 0


def change(one: Any, draw: random.Random, others: list[Any]) -> None:
    new = draw.choice([*others, *(value(draw, 2, []) for _ in range(3))])
    if isinstance(one, collections.Counter):
        one["new"] += 1
    elif isinstance(one, dict):
        one[draw.choice(list(one) or ["new"])] = new
    elif isinstance(one, set):
        one.symmetric_difference_update({1, "b"})
    elif isinstance(one, bytearray):
        one.extend(b"x")
    elif one and draw.random() < 0.5:
        one.pop()
    else:
        one.append(new)


TAGS = ["t", "r", "f", "n", "i", "y", "e", "E", "C", "o", "h", "k", "b", "c", "g", "D", "F", "md", "mt", "mm", "ml",
        "list", "dict", "set", "bytearray", "deque", "Counter", "defaultdict", "OrderedDict", "R:Node", "ok", "error",
        "handed", "__eq__", "ValueError", "SystemExit", ""]  # fmt: skip


def noise(draw: random.Random, depth: int) -> Any:
    """Draw JSON of the kind that messages are made of, put together without sense."""
    if depth == 0 or draw.random() < 0.35:
        return draw.choice([None, True, 0, 1, -1, 2**70, 0.5, float("nan"), "x", "0x", "é", "\ud800", *TAGS])
    if draw.random() < 0.05:
        return {"a": noise(draw, depth - 1)}
    return [draw.choice(TAGS), *(noise(draw, depth - 1) for _ in range(draw.choice([0, 1, 2, 2, 3, 5])))]


@pytest.mark.parametrize("count", [4000, pytest.param(200_000, marks=pytest.mark.nightly)])
def test_no_message_does_more_than_fail(count: int, report: ReportTables) -> None:
    """Whatever the program replies, the tests get a value, an exception of the program's, or the end of it."""
    draw = random.Random(7)
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(count):
        read, write = os.pipe()
        nothing = os.open(os.devnull, os.O_WRONLY)
        side = TestsSide(Frames(read, nothing))
        reply = [draw.choice(["ok", "ok", "error", "x", ["handed", 0]]), noise(draw, 4), noise(draw, 3)]
        if draw.random() < 0.4:
            reply[2] = []
        if reply[0] == "error" and draw.random() < 0.6:
            names = draw.sample(["ValueError", "Mine", "SystemExit", "object", "é", "KeyError", "OSError"], 3)
            reply[1] = [names, ["t", [noise(draw, 2)]], [[noise(draw, 1), noise(draw, 2)]], noise(draw, 0)]
        data = json.dumps(reply).encode()
        os.write(write, struct.pack("!I", len(data)) + data)
        os.close(write)
        try:
            raised, _ = side.exchange(["call"], [[1, 2]], {})
            ends["an exception of the program" if raised else "a value"] += 1
        except AnswerGoneError:
            ends["the end of the program"] += 1
        finally:
            os.close(read)
            os.close(nothing)
    for end, number in ends.items():
        report.add(TITLE, HEADER, f"senseless replies that give {end}", number, 0)
    assert sum(ends.values()) == count
    assert len(ends) == 3


def test_messages_that_are_too_long_or_too_deep_are_refused() -> None:
    frames = Frames(-1, os.open(os.devnull, os.O_WRONLY))
    with pytest.raises(WireError, match="64 MiB"):
        frames.send("x" * (65 * 1024**2))
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WireError, match="deeply"):
        frames.send(deep)
