"""What is written down and found out about a run while it goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.training import ComputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import find_family
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.observability.mfu import training_flops_per_token
from ascendspeed_core.observability.nan_detector import find_not_finite
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.check_finite import check_evaluation
from ascendspeed_core.training.step import forward_backward
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import AscendSpeedError
from core.training_cases import LENGTH, PlainPasses, micro_batches
from support.commands import call
from support.models import tiny_config
from support.processes import WorkerPool


@pytest.fixture(scope="module")
def model_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "model.json"
    path.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return path


@pytest.fixture
def arguments(model_json: Path, dataset: Path, tmp_path: Path) -> list[object]:
    return [
        "asd-core", "pretrain", "--model-config", model_json, "--data-path", dataset, "--seq-length", 32,
        "--global-batch-size", 4, "--train-iters", 6, "--device", "cpu", "--save", tmp_path / "run",
    ]  # fmt: skip


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_tensorboard_shows_the_metrics_across_a_resume(arguments: list[object], tmp_path: Path) -> None:
    board = ["--tensorboard-dir", tmp_path / "board"]
    assert call(*arguments, *board, "--eval-iters", 1, "--eval-interval", 2, "--exit-interval", 4).status == 0
    assert call(*arguments, *board, "--eval-iters", 1, "--eval-interval", 2, "--auto-resume").status == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 6
    for name in ("lm_loss", "grad_norm", "learning_rate", "tokens_per_second", "validation_loss"):
        want = [(r["iteration"], r[name]) for r in records if name in r]
        got = points(tmp_path / "board", name)
        assert [step for step, _ in got] == [step for step, _ in want]
        # Its files hold fp32.
        assert [value for _, value in got] == pytest.approx([value for _, value in want], rel=1e-6)


def test_tensorboard_needs_no_checkpoints(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments[:-2], "--tensorboard-dir", tmp_path / "board").status == 0
    assert len(points(tmp_path / "board", "lm_loss")) == 6


def test_tensorboard_that_is_not_installed_is_asked_for(
    arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )
    done = call(*arguments, "--tensorboard-dir", tmp_path / "board")
    assert done.status == 1
    assert 'needs the package tensorboard: pip install "ascendspeed-core[tensorboard]"' in done.complaint


def test_a_profile_of_some_iterations(arguments: list[object], tmp_path: Path) -> None:
    done = call(*arguments, "--profile-steps", 3, 4)
    assert done.status == 0, done.stderr
    trace = tmp_path / "run" / "profiles" / "rank0-iterations3-4.json"
    assert str(trace) in done.stderr
    assert [path.name for path in trace.parent.iterdir()] == [trace.name]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    # Two steps of four micro-batches through the layers: nothing of the other iterations.
    config = ModelConfig.model_validate(
        json.loads((tmp_path / "run" / "iter_0000006" / "checkpoint.json").read_text())["model"]
    )
    assert names.count("aten::scaled_dot_product_attention") == 2 * 4 * config.num_layers


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--profile-steps", 3], 2, "profile_steps=3 is not FIRST LAST"),
        (["--profile-steps", 4, 3], 2, "profile_steps=4 3 is not FIRST LAST"),
        (["--profile-steps", 5, 7], 2, "profile_steps=5 7 ends after the last iteration, 6"),
        (["--profile-steps", 1, 2, "--profile-ranks", 1], 2, "profile_ranks=1 is none of the 1 processes"),
        (["--profile-ranks", 1], 2, "profile_ranks means nothing without --profile-steps"),
    ],
)
def test_profiles_that_cannot_be_made(
    arguments: list[object], flags: list[object], status: int, message: str
) -> None:
    done = call(*arguments, *flags)
    assert (done.status, message in done.complaint) == (status, True), done.complaint


def test_a_profile_needs_a_folder(arguments: list[object]) -> None:
    done = call(*arguments[:-2], "--profile-steps", 1, 2)
    assert done.status == 2
    assert "profile_steps needs --save DIR" in done.complaint


def test_share_of_the_peak(arguments: list[object], tmp_path: Path) -> None:
    done = call(*arguments, "--peak-tflops", 0.5)
    assert done.status == 0
    assert "peak 0.5 TFLOP/s (--peak-tflops) x 1 devices" in done.stderr
    assert "tokens/s | MFU " in done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    description = json.loads((tmp_path / "run" / "iter_0000006" / "checkpoint.json").read_text())
    needed = training_flops_per_token(ModelConfig.model_validate(description["model"]), 32)
    for record in records:
        assert record["mfu"] == pytest.approx(needed * record["tokens_per_second"] / 0.5e12)


def test_without_a_known_peak_there_is_no_share(arguments: list[object], tmp_path: Path) -> None:
    assert call(*arguments).status == 0
    assert not any("mfu" in record for record in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(name: str, dtype: str = "bfloat16") -> float | None:
        monkeypatch.setattr(Device, "name", property(lambda _: name))
        return Device("cuda").peak_flops(dtype)

    assert peak("NVIDIA H100 80GB HBM3") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA H20") == 148e12
    assert peak("NVIDIA H200") == 989e12
    assert peak("Ascend910B3") == 313e12
    assert peak("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak("a new one") is None


@pytest.mark.parametrize(
    "changes", [{}, {"mlp": "gelu", "num_key_value_heads": 8}, {"tie_word_embeddings": True}]
)
def test_operations_of_a_token_equal_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """torch counts the products of a step; the reference attention computes what the causal mask hides too."""
    from torch.utils.flop_counter import FlopCounterMode

    config, mesh = tiny_config(**changes), ParallelMesh(Device("cpu"), Layout())
    model = load_model(InitialWeights(config, seed=5), mesh, torch.float32)
    apply_kernels(model, ComputeConfig(attention="reference"))
    batches = micro_batches(config.vocab_size, 0, mesh, 4, masked=False)
    tokens = sum(batch.tokens.numel() for batch in batches)
    passes: Any = PlainPasses(model)
    with FlopCounterMode(display=False) as counter:
        forward_backward(model, passes, batches, mesh, *NextTokenLoss(model, mesh).prepare(batches))
    hidden = 6 * config.num_layers * LENGTH * config.num_attention_heads * config.head_dim
    assert counter.get_total_flops() == tokens * (training_flops_per_token(config, LENGTH) + hidden)


def test_a_window_bounds_the_operations_of_attention() -> None:
    config = tiny_config(sliding_window=3)
    width = config.num_attention_heads * config.head_dim
    # Queries see 1, 2, 3, 3, 3 keys: 12 of the 15 that five see, each counted twice.
    whole = training_flops_per_token(tiny_config(), 5) - training_flops_per_token(config, 5)
    assert whole == pytest.approx(6 * config.num_layers * width * (5 - (2 * 3 - 9 / 5)))


Poison = str


def spoil(model: Any, poison: Poison) -> float:
    """Make the model compute what is not finite, where it has that layer; return the factor of gradients."""
    held = dict(model.named_parameters())
    with torch.no_grad():
        if poison == "weight" and "layers.2.mlp.up_proj.weight" in held:
            held["layers.2.mlp.up_proj.weight"][1, 1] = torch.nan
        if poison == "result" and "layers.1.attention.v_proj.weight" in held:
            held["layers.1.attention.v_proj.weight"].fill_(1e308)
    return 1e308 if poison == "gradient" else 1.0


def locate(layout: Layout, poison: Poison) -> str:
    """What a step under a layout says of a spoilt model."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    config = tiny_config()
    model = load_model(InitialWeights(config, seed=5), mesh, torch.float64)
    scale = spoil(model, poison) * 1e3 if poison == "gradient" else spoil(model, poison)
    batches = micro_batches(config.vocab_size, 0, mesh, 4, masked=False)
    passes: Any = PlainPasses(model)
    # A mean over one token where many count, so that the factor overflows in the gradient.
    _, loss_of = NextTokenLoss(model, mesh).prepare(batches)
    found = find_not_finite(
        model, mesh, lambda: forward_backward(model, passes, batches, mesh, 1, loss_of, scale)
    )
    assert not any(module._forward_hooks for module in model.modules())
    return found


FOUND = {
    "weight": "layers.2.mlp.up_proj.weight holds nan before the step",
    "result": "layers.1.attention.v_proj is the first module whose result holds ",
    "gradient": "all results are finite, the gradient of output_head's result is the first that holds ",
}


@pytest.mark.parametrize("poison", FOUND)
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2), Layout(pp=2, dp=2)], ids=str)
def test_where_numbers_stop_being_finite(workers: WorkerPool, layout: Layout, poison: Poison) -> None:
    answers = workers.run(locate, layout.world_size, layout, poison)
    assert len(set(answers)) == 1
    assert answers[0].startswith(FOUND[poison])
    last = layout.pp > 1 and poison != "result"
    rank = layout.tp * layout.dp if last else 0
    assert answers[0].endswith(f"(rank {rank} of {layout.world_size})") == (layout.world_size > 1)


def test_a_sound_step_is_called_sound(workers: WorkerPool) -> None:
    (answer,) = workers.run(locate, 1, Layout(), "nothing")
    assert answer == "computed again, everything is finite: suspect a device that errs"


def measured(layout: Layout, poison: bool) -> str:
    """What an evaluation of some micro-batches says, of which the last alone has a token of a spoilt row."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    config = tiny_config()
    model = load_model(InitialWeights(config, seed=5), mesh, torch.float64)
    batches = micro_batches(config.vocab_size, 0, mesh, 4, masked=False)
    for number, batch in enumerate(batches):
        tokens = batch.tokens
        tokens[tokens == 7] = 8
        if number == len(batches) - 1:
            tokens[0, 1] = 7
    held = dict(model.named_parameters())
    if poison and "embedding.weight" in held:
        with torch.no_grad():
            held["embedding.weight"][7] = torch.nan
    objective = NextTokenLoss(model, mesh)
    values = objective.evaluate(batches)
    try:
        check_evaluation("validation", 5, values, batches, mesh, objective.evaluate)
    except AscendSpeedError as error:
        return str(error)
    return "finite"


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2), Layout(dp=2)], ids=str)
def test_a_measured_loss_that_is_not_finite_is_an_error(workers: WorkerPool, layout: Layout) -> None:
    for poison, wanted in (
        (False, "finite"),
        (True, "iteration 5: the validation loss is nan, first in micro-"),
    ):
        answers = workers.run(measured, layout.world_size, layout, poison)
        assert len(set(answers)) == 1
        assert answers[0].startswith(wanted)
    count = 4 // layout.dp
    assert f"first in micro-batch {count} of {count}; look at that data" in answers[0]
