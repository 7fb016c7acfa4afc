"""The sandbox in which chat templates run: functions, filters and tags are those that transformers gives them.

Source: `_compile_jinja_template` in transformers/utils/chat_template_utils.py.
"""

import json
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

GENERATION_BEGIN, GENERATION_END = "\x02generation\x03", "\x02endgeneration\x03"
"""Delimiters of `{% generation %}` blocks in rendered text; conversations must not contain them."""


class GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers defines it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        """Wrap the body in a call that adds the delimiters."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return GENERATION_BEGIN + caller() + GENERATION_END


def without_marks(text: str) -> str:
    """Return a rendered text without the delimiters of `{% generation %}`."""
    return text.replace(GENERATION_BEGIN, "").replace(GENERATION_END, "")


def template_environment(strftime_now: Callable[[str], str] | None) -> ImmutableSandboxedEnvironment:
    """Return the environment of chat templates.

    Args:
        strftime_now: gives the day in a form of strftime; templates that find none may fall back to a fixed day.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlocks, loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _TemplateNamespace
    if strftime_now is not None:
        environment.globals["strftime_now"] = strftime_now
    return environment


class _TemplateDict:
    """`dict` for templates, without the methods of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` for templates; names that begin with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # As in jinja2, so that `namespace(self=...)` works.
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold the name {name!r}, which begins with an underscore")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON text; the arguments are those of transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
