"""What a preflight counts: bytes of a checkpoint against those on the disk, of a rank against the formula by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import NamedRecipe, load_config
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.config.recipes import find_recipe, read_recipe, recipe_names
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import find_family
from ascendspeed_core.planner.forecast import modes_of_ranks, planned_memory
from ascendspeed_core.planner.hardware import load_profile
from ascendspeed_core.planner.rank_memory import ALLOCATOR_MARGIN, FIXED_BYTES
from ascendspeed_core.training.preflight import (
    Problems,
    check_memory,
    checkpoint_bytes,
    checkpoints_at_once,
    memory_need,
    resident_bytes,
)
from ascendspeed_core.weights import InitialWeights, WeightSource
from ascendspeed_core.weights.adapters.lora import drawn_adapters, plan_adapters
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from core.expert_cases import experts_config
from support.commands import call
from support.models import tiny_config
from support.recipes import published
from support.tables import ReportTables

CONFIGS: dict[str, type[PretrainConfig]] = {
    "pretrain": PretrainConfig, "finetune": FinetuneConfig, "dpo": DpoConfig
}  # fmt: skip
DEVICE_BYTES = load_profile("ascend-910b3").memory_bytes - FIXED_BYTES
"""Of the devices that the recipes are for: Ascend 910B, 64 GB, of which 60 GiB are left for a step."""


def config_of(command: str = "pretrain", **given: Any) -> PretrainConfig:
    options = {"data_path": ["d"], "seq_length": 8, "train_iters": 4, "model_config_file": Path("m"), **given}
    return load_config(CONFIGS[command], None, options)


def source_of(config: PretrainConfig, model: str) -> WeightSource:
    base = InitialWeights(published(model), 1)
    lora = config.adapters
    return base if lora is None else drawn_adapters(base, plan_adapters(lora, base.config, model), 1)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("pretrain", {}),
        ("pretrain", {"bf16": True}),
        ("pretrain", {"optimizer": "sgd", "dtype": "float64"}),
        ("finetune", {"lora_target_modules": "all-linear", "lora_r": 8}),
    ],
)
def test_a_checkpoint_is_as_large_as_it_was_said(
    command: str, flags: dict[str, Any], dataset: Path, tmp_path: Path, report: ReportTables
) -> None:
    model = tiny_config(vocab_size=400, hidden_size=64, head_dim=8, ffn_hidden_size=160)
    (tmp_path / "model.json").write_text(json.dumps(find_family("llama").write_config(model)))
    words = [part for name, value in flags.items() for part in ([f"--{name.replace('_', '-')}"] + (
        [] if value is True else [str(value)]))]  # fmt: skip
    done = call(
        "asd-core", command, "--model-config", tmp_path / "model.json", "--data-path", dataset, "--seq-length", 8,
        "--train-iters", 1, "--save", tmp_path / "run", "--data-cache-path", tmp_path / "cache", "--device", "cpu",
        *words,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    given = {name: [value] if name == "lora_target_modules" else value for name, value in flags.items()}
    config = config_of(command, **given)
    base = InitialWeights(model, 1)
    lora = config.adapters
    source = base if lora is None else drawn_adapters(base, plan_adapters(lora, model, "m"), 1)
    said = checkpoint_bytes(config, source)
    written = sum(
        path.stat().st_size for path in (tmp_path / "run" / "iter_0000001").glob("*") if path.is_file()
    )
    report.add(
        "Preflight: bytes of a checkpoint", ("run", "said", "written"), f"{command} {flags}", said, written
    )
    # Each stored tensor has a name, a shape and a checksum, and begins at a multiple of bytes; moments are tensors too.
    trained = len(source.tensors()) if lora is None else 2 * len(source.adapters.layers)
    assert said < written < said + 1_500 * 4 * trained + 20_000


def held(config: PretrainConfig, source: WeightSource, layout: Layout) -> int:
    return max(resident_bytes(config, source, layout))


def test_what_a_rank_holds_by_hand() -> None:
    model = tiny_config()
    source, count = InitialWeights(model, 1), model.num_parameters
    assert held(config_of(), source, Layout()) == count * (4 + 4 + 8)
    assert held(config_of(bf16=True), source, Layout()) == count * (2 + 4 + 4 + 8)
    assert held(config_of(bf16=True), source, Layout(dp=4, sharded_optimizer=True)) == count * (6 + 12 / 4)
    assert held(config_of(bf16=True), source, Layout(dp=4, zero_stage=2)) == count * (2 + 16 / 4)
    assert held(config_of(bf16=True), source, Layout(dp=4, zero_stage=3)) == count * 18 / 4
    assert held(config_of(optimizer="sgd"), source, Layout()) == count * (4 + 4 + 4)
    norms = (2 * model.num_layers + 1) * model.hidden_size
    assert held(config_of(), source, Layout(tp=2)) == (count - norms) // 2 * 16 + norms * 16
    head = model.vocab_size * model.hidden_size
    layers = count - 2 * head - model.hidden_size
    # The last stage has the final norm beside the head.
    last = layers // 2 + head + model.hidden_size
    assert held(config_of(), source, Layout(pp=2)) == last * 16


def test_experts_are_shared_out() -> None:
    model = experts_config(shared_gate=False, shared_ffn_hidden_size=None, dense_layers=())
    source = InitialWeights(model, 1)
    assert model.experts is not None
    of_experts = sum(
        1 for name in source.tensors() if ".experts." in name
    ) * model.hidden_size * model.experts.ffn_hidden_size  # fmt: skip
    rest = model.num_parameters - of_experts
    layout = Layout(dp=4, ep=2, etp=1, sharded_optimizer=True)
    wanted = of_experts / 2 * (6 + 12 / 2) + rest * (6 + 12 / 4)
    assert held(config_of(bf16=True), source, layout) == pytest.approx(wanted, rel=1e-9)


def test_activations_that_do_not_fit_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, layout = config_of(micro_batch_size=8, seq_length=64), Layout()
    source, device = InitialWeights(tiny_config(), 1), Device("cpu")
    need = memory_need(config, source, layout, device)
    alone, whole = need.held[0], need.largest()
    assert alone < whole

    def machine_has(size: int) -> None:
        monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}.__getitem__)

    machine_has(whole)
    assert check_memory(config, source, layout, device) == need
    assert capsys.readouterr().err == ""
    machine_has(whole - 1)
    check_memory(config, source, layout, device)
    assert "warning: this run may run out of memory: activations and messages" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^activations and messages of a step bring a rank from"):
        check_memory(config, source, layout, device, trusts_plan=True)
    machine_has(alone - 1)
    with pytest.raises(ConfigError, match=r"^weights, gradients and optimizer state take"):
        check_memory(config, source, layout, device)


def test_memory_without_a_formula_is_said() -> None:
    config = config_of(checkpoint_policy="attention")
    need = memory_need(config, InitialWeights(tiny_config(), 1), Layout(), Device("cpu"))
    assert need.beside is None
    assert str(need).endswith("on each rank, activations not counted")


@pytest.mark.parametrize(
    ("flags", "modes"),
    [
        ({}, "nnnn nnnn"),
        ({"checkpoint_activations": True}, "ffff ffff"),
        ({"checkpoint_policy": "auto"}, "ffff ffff"),
        ({"checkpoint_policy": "selective"}, "ssss ssss"),
        ({"checkpoint_policy": "block", "checkpoint_block_layer": 1}, "fnfn fnfn"),
        ({"checkpoint_policy": "custom", "recomputation_layer_num": (3, 1)}, "fffn fnnn"),
    ],
)
def test_layers_that_a_policy_touches(flags: dict[str, Any], modes: str) -> None:
    """Two ranks of two stages of two layers, see `parallel.recompute.recomputed_layers`."""
    layout = Layout(pp=2, schedule="interleaved", layers_per_stage=2)
    found = modes_of_ranks(config_of(**flags).recompute, 8, layout)
    assert found is not None
    assert " ".join("".join(mode[0] for mode in own) for own in found) == modes


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_its_devices(name: str, report: ReportTables) -> None:
    command = read_recipe(find_recipe(name))["recipe"]["command"]
    options = {"data_path": ["data"], **({} if command == "pretrain" else {"load": Path("model")})}
    config = load_config(CONFIGS[command], None, options, named=NamedRecipe(name, command))
    assert config.recipe.devices is not None
    assert config.recipe.model is not None
    layout = config.parallel.layout(config.recipe.devices)
    source = source_of(config, config.recipe.model)
    planned = planned_memory(config, source.config, layout, is_fused=True, margin=ALLOCATOR_MARGIN)
    assert planned is not None
    most = max(one.total for one in planned)
    title = (
        "Recipes: memory of the fullest rank as planned, and what of it is counted tensor by tensor, of 64 GB"
    )
    counted = held(config, source, layout)
    report.add(title, ("recipe", "layout", "GB", "counted"), name, str(layout), f"{most / 1e9:.1f}",
               f"{counted / 1e9:.1f}")  # fmt: skip
    assert counted < most < DEVICE_BYTES


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 1),
        ({"save_interval": 2, "train_iters": 9}, 5),
        ({"save_interval": 2, "train_iters": 9, "keep_checkpoints": 2}, 3),
        ({"save_interval": 100, "train_iters": 9}, 1),
    ],
)
def test_how_many_checkpoints_lie_there_at_once(options: dict[str, Any], count: int) -> None:
    assert checkpoints_at_once(config_of(**options)) == count


def test_problems_are_gathered() -> None:
    problems = Problems()

    def fails(text: str) -> int:
        raise ConfigError(text)

    assert problems.value(int, "3") == 3
    problems.raise_found()
    assert problems.value(fails, "first") is None
    with pytest.raises(ConfigError, match=r"^first$"):
        problems.raise_found()
    problems.value(fails, "first")
    problems.value(fails, "second")
    with pytest.raises(AscendSpeedError, match=r"^first; also: second$"):
        problems.raise_found()
