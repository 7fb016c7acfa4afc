"""Find the number that a text gives as its answer, as people and models write numbers.

Currency, thousands, marks at the end, zeros after the point, minus signs and LaTeX change no value.
"""

import re
from fractions import Fraction

_SPACES = "\u00a0\u2009\u202f"
"""No-break, thin and narrow no-break space, which group thousands."""
_MINUS = "\u2212\u2012\u2013\ufe63"
"""Minus sign, figure dash, en dash and small hyphen; a hyphen is ASCII."""
MAX_DIGITS = 200
"""Longer numbers answer no question; a model that repeats a digit writes them."""
MAX_ANNOUNCEMENTS = 100
"""Looked at from the end; a model that repeats itself writes more."""
_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+]\s?)?(?:[$€£¥₹]\s?)?(?P<inner>-)?"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?(?:\s?/\s?(?P<below>[1-9]\d*)(?![\w/]))?"
)
_LATEX = (
    (re.compile(r"\{,\}|\\,|\\!|\\;"), ","),
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}"), r" \1/\2 "),
    (re.compile(r"\\[dt]?frac\s*(\d)(\d)"), r" \1/\2 "),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\([$%])"), r"\1"),
)
_ANNOUNCED = re.compile(r"####|answer(?:\s+is|\s*[:=])", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s*\{")


class ReadNumber(str):
    """A number that was found in a text, as `29`, `0.75` or `1/3`; compared by its value."""

    @property
    def value(self) -> Fraction:
        """Its value."""
        return Fraction(self)


def find_number(text: str) -> ReadNumber | None:
    """Return the number of an answer: in the last `\\\\boxed{}`, else after the last announcement, else the last one.

    An announcement is `####` or "answer is"; the number follows it without a word between.
    """
    plain = _plain(text)
    boxed = list(_BOXED.finditer(plain))
    if boxed:
        inside = _numbers(plain[boxed[-1].end() :].partition("}")[0])
        if inside:
            return ReadNumber(_digits(inside[-1][1]))
    for announced in list(_ANNOUNCED.finditer(plain))[: -MAX_ANNOUNCEMENTS - 1 : -1]:
        rest = plain[announced.end() :][:200]
        found = _numbers(rest)
        if found and not re.search(r"[^\W\d_]", rest[: found[0][0]]):
            return ReadNumber(_digits(found[0][1]))
    found = _numbers(plain)
    return ReadNumber(_digits(found[-1][1])) if found else None


def value_of(text: str) -> Fraction | None:
    """Return the value of a text that is one number; `None` if it is none."""
    found = _numbers(_plain(text))
    return found[-1][1] if found else None


def _plain(text: str) -> str:
    full_width = {number + 0xFEE0: number for number in range(0x21, 0x7F)}
    text = text.translate(full_width | dict.fromkeys(map(ord, _MINUS), "-"))
    for pattern, written in _LATEX:
        text = pattern.sub(written, text)
    return re.sub(rf"(?<=\d)[{_SPACES}](?=\d{{3}}(?!\d))", ",", text)


def _numbers(text: str) -> list[tuple[int, Fraction]]:
    """Return the numbers of a text in order, each with the position where it begins."""
    found = []
    for one in _NUMBER.finditer(text):
        longest = max(len(one[name] or "") for name in ("whole", "part", "below"))
        if (one["whole"] is None and one["part"] is None) or longest > MAX_DIGITS:
            continue
        digits = (one["whole"] or "0").replace(",", "") + (one["part"] or "")
        value = Fraction(digits) / int(one["below"] or 1)
        sign = -1 if "-" in (one["sign"] or "") + (one["inner"] or "") else 1
        found.append((one.start(), sign * value))
    return found


def _digits(value: Fraction) -> str:
    below = value.denominator
    while below % 2 == 0:
        below //= 2
    while below % 5 == 0:
        below //= 5
    if below != 1:
        return f"{value.numerator}/{value.denominator}"
    if value.denominator == 1:
        return str(value.numerator)
    decimals = next(n for n in range(1, value.denominator.bit_length() + 1) if 10**n % value.denominator == 0)
    scaled = abs(value) * 10**decimals
    whole = f"{scaled.numerator:0{decimals + 1}d}"
    return f"{'-' if value < 0 else ''}{whole[:-decimals]}.{whole[-decimals:]}"
