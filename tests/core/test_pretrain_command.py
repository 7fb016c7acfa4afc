"""`asd-core pretrain` as a user runs it: what it leaves, how it goes on after a kill, what it refuses."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.training.checkpoint import saved_iterations
from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.source import CheckpointError
from support.commands import RunningCommand, call, command_line, run_command
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables


@pytest.fixture(scope="module")
def model_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "model.json"
    path.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return path


@pytest.fixture
def arguments(model_json: Path, dataset: Path, tmp_path: Path) -> list[object]:
    return [
        "asd-core", "pretrain", "--model-config", model_json, "--data-path", dataset, "--seq-length", 32,
        "--micro-batch-size", 2, "--global-batch-size", 8, "--train-iters", 12, "--lr", 3e-3, "--save",
        tmp_path / "run", "--data-cache-path", tmp_path / "cache", "--split", "90,10,0", "--log-interval", 4,
    ]  # fmt: skip


def weights_of(folder: Path) -> dict[str, Any]:
    source = open_weights(folder)
    return {name: source.read(name) for name in source.tensors()}


def equal_runs(a: Path, b: Path) -> bool:
    keys = ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples")
    rows = [[tuple(r[key] for key in keys) for r in read_metrics(p / "metrics.jsonl")] for p in (a, b)]
    first, second = weights_of(a), weights_of(b)
    return rows[0] == rows[1] and all(first[name].equal(second[name]) for name in first)


def test_what_a_run_leaves(arguments: list[object], tmp_path: Path, tokenizer_folder: Path) -> None:
    done = call(
        *arguments, "--eval-iters", 2, "--eval-interval", 4, "--save-interval", 5, "--tokenizer-name-or-path",
        tokenizer_folder, "--lr-warmup-iters", 3, "--lr-decay-style", "cosine", "--min-lr", 3e-4,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert done.stdout == ""
    run = tmp_path / "run"
    records = read_metrics(run / "metrics.jsonl")
    assert [r["iteration"] for r in records] == list(range(1, 13))
    assert [r["consumed_samples"] for r in records] == [8 * n for n in range(1, 13)]
    assert all(r["lm_loss"] > 0 and r["grad_norm"] > 0 and r["tokens_per_second"] > 0 for r in records)
    assert records[-1]["peak_memory_bytes"] > 10_000_000
    assert records[-1]["lm_loss"] < records[0]["lm_loss"] - 0.2
    rates = [r["learning_rate"] for r in records]
    assert rates.index(max(rates)) in (2, 3)
    assert max(rates) == pytest.approx(3e-3)
    assert min(rates[3:]) >= 3e-4
    assert [r["iteration"] for r in records if "validation_loss" in r] == [4, 8, 12]
    assert sorted(p.name for p in run.iterdir()) == [
        "data.manifest.json", "iter_0000005", "iter_0000010", "iter_0000012", "latest_checkpointed_iteration.txt",
        "loss.png", "metrics.jsonl", "tokenizer",
    ]  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "tokenizer" / "tokenizer.model").read_bytes() == (
        tokenizer_folder / "tokenizer.model"
    ).read_bytes()
    description = json.loads((run / "iter_0000012" / "checkpoint.json").read_text())
    assert description["run"]["optimizer"]["lr"] == 3e-3
    assert "iteration 12/12 | loss" in done.stderr
    assert "nats below the unigram entropy" in done.stderr or "nats above the unigram entropy" in done.stderr


def test_validation_does_not_change_training(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments).status == 0
    with_validation = [*arguments, "--save", tmp_path / "other", "--eval-iters", 1, "--eval-interval", 1]
    assert call(*with_validation).status == 0
    assert equal_runs(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopping_and_going_on_changes_nothing(arguments: list[object], tmp_path: Path, dtype: str) -> None:
    arguments = [*arguments, "--dtype", dtype]
    assert call(*arguments, "--save", tmp_path / "whole").status == 0
    assert call(*arguments, "--exit-interval", 5, "--auto-resume").status == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["iteration"] == 5
    done = call(*arguments, "--auto-resume")
    assert done.status == 0, done.stderr
    assert "resumed at iteration 5" in done.stderr
    assert equal_runs(tmp_path / "run", tmp_path / "whole")


def kill_when(condition: Callable[[], bool], arguments: list[object]) -> None:
    """Start a command, and kill its session with SIGKILL once the condition holds."""
    running = RunningCommand(*arguments)
    wait_for(condition, running)
    running.kill_session()


def wait_for(condition: Callable[[], bool], running: RunningCommand) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert running.poll() is None, running.stderr
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_kill_and_resume(arguments: list[object], tmp_path: Path, processes: int) -> None:
    layout = ["--nproc-per-node", processes, "--tensor-model-parallel-size", processes]
    arguments = [*arguments, *layout, "--save-interval", 3, "--train-iters", 40, "--device", "cpu"]
    whole = run_command(*arguments, "--save", tmp_path / "whole")
    assert whole.status == 0, whole.stderr
    metrics = tmp_path / "run" / "metrics.jsonl"
    kill_when(lambda: metrics.exists() and len(read_metrics(metrics)) >= 8, arguments)
    assert len(read_metrics(metrics)) < 60
    done = run_command(*arguments, "--auto-resume")
    assert done.status == 0, done.stderr
    assert "resumed at iteration" in done.stderr
    assert equal_runs(tmp_path / "run", tmp_path / "whole")


def test_workers_do_not_outlive_their_launcher(arguments: list[object], tmp_path: Path) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    arguments = [*arguments, "--nproc-per-node", 2, "--train-iters", 100_000, "--device", "cpu"]
    kill_when(lambda: metrics.exists() and len(read_metrics(metrics)) >= 3, arguments)
    time.sleep(0.5)
    before = metrics.stat().st_size
    time.sleep(0.5)
    assert metrics.stat().st_size == before


def test_ctrl_c_ends_all_processes_with_one_line(arguments: list[object], tmp_path: Path) -> None:
    flags = ["--nproc-per-node", 2, "--train-iters", 100_000, "--device", "cpu"]
    running = start([*arguments, *flags], tmp_path / "run", records=2)
    running.send_signal(signal.SIGINT)
    done = running.finish(timeout=60)
    assert done.status == 130, done.stderr
    reached = saved_iterations(tmp_path / "run")[-1]
    assert done.complaint == (
        f"asd-core: error: stopped by Ctrl-C, all 2 processes with it; {tmp_path}/run holds iteration {reached}; the "
        "same command with --auto-resume goes on from there"
    )
    assert "Traceback" not in done.stderr


def start(arguments: list[object], run: Path, records: int) -> RunningCommand:
    """Start a command, and return once its run has written so many records."""
    running = RunningCommand(*arguments)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= records, running)
    return running


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.nightly), 2])
def test_sigterm_saves_and_exits(arguments: list[object], tmp_path: Path, processes: int) -> None:
    """What was done is not lost, and the run goes on as if it had not been stopped."""
    layout = ["--nproc-per-node", processes, "--tensor-model-parallel-size", processes, "--device", "cpu"]
    flags = [*arguments, *layout, "--train-iters", 40, "--async-save"]
    running = start(flags, tmp_path / "run", records=2)
    # Schedulers may signal every process of a job, and the launcher passes on what it gets.
    for process in (*psutil.Process(running.pid).children(recursive=True), psutil.Process(running.pid)):
        process.send_signal(signal.SIGTERM)
    done = running.finish(timeout=60)
    assert done.status == 143, done.stderr
    assert "SIGTERM: saving after this step" in done.stderr
    assert "Traceback" not in done.stderr
    assert "stopped by SIGTERM" in done.complaint
    reached = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert 2 <= reached < 40
    assert saved_iterations(tmp_path / "run") == [reached]
    assert run_command(*flags, "--auto-resume").status == 0
    assert run_command(*flags, "--save", tmp_path / "whole").status == 0
    assert equal_runs(tmp_path / "run", tmp_path / "whole")


def test_only_the_newest_checkpoints_are_kept(arguments: list[object], tmp_path: Path) -> None:
    done = call(
        *arguments, "--save-interval", 2, "--keep-checkpoints", 2, "--save-retain-interval", 6, "--async-save"
    )
    assert done.status == 0, done.stderr
    assert saved_iterations(tmp_path / "run") == [6, 10, 12]


@pytest.fixture(scope="module")
def large_model_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose checkpoint of 110 MB takes long enough to write that it can be killed meanwhile."""
    config = tiny_config(
        vocab_size=400, hidden_size=256, ffn_hidden_size=1024, head_dim=32, tie_word_embeddings=True
    )
    path = tmp_path_factory.mktemp("large") / "model.json"
    path.write_text(json.dumps(find_family("llama").write_config(config)))
    return path


LAYOUTS: dict[str, list[object]] = {
    "tp2 x pp2": ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--nproc-per-node", 4],
    "tp4": ["--tensor-model-parallel-size", 4, "--nproc-per-node", 4],
    "pp2": ["--pipeline-model-parallel-size", 2, "--nproc-per-node", 2],
    "dp2 + sharded optimizer": ["--nproc-per-node", 2, "--use-distributed-optimizer"],
    "one process": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param(("tp2 x pp2", "one process"), id="two"),
        pytest.param(tuple(LAYOUTS), marks=pytest.mark.nightly, id="all"),
    ],
)
def test_a_save_killed_half_way_and_resumed_under_any_layout(
    arguments: list[object],
    large_model_json: Path,
    tmp_path: Path,
    report: ReportTables,
    layouts: tuple[str, ...],
) -> None:
    """Killed with -9 while it saves iteration 6, the run still has iteration 3, and any layout goes on from there."""
    arguments = [*arguments[:3], large_model_json, *arguments[4:], "--dtype", "float64", "--save-interval", 3]
    arguments += ["--train-iters", 8, "--device", "cpu"]
    whole = run_command(*arguments, *LAYOUTS["tp2 x pp2"], "--save", tmp_path / "whole")
    assert whole.status == 0, whole.stderr
    half = tmp_path / "run" / "iter_0000006.incomplete"
    kill_when(lambda: any(half.glob("*.distcp")), [*arguments, *LAYOUTS["tp2 x pp2"]])
    assert saved_iterations(tmp_path / "run") == [3]
    assert half.exists()
    with pytest.raises(CheckpointError, match="was not completed"):
        open_weights(half)
    want = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    for name in layouts:
        run = tmp_path / name.replace(" ", "")
        shutil.copytree(tmp_path / "run", run)
        done = run_command(*arguments, *LAYOUTS[name], "--save", run, "--auto-resume")
        assert done.status == 0, done.stderr
        assert "resumed at iteration 3" in done.stderr
        records = read_metrics(run / "metrics.jsonl")
        # float64: the sums run in another order. The same losses come from the same samples only.
        worst = max(
            abs(a["lm_loss"] - b["lm_loss"]) / b["lm_loss"] for a, b in zip(records, want, strict=True)
        )
        assert worst < 1e-12
        assert (worst == 0) or name != "tp2 x pp2"
        assert sorted(saved_iterations(run)) == [3, 6, 8]
        assert not list(run.glob("*.incomplete"))
        digests = [
            json.loads((f / "iter_0000008/checkpoint.json").read_text())["order_digest"]
            for f in (run, tmp_path / "whole")
        ]
        assert digests[0] == digests[1]
        report.add(
            "Killed during the save of iteration 6 at tp2 x pp2, resumed from iteration 3, float64",
            ("resumed as", "largest relative difference of a loss", "sample order"), name, worst, "same",
        )  # fmt: skip


def test_a_layout_of_four_processes_under_torchrun(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments).status == 0
    done = run_command(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 4, "--module", *command_line(*arguments)[2:],
        "--tensor-model-parallel-size", 2, "--save", tmp_path / "four",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    one, four = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "four"))
    # fp32: the sums run in another order.
    assert [r["lm_loss"] for r in four] == pytest.approx([r["lm_loss"] for r in one], rel=1e-4)
    description = json.loads((tmp_path / "four" / "iter_0000012" / "checkpoint.json").read_text())
    assert {size: description["layout"][size] for size in ("tp", "pp", "dp")} == {"tp": 2, "pp": 1, "dp": 2}


def test_stages_are_printed_and_validate(arguments: list[object], tmp_path: Path) -> None:
    measured = [*arguments, "--eval-iters", 1, "--eval-interval", 4]
    assert call(*measured).status == 0
    flags = [
        "--pipeline-model-parallel-size",
        3,
        "--nproc-per-node",
        3,
        "--save",
        tmp_path / "three",
        "--device",
        "cpu",
    ]
    done = run_command(*measured, *flags)
    assert done.status == 0, done.stderr
    assert "stages: layers 0-1, 2, 3" in done.stderr
    one, three = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "three"))
    for key in ("lm_loss", "grad_norm"):
        # fp32: the sums of the gradient norm run in another order.
        assert [r[key] for r in three] == pytest.approx([r[key] for r in one], rel=1e-4)
    losses = [[r["validation_loss"] for r in rows if "validation_loss" in r] for rows in (three, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 3


def test_start_from_a_hugging_face_folder(arguments: list[object], tmp_path: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "hf")
    start = [*arguments[:2], "--load", tmp_path / "hf", *arguments[4:]]
    done = call(*start, "--num-layers", 4, "--hidden-size", 32)
    assert done.status == 0, done.stderr
    assert "weights: huggingface" in done.stderr
    assert "num_layers=5 contradicts" in call(*start, "--num-layers", 5, "--save", tmp_path / "b").complaint


def test_finetuning_starts_the_data_anew(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments).status == 0
    second = [*arguments[:2], "--load", tmp_path / "run", *arguments[4:], "--save", tmp_path / "second"]
    done = call(*second, "--finetune", "--seed", 7)
    assert done.status == 0, done.stderr
    records = read_metrics(tmp_path / "second" / "metrics.jsonl")
    assert records[0]["iteration"] == 1
    assert records[0]["lm_loss"] < read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["lm_loss"] - 0.2
    changed = call(*second, "--save", tmp_path / "third", "--seed", 7)
    assert changed.status == 1
    assert "seed was 1234, is 7" in changed.complaint


def test_a_changed_length_of_the_run_is_refused(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments, "--exit-interval", 5).status == 0
    done = call(*arguments, "--auto-resume", "--train-iters", 2000)
    assert done.status == 1
    assert "stop early with --exit-interval" in done.complaint


def test_a_loss_that_is_no_number_ends_the_run(arguments: list[object], tmp_path: Path) -> None:
    done = call(*arguments, "--lr", 1e30, "--clip-grad", 0, "--save-interval", 1)
    assert done.status == 1
    assert "iteration 2: loss=" in done.complaint
    assert (
        "grad_norm=nan; all results are finite, the gradient of layers.3's result is the first"
        in done.complaint
    )
    assert open_weights(tmp_path / "run").read("embedding.weight").isfinite().all()


def test_a_dry_run_writes_nothing(arguments: list[object], tmp_path: Path) -> None:
    done = call(*arguments, "--dry-run")
    assert done.status == 0
    assert "8 samples of 32 tokens; iterations 0 to 12" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_on_the_same_folder(arguments: list[object], tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "run.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = call(*arguments)
    assert done.status == 1
    assert "is being written by another run" in done.complaint


BAD: dict[str, tuple[list[object], int, str]] = {
    "a flag that is not": (["--tensor-model-paralel-size", 2], 2, "did you mean --tensor-model-parallel-size or"),
    "a checkpoint that is not": (["{model}", "--load", "/nowhere/run"], 1, "does not exist"),
    "heads that do not divide": (["--tensor-model-parallel-size", 16, "--nproc-per-node", 16], 2, "choose 1, 2, 4, 8"),
    "a sequence that cannot be cut": (["--sequence-parallel"], 2, "give --tensor-model-parallel-size 2 or more"),
    "a sequence that does not divide": (
        ["--seq-length", 33, "--sequence-parallel", "--tensor-model-parallel-size", 2, "--nproc-per-node", 2],
        2,
        "choose 32",
    ),
    "ranks that do not divide": (["--tensor-model-parallel-size", 2, "--nproc-per-node", 3], 2, "not divide the 3"),
    "a batch that does not divide": (["--global-batch-size", 7], 2, "choose 6"),
    "a length beyond the model": (["--seq-length", 65], 1, "max_position_embeddings=64"),
    "data that is not": (["{data}", "/nowhere/x"], 1, "/nowhere/x.idx does not exist"),
    "two formats": (["--fp16", "--bf16"], 2, "were both asked for"),
    "a stage without a layer": (["--pipeline-model-parallel-size", 5, "--nproc-per-node", 5], 2, "choose 4 stages"),
    "stages that do not divide": (["--pipeline-model-parallel-size", 2, "--nproc-per-node", 3], 2, "multiple of 2"),
    "no iterations": (["--train-iters", 0], 2, "train_iters=0"),
    "an empty split": (["--split", "0,100,0"], 1, "leaves no training document"),
    "a device that is not": (["--device", "npu"], 1, "device=npu is not available here"),
    "an unknown device": (["--device", "tpu"], 2, "tpu"),
    "a value of another kind": (["--lr", "fast"], 2, "Invalid value 'fast' for '--lr'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(arguments: list[object], tmp_path: Path, case: str) -> None:
    flags, status, complaint = BAD[case]
    if flags[0] == "{model}":
        arguments, flags = [*arguments[:2], *arguments[4:]], flags[1:]
    if flags[0] == "{data}":
        arguments, flags = [*arguments[:4], *arguments[6:], "--data-path"], flags[1:]
    started = time.monotonic()
    done = call(*arguments, *flags)
    assert done.status == status, done.stderr
    assert complaint in done.complaint
    assert done.complaint.startswith("asd-core: error: ")
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - started < 20


def test_no_weights_by_accident(arguments: list[object]) -> None:
    done = call(*arguments[:2], *arguments[4:])
    assert done.status == 2
    assert "neither of --load and --model-config given" in done.complaint


def test_another_tokenizer_is_refused(
    arguments: list[object], tokenizer_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text()) | {"add_bos_token": False}
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(config))
    done = call(*arguments, "--tokenizer-name-or-path", tmp_path / "other")
    assert done.status == 1
    assert "is not the tokenizer of the dataset" in done.complaint


def test_a_vocabulary_smaller_than_the_tokenizers(arguments: list[object], tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=399))))
    done = call(*arguments[:3], small, *arguments[4:])
    assert done.status == 1
    assert "vocab_size=400, the model has vocab_size=399" in done.complaint


def test_an_error_of_a_worker_is_told_once(arguments: list[object], dataset: Path, tmp_path: Path) -> None:
    """Ids beyond the vocabulary show only once samples are read, in every process."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{dataset}{suffix}", tmp_path / f"x{suffix}")
    small = tmp_path / "small.json"
    small.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=200))))
    done = run_command(
        *arguments[:3], small, "--data-path", tmp_path / "x", *arguments[6:], "--nproc-per-node", 2,
        "--tensor-model-parallel-size", 2, "--device", "cpu",
    )  # fmt: skip
    assert done.status == 1
    assert "the model's vocabulary ends at 199" in done.complaint
    assert done.stderr.count("the model's vocabulary ends at 199") == 1
    assert "Traceback" not in done.stderr


def test_joined_projections_leave_the_checkpoints_of_a_plain_run(
    arguments: list[object], tmp_path: Path
) -> None:
    """--mlp-layer-fusion: the same names and weights; a run goes on without it, and with it under another layout."""
    plain = [*arguments, "--dtype", "float64"]
    assert call(*plain).status == 0
    (tmp_path / "run").rename(tmp_path / "plain")
    first = call(*plain, "--mlp-layer-fusion", "--exit-interval", 4)
    assert first.status == 0, first.stderr
    assert "one matrix product each for queries, keys and values; gate and up" in first.stderr
    assert call(*plain, "--auto-resume", "--exit-interval", 4).status == 0
    cut = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--nproc-per-node", 4)
    last = run_command(*plain, *cut, "--use-distributed-optimizer", "--mlp-layer-fusion", "--auto-resume")
    assert last.status == 0, last.stderr
    got, want = weights_of(tmp_path / "run"), weights_of(tmp_path / "plain")
    assert got.keys() == want.keys()
    # float64, sums in another order, magnified by twelve steps of AdamW.
    assert max(float((got[name] - want[name]).abs().max()) for name in want) < 1e-11
    losses = [[r["lm_loss"] for r in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("run", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
