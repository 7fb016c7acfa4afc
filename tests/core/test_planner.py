"""`asd-core plan`: profiles, seconds, the search, its words and its files; and `asd-core profile-device`."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from ascendspeed_core.config.layout import SPLIT_BACKWARD_SCHEDULES, Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.planning import PlanConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.models.families import find_family
from ascendspeed_core.planner.hardware import HardwareProfile, known_profiles, load_profile
from ascendspeed_core.planner.plan_report import aligned, plan_lines
from ascendspeed_core.planner.question import make_question, read_model
from ascendspeed_core.planner.rank_memory import MemoryPlanner
from ascendspeed_core.planner.search import (
    AS_FAST,
    FINALISTS,
    Question,
    candidates,
    make_plans,
    pareto,
    search,
)
from ascendspeed_core.planner.step_time import StepTimer, spans_nodes
from ascendspeed_core.planner.workload import Workload
from ascendspeed_data.errors import ConfigError
from support.commands import call, run_command
from support.models import tiny_config

LLAMA = read_model("llama-7b")[0]


def question(**changes: object) -> Question:
    values: dict[str, object] = {
        "model": LLAMA,
        "profile": load_profile("ascend-910b1"),
        "devices": 8,
        "seq_length": 2048,
        "global_batch_size": 64,
    }
    return Question(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", known_profiles())
def test_profiles_are_whole_and_name_sources(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    facts = [
        *profile.peak_tflops.values(),
        *(fact for part in ("memory", "links", "machine", "shares") for _, fact in getattr(profile, part)),
    ]
    assert all(len(fact.source) > 4 for fact in facts)
    # A square product takes no longer than its share of the data sheet says, with as much for all else.
    dtype = "bfloat16" if "bfloat16" in profile.peak_tflops else "float16"
    least = 2 * 4096**3 / (profile.peak_flops(dtype) * profile.shares.products.value)
    assert 0.7 * least < profile.product_seconds(4096, 4096, 4096, dtype)[0] < 2 * least


def test_every_kind_of_device_has_a_profile() -> None:
    wanted = {
        "cpu-epyc-core",
        "ascend-910a",
        "ascend-910c",
        "a100-40gb",
        "a100-80gb",
        "h100-sxm",
        "h200",
        "b200",
        "mi300x",
    }
    assert wanted | {f"ascend-910b{grade}" for grade in (1, 2, 3, 4)} <= set(known_profiles())


def test_unknown_devices_and_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device=ascend-910d is no profile; did you mean ascend-910"):
        load_profile("ascend-910d")
    with pytest.raises(ConfigError, match="model=llama-8b is no size"):
        read_model("llama-8b")
    broken = tmp_path / "mine.toml"
    broken.write_text('name = "mine"\n')
    with pytest.raises(ConfigError):
        load_profile(str(broken))
    with pytest.raises(ConfigError, match="dtype=bfloat16: the profile ascend-910a has no products in it"):
        make_question(PlanConfig(model="llama-7b", device="ascend-910a", dtype="bfloat16"))


def test_measured_products_are_their_own_prediction() -> None:
    measured = [
        {
            "format": "float32",
            "m": m,
            "n": n,
            "k": 64,
            "forward_seconds": m * n * 1e-9,
            "backward_seconds": m * n * 2e-9,
        }
        for m in (64, 1024)
        for n in (64, 1024)
    ]
    values = load_profile("h100").model_dump() | {"products": measured}
    profile = HardwareProfile.model_validate(values)
    assert profile.product_seconds(64, 1024, 64, "float32")[0] == pytest.approx(64 * 1024e-9, rel=1e-3)
    # Between the sizes, between the rates.
    assert profile.product_seconds(256, 256, 64, "float32")[1] == pytest.approx(256 * 256 * 2e-9, rel=1e-2)


def test_work_of_a_step_is_the_models_operations() -> None:
    """Six operations for each weight in a product and token: as `observability.mfu` counts, without attention."""
    work = Workload(LLAMA, Layout(), 2, 512, "bfloat16")
    parts = list(work.parts(range(LLAMA.num_layers), True, True))
    done = sum(one.m * one.n * one.k * one.times for part in parts for one in part.products)
    assert done == 1024 * (LLAMA.weights_in_products + LLAMA.hidden_size * LLAMA.vocab_size)
    assert sum(part.parameters for part in parts) == LLAMA.num_parameters


@pytest.mark.parametrize("name", ["qwen3-8b", "mixtral-8x7b", "bloom-7b1", "deepseek-v3"])
def test_weights_of_all_ranks_are_the_models(name: str) -> None:
    """Matrices exactly; norms and biases, which the ranks of tp all have, within a thousandth."""
    model = read_model(name)[0]
    parts = Workload(model, Layout(), 1, 128, "bfloat16").parts(range(model.num_layers), True, True)
    total = sum(part.parameters for part in parts)
    if model.tie_word_embeddings:
        total -= model.vocab_size * model.hidden_size
    assert total == pytest.approx(model.num_parameters, rel=1e-3)


def test_more_parallelism_takes_less_memory_and_sends_more() -> None:
    plans = {
        tp: make_plans(question(), Layout(tp=tp, dp=8 // tp, sequence_parallel=tp > 1), 1, ["none"])[0]
        for tp in (1, 2, 4, 8)
    }
    memory = [plans[tp].memory.total for tp in (1, 2, 4, 8)]
    messages = [plans[tp].seconds.model_messages for tp in (1, 2, 4, 8)]
    assert memory == sorted(memory, reverse=True)
    assert messages == sorted(messages)
    assert messages[0] == 0


def test_recompute_takes_time_and_gives_memory() -> None:
    none, selective, full = make_plans(
        question(), Layout(tp=8, sequence_parallel=True), 4, ["none", "selective", "full"]
    )
    assert none.memory.total > selective.memory.total > full.memory.total
    assert none.seconds.total < selective.seconds.total < full.seconds.total
    # All products of the forward but each layer's last are computed again: between a quarter and a third of the rest.
    assert 0.2 < full.seconds.recompute / full.seconds.compute < 0.34


def test_a_sharded_optimizer_is_shared_out() -> None:
    whole = MemoryPlanner(Workload(LLAMA, Layout(dp=8), 1, 512, "bfloat16"), True).rank(0, 1, "full")
    layout = Layout(dp=8, sharded_optimizer=True)
    shared = MemoryPlanner(Workload(LLAMA, layout, 1, 512, "bfloat16"), True).rank(0, 1, "full")
    assert whole.optimizer == LLAMA.num_parameters * 12
    assert shared.optimizer == pytest.approx(whole.optimizer / 8, rel=1e-6)


def test_groups_that_leave_a_node() -> None:
    layout = Layout(tp=8, dp=4, pp=2)
    assert not spans_nodes(layout, "tp", 8)
    assert spans_nodes(layout, "replicas", 8)
    assert spans_nodes(Layout(tp=16), "tp", 8)
    assert not spans_nodes(Layout(tp=8), "replicas", 8)


@pytest.mark.parametrize("devices", [1, 96, 100_000])
def test_search_from_one_device_to_a_hundred_thousand(devices: int) -> None:
    model = read_model("llama3.1-70b" if devices > 8 else "llama3.2-1b")[0]
    asked = question(
        model=model,
        profile=load_profile("h100"),
        devices=devices,
        seq_length=4096,
        global_batch_size=max(devices, 64),
    )
    found = search(asked)
    assert found.fitting, "nothing fits"
    best = found.fitting[0]
    assert best.layout.world_size == devices
    assert best.memory.total <= asked.budget
    assert all(plan.tokens_per_second <= best.tokens_per_second for plan in found.fitting)
    assert 0.1 < best.utilization < 0.7
    assert abs(sum(best.seconds.shares().values()) - 1) < 1e-9


def test_search_finds_the_best_of_all() -> None:
    """Against every candidate walked through, none left out for its closed form."""
    asked = question(devices=4, global_batch_size=16, seq_length=1024, memory_bytes=200 << 30)
    found = search(asked)
    every = [
        plan
        for layout, micro_batch in candidates(asked)
        for plan in make_plans(asked, layout, micro_batch, ["none", "selective", "full"])
        if plan.fits
    ]
    assert found.fitting[0].tokens_per_second >= max(plan.tokens_per_second for plan in every)


def test_what_is_given_is_kept() -> None:
    found = search(question(fixed={"tp": 2, "recompute": "full", "micro_batch": 2}))
    plans = (*found.fitting, *found.others)
    assert {(plan.layout.tp, plan.recompute, plan.micro_batch) for plan in plans} == {(2, "full", 2)}


def test_the_front_is_not_beaten() -> None:
    found = search(question())
    every = (*found.fitting, *found.others)
    front = pareto(every)
    for plan in front:
        better = [
            one
            for one in every
            if one.memory.total < plan.memory.total and one.tokens_per_second > plan.tokens_per_second
        ]
        assert not better


def test_words_say_why() -> None:
    asked = question(devices=32, model=read_model("llama-65b")[0], global_batch_size=512)
    lines = plan_lines(asked, search(asked), 3, 1e12)
    text = "\n".join(lines)
    assert "because" in text
    assert re.search(r"^- tensor parallel \d+: with \d+ at best \d", text, re.M)
    assert "faster, but too large" in text
    assert "days and" in text
    too_small = question(memory_bytes=1 << 30)
    assert "nothing fits into 1.0 GiB: the smallest plan" in "\n".join(
        plan_lines(too_small, search(too_small), 3, None)
    )


def test_no_layout_is_refused() -> None:
    with pytest.raises(ConfigError, match="devices=7: no layout divides"):
        search(question(devices=7, global_batch_size=4))


def test_columns_are_aligned() -> None:
    assert aligned([("a", "1"), ("bb", "22")]) == ["a    1", "bb  22"]


def test_command_writes_a_recipe_that_pretrain_reads(tmp_path: Path) -> None:
    recipe, charts = tmp_path / "plan.toml", tmp_path / "charts"
    done = call(
        "asd-core", "plan", "--model", "llama-7b", "--device", "ascend-910b", "--devices", "8", "--seq-length", "2048",
        "--global-batch-size", "64", "--tokens", "1e9", "--recipe", str(recipe), "--charts", str(charts), "--json",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    best = report["plans"][0]
    assert best["memory_bytes"]["total"] <= report["budget_bytes"]
    assert report["seconds"] == pytest.approx(1e9 / (8 * best["tokens_per_second_per_device"]))
    config = load_config(PretrainConfig, recipe, {"data_path": ("data",)})
    layout = config.parallel.layout(8)
    assert layout.tp == best["tensor_model_parallel_size"]
    assert config.batch.micro_batch_size == best["micro_batch_size"]
    assert config.training.train_iters == round(1e9 / (64 * 2048))
    assert read_model(str(config.start.model_config_file))[0] == LLAMA
    for name in ("memory.png", "time.png", "pareto.png"):
        assert (charts / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_starts_from_a_plans_recipe(dataset: Path, tmp_path: Path) -> None:
    model, recipe = tmp_path / "model.json", tmp_path / "plan.toml"
    model.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    planned = call(
        "asd-core", "plan", "--model", model, "--device", "cpu-epyc-core", "--devices", 2, "--dtype", "float32",
        "--seq-length", 32, "--global-batch-size", 4, "--recipe", recipe, "--json",
    )  # fmt: skip
    assert planned.status == 0, planned.stderr
    best = json.loads(planned.stdout)["plans"][0]
    done = run_command(
        "asd-core", "pretrain", "--config", recipe, "--data-path", dataset, "--data-cache-path", tmp_path / "cache",
        "--train-iters", 2, "--nproc-per-node", 2, "--device", "cpu",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert f"layout: {best['layout']}, float32; batch: 4 samples of 32 tokens" in done.stderr


def test_the_simplest_of_equally_fast_plans_stands_first() -> None:
    for devices, batch in ((8, 16), (32, 64), (64, 512)):
        first, *others = search(question(devices=devices, global_batch_size=batch)).fitting[:FINALISTS]
        fastest = min(plan.seconds.total for plan in (first, *others))
        assert first.seconds.total <= fastest * (1 + AS_FAST)
        if first.layout.schedule in SPLIT_BACKWARD_SCHEDULES:
            as_fast = [plan for plan in others if plan.seconds.total <= fastest * (1 + AS_FAST)]
            assert all(plan.layout.schedule in SPLIT_BACKWARD_SCHEDULES for plan in as_fast)


def test_command_needs_no_torch() -> None:
    done = call("asd-core", "plan", "--model", "llama-9b", "--device", "h100")
    assert done.status != 0
    assert "did you mean llama-7b" in done.complaint or "no size" in done.complaint


def test_profile_of_this_machine_plans(tmp_path: Path) -> None:
    output = tmp_path / "mine.toml"
    done = call(
        "asd-core", "profile-device", "--device", "cpu", "--output", str(output), "--budget-seconds", "0.5",
        "--dtype", "float32", "--quick",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    profile = load_profile(str(output))
    assert profile.products
    assert {row.name for row in profile.operators} >= {"norm", "attention", "adamw"}
    assert tomllib.loads(output.read_text())["format_version"] == 1
    model = tiny_config(num_layers=2, hidden_size=64, ffn_hidden_size=128, head_dim=8)
    asked = question(
        model=model,
        profile=profile,
        devices=1,
        seq_length=64,
        global_batch_size=4,
        dtype="float32",
        is_fused=False,
    )
    best = search(asked).fitting[0]
    assert 0 < best.tokens_per_second < 1e7
    seconds = StepTimer(Workload(model, Layout(), 4, 64, "float32"), profile).step(1, "none")
    assert seconds.total > 0
