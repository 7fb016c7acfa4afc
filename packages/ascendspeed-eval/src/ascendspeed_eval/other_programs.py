"""Answers to flags of other programs: what they are called here, or what they mean today.

The table `other_programs.toml` beside this file is read only when a command line has a flag that the command lacks.
"""

import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

TABLE = Path(__file__).with_name("other_programs.toml")
SIMILAR = 0.8
"""How alike a flag must be to one of the command to be taken for a slip of the keyboard."""

COMMANDS = {
    "train": "asd-core pretrain trains on text, finetune on instruction sets and with LoRA, dpo on preference pairs",
    "sft": "asd-core finetune trains on instruction sets, whole or with LoRA",
    "lora": "asd-core finetune --lora-target-modules trains LoRA adapters, asd-ckpt merge-lora merges one",
    "export": "asd-ckpt convert writes the formats of other programs, merge-lora merges an adapter",
    "eval": "asd-eval run scores benchmarks",
    "evaluate": "asd-eval run scores benchmarks",
    "serve": "there is no server; asd-infer generate reads prompts from a file, and --engine vllm runs vLLM",
    "tokenize": "asd-data preprocess turns records into tokens",
}
"""What commands of other programs are called here."""


@dataclass(frozen=True)
class Answer:
    """What to say of a flag that a command lacks.

    Attributes:
        flag: as the other program spells it.
        at: the commands that it is about: `asd-core`, `asd-infer generate`.
        say: what to give instead, or what the flag means today.
        values: values that follow it: `0`, `1` or `*`; `None` if it is refused.
        programs: where it comes from.
    """

    flag: str
    at: tuple[str, ...]
    say: str
    values: str | None
    programs: str

    def is_about(self, command: str) -> bool:
        """Whether the answer holds at a command, such as `asd-core pretrain`."""
        return any(command == at or command.startswith(f"{at} ") for at in self.at)


def read_answers(path: Path = TABLE) -> list[Answer]:
    """Return all answers, in the order of the table."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))
    found = []
    for kind in ("accepted", "refused"):
        for row in rows[kind]:
            for written in row["flags"]:
                flag, _, value = written.partition(" ")
                values = (
                    None if kind == "refused" else "*" if value.endswith("...") else "1" if value else "0"
                )
                found.append(Answer(flag, tuple(row["at"]), row["say"], values, row["from"]))
    return found


def plain(flag: str) -> str:
    """Return a flag as it is compared: small letters, dashes."""
    return "--" + flag.lstrip("-").replace("_", "-").lower()


def settle_flags(
    command: str,
    args: Sequence[str],
    takes_value: Mapping[str, bool],
    siblings: Callable[[], Mapping[str, Iterable[str]]],
    read: Callable[[], Iterable[Answer]] = read_answers,
) -> tuple[list[str], list[str], list[str]]:
    """Take the flags of other programs out of a command line.

    Args:
        command: such as `asd-core pretrain`.
        args: what follows it.
        takes_value: the command's own flags, and whether a value follows.
        siblings: returns the flags of the other commands of the program, by name.
        read: returns the answers; called only when a flag needs one.

    Returns:
        The rest of the arguments, what each accepted flag means today, and an answer to each flag that is refused.
    """
    kept: list[str] = []
    accepted: list[str] = []
    unknown: list[str] = []
    answers: dict[str, list[Answer]] = {}
    position = 0
    while position < len(args):
        arg = args[position]
        position += 1
        name = arg.partition("=")[0]
        if arg == "--":
            kept += args[position - 1 :]
            break
        own = takes_value.get(name, takes_value.get(name.replace("_", "-")))
        is_bare = "=" not in arg and (position == len(args) or args[position].startswith("--"))
        if not arg.startswith("--") or (own is not None and not (own and is_bare)):
            kept.append(arg)
            if arg.startswith("--") and own and "=" not in arg:
                kept += args[position : position + 1]
                position += 1
            continue
        if not answers:
            for one in read():
                answers.setdefault(plain(one.flag), []).append(one)
        found = next((one for one in answers.get(plain(name), ()) if one.is_about(command)), None)
        if own and (found is None or found.values != "0"):
            kept += args[position - 1 : position + 1]
            position += 1
            continue
        if found is None or found.values is None:
            unknown.append(_refusal(command, name, found, answers, takes_value, siblings))
            continue
        end = position
        limit = {"0": 0, "1": 1, "*": len(args)}[found.values] if "=" not in arg else 0
        while end < len(args) and end - position < limit and not args[end].startswith("--"):
            end += 1
        accepted.append(f"{' '.join([arg, *args[position:end]])}: {found.say}")
        position = end
    return kept, accepted, unknown


def _refusal(
    command: str,
    flag: str,
    found: Answer | None,
    answers: Mapping[str, Sequence[Answer]],
    own: Iterable[str],
    siblings: Callable[[], Mapping[str, Iterable[str]]],
) -> str:
    """Say what to do with a flag that a command lacks."""
    if found is not None:
        return f"{flag}: {found.say}"
    there = [name for name, flags in siblings().items() if plain(flag) in {plain(one) for one in flags}]
    if there:
        return f"{flag} belongs to {command.partition(' ')[0]} {' and '.join(there)}"
    elsewhere = next(iter(answers.get(plain(flag), ())), None)
    if elsewhere is not None:
        return f"{flag} is about {' and '.join(elsewhere.at)}: {elsewhere.say}"
    own = list(own)
    close = [one for one in own if one.startswith(plain(flag))] or get_close_matches(
        plain(flag), own, n=3, cutoff=SIMILAR
    )
    return f"{flag} is unknown; did you mean {' or '.join(close[:3])}?" if close else f"{flag} is unknown"


def refuse(command: str, unknown: Sequence[str]) -> str:
    """Return one line about all flags of a command line that a command lacks."""
    count = f"{len(unknown)} flags" if len(unknown) > 1 else "a flag"
    return f"{command} lacks {count} of this line: {'; '.join(unknown)} (--help lists all)"


def announce_accepted(lines: Sequence[str]) -> None:
    """Print what accepted flags mean today, once for all processes of a run."""
    if "ASCENDSPEED_LAUNCHED" in os.environ or os.environ.get("RANK", "0") != "0":
        return
    for line in lines:
        print(f"accepted: {line}", file=sys.stderr, flush=True)
