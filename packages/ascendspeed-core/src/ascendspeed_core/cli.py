"""The command `asd-core`."""

from ascendspeed_core import __version__
from ascendspeed_data.command_line import Command, build_app, run_and_exit

SUMMARY = "Train large language models under any parallel layout, on NPU, GPU or CPU."

app = build_app(
    SUMMARY,
    __version__,
    [
        Command(
            "pretrain", "ascendspeed_core.commands.pretrain:pretrain", "Train a model on tokenized text."
        ),
        Command(
            "finetune",
            "ascendspeed_core.commands.finetune:finetune",
            "Fine-tune a model on instruction sets.",
        ),
        Command(
            "dpo",
            "ascendspeed_core.commands.dpo:dpo",
            "Tune a model on pairs of answers (preference tuning).",
        ),
        Command(
            "compare-loss",
            "ascendspeed_core.commands.compare_loss:compare_loss",
            "Compare the losses of runs, with a verdict.",
        ),
        Command("models", "ascendspeed_core.commands.models:models", "List families and sizes of models."),
        Command(
            "recipes",
            "ascendspeed_core.commands.recipes:recipes",
            "List tested recipes of published models, or print one.",
        ),
        Command(
            "launch-command",
            "ascendspeed_core.commands.launch_command:launch_command",
            "Print what starts a recipe on several machines.",
        ),
        Command(
            "doctor",
            "ascendspeed_core.commands.doctor:doctor",
            "Look at this environment: versions, devices, kernels, what is missing.",
        ),
        Command(
            "plan",
            "ascendspeed_core.commands.planning:plan",
            "Say what fits on some devices, and how fast it will be.",
        ),
        Command(
            "profile-device",
            "ascendspeed_core.commands.profile_device:profile_device",
            "Measure this device for `plan`.",
        ),
        Command(
            "timeline",
            "ascendspeed_core.commands.timeline:timeline",
            "Draw what each pipeline device does in a step.",
        ),
        Command(
            "from-megatron",
            "ascendspeed_core.commands.from_megatron:from_megatron",
            "Translate a Megatron-LM script.",
        ),
        Command(
            "parity", "ascendspeed_core.commands.parity:parity", "Prove layouts equal on your model and data."
        ),
    ],
)


def main() -> None:
    """Run the command line and exit."""
    run_and_exit(app, "asd-core")


if __name__ == "__main__":
    main()
