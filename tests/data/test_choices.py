"""Choices on the command line go by their usual names, and a name that is not known gets a suggestion."""

from pathlib import Path

import pytest

from ascendspeed_data.command_line.app import ALIASES, usual_choices
from support.commands import call

FORMATS = ["native", "huggingface", "ascendspeed", "megatron", "torch_dist"]
CHOICES = {"--to": FORMATS, "--dtype": ["float64", "float32", "bfloat16", "float16"], "--save": []}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--to", "hf"], ["--to", "huggingface"]),
        (["--to=HF"], ["--to=huggingface"]),
        (["--to", "Torch-Dist", "--save", "hf"], ["--to", "torch_dist", "--save", "hf"]),
        (["--to", "Megatron-LM", "--dtype", "bf16"], ["--to", "megatron", "--dtype", "bfloat16"]),
        (["--to", "mcore", "hf"], ["--to", "mcore", "hf"]),
        (["hf", "--save", "--to", "--to", "hf"], ["hf", "--save", "--to", "--to", "huggingface"]),
        (["--to", "hf", "--", "--to", "hf"], ["--to", "huggingface", "--", "--to", "hf"]),
        (["--dtype", "hf"], ["--dtype", "hf"]),
    ],
)
def test_other_names_are_replaced_after_their_flags_only(given: list[str], taken: list[str]) -> None:
    assert usual_choices(given, CHOICES) == taken


def test_a_choice_is_never_taken_for_another() -> None:
    for choices in CHOICES.values():
        for choice in choices:
            assert usual_choices(["--to", choice], {"--to": choices}) == ["--to", choice]
    assert not set(ALIASES) & {choice for choices in CHOICES.values() for choice in choices}


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("convert", ["--to", "mcore"], "did you mean megatron (files of each rank) or torch_dist?"),
        ("convert", ["--to", "hugginface"], "did you mean huggingface?"),
        ("convert", ["--from", "safetensors"], "did you mean huggingface with"),
        ("convert", ["--to", "hf"], "is not a checkpoint of a known kind"),
        ("convert", ["--from", "hf"], "config.json"),
        ("inspect", ["--from", "hf"], "config.json"),
        ("inspect", ["--from", "mcore"], "did you mean megatron"),
    ],
)
def test_commands_name_the_right_format(tmp_path: Path, command: str, given: list[str], says: str) -> None:
    folders = [tmp_path] if command == "inspect" else ["--load", tmp_path, "--save", tmp_path / "new"]
    done = call("asd-ckpt", command, *folders, *given)
    assert done.status != 0
    assert says in done.complaint
    assert len(done.stderr.strip().splitlines()) == 1
