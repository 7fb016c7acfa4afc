"""Command-line options from the fields of a pydantic config: one definition per option.

A field has the help, default and range of its option, and other spellings in `json_schema_extra={"flags": [...]}`.
The option of the field `micro_batch_size` is `--micro-batch-size`. The result has only options that were given, so
that flags can override a TOML file.
"""

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

Function = TypeVar("Function", bound=Callable[..., Any])


def options_from(*configs: type[BaseModel]) -> Callable[[Function], Function]:
    """Add an option for each field of `configs` to a Typer command.

    The command must accept `**options`: the options that were given, by field name. Fields of nested configs become
    options too, so field names must be unique across all configs.
    """

    def decorate(function: Function) -> Function:
        own = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        added = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[_option_type(field), _option(name, field, panel)],
            )
            for name, field, panel in walk_fields(*configs)
        ]

        def command(**arguments: Any) -> Any:
            return function(**given_options(arguments, {parameter.name for parameter in own}))

        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        command.__doc__ = function.__doc__
        command.__name__ = function.__name__
        command.__annotations__ = {p.name: p.annotation for p in [*own, *added]}
        return command  # type: ignore[return-value]

    return decorate


def given_options(arguments: dict[str, Any], always: set[str]) -> dict[str, Any]:
    """Return the options that were given, and those named in `always`."""
    return {
        name: value
        for name, value in arguments.items()
        if name in always or (value is not None and value != [] and value != ())
    }


def walk_fields(*configs: type[BaseModel]) -> list[tuple[str, FieldInfo, str]]:
    """Return (name, field, section) of every field; the section of a nested config is its name."""
    return [found for config in configs for found in _walk(config, config.__name__)]


def _walk(config: type[BaseModel], section: str) -> list[tuple[str, FieldInfo, str]]:
    found: list[tuple[str, FieldInfo, str]] = []
    for name, field in config.model_fields.items():
        inner = _without_content(field.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _walk(inner, f"[{name}]")
        elif not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("internal")):
            found.append((name, field, section))
    return found


def _without_content(annotation: Any) -> Any:
    """Remove `| None` from a type."""
    if get_origin(annotation) in (Union, types.UnionType):
        kept = [a for a in get_args(annotation) if a is not type(None)]
        if len(kept) == 1:
            return kept[0]
    return annotation


def _option_type(field: FieldInfo) -> Any:
    bare = _without_content(field.annotation)
    if get_origin(bare) in (tuple, list):
        return list[get_args(bare)[0]] | None  # type: ignore[misc]
    if get_origin(bare) is Literal or bare in (int, float, str, bool, Path):
        return bare | None if get_origin(bare) is not Literal else Union[bare, None]  # noqa: UP007
    return str | None


def _option(name: str, field: FieldInfo, section: str) -> Any:
    spellings = ["--" + name.replace("_", "-"), *further_flags(field)]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    bare = _without_content(field.annotation)
    if bare is bool:
        off = extra.get("off", "--no-" + name.replace("_", "-"))
        spellings = [
            f"{spelling}/{off}" if i == 0 and off else spelling for i, spelling in enumerate(spellings)
        ]
    return typer.Option(*spellings, help=option_help(field), show_default=False, rich_help_panel=section)


def further_flags(field: FieldInfo) -> list[str]:
    """Return the flags of a field besides that of its name."""
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    flags = extra.get("flags", [])
    return [str(flag) for flag in flags] if isinstance(flags, list) else []


def option_help(field: FieldInfo) -> str:
    """Return what `--help` says of a field: its description, its range and its default."""
    return " ".join(part for part in (field.description or "", _rule(field), _default(field)) if part)


def plain_type(field: FieldInfo) -> type:
    """Return `bool`, `int` or `float` for a field of such values, and `str` for any other."""
    bare = _without_content(field.annotation)
    if get_origin(bare) is Literal:
        bare = type(get_args(bare)[0])
    return bare if bare in (bool, int, float) else str


def _rule(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    rules = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    return f"({', '.join(rules)})" if rules else ""


def _default(field: FieldInfo) -> str:
    if field.is_required() or field.default is None or field.default == () or field.default_factory:
        return ""
    value = field.default
    return f"[default: {str(value).lower() if isinstance(value, bool) else value}]"
