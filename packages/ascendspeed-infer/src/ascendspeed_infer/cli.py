"""The command `asd-infer`."""

from ascendspeed_data.command_line import Command, build_app, run_and_exit
from ascendspeed_infer import __version__

app = build_app(
    "Generate text from any checkpoint, under any layout.",
    __version__,
    [
        Command("generate", "ascendspeed_infer.commands.generate:generate", "Continue texts."),
        Command(
            "recipes",
            "ascendspeed_infer.commands.recipes:recipes",
            "List tested recipes of generation, or print one.",
        ),
        Command("serve", "ascendspeed_infer.commands.serve:serve", "Answer over HTTP, in OpenAI's form."),
        Command("chat", "ascendspeed_infer.commands.chat:chat", "Talk with a model."),
    ],
)


def main() -> None:
    """Run the command line and exit."""
    run_and_exit(app, "asd-infer")


if __name__ == "__main__":
    main()
