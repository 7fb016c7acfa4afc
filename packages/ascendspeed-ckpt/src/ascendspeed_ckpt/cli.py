"""The command `asd-ckpt`."""

from ascendspeed_ckpt import __version__
from ascendspeed_data.command_line import Command, build_app, run_and_exit

COMMANDS = "ascendspeed_ckpt.commands"

app = build_app(
    "Convert, inspect and verify checkpoints.",
    __version__,
    [
        Command(
            "convert",
            f"{COMMANDS}.convert:convert_command",
            "Convert a checkpoint to another kind or layout.",
        ),
        Command("inspect", f"{COMMANDS}.inspect:inspect_command", "Describe a checkpoint."),
        Command(
            "merge-lora", f"{COMMANDS}.merge_lora:merge_lora_command", "Merge a LoRA adapter into a model."
        ),
        Command(
            "verify", f"{COMMANDS}.verify:verify_command", "Check that two checkpoints hold the same model."
        ),
    ],
)


def main() -> None:
    """Run the command line and exit."""
    run_and_exit(app, "asd-ckpt")


if __name__ == "__main__":
    main()
