"""HumanEval's own way to run a program: answer and tests in one namespace of a forked process (Chen et al., 2021)."""

import ast
import os
import random
import signal
from collections.abc import Mapping

SECONDS = 10


def passes(problem: Mapping[str, str], program: str) -> bool:
    """Return whether the tests pass, as `check_correctness` of openai/human-eval decides it."""
    text = f"{program}\n{problem['test']}\ncheck({problem['entry_point']})"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            nothing = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(nothing, number)
            exec(text, {})
            status = 0
        except BaseException:  # noqa: BLE001 - theirs catches the same
            pass
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Mutation(ast.NodeTransformer):
    """Change one thing of a program, chosen at random, in the way that models go wrong.

    Args:
        draw: random numbers.
        number: of the node that is changed, counted over those that can be.
        name: of the function that is changed; others belong to the prompt.
    """

    def __init__(self, draw: random.Random, number: int, name: str) -> None:
        self.count, self._draw, self._number, self._name, self._inside = 0, draw, number, name, False

    def generic_visit(self, node: ast.AST) -> ast.AST:
        outside = self._inside
        self._inside = outside or (isinstance(node, ast.FunctionDef) and node.name == self._name)
        super().generic_visit(node)
        change = getattr(self, f"change_{type(node).__name__.lower()}", None)
        is_inside, self._inside = self._inside, outside
        if change is None or not is_inside:
            return node
        self.count += 1
        return change(node) if self.count - 1 == self._number else node

    def change_constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, bool) or not isinstance(node.value, int):
            return node
        return ast.Constant(node.value + self._draw.choice([-1, 1]))

    def change_compare(self, node: ast.Compare) -> ast.AST:
        node.ops[0] = self._draw.choice([ast.Lt(), ast.LtE(), ast.Gt(), ast.GtE(), ast.Eq(), ast.NotEq()])
        return node

    def change_binop(self, node: ast.BinOp) -> ast.AST:
        node.op = self._draw.choice([ast.Add(), ast.Sub(), ast.Mult(), ast.Mod(), ast.FloorDiv(), ast.Div()])
        return node

    def change_return(self, node: ast.Return) -> ast.AST:
        """Return an equal value of another type, an object of the answer's own, or none; or raise."""
        wraps = ["list({})", "tuple({})", "iter({})", "(x for x in {})", "[{}]", "({},)", "str({})", "Own({})",
                 "Anything({})", "Named({})", "(lambda: {})", "{}.copy()", "sorted({})", "float({})",
                 "Text({})"]  # fmt: skip
        chosen = self._draw.choice([*wraps, None, "exit()", "1 / 0"])
        if chosen is None or node.value is None:
            return ast.Return(None)
        wrapped = chosen.replace("{}", f"({ast.unparse(node.value)})")
        return ast.Return(ast.parse(wrapped, mode="eval").body)


OWN_CLASSES = """
import collections as _collections
class Own:
    def __init__(self, value): self.value = value
    def __eq__(self, other): return self.value == other
    def __len__(self): return len(self.value)
    def __iter__(self): return iter(self.value)
    def __abs__(self): return abs(self.value)
    def __sub__(self, other): return self.value - other
    def __rsub__(self, other): return other - self.value
    def __getitem__(self, key): return self.value[key]
    def __bool__(self): return bool(self.value)
class Anything(Own):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    __rsub__ = __sub__
class Text(str): pass
_Named = _collections.namedtuple('_Named', 'value')
def Named(value): return _Named(value)
"""


def mutated(program: str, name: str, draw: random.Random) -> str:
    """Return a program with one random change in the function `name`."""
    tree = ast.parse(program)
    counter = Mutation(draw, -1, name)
    counter.visit(tree)
    changed = Mutation(draw, draw.randrange(max(counter.count, 1)), name).visit(ast.parse(program))
    text = OWN_CLASSES + ast.unparse(ast.fix_missing_locations(changed))
    return text + "\n" if draw.random() < 0.5 else "\n" + text
