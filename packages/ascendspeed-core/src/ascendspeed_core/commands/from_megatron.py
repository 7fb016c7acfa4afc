"""`asd-core from-megatron`."""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.app import settle_flags_of
from ascendspeed_data.command_line.other_programs import plain
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.small_files import read_text

OTHER_DEFAULTS = {
    "hidden_dropout": "0.1", "attention_dropout": "0.1", "eval_iters": "100",
    "moe_router_load_balancing_type": "aux_loss",
}  # fmt: skip
"""Values that Megatron-LM takes where a script says nothing, and this program does not."""


@dataclass(frozen=True)
class Answers:
    """What becomes of flags.

    Attributes:
        of_model: those that the config.json says.
        accepted: those that mean nothing here, and why.
        lacking: those without an answer, and why.
        kept: words of the command line.
    """

    of_model: list[str]
    accepted: list[str]
    lacking: list[str]
    kept: list[str]


def from_megatron(
    ctx: typer.Context,
    script: Annotated[
        Path, typer.Argument(help="Shell script, or its flags alone, as for Megatron-LM's pretrain_gpt.py.")
    ],
    model_config: Annotated[
        Path, typer.Option(help="Where to write the config.json of the model that the flags describe.")
    ] = Path("model.json"),
    vocab_size: Annotated[
        int | None, typer.Option(help="Size of the tokenizer's vocabulary, where no flag says it.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="Engine to train with, see `asd-core pretrain`. [default: none named]")
    ] = None,
) -> None:
    """Translate the arguments of a Megatron-LM script into a command line and a config.json.

    Prints `asd-core pretrain` with each flag that it has. What means nothing here, and what has no answer, stands above
    it as comments, with the reason.
    """
    flags = list(flags_of_script(read_text(script, f"{script}", "correct it"), script))
    given = {plain(flag).removeprefix("--").replace("-", "_"): values for flag, values in flags}
    if vocab_size is not None:
        given["vocab_size"] = [str(vocab_size)]
    from ascendspeed_core.weights.external.model_of_flags import model_of_flags
    from ascendspeed_core.weights.source import UnknownModelError

    try:
        config, answered = model_of_flags(given, script)
    except UnknownModelError as error:
        # What reads checkpoints by their arguments lets a user name a config instead.
        said = str(error).partition("; name the model's config.json")[0]
        raise AscendSpeedError(
            f"{said}; write a config.json of the model, and translate the other flags"
        ) from None
    for name, value in OTHER_DEFAULTS.items():
        if name not in given and (not name.startswith("moe_") or "num_experts" in given):
            flags.append((f"--{name.replace('_', '-')}", [value]))
            log(f"{script} leaves {flags[-1][0]} at Megatron-LM's default, {value}, which is given here")
    answers = Answers(of_model=[], accepted=[], lacking=[], kept=[])
    for flag, values in flags:
        written = " ".join([flag, *values])
        if plain(flag).removeprefix("--").replace("-", "_") in answered:
            answers.of_model.append(written)
        elif flag == "--sequence-parallel" and given.get("tensor_model_parallel_size", ["1"]) == ["1"]:
            answers.accepted.append(f"{flag}: Megatron-LM turns it off where one rank has all of each layer")
        elif any("$" in value for value in values):
            answers.lacking.append(f"{written}: the script gets it from outside; give it with its value")
        else:
            kept, accepted, lacking = settle_flags_of(ctx, "pretrain", [flag, *values])
            answers.accepted.extend(accepted)
            answers.lacking.extend(f"{written}: {line}" for line in lacking)
            answers.kept.extend(() if lacking else kept)
    _write(model_config, json.dumps(config, indent=2) + "\n")
    for title, lines in (
        (f"in {model_config}", answers.of_model),
        ("means nothing here", answers.accepted),
        ("has no answer", answers.lacking),
    ):
        for line in lines:
            print(f"# {title}: {line}")
    chosen = [] if engine is None else ["--engine", engine]
    print(_shell(["--model-config", str(model_config), *chosen, *answers.kept]))
    log(
        f"{script}: {len(flags)} flags, of which {len(answers.lacking)} have no answer; wrote {model_config}, a model "
        f"of type {config['model_type']}"
    )


def _write(path: Path, text: str) -> None:
    if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
        raise AscendSpeedError(
            f"{path} already exists and holds something else; name another file with --model-config"
        )
    path.write_text(text, encoding="utf-8")


def flags_of_script(text: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the flags of a script and their values, those of variables in place of them.

    Args:
        text: of a shell script, or flags alone.
        path: of it, for messages.

    Raises:
        AscendSpeedError: its quotes do not match, or it has no flags.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise AscendSpeedError(f"{path}: {str(error).lower()}; correct the quotes") from None
    variables: dict[str, str] = {}
    found: list[tuple[str, list[str]]] = []
    takes_values = False
    for word in _unwrapped(words):
        name, is_set, value = word.partition("=")
        if is_set and re.fullmatch(r"[A-Za-z_]\w*", name):
            variables[name] = _filled_in(value, variables)
            # A string of flags, as older scripts hold them.
            parts = variables[name].split() if " " in value and "--" in value else []
        else:
            parts = [word]
        for part in parts:
            if part.startswith("--"):
                flag, has_value, first = part.partition("=")
                found.append((flag, [_filled_in(first, variables)] if has_value else []))
                takes_values = not has_value
            elif takes_values and _is_value(part):
                found[-1][1].append(_filled_in(part, variables))
            else:
                takes_values = False
        takes_values = takes_values and not is_set
    if not found:
        raise AscendSpeedError(
            f"{path} has no flags (--name value); name the script, or a file with its flags"
        )
    yield from found


def _unwrapped(words: Sequence[str]) -> Iterator[str]:
    """Yield words without the parentheses of arrays, which end the values of a flag."""
    for word in words:
        opened = re.fullmatch(r"[A-Za-z_]\w*\+?=\((.*)", word)
        if opened:
            yield ";"
            word = opened[1]
        ends = word.endswith(")") and not word.startswith(("$(", "(["))
        if ends and word.count(")") > word.count("("):
            word = word[:-1]
        else:
            ends = False
        if word:
            yield word
        if ends:
            yield ";"


def _is_value(word: str) -> bool:
    """Whether a word may be the value of the flag before it, and is none of the script's own."""
    return not re.fullmatch(r";|&&|\|+|>+.*|\d>.*|\$\{\w+\[[@*]\]\}|.*\.py|if|then|fi|export|echo", word)


def _filled_in(value: str, variables: Mapping[str, str]) -> str:
    """Return a value with what the script sets in the place of its variables, as far as it does."""

    def known(match: re.Match[str]) -> str:
        name, default = match["braced"] or match["bare"], match["default"]
        if name in variables and "$" not in variables[name]:
            return variables[name]
        return match[0] if default is None else default

    return re.sub(r"\$(?:\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\}|(?P<bare>\w+))", known, value)


def _shell(words: Sequence[str]) -> str:
    """Return a command line, a flag on each line."""
    lines, line = [], "asd-core pretrain"
    for word in words:
        if word.startswith("--"):
            lines.append(line)
            line = f"    {word}"
        else:
            line += f" {shlex.quote(word)}"
    return " \\\n".join([*lines, line])
