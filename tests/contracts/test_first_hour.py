"""What someone types who comes from another program: each slip is one line that says what to type instead."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.observability.metrics import read_metrics
from support.commands import MODULES, call, environment
from support.models import save_hugging_face, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_hugging_face(tiny_config(vocab_size=400), folder, tokenizer=tokenizer_folder)
    return folder


def pretrain(model: Path, data: object, save: Path, *flags: object) -> list[object]:
    return [
        "asd-core", "pretrain", "--load", model, "--data-path", data, "--seq-length", 32, "--save", save,
        "--train-iters", 2, "--device", "cpu", "--data-cache-path", save.parent / "cache", *flags,
    ]  # fmt: skip


def test_a_path_that_is_no_prefix_names_the_command_that_makes_one(
    model: Path, dataset: Path, corpus: Path, tmp_path: Path
) -> None:
    short = str(dataset).removesuffix("_text_document")
    for part in ("input_ids", "attention_mask", "labels"):
        for suffix in (".idx", ".bin"):
            shutil.copy(f"{dataset}{suffix}", tmp_path / f"set_packed_{part}_document{suffix}")
    for data, words in (
        (
            tmp_path / "set",
            "holds samples with labels, not plain text; train on them with `asd-core finetune",
        ),
        (corpus, f"{corpus} is not tokenized yet: asd-data preprocess --input {corpus} --output-prefix"),
        (corpus.parent, f"is a folder; give a prefix in it: {dataset}"),
        (f"{dataset}.bin", f"give the prefix without the ending: {dataset}"),
        (short, f"did you mean {dataset}?"),
        (f"{dataset},{dataset}", "separate several prefixes by spaces"),
        ("wikitext/wikitext-2", "looks like a name on the Hugging Face hub"),
    ):
        done = call(*pretrain(model, data, tmp_path / "run", "--dry-run"))
        assert done.status == 1, data
        assert words in done.complaint


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["asd-infer", "generate", "--load", "meta-llama/Llama-2-7b-hf", "--prompt", "a"],
         "load=meta-llama/Llama-2-7b-hf: HF_HUB_OFFLINE is set and the cache does not have it"),
        (["asd-ckpt", "inspect", "Qwen/Qwen2.5-0.5B"], "it looks like a name on the Hugging Face hub"),
        (["asd-ckpt", "inspect", "/nowhere/at/all"], "does not exist; check --load"),
        (["asd-core", "pretrain", "--num-layers", 2, "--data-path", "x", "--seq-length", 8, "--train-iters", 1],
         "a config.json, or a size that `asd-core models` lists; --num-layers and the other sizes only check"),
    ],
)  # fmt: skip
def test_names_of_the_hub_and_sizes_without_a_model(
    args: list[object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = call(*args)
    assert done.status in (1, 2)
    assert words in done.complaint


def test_commands_and_records_of_other_programs(tmp_path: Path, tokenizer_folder: Path) -> None:
    assert "finetune on instruction sets" in call("asd-core", "train", "--lr", 1).complaint
    (tmp_path / "alpaca.json").write_text('[{"instruction": "Name one.", "input": "", "output": "One."}]')
    asked = (
        "asd-data", "preprocess", "--input", tmp_path / "alpaca.json", "--output-prefix", tmp_path / "set",
        "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    done = call(*asked)
    assert done.status == 1
    assert "has instruction, input, output; --handler-name GeneralInstructionHandler" in done.complaint
    assert (
        "did you mean GeneralInstructionHandler?" in call(*asked, "--handler-name", "AlpacaHandler").complaint
    )
    assert call(*asked, "--handler-name", "GeneralInstructionHandler").status == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tensor-model-parallel-size", 4], "start 4 with --nproc-per-node 4"),
        (
            ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 3],
            "start 6 with --nproc-per-node 6",
        ),
    ],
)
def test_a_layout_says_how_to_start_its_processes(
    model: Path, dataset: Path, tmp_path: Path, flags: list[object], words: str
) -> None:
    assert words in call(*pretrain(model, dataset, tmp_path / "run", *flags)).complaint
    assert words in call("asd-infer", "generate", "--load", model, "--prompt", "a", *flags).complaint


def test_lists_with_commas_are_lists() -> None:
    asked = (
        "asd-core",
        "finetune",
        "--load",
        "/nowhere",
        "--data-path",
        "x",
        "--seq-length",
        8,
        "--train-iters",
        1,
    )
    done = call(*asked, "--lora-target-modules", "q_proj,v_proj", "--recomputation-layer-num", "3,2", "x")
    assert "Invalid value '3,2 x' for '--recomputation-layer-num'" in done.complaint, "numbers are split too"
    done = call(*asked, "--lora-target-modules", "q_proj,v_proj")
    assert "checkpoint /nowhere does not exist" in done.complaint


def test_an_evaluation_without_a_number_of_batches_takes_all_held_out_data(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    """The loss is that of as many batches as were announced."""
    flags = ["--split", "80,20,0", "--eval-interval", 2, "--global-batch-size", 2]
    done = call(*pretrain(model, dataset, tmp_path / "all", *flags))
    assert done.status == 0, done.stderr
    said = next(line for line in done.stderr.splitlines() if line.startswith("eval_interval without"))
    batches = int(said.partition("--eval-iters ")[2].split(";")[0])
    assert f"takes all {2 * batches}" in said or f"takes all {2 * batches + 1}" in said
    assert batches > 1
    again = call(*pretrain(model, dataset, tmp_path / "some", *flags, "--eval-iters", batches))
    assert again.status == 0, again.stderr
    losses = [
        read_metrics(tmp_path / name / "metrics.jsonl")[-1]["validation_loss"] for name in ("all", "some")
    ]
    assert losses[0] == losses[1]
    none = call(*pretrain(model, dataset, tmp_path / "none", "--split", "1,0,0", "--eval-interval", 2))
    assert none.status == 2
    assert "split=1,0,0 leaves nothing to measure" in none.complaint


def test_a_loss_scale_in_another_precision_is_named(model: Path, dataset: Path, tmp_path: Path) -> None:
    for flags, is_named in ((["--bf16", "--initial-loss-scale", 4096], True), (["--bf16"], False)):
        done = call(*pretrain(model, dataset, tmp_path / "run", *flags, "--dry-run"))
        assert done.status == 0, done.stderr
        assert ("initial_loss_scale scales nothing in bfloat16: only fp16" in done.stderr) == is_named


def test_compare_loss_says_which_run_is_better(tmp_path: Path) -> None:
    for name, losses in (("a", [3.0, 2.0]), ("b", [3.0, 1.5]), ("c", [3.0, 2.0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"iteration": n, "lm_loss": loss}) + "\n" for n, loss in enumerate(losses, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    done = call("asd-core", "compare-loss", tmp_path / "a", tmp_path / "b", tmp_path / "c")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert (
        f"at the end {b} is better than {a} by 0.25: 2.2500 and 2.5000 (means of the last 2 common"
        in done.stdout
    )
    assert f"at the end {c} and {a} have the same loss, 2.5000" in done.stdout


def test_an_empty_output_folder_is_as_good_as_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    args = ("asd-ckpt", "convert", "--load", model, "--save", tmp_path / "out")
    assert call(*args).status == 0
    assert "exists; give --overwrite" in call(*args).complaint


def test_the_launcher_of_2023_starts_commands(model: Path, dataset: Path, tmp_path: Path) -> None:
    """`python -m torch.distributed.launch` passes --local-rank before the command."""
    args = pretrain(model, dataset, tmp_path / "run", "--tensor-model-parallel-size", 2, "--dry-run")
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node",
        "2",
        "-m",
        MODULES["asd-core"],
    ]
    done = subprocess.run(
        [*launcher, *map(str, args[1:])], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "layout: tp2" in done.stderr
    alone = call("asd-core", "--local-rank=0", *args[1:])
    assert alone.status == 2
    assert "--local-rank is for processes of a launcher, which sets LOCAL_RANK too" in alone.complaint


def test_no_config_has_a_formula_for_a_name() -> None:
    from ascendspeed_core.config.deepspeed import RunValues

    names = {
        name for section in PretrainConfig.model_fields.values() for name in section.annotation.model_fields
    }
    values = dict.fromkeys(RunValues.__annotations__, 1) | {"betas": (0.9, 0.9), "dtype": "float16"}
    for name, _ in RunValues(**values).named().values():
        assert "log2" not in name
        assert any(part in names or part in {"fp16", "bf16"} for part in name.replace(",", " ").split())
