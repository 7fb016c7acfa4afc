"""Typer applications that import a command only when it runs, and show errors as one line.

`--help` must not import torch, pydantic or numpy. So an application is a list of `Command` entries: name, summary and
import path of the function.
"""

import importlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from ascendspeed_data.command_line.other_programs import COMMANDS, announce_accepted, refuse, settle_flags


@dataclass(frozen=True)
class Command:
    """One command of an application.

    Attributes:
        name: name on the command line.
        target: `package.module:function`; the function is a Typer command.
        summary: one line for `--help` of the application.
    """

    name: str
    target: str
    summary: str

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, function = self.target.partition(":")
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded


class SpaceSeparatedCommand(TyperCommand):
    """A command that accepts `--flag a b c` for list options, and `--some_flag` for `--some-flag`.

    Scripts in the style of Megatron-LM use both. Typer expects `--flag a --flag b`, so the arguments are rewritten
    before parsing. Flags of other programs are answered, see `other_programs`.
    """

    _given_as: Mapping[str, str] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite `args`, then parse them."""
        spelled = _spelled(self, ctx)
        kept, accepted, unknown = settle_flags(
            ctx.command_path, args, _takes_value(spelled), lambda: _siblings(ctx)
        )
        if unknown:
            ctx.fail(refuse(ctx.command_path, unknown))
        announce_accepted(accepted)
        self._given_as = given_spellings(kept, spelled)
        lists = {spelling: bool(getattr(param, "multiple", False)) for spelling, param in spelled}
        with_commas = {
            spelling
            for spelling, param in spelled
            if lists[spelling] and (spelling in LISTS_OF_NAMES or _is_number(param))
        }
        choices = {spelling: choices_of(param) for spelling, param in spelled}
        expanded = expand_arguments(split_at_commas(kept, with_commas), lists)
        return list(super().parse_args(ctx, usual_choices(expanded, choices)))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error for the user names options as the user spelled them."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(getattr(error, "exit_code", None), int) and self._given_as and len(error.args) == 1:
                error.args = (as_spelled(str(error), self._given_as),)
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, grouped by config."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                panels.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)


LISTS_OF_NAMES = frozenset(
    f"--{name}"
    for name in (
        "task", "subset", "json-keys", "json-key", "lora-target-modules", "lora-modules-to-save",
        "lora-register-forward-hook",
    )
)  # fmt: skip
"""Options that take names, which have no commas: `a,b` is `a b`."""


def split_at_commas(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Write lists of names and numbers that are joined by commas as separate words."""
    written: list[str] = []
    flag = ""
    for position, arg in enumerate(args):
        if arg == "--":
            return [*written, *args[position:]]
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            flag = flag.replace("_", "-") if flag.replace("_", "-") in flags else flag
            if flag in flags and equals and "," in value:
                written += [flag, *(part.strip() for part in value.split(",") if part.strip())]
            else:
                written.append(arg)
        elif flag in flags and "," in arg:
            written += [part.strip() for part in arg.split(",") if part.strip()]
        else:
            written.append(arg)
    return written


def given_spellings(args: Sequence[str], spelled: Sequence[tuple[str, Any]]) -> dict[str, str]:
    """Return by the name of a config's field how the user wrote its flag, where the two differ."""
    given = {arg.partition("=")[0].replace("_", "-") for arg in args if arg.startswith("--")}
    found = {}
    for spelling, param in spelled:
        name = str(param.name)
        own = "--" + name.replace("_", "-")
        if spelling.replace("_", "-") in given and spelling in param.opts and spelling != own:
            found[name] = spelling
    return found


def as_spelled(message: str, given: Mapping[str, str]) -> str:
    """Write a message with the user's spelling of options: `--layernorm-epsilon` for `norm_epsilon`."""
    for name, flag in given.items():
        dashed = re.escape("--" + name.replace("_", "-"))
        message = re.sub(rf"{dashed}(?![\w-])", flag, message)
        message = re.sub(rf"(?<![\w-]){re.escape(name)}(?==| is missing)", flag, message)
    return message


def settle_flags_of(ctx: Any, name: str, args: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Take the flags of other programs out of a line of another command of the same program.

    Args:
        ctx: of the command that runs.
        name: of the other command.
        args: its line.

    Returns:
        See `settle_flags`.
    """
    command = _as_typer_command(ctx.parent.command.table[name])
    path = f"{ctx.parent.command_path} {name}"
    return settle_flags(path, args, _takes_value(_spelled(command, ctx)), lambda: _siblings(ctx))


def _spelled(command: Any, ctx: Any) -> list[tuple[str, Any]]:
    """Return each spelling of the options of a command."""
    return [
        (spelling, param)
        for param in command.get_params(ctx)
        for spelling in (*param.opts, *param.secondary_opts)
    ]


def _takes_value(spelled: Sequence[tuple[str, Any]]) -> dict[str, bool]:
    """Return by the spelling of an option whether a value follows it."""
    return {spelling: not getattr(param, "is_flag", False) for spelling, param in spelled}


def _siblings(ctx: Any) -> dict[str, list[str]]:
    """Return the flags of the other commands of the program, by their names."""
    table: dict[str, Command] = getattr(getattr(ctx.parent, "command", None), "table", {})
    return {
        name: [
            flag for param in _as_typer_command(row).params for flag in (*param.opts, *param.secondary_opts)
        ]
        for name, row in table.items()
        if name != ctx.info_name
    }


def _is_number(param: Any) -> bool:
    """Whether the values of an option are numbers; of a list each of them."""
    annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    return annotation in (int, float) or any(part in (int, float) for part in get_args(annotation))


def expand_arguments(args: Sequence[str], spellings: dict[str, bool]) -> list[str]:
    """Repeat the flag before every value of a list option, and replace underscores in flags by dashes.

    Args:
        args: the command line after the name of the command.
        spellings: all flags of the command; true for list options.

    Returns:
        An equivalent command line in Typer's form: `--x a b` becomes `--x a --x b`. Arguments after a bare `--` stay
        as they are.
    """
    expanded: list[str] = []
    list_flag: str | None = None
    fresh = False
    for position, arg in enumerate(args):
        if arg == "--":
            return [*expanded, *args[position:]]
        if arg.startswith("--"):
            name, equals, value = arg.partition("=")
            dashed = name.replace("_", "-")
            if name not in spellings and dashed in spellings:
                name = dashed
            expanded.append(name + equals + value)
            list_flag = name if spellings.get(name) and not equals else None
            fresh = True
        elif list_flag is not None:
            expanded += [arg] if fresh else [list_flag, arg]
            fresh = False
        else:
            expanded.append(arg)
    return expanded


ALIASES = {
    "hf": "huggingface",
    "transformers": "huggingface",
    "megatron-lm": "megatron",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp64": "float64",
}
"""Other names of choices, in the words of other programs."""

HINTS = {
    "mcore": "megatron (files of each rank) or torch_dist",
    "megatron-core": "megatron (files of each rank) or torch_dist",
    "dist-ckpt": "torch_dist",
    "dcp": "torch_dist",
    "safetensors": "huggingface with --weights-format safetensors",
    "bin": "huggingface with --weights-format bin",
    "llama": "huggingface",
    "ds": "deepspeed",
}
"""What someone may mean who gives one of these for a format; they are not exact enough to be taken for it."""

REMEDIES = {
    ("--zero-stage", "0"): "leave it out, and --deepspeed too: stage 0 shards nothing",
    ("--lr-decay-style", "none"): "constant keeps the rate",
    ("--lr-decay-style", "cosine-with-restarts"): "cosine has no restarts here",
    ("--optimizer", "adamw"): "adam is AdamW",
}
"""What to give instead of values that other programs have."""


def usual_choices(args: Sequence[str], choices: dict[str, list[str]]) -> list[str]:
    """Replace other names of choices: `--to hf` is `--to huggingface`; case, dashes and underscores do not matter.

    Args:
        args: the command line after the name of the command.
        choices: the choices of each flag; empty for flags that take any value.
    """
    written: list[str] = []
    flag = ""
    for position, arg in enumerate(args):
        if arg == "--":
            return [*written, *args[position:]]
        name, equals, value = arg.partition("=") if arg.startswith("--") else (flag, "", arg)
        chosen = _choice_of(value, choices.get(name, []))
        if arg.startswith("--"):
            written.append(f"{name}={chosen}" if equals else arg)
            flag = "" if equals else name
        else:
            written.append(chosen)
            flag = ""
    return written


def choices_of(param: Any) -> list[str]:
    """Return the choices of an option; empty if it takes any value."""
    annotation = getattr(getattr(param, "type_descriptor", None), "annotation", None)
    found = getattr(getattr(param, "type", None), "choices", ())
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            found = get_args(part)
    return [str(choice) for choice in found]


def _choice_of(value: str, choices: Sequence[str]) -> str:
    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    wanted = {plain(value), plain(ALIASES.get(plain(value), value))}
    return (
        next((choice for choice in choices if plain(choice) in wanted), value)
        if value not in choices
        else value
    )


class _LazyGroup(TyperGroup):
    """A group that imports a command only when the user runs it."""

    table: dict[str, Command]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.table and args[0] in COMMANDS:
            ctx.fail(f"there is no command {args[0]!r}; {COMMANDS[args[0]]}")
        name, placeholder, rest = super().resolve_command(ctx, args)
        row = self.table.get(name or "")
        return (name, _as_typer_command(row), rest) if row else (name, placeholder, rest)


def _as_typer_command(row: Command) -> Any:
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name=row.name, cls=SpaceSeparatedCommand)(row.load())
    return typer.main.get_command(single)


def build_app(summary: str, version: str, commands: Sequence[Command]) -> typer.Typer:
    """Return the Typer application of a package.

    Args:
        summary: what the package does, for `--help`.
        version: for `--version`.
        commands: the commands, in the order of `--help`.
    """
    group = type("LazyGroup", (_LazyGroup,), {"table": {row.name: row for row in commands}})
    app = typer.Typer(
        cls=group, help=summary, add_completion=False, rich_markup_mode=None, no_args_is_help=True
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            typer.echo(version)
            raise typer.Exit

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", callback=show_version, is_eager=True, help="Print the version and exit."
        ),
    ) -> None:
        pass

    options.__doc__ = summary
    for row in commands:
        app.command(name=row.name, help=row.summary)(lambda: None)
    return app
