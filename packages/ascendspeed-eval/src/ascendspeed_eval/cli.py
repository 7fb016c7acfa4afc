"""The command `asd-eval`."""

from ascendspeed_eval import __version__
from ascendspeed_eval.command_line import Command, build_app
from ascendspeed_eval.running import run_and_exit

COMMANDS = "ascendspeed_eval.commands"

app = build_app(
    "Evaluate language models on benchmarks, with scores that anyone can reproduce.",
    __version__,
    [
        Command("run", f"{COMMANDS}.run:run", "Evaluate a model on a benchmark."),
        Command("recipes", f"{COMMANDS}.show:recipes", "List the recipes of evaluation, or print one."),
        Command("tasks", f"{COMMANDS}.show:tasks", "List the benchmarks and their protocols."),
        Command("report", f"{COMMANDS}.show:report", "Put several runs into one table."),
        Command("compare", f"{COMMANDS}.show:compare", "Compare two runs sample by sample."),
    ],
)


def main() -> None:
    """Run the command line and exit."""
    run_and_exit(app, "asd-eval")


if __name__ == "__main__":
    main()
