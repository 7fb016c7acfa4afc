"""Typer applications that import a command only when it runs, and show errors as one line.

A copy of `ascendspeed_data.command_line.app`, because this package imports no other; a test keeps both equal.
"""

import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from ascendspeed_eval.errors import did_you_mean
from ascendspeed_eval.other_programs import COMMANDS, announce_accepted, refuse, settle_flags
from ascendspeed_eval.stopping import NO_SPACE, no_space


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
        spelled = [
            (spelling, param)
            for param in self.get_params(ctx)
            for spelling in (*param.opts, *param.secondary_opts)
        ]
        takes_value = {spelling: not getattr(param, "is_flag", False) for spelling, param in spelled}
        kept, accepted, unknown = settle_flags(ctx.command_path, args, takes_value, lambda: _siblings(ctx))
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
        choices = {spelling: _choices_of(param) for spelling, param in spelled}
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


INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended."""

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


def _choices_of(param: Any) -> list[str]:
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


def without_local_rank(words: Sequence[str]) -> list[str]:
    """Leave out the --local-rank that torch.distributed.launch puts before the command; LOCAL_RANK says it too."""
    first = words[0].replace("_", "-") if words else ""
    if not first.startswith("--local-rank"):
        return list(words)
    if "LOCAL_RANK" not in os.environ:
        return ["--local-rank"]
    return list(words[1:] if "=" in first else words[2:])


def run_and_exit(app: typer.Typer, name: str) -> NoReturn:
    """Run an application on this process's command line, and end the process.

    What is done stays done: while Python ends, one Ctrl-C changes nothing, and a second one kills.
    """
    status = run_app(app, name)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
    sys.exit(status)


def run_app(app: typer.Typer, name: str, args: Sequence[str] | None = None) -> int:
    """Run an application and return its exit status; errors for the user become one line on stderr.

    Exit 2: the arguments or the config are wrong. Exit 1: a file, a device or another process caused an error.
    Exit 130: interrupted. Any other exception is a bug and keeps its traceback.
    """
    command = typer.main.get_command(app)
    words = without_local_rank(sys.argv[1:] if args is None else args)
    if words and words[0].startswith("--local-rank"):
        return _print_error(name, f"{words[0]} is for processes of a launcher, which sets LOCAL_RANK too", 2)
    try:
        result = command.main(args=words, prog_name=name, standalone_mode=False)
        # What is printed belongs to the command: without space for it the command has failed.
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return _say_interrupted(name)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 2
        return _print_error(name, _one_line(error, words), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return _print_error(name, f"{no_space(error)}, and run the same command again", 1)
        # Errors for the user, also those of backends in other packages, have an exit status.
        status = getattr(error, "exit_code", None)
        if not isinstance(status, int):
            raise
        return _print_error(name, str(error), status)
    if result == INTERRUPTED:
        # Typer returns this for Ctrl-C, and says nothing.
        return _say_interrupted(name)
    return result if isinstance(result, int) else 0


def _say_interrupted(name: str) -> int:
    """Say that Ctrl-C ended the command; the launcher of several processes says it for them."""
    if "ASCENDSPEED_LAUNCHED" in os.environ and "RANK" in os.environ:
        return INTERRUPTED
    return _print_error(name, "interrupted; run the same command again", INTERRUPTED)


def _one_line(error: typer.TyperException, words: Sequence[str]) -> str:
    """Return an error of Typer as one line, with the wrong value and similar flags."""
    line = " ".join(error.format_message().split()).replace("Value error, ", "")
    line = re.sub(
        r" \(Possible options: (.*)\)$", lambda m: f"; did you mean {m[1].replace(', ', ' or ')}?", line
    )
    flags = getattr(getattr(error, "param", None), "opts", ())
    values = [" ".join(_values_after(words, number)) for number, word in enumerate(words) if word in flags]
    if values:
        line = line.replace("Invalid value for", f"Invalid value {values[-1]!r} for", 1)
        choices = _choices_of(getattr(error, "param", None))
        hint = HINTS.get(values[-1].lower().replace("_", "-"))
        remedy = next((REMEDIES[flag, values[-1]] for flag in flags if (flag, values[-1]) in REMEDIES), None)
        if remedy:
            line = f"{line.rstrip('.')}; {remedy}"
        elif hint and hint.split()[0] in choices:
            line = f"{line.rstrip('.')}; did you mean {hint}?"
        elif choices:
            line = line.rstrip(".") + did_you_mean(values[-1], choices)
    return line


def _values_after(words: Sequence[str], number: int) -> list[str]:
    """Return what follows a flag: the next word, and those after it up to another flag."""
    following = list(words[number + 1 :])
    end = next(
        (position for position, word in enumerate(following) if position and word.startswith("--")), None
    )
    return following[:end]


def _print_error(name: str, message: str, status: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try again as it ends, and complain of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{name}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return status
