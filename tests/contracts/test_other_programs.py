"""Flags of other programs get an answer: taken, explained, or refused together with what to give instead."""

import random
import re
import sys
from pathlib import Path

import pytest

import ascendspeed_eval.other_programs
from ascendspeed_data.command_line.other_programs import (
    TABLE,
    plain,
    read_answers,
    settle_flags,
)
from support.command_flags import all_commands
from support.commands import call
from support.flags_2023 import PROGRAMS, README, SCRIPTS
from support.tables import ReportTables

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from coming_from_page import PAGE, page

ANSWERS = read_answers()

NEWCOMERS = {
    "asd-core pretrain": """
        learning-rate:--lr output-dir:--save gradient-accumulation-steps:--global-batch-size
        per-device-train-batch-size:--micro-batch-size per_device_eval_batch_size:--global-batch-size
        epochs:--num-train-epochs max-steps:--train-iters save-steps:--save-interval save_total_limit:--keep-checkpoints
        eval-steps:--eval-interval eval_strategy:--eval-interval logging-steps:--log-interval
        report-to:--tensorboard-dir lr-scheduler-type:--lr-decay-style warmup-steps:--lr-warmup-iters
        warmup-ratio:--lr-warmup-fraction max-grad-norm:--clip-grad adam-epsilon:--adam-eps optim:--optimizer
        gradient-checkpointing:--checkpoint-activations recompute-granularity:--checkpoint-policy
        resume-from-checkpoint:--auto-resume model-name-or-path:--load tokenizer-model:--tokenizer-name-or-path
        dataset:--data-path train-file:--data-path cutoff-len:--seq-length max-seq-length:--seq-length
        flash-attn:--attention params-dtype:--dtype fsdp:--zero-stage tensor-parallel-size:--tensor-model-parallel-size
        is-instruction-dataset:finetune lora-r:finetune lora-rank:--lora-r lora-target:--lora-target-modules
        dpo-beta:dpo pref-beta:--dpo-beta val-size:--split use-dist-ckpt:asd-ckpt num-experts:experts
        train-tokens:--train-samples nnodes:torchrun wandb-project:--tensorboard-dir data-seed:--seed
        trust-remote-code:never overwrite-output-dir:--save template:asd-data packing:--pack
        moe-ffn-hidden-size:config.json kv-lora-rank:config.json moe-router-dtype:fp32 mtp-num-layers:experts.md
        moe-layer-recompute:--checkpoint-activations moe-tp-extend-ep:--expert-tensor-parallel-size
        disable-moe-token-dropping:--moe-expert-capacity-factor moe-train-capacity-factor:--moe-expert-capacity-factor
        ulysses-size:--context-parallel-size decoder-first-pipeline-num-layers:--num-layers-per-virtual-pipeline-stage
    """,
    "asd-core finetune": """
        learning_rate:--lr finetuning-type:--lora-target-modules lora-rank:--lora-r lora_target:--lora-target-modules
        adapter-name-or-path:--lora-load num_epochs:--num-train-epochs quantization-bit:--weight-quantization
        additional-target:--lora-modules-to-save stage:asd-core bf-16:--bf16
    """,
    "asd-infer generate": """
        model:--load max-tokens:--max-new-tokens tensor-parallel-size:--tensor-model-parallel-size
        max-model-len:max_position_embeddings gpu-memory-utilization:--batch-size n:--num-return-sequences
        logprobs:--return-log-probs presence-penalty:--repetition-penalty min-p:--repetition-penalty
        stop-token-ids:--eos-token-ids quantization:--weight-quantization host:server lora-modules:--lora-load
        tokenizer:--tokenizer-name-or-path chat-template:asd-infer beam-size:--num-beams input-file:--prompt-file
        data-parallel-size:--nproc-per-node
    """,
    "asd-eval run": """
        tasks:--task model:--load model_args:--load batch_size:--micro-batch-size output_path:--output-dir
        log_samples:--output-dir gen_kwargs:--max-new-tokens num-shots:--num-fewshot
        include_path:--task use_cache:--output-dir
        confirm_run_unsafe_code:--allow-code-execution max-gen-toks:--max-new
        top-p:--temperature
    """,
    "asd-ckpt convert": """
        saver:--to loader:--from load-dir:--load save-dir:--save
        target-tensor-parallel-size:--tensor-model-parallel-size
        model-type-hf:--model-config lora-load:merge-lora export-size:--max-shard-size
    """,
    "asd-data preprocess": """
        dataset:--input output-dir:--output-prefix num-proc:--workers cutoff-len:--seq-length packing:--pack
        template:--chat-template prompt-type:--chat-template text-column:--json-key vocab-file:--tokenizer-name-or-path
        add_eos_token:--append-eod overwrite_cache:--overwrite
    """,
}
"""By command: flags of transformers, LLaMA-Factory, MindSpeed-LLM, Megatron-LM, vLLM and lm-evaluation-harness, and
what the answer must name."""


def settle(command: str, *args: str) -> tuple[list[str], list[str], list[str]]:
    params = all_commands()[command]
    takes_value = {flag: not getattr(param, "is_flag", False) for flag, param in params.items()}
    program = command.split()[0]
    siblings = {
        name.split()[1]: list(flags)
        for name, flags in all_commands().items()
        if name.startswith(f"{program} ") and name != command
    }
    return settle_flags(command, list(args), takes_value, lambda: siblings, lambda: ANSWERS)


def kind_of_answer(command: str, flag: str) -> str:
    kept, accepted, unknown = settle(command, flag)
    if kept:
        return "an option"
    if accepted:
        return "accepted with a line"
    return "unknown" if "is unknown" in unknown[0] else "refused with a remedy"


@pytest.mark.parametrize(
    ("source", "flags"), [("README", README), ("scripts", SCRIPTS), ("programs", PROGRAMS)]
)
def test_every_flag_of_2023_gets_an_answer(
    source: str, flags: dict[str, list[str]], report: ReportTables
) -> None:
    for command, names in flags.items():
        kinds = {flag: kind_of_answer(command, flag) for flag in names}
        unknown = [flag for flag, kind in kinds.items() if kind == "unknown"]
        if source == "README":
            assert set(kinds.values()) == {"an option"}, kinds
        counts = [
            list(kinds.values()).count(kind)
            for kind in ("an option", "accepted with a line", "refused with a remedy", "unknown")
        ]
        header = (
            "from",
            "today",
            "flags",
            "an option",
            "accepted with a line",
            "refused with a remedy",
            "unknown",
        )
        report.add("Answers to flags of AscendSpeed 2023", header, source, command, len(names), *counts)
        assert not unknown, (command, unknown)


@pytest.mark.nightly
def test_each_answer_to_a_flag_of_2023_is_printed(report: ReportTables) -> None:
    """The whole table, for people: flag by flag, what the command of today answers."""
    given: dict[str, set[str]] = {}
    for flags in (README, SCRIPTS, PROGRAMS):
        for command, names in flags.items():
            given.setdefault(command, set()).update(names)
    for command, names in given.items():
        for flag in sorted(names):
            kept, accepted, unknown = settle(command, flag)
            answer = (
                "an option"
                if kept
                else f"accepted: {accepted[0].partition(': ')[2]}"
                if accepted
                else unknown[0]
            )
            report.add("Each flag of 2023", ("command", "flag", "answer"), command, flag, answer)
            assert "is unknown" not in answer


@pytest.mark.parametrize("command", NEWCOMERS)
def test_flags_of_other_programs_are_answered(command: str, report: ReportTables) -> None:
    pairs = [word.split(":") for word in NEWCOMERS[command].split()]
    for flag, wanted in pairs:
        _, _, unknown = settle(command, f"--{flag}", "1")
        assert len(unknown) == 1, flag
        assert wanted in unknown[0], (flag, unknown)
        report.add(
            "Answers to flags of other programs",
            ("command", "flag", "answer"),
            command,
            f"--{flag}",
            unknown[0],
        )


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python scripts/coming_from_page.py"


def test_there_is_one_table() -> None:
    copy = Path(ascendspeed_eval.other_programs.__file__)
    for name in (TABLE, TABLE.with_suffix(".py")):
        assert copy.with_name(name.name).read_bytes() == name.read_bytes()
    stopping = TABLE.with_name("stopping.py").read_text(encoding="utf-8")
    renamed = stopping.replace("ascendspeed_data", "ascendspeed_eval").replace(
        "AscendSpeedError", "EvaluationError"
    )
    assert copy.with_name("stopping.py").read_text(encoding="utf-8") == renamed


def test_answers_name_flags_that_exist() -> None:
    """Each flag in an answer is one of the program that it is about, or of a program that it names."""
    for answer in ANSWERS:
        programs = {at.split()[0] for at in answer.at} | set(re.findall(r"asd-\w+", answer.say))
        known = {
            flag
            for command, flags in all_commands().items()
            for flag in flags
            if command.split()[0] in programs
        }
        for flag in re.findall(r"(?<![\w-])--[\w-]+", answer.say.replace("torchrun --nnodes", "torchrun")):
            assert flag in known, f"{answer.flag}: {flag} is no flag"
        for command in re.findall(r"asd-\w+ [a-z][\w-]+", answer.say):
            assert command in all_commands() or command.split()[1] in ("has", "trains", "and"), command


def test_no_accepted_flag_hides_an_option() -> None:
    """An option of a command is parsed, not answered; an answer that no command can give is dead."""
    for answer in ANSWERS:
        about = [command for command in all_commands() if answer.is_about(command)]
        assert about, answer
        lacking = [
            command
            for command in about
            if plain(answer.flag) not in {plain(flag) for flag in all_commands()[command]}
        ]
        assert lacking, f"{answer.flag} is an option of {about}"


def test_accepted_flags_leave_the_rest_as_it_was() -> None:
    """Drawn lines: flags of 2023 anywhere in a command line change nothing of what remains of it."""
    draw = random.Random(2023)
    options = [
        ["--lr", "3e-4"],
        ["--seq-length", "8"],
        ["--fp16"],
        ["--data-path", "0.3", "a", "0.7", "b"],
        ["--load", "x"],
    ]
    own = {plain(flag) for flag in all_commands()["asd-core pretrain"]}
    accepted = [
        a
        for a in ANSWERS
        if a.values is not None and a.is_about("asd-core pretrain") and plain(a.flag) not in own
    ]
    tried = 0
    for _ in range(300):
        given = draw.sample(options, draw.randint(1, len(options)))
        added: list[list[str]] = []
        for answer in draw.sample(accepted, draw.randint(1, 4)):
            flag = (
                answer.flag.replace("-", "_").replace("__", "--", 1) if draw.random() < 0.3 else answer.flag
            )
            added.append([flag, *["value"][: answer.values == "1"]])
        mixed = [*given]
        for one in added:
            mixed.insert(draw.randint(0, len(mixed)), one)
        kept, lines, unknown = settle("asd-core pretrain", *[word for part in mixed for word in part])
        assert kept == [word for part in mixed if part in given for word in part]
        assert len(lines) == len(added)
        assert not unknown
        tried += 1
    assert tried == 300


def test_a_flag_of_the_same_name_without_a_value_is_answered() -> None:
    """Megatron-LM's --swiglu is a switch, here it chooses a kernel."""
    kept, accepted, unknown = settle(
        "asd-core pretrain", "--swiglu", "--normalization", "RMSNorm", "--lr", "1"
    )
    assert kept == ["--lr", "1"]
    assert len(accepted) == 2
    assert not unknown
    assert settle("asd-core pretrain", "--swiglu", "liger")[0] == ["--swiglu", "liger"]
    assert settle("asd-infer generate", "--prompt", "--lr")[0] == ["--prompt", "--lr"]


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [(["--zero-stage", 0], "stage 0 shards nothing"), (["--optimizer", "adamw"], "adam is AdamW")],
)
def test_values_of_other_programs_are_answered(flags: list[object], remedy: str) -> None:
    done = call("asd-core", "pretrain", "--load", "x", "--data-path", "y", *flags)
    assert done.status == 2
    assert remedy in done.complaint


def test_one_message_answers_all_flags_of_a_line() -> None:
    done = call(
        "asd-core", "pretrain", "--learning-rate", 1, "--DDP-impl", "local", "--epochs", 3, "--lora-r", 8, "--flubb", 1
    )  # fmt: skip
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    for part in (
        "lacks 4 flags",
        "give --lr;",
        "--num-train-epochs",
        "--lora-r belongs to asd-core finetune and dpo",
        "--flubb is unknown",
    ):
        assert part in done.stderr


def test_accepted_flags_say_what_they_mean() -> None:
    done = call(
        "asd-infer",
        "generate",
        "--seq-length",
        8,
        "--no-pipeline-parallel",
        "--load",
        "/nowhere",
        "--prompt",
        "a",
    )
    assert "accepted: --seq-length 8: a prompt and its text may be as long" in done.stderr
    assert "accepted: --no-pipeline-parallel: there is a pipeline only" in done.stderr
    assert done.complaint.startswith("asd-infer: error: checkpoint /nowhere does not exist")


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (
            ["asd-infer", "generate", "--load", "x", "--prompt", "a", "--layernorm-epsilon", -1],
            "--layernorm-epsilon=-1",
        ),
        (["asd-infer", "generate", "--load", "x", "--prompt", "a", "--norm-epsilon", -1], "norm_epsilon=-1"),
        (["asd-ckpt", "convert", "--load", "x"], "output_model_dir is missing"),
    ],
)
def test_messages_use_the_spelling_of_the_user(args: list[object], complaint: str) -> None:
    assert complaint in call(*args).complaint
