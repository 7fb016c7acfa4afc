"""The command `asd-data`."""

from ascendspeed_data import __version__
from ascendspeed_data.command_line import Command, build_app, run_and_exit

COMMANDS = "ascendspeed_data.commands"

app = build_app(
    "Prepare training data for large language models; needs no torch.",
    __version__,
    [
        Command(
            "train-tokenizer",
            f"{COMMANDS}.train_tokenizer:train_tokenizer_command",
            "Train a SentencePiece tokenizer.",
        ),
        Command(
            "preprocess", f"{COMMANDS}.preprocess:preprocess_command", "Tokenize text into .bin/.idx files."
        ),
        Command(
            "handlers",
            f"{COMMANDS}.handlers:handlers_command",
            "List the handlers of records.",
        ),
        Command(
            "inspect",
            f"{COMMANDS}.inspect:inspect_command",
            "Show counts, manifest and documents of a dataset.",
        ),
        Command("merge", f"{COMMANDS}.merge:merge_command", "Merge datasets that have the same tokenizer."),
        Command(
            "verify", f"{COMMANDS}.inspect:verify_command", "Check that a dataset is complete and undamaged."
        ),
    ],
)


def main() -> None:
    """Run the command line and exit."""
    run_and_exit(app, "asd-data")


if __name__ == "__main__":
    main()
