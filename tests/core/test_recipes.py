"""Every recipe fits its model, its devices and their memory, and trains at a scale that a test can run."""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.commands.recipes import CONFIGS, forecast_of
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.load import NamedRecipe, load_config
from ascendspeed_core.config.recipes import FOLDER, find_recipe, read_recipe, recipe_names, written_recipe
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.planner.hardware import load_profile
from ascendspeed_core.training.checkpoint import saved_iterations
from ascendspeed_data.errors import ConfigError
from support.commands import call, run_command
from support.pairs import make_pairs
from support.recipes import kept_features, published, scaled
from support.tables import ReportTables

RECIPES = {name: read_recipe(find_recipe(name)) for name in recipe_names()}
TODAY = (
    "llama3.1-8b",
    "llama3.1-70b",
    "qwen2.5-7b",
    "qwen3-8b",
    "qwen3-32b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
)
OWED = [
    "baichuan-7b", "baichuan-13b", "bloom-7b1", "bloom-176b", "internlm-7b", "llama-7b", "llama-13b", "llama-33b",
    "llama-65b", "llama2-7b", "llama2-13b", "llama2-70b", "aquila-7b", "llama-7b-lora", "llama-13b-lora",
    "llama-33b-lora", *(name + stage for name in TODAY for stage in ("", "-finetune", "-lora", "-dpo")),
]  # fmt: skip
"""The rows of the tables of 2023, and the models of today in all stages."""


def loaded(name: str, **given: Any) -> PretrainConfig:
    """The whole config of a recipe, with paths that no one opens."""
    command = RECIPES[name]["recipe"]["command"]
    options = {"data_path": ["data"], **({} if command == "pretrain" else {"load": Path("model")}), **given}
    return load_config(CONFIGS[command], None, options, named=NamedRecipe(name, command))


def test_the_page_is_up_to_date() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from recipes_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), "run: python scripts/recipes_page.py"


def test_every_row_has_its_recipe() -> None:
    assert sorted(OWED) == recipe_names()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_model_and_devices(name: str) -> None:
    config = loaded(name)
    assert config.recipe.name == name
    assert config.recipe.model is not None
    assert config.recipe.devices is not None
    model, layout = published(config.recipe.model), config.parallel.layout(config.recipe.devices)
    config.parallel.check_model(model)
    config.parallel.check_sequence(config.data.seq_length)
    size = config.batch.resolve_global_batch_size(layout.dp)
    layout.check_micro_batches(size // config.batch.micro_batch_size // layout.dp)
    assert config.data.seq_length <= model.max_position_embeddings
    config.optimizer.check_unit(config.training.train_samples is not None)
    lora = getattr(config, "lora", None)
    assert name.endswith("-lora") == (lora is not None and lora.is_on)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_printed_as_the_file_that_it_is(name: str) -> None:
    done = call("asd-core", "recipes", name)
    assert done.status == 0, done.stderr
    assert tomllib.loads(done.stdout) == RECIPES[name]
    assert done.stdout.startswith("# ")
    assert all(len(line) <= 110 for line in done.stdout.splitlines())


def test_the_list_names_all() -> None:
    done = call("asd-core", "recipes")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["recipe", "model", "command", "devices", "layout"]
    assert {line.split()[0] for line in lines[1:]} == set(RECIPES)
    (row,) = (line for line in lines if line.startswith("llama-65b "))
    assert row.split(maxsplit=4)[1:] == ["llama-65b", "pretrain", "32", "tp8 x pp4 x dp1 + sp"]
    rows = [json.loads(line) for line in call("asd-core", "recipes", "--json").stdout.splitlines()]
    assert {row.pop("name"): row for row in rows} == RECIPES


def test_what_a_recipe_takes_of_a_device() -> None:
    done = call("asd-core", "recipes", "llama-65b", "--device", "ascend-910b3")
    header, row = (line.split() for line in done.stdout.splitlines())
    assert header[:5] == ["recipe", "devices", "layout", "GiB", "of"]
    assert row[:7] == ["llama-65b", "32", "tp8", "x", "pp4", "x", "dp1"]
    with_all, of_adapters, of_pairs = (
        forecast_of(f"llama3.1-8b-{kind}", load_profile("h100")) for kind in ("finetune", "lora", "dpo")
    )
    assert of_adapters.memory.optimizer < with_all.memory.optimizer / 20
    # Frozen weights need no gradients: of six products of a token two are left out, and none of recompute.
    assert 1.1 < of_adapters.tokens_per_second / with_all.tokens_per_second < 1.6
    # A reference of its own, which reads every pair too.
    assert of_pairs.memory.weights == 2 * with_all.memory.weights
    assert 0.6 < of_pairs.tokens_per_second / with_all.tokens_per_second < 1
    (as_json,) = call("asd-core", "recipes", "llama-65b", "--device", "h100", "--json").stdout.splitlines()
    told = json.loads(as_json)
    assert told["name"] == "llama-65b"
    assert told["memory_bytes"]["total"] == forecast_of("llama-65b", load_profile("h100")).memory.total
    lacks = call("asd-core", "recipes", "llama-65b", "--device", "ascend-910a")
    assert "the profile ascend-910a has no products in it" in lacks.complaint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[precision]\ndtype = 'bfloat16'", "[recipe] must have command"),
        ("recipe = 3", "[recipe] must have command"),
        ("[recipe]\ncommand = 'serve'\nmodel = 'llama-7b'\ndevices = 8", "[recipe] must have command"),
        ("[recipe]\ncommand = 'pretrain'\nmodel = 'llama-7b'\ndevices = 'many'", "devices='many'"),
        ("[recipe]\ncommand = 'pretrain'\nmodel = 'llama-7b'\ndevices = 8\nnodes = 2", "nodes"),
    ],
)
def test_a_file_that_does_not_say_what_it_is_for(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text + "\n")
    done = call("asd-core", "recipes", tmp_path / "mine.toml", "--device", "h100")
    assert done.status == 2, done.stderr
    assert words in done.complaint


def test_no_recipe_repeats_its_base() -> None:
    for path in FOLDER.glob("*.toml"):
        own = tomllib.loads(path.read_text())
        base = own.get("recipe", {}).get("base")
        if base is None:
            continue
        under = read_recipe(path.parent / f"{base}.toml")
        double = [
            (section, key)
            for section, values in own.items()
            if isinstance(values, dict)
            for key, value in values.items()
            if under.get(section, {}).get(key) == value
        ]
        assert not double, path


def test_what_flags_take_the_place_of_is_said() -> None:
    said: list[str] = []
    given = {"data_path": ["d"], "train_samples": 100, "use_distributed_optimizer": True}
    load_config(PretrainConfig, None, given, said.append, NamedRecipe("llama-7b", "pretrain"))
    assert said == ["recipe: train_iters, zero_stage left out; options that were given take the place"]


def test_flags_and_config_win(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[optimizer]\nlr = 1e-4\nmin_lr = 0.0\n[precision]\nbf16 = true\n")
    named = NamedRecipe("llama-7b", "pretrain")
    given = {"data_path": ["d"], "lr": 2e-4, "train_samples": 100, "use_distributed_optimizer": True}
    config = load_config(
        PretrainConfig, tmp_path / "mine.toml", given | {"lr_warmup_samples": 10}, named=named
    )
    assert (config.optimizer.lr, config.optimizer.min_lr) == (2e-4, 0.0)
    assert config.optimizer.weight_decay == 0.1
    assert config.precision.dtype_name == "bfloat16"
    assert (config.training.train_iters, config.training.train_samples) == (0, 100)
    assert config.optimizer.lr_warmup_iters == 0
    assert config.parallel.zero_stage is None
    assert config.start.model_config_file == Path("llama-7b")
    loaded_weights = loaded("llama-7b", load=Path("x"))
    assert loaded_weights.start.model_config_file is None
    adapter = loaded("llama-7b-lora", lora_load=Path("a"))
    assert isinstance(adapter, FinetuneConfig)
    assert (adapter.lora.lora_target_modules, adapter.lora.lora_load) == ((), Path("a"))


@pytest.mark.parametrize(
    ("name", "command", "words"),
    [
        ("lama-7b", "pretrain", "lama-7b is no recipe; did you mean llama-7b?"),
        ("zzz", "pretrain", "zzz is no recipe; known: aquila-7b, "),
        ("llama-7b-lora", "pretrain", "is a recipe of the command finetune, not of pretrain"),
        ("./none.toml", "pretrain", "none.toml"),
    ],
)
def test_what_is_no_recipe(name: str, command: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIGS[command], None, {"data_path": ["d"]}, named=NamedRecipe(name, command))
    assert words in str(caught.value)


def test_bases_in_a_circle(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.toml").write_text(f'[recipe]\nbase = "{base}"\n')
    with pytest.raises(ConfigError, match="is a base of itself"):
        read_recipe(tmp_path / "a.toml")


def test_a_checkpoint_of_another_model_is_refused(dataset: Path, tmp_path: Path) -> None:
    from support.models import save_hugging_face, tiny_config

    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "model")
    done = call(
        "asd-core", "finetune", "llama-7b-lora", "--load", tmp_path / "model", "--data-path", dataset, "--seq-length",
        32, "--tensor-model-parallel-size", 1, "--pipeline-model-parallel-size", 1, "--dry-run",
    )  # fmt: skip
    assert done.status != 0
    assert "is another model than llama-7b, which the recipe is for: num_layers=4, not 32" in done.complaint


def test_a_dry_run_by_name(dataset: Path, tmp_path: Path) -> None:
    """The whole model of 32 layers, planned on one device; nothing of it is built."""
    done = call(
        "asd-core", "pretrain", "llama2-7b", "--data-path", dataset, "--data-cache-path", tmp_path, "--dry-run",
        "--use-distributed-optimizer", "--train-iters", 2,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "recipe: llama2-7b; its layout is for 8 devices, this run has 1" in done.stderr
    assert "model: llama, 6,738,415,616 parameters, 32 layers" in done.stderr


QUICK = ["llama-13b", "llama-33b", "bloom-176b", "qwen3-30b-a3b", "llama3.1-8b-dpo", "llama-7b-lora"]
"""ZeRO-3, tensor and pipeline parallelism, ALiBi, experts, pairs, adapters; the rest are nightly."""
CASES = [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.nightly) for name in RECIPES]


@pytest.mark.parametrize("name", CASES)
def test_two_steps_scaled_down(
    name: str,
    dataset: Path,
    sets: tuple[Path, Path],
    tokenizer_folder: Path,
    tmp_path: Path,
    report: ReportTables,
) -> None:
    small, model, processes = scaled(RECIPES[name], tmp_path)
    command = small["recipe"]["command"]
    recipe = tmp_path / f"{name}.toml"
    recipe.write_text(written_recipe(small))
    start: list[object] = ["--model-config", model]
    data = {"pretrain": dataset, "finetune": sets[0]}.get(command)
    if command == "dpo":
        data = make_pairs(tmp_path, tokenizer_folder)
        begun = call(
            "asd-core", "pretrain", "--model-config", model, "--data-path", dataset, "--seq-length", 8,
            "--train-iters", 1, "--save", tmp_path / "base", "--data-cache-path", tmp_path / "cache",
        )  # fmt: skip
        assert begun.status == 0, begun.stderr
        start = ["--load", tmp_path / "base"]
    done = run_command(
        "asd-core", command, recipe, *start, "--data-path", data, "--save", tmp_path / "run", "--data-cache-path",
        tmp_path / "cache", "--nproc-per-node", processes, "--device", "cpu", "--split", "90,10,0",
        *(["--seq-length", 64] if command == "dpo" else []),
    )  # fmt: skip
    assert done.status == 0, done.stderr
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [record["lm_loss"] for record in records]
    assert len(losses) == 2
    assert all(loss is not None and 0 < loss < 20 for loss in losses)
    (last,) = saved_iterations(tmp_path / "run")
    description = json.loads((tmp_path / "run" / f"iter_{last:07d}" / "checkpoint.json").read_text())
    assert description["run"]["recipe"]["name"] == name
    wanted = kept_features(RECIPES[name])
    assert {key: description["layout"][key] for key in wanted} == wanted
    shown = " x ".join(f"{axis}{wanted[axis]}" for axis in ("tp", "pp", "dp", "ep"))
    title = "Recipes scaled down: two steps"
    report.add(title, ("recipe", "command", "layout", "losses"), name, command, shown,
               ", ".join(f"{loss:.3f}" for loss in losses))  # fmt: skip
