"""Programs that do nothing wrong, and tests that pass where answer and tests share one interpreter.

Each text holds the body of `f(x)`, a line of dashes, and what `check(candidate)` asserts.
"""

HONEST = {
    "libraries": """
    import math, re, collections, itertools, hashlib, random, datetime, threading
    import typing, json, bisect, decimal
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    return math.isqrt(x)
---
assert candidate(9) == 3
""",
    "much output": """
    print('x' * 10**6)
    return x
---
assert candidate(1) == 1
""",
    "sorts its argument in place": """
    x.sort()
---
a = [3, 1, 2]
assert candidate(a) is None
assert a == [1, 2, 3]
""",
    "returns its argument": """
    return x
---
a = [[1], {2: [3]}]
assert candidate(a) is a
assert candidate(a)[1] is a[1]
""",
    "changes a part of its argument": """
    x['a'][0].append(5)
    return x['a'][0]
---
a = {'a': ([1],)}
b = candidate(a)
assert b is a['a'][0]
assert a == {'a': ([1, 5],)}
""",
    "changes every kind of container": """
    for one in x:
        {list: lambda: one.append(2), set: lambda: one.add(2), dict: lambda: one.update(b=2),
         bytearray: lambda: one.extend(b'2')}[type(one)]()
---
a = [[1], {1}, {'a': 1}, bytearray(b'1')]
first = a[0]
candidate(a)
assert a == [[1, 2], {1, 2}, {'a': 1, 'b': 2}, bytearray(b'12')]
assert a[0] is first
""",
    "changes its argument, then raises": """
    x.pop()
    raise ValueError
---
a = [1, 2]
try:
    candidate(a)
except ValueError:
    assert a == [1]
else:
    assert False
""",
    "ties a knot": """
    x.append(x)
    return x
---
a = []
b = candidate(a)
assert b is a
assert a[0] is a
""",
    "raises what is expected": """
    if x < 0:
        raise ValueError('negative', x)
---
try:
    candidate(-1)
except ValueError as error:
    assert error.args == ('negative', -1)
else:
    assert False
""",
    "raises its own exception": """
    class Mine(KeyError):
        pass
    raise Mine('k')
---
try:
    candidate(1)
except LookupError as error:
    assert type(error).__name__ == 'Mine'
else:
    assert False
""",
    "yields": """
    for n in range(x):
        yield [n]
---
assert list(candidate(3)) == [[0], [1], [2]]
assert next(candidate(1)) == [0]
""",
    "runs out of values": """
    return iter([1])
---
i = candidate(0)
assert next(i) == 1
assert next(i, None) is None
""",
    "returns a function": """
    return lambda y: x + y
---
assert candidate(2)(3) == 5
assert callable(candidate(2))
""",
    "takes functions": """
    f, values = x
    return [f(n) for n in values]
---
seen = []
assert candidate((lambda n: seen.append(n) or n * 2, [1, 2])) == [2, 4]
assert seen == [1, 2]
assert candidate((len, ['ab'])) == [2]
""",
    "is called by a function that it was given": """
    return x[0](x[1]) if isinstance(x, tuple) else x + 1
---
assert candidate((lambda n: candidate(n) * 10, 4)) == 50
""",
    "takes named and starred arguments": """
    pass
def f(*args, key=1, **more):
    return [args, key, more]
---
assert candidate(1, 2, key=3, z=4) == [(1, 2), 3, {'z': 4}]
""",
    "calls itself": """
    return 1 if x < 2 else x * f(x - 1)
---
assert candidate(5) == 120
assert candidate(300) > 10**600
""",
    "exact numbers": """
    return x
---
for v in (0.1, -0.0, 1e308, 2**200, -2**63, 1, True, 1.0, 2j, float('inf')):
    got = candidate(v)
    assert got == v and type(got) is type(v) and repr(got) == repr(v)
assert candidate(float('nan')) != candidate(float('nan'))
""",
    "texts and bytes": """
    return x
---
for v in ('', 'é😀', '\\ud800', '\\x00', b'\\xff', bytearray(b'a'), 'a' * 10**6):
    assert candidate(v) == v and type(candidate(v)) is type(v)
""",
    "types of the library": """
    return x
---
import collections, datetime, decimal, fractions
for v in (decimal.Decimal('1.10'), fractions.Fraction(1, 3), collections.deque([1], 3), range(3, 9, 2),
          collections.Counter('aab'), collections.OrderedDict(b=1, a=2), frozenset({1}), {1, 2}, int, ...,
          datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3), datetime.timedelta(1, 2), (1, [2])):
    got = candidate(v)
    assert got == v and type(got) is type(v), v
d = candidate(collections.defaultdict(int, a=1))
assert d['b'] == 0 and d.default_factory is int
""",
    "a named tuple": """
    import collections
    return collections.namedtuple('P', 'a b')(x, 2)
---
assert candidate(1) == (1, 2) and candidate(1).b == 2 and isinstance(candidate(1), tuple)
""",
    "an object with methods": """
    class Stack:
        def __init__(self): self.held = []
        def push(self, v): self.held.append(v)
        def __len__(self): return len(self.held)
    return Stack()
---
s = candidate(1)
s.push(4)
s.push(5)
assert len(s) == 2 and s.held == [4, 5]
s.name = 'x'
assert s.name == 'x' and not hasattr(s, 'other')
""",
    "gives its own object back": """
    global kept
    if x is None:
        kept = object()
        return kept
    return x is kept
---
assert candidate(candidate(None)) is True
""",
    "keeps what it was given": """
    held.append(x)
    return len(held)
held = []
---
assert [candidate(1), candidate(2)] == [1, 2]
""",
}

NAMES_OF_THE_PROGRAM = """
    return x
HALF = 0.5
def double(v):
    return 2 * v
---
assert candidate(double(1)) == 2 and HALF == 0.5
"""
"""Two names that the tests use and the prompt lacks."""

SHARED_CLASSES = '''
import enum
from dataclasses import dataclass
@dataclass
class Node:
    value: int
    next: "Node | None" = None
class Colour(enum.Enum):
    RED = 1
    BLUE = 2
class Refused(Exception):
    pass
def f(x):
    """Do it."""
'''
"""A prompt that defines classes."""

WITH_SHARED_CLASSES = {
    "objects": """
    x.value += 1
    return Node(0, x)
---
n = Node(1)
got = candidate(n)
assert got == Node(0, Node(2)) and got.next is n
""",
    "members": """
    return Colour.BLUE if x is Colour.RED else x
---
assert candidate(Colour.RED) is Colour.BLUE
""",
    "the class itself": """
    return x
---
assert candidate(Node) is Node
""",
    "exceptions": """
    raise Refused(x)
---
try:
    candidate(3)
except Refused as error:
    assert error.args == (3,)
else:
    assert False
""",
}

OWN_OPERATORS = {
    "equal to everything": """
    class E:
        def __eq__(self, o): return True
    return E()
---
assert candidate(1) == 5
""",
    "equal from the right": """
    class E:
        def __eq__(self, o): return True
    return E()
---
assert 5 == candidate(1)
""",
    "inside a list": """
    class E(list):
        def __eq__(self, o): return True
    return [E()]
---
assert candidate(1) == [[1, 2]]
""",
    "a difference": """
    class E(float):
        def __sub__(self, o): return 0
    return E()
---
assert abs(candidate(1) - 5) < 1e-6
""",
    "contains everything": """
    class E:
        def __contains__(self, o): return True
    return E()
---
assert 7 in candidate(1)
""",
    "found in a set": """
    class E(str):
        def __hash__(self): return hash('b')
        def __eq__(self, o): return True
    return E()
---
assert candidate(1) in {'b'}
""",
    "true in itself": """
    class E:
        def __bool__(self): return True
    return E()
---
assert candidate(1)
""",
}
"""Answers that decide an assertion themselves."""
