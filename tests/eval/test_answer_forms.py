"""The form of an answer decides no score of the default protocols: fences, prose, reasoning, spellings of numbers."""

import random
from collections.abc import Callable
from fractions import Fraction
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed_eval.tasks.answer_marks import FENCE, REPEATED
from ascendspeed_eval.tasks.code_answers import code_marks, read_code
from ascendspeed_eval.tasks.gsm8k import number_of_2023, same_number
from ascendspeed_eval.tasks.human_eval import HumanEval
from ascendspeed_eval.tasks.registry import find_task, find_variant
from ascendspeed_eval.tasks.samples import Record
from support.shared_data import BENCHMARK_FOLDERS, needs_shared_data
from support.tables import ReportTables

Form = Callable[[str, str], str]
"""From the prompt of a function and its body to what a model might answer."""


def fence(code: str, language: str = "python") -> str:
    return f"```{language}\n{code.rstrip()}\n```"


FORMS: dict[str, Form] = {
    "a body": lambda prompt, body: body,
    "a body without its first spaces": lambda prompt, body: body.lstrip(" "),
    "a body with one space less": lambda prompt, body: body.removeprefix(" "),
    "a body after one space": lambda prompt, body: " " + body.lstrip(" "),
    "a body after a line end": lambda prompt, body: "\n" + body,
    "a body that prints follow": lambda prompt, body: body + "\n\nprint('done')\n# The end.\n",
    "a body that the fence of the prompt follows": lambda prompt, body: body + "\n```\nThat is all.",
    "the whole function": lambda prompt, body: prompt + body,
    "the whole function after a space": lambda prompt, body: " " + (prompt + body).lstrip(),
    "the whole function and a sentence": lambda prompt, body: prompt + body + "\n\nIt does what was asked.",
    "a sentence and the whole function": lambda prompt, body: "Sure! Here it is:\n\n" + prompt + body,
    "a fenced function": lambda prompt, body: fence(prompt + body),
    "a fenced function without a language": lambda prompt, body: fence(prompt + body, ""),
    "a fenced function in prose": lambda prompt, body: f"Here:\n\n{fence(prompt + body)}\n\nIt works.",
    "a fenced function, then a call": lambda prompt, body: fence(prompt + body) + "\n\n" + fence("f(1)"),
    "a fence without an end": lambda prompt, body: "```python\n" + prompt + body,
    "a fenced body": lambda prompt, body: fence(body),
    "a fenced body at the left": lambda prompt, body: fence(dedent(body)),
    "after reasoning": lambda prompt, body: "<think>\ndef wrong():\n</think>\n\n" + fence(prompt + body),
    "after reasoning that the prompt began": lambda prompt, body: "Hm.\n</think>\n" + prompt + body,
}  # fmt: skip


@needs_shared_data
def test_right_programs_pass_in_every_form(report: ReportTables) -> None:
    """The authors' solutions of HumanEval, in twenty forms; run here, as they are trusted."""
    task = HumanEval()
    variant = find_variant(task, "ascendspeed")
    records = task.read(str(BENCHMARK_FOLDERS["human_eval"])).records
    draw, passed, failed = random.Random(3), 0, list[str]()
    for name, form in FORMS.items():
        for record in draw.sample(list(records), 40):
            fields = record.fields
            text = form(fields["prompt"], fields["canonical_solution"])
            program = task.program(variant, fields, text)
            try:
                check = f"\n{program.tests}\ncheck({program.entry_point})"
                exec(compile(program.program + check, "answer", "exec"), {"__name__": "answer"})
                passed += 1
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a program may raise anything
                failed.append(f"{record.id}, {name}: {type(error).__name__}: {error}")
    row = (len(FORMS), passed + len(failed), passed)
    report.add("Right programs of HumanEval in forms of chat models", ("forms", "tried", "passed"), *row)
    assert failed == []


def test_forms_are_marked() -> None:
    assert code_marks("    return 1\n", "f") == []
    assert code_marks("```python\n    return 1\n```", "f") == [FENCE]
    assert code_marks("def f(x):\n    return 1\n", "f") == [REPEATED]
    assert code_marks("```\ndef f(x):\n    return 1\n```", "f") == [FENCE, REPEATED]
    assert code_marks("<think>```def f(</think>    return 1", "f") == []
    assert code_marks("def g(x):\n    return 1\n", "f") == []


def test_a_wrong_program_does_not_pass_by_its_form() -> None:
    prompt = 'def f(x):\n    """ Return x. """\n'
    for text in ("", "I cannot do that.", "```\n```", "<think>\n    return x", "```python\nreturn x +\n```"):
        answer = read_code(prompt, text, "f")
        with pytest.raises((SyntaxError, TypeError, AssertionError)):
            names: dict[str, object] = {}
            exec(compile(answer.code, "answer", "exec"), names)
            assert names["f"](3) == 3  # type: ignore[operator]


def grouped(number: int, mark: str) -> str:
    return f"{number:,}".replace(",", mark)


WRITTEN: dict[str, Callable[[int], str]] = {
    "digits": str,
    "thousands": lambda n: grouped(n, ","),
    "thousands in TeX": lambda n: grouped(n, "{,}"),
    "thin spaces": lambda n: grouped(n, "\u202f"),
    "TeX spaces": lambda n: grouped(n, "\\,"),
    "zeros after the point": lambda n: f"{n}.00",
    "dollars": lambda n: f"${n:,}" if n >= 0 else f"-${-n:,}",
    "dollars in TeX": lambda n: f"\\${n}",
    "bold": lambda n: f"**{n}**",
    "a true minus": lambda n: str(n).replace("-", "\u2212"),
    "full width": lambda n: "".join(chr(ord(c) + 0xFEE0) if c.isdigit() else c for c in str(n)),
    "mathematics": lambda n: f"${n}$",
    "a box": lambda n: f"$\\boxed{{{n}}}$",
    "text in a box": lambda n: f"\\boxed{{\\text{{{n}}}}}",
    "a fraction": lambda n: f"\\frac{{{2 * n}}}{{2}}",
    "euros after": lambda n: f"{n} €",
    "a share": lambda n: f"{n}%",
}
AROUND = (
    "{}", "{}.", "{}...", "{} ...", " The answer is {}.", "3 + 4 = 7. The answer is {}", "So she has {} apples.",
    "#### {}", "\n#### {}\n", "Answer: {} (that is 2 more than before)", "<think>5 or 6?</think>It is {}",
    "= {}", "({})", "'{}'!", "Final answer: {} km",
)  # fmt: skip


def test_numbers_are_read_however_they_are_written(report: ReportTables) -> None:
    counts = {"tried": 0, "read": 0}

    @settings(max_examples=800, deadline=None, database=None, derandomize=True)
    @given(
        st.one_of(st.integers(-2000, 2000), st.integers(-(10**9), 10**9)),
        st.sampled_from(sorted(WRITTEN)), st.sampled_from(AROUND),
    )  # fmt: skip
    def try_one(number: int, way: str, around: str) -> None:
        text = around.format(WRITTEN[way](number))
        record = Record("1", "gsm8k", {}, f"{number:,}")
        counts["tried"] += 1
        found = number_of_2023(text, record)["flexible"]
        assert same_number(found, record), (text, found)
        counts["read"] += 1
        other = Record("1", "gsm8k", {}, str(number + 1))
        assert not same_number(found, other)

    try_one()
    report.add("Numbers in the ways and sentences of models", tuple(counts), *counts.values())


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(st.text(st.characters(), max_size=60))
def test_any_text_is_read_without_an_error(text: str) -> None:
    record = Record("1", "gsm8k", {}, "7")
    found = number_of_2023(text, record)["flexible"]
    assert found is None or isinstance(Fraction(found), Fraction)
    read_code("def f():\n    ''' f '''\n", text, "f")


def test_long_runs_of_digits_are_no_number() -> None:
    record = Record("1", "gsm8k", {}, "7")
    for text in (
        "9" * 100_000,
        "1," * 100_000,
        "-" * 100_000,
        "\\frac{" * 20_000,
        "1.0/" * 50_000,
        "####" * 20_000,
    ):
        assert not same_number(number_of_2023(text, record)["flexible"], record)


def test_the_protocol_of_the_harness_stays_a_copy() -> None:
    task = find_task("gsm8k")
    variant = find_variant(task, "lm-eval")
    assert variant.extract("The answer is 72...", Record("1", "gsm8k", {}, "72"))["flexible"] == "72..."
