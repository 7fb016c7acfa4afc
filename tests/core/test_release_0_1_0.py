"""What release 0.1.0 wrote is still read: recipes, a checkpoint, an adapter; and training goes on with its numbers.

The files in `tests/fixtures/v0.1.0` were made by that release and are never made anew. `expected.json` holds what it
computed itself when its runs went on to iteration 6. Processors round the last bits of a product in different ways, so
numbers are compared to 1e-12; whether the weights are the same bit for bit is printed (`pytest -rP`).
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.migrate import FORMAT_VERSION, migrate_config
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.config.recipes import RecipeConfig
from ascendspeed_core.config.records import RecordsConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.weights import NativeSource
from ascendspeed_data.errors import ConfigError
from support.commands import call

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1.0"
TOLERANCE = 1e-12

RECIPES: dict[str, type[PretrainConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "dpo": DpoConfig,
}

DATA_SINCE: dict[str, Any] = {
    "train_data_path": [], "valid_data_path": [], "test_data_path": [], "reset_attention_mask": False,
    "reset_position_ids": False, "no_shuffle": False,
}  # fmt: skip
PARALLEL_SINCE: dict[str, Any] = {
    "expert_model_parallel_size": 1, "expert_tensor_parallel_size": None, "overlap_grad_reduce": True,
    "overlap_param_gather": True, "ddp_bucket_size": 1 << 24, "engine": None, "megatron_args": None,
    "fp8": None, "fp8_recipe": None,
}  # fmt: skip
"""Options that later releases added, which an old recipe leaves alone."""


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the release wrote, as working directory."""
    folder = tmp_path / "v0.1.0"
    shutil.copytree(FIXTURES, folder)
    monkeypatch.chdir(folder)
    return folder


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("run", "command"), [("run", "pretrain"), ("lora", "finetune")])
def test_a_recipe_gives_the_settings_that_the_release_stored(run: str, command: str) -> None:
    loaded = load_config(RECIPES[command], FIXTURES / f"{command}.toml", {}, say=lambda _: None)
    stored = read_json(FIXTURES / run / "iter_0000003" / "checkpoint.json")["run"]
    migrated, _ = migrate_config(stored, "checkpoint.json")
    new: dict[str, dict[str, Any]] = {"data": DATA_SINCE, "training": {"num_train_epochs": None}}
    new |= {"parallel": PARALLEL_SINCE, "compute": {"token_permutation": "auto", "grouped_product": "auto"}}
    new["start"] = {"orig_vocab_size": None}
    expected = {section: values | new.get(section, {}) for section, values in migrated.items()}
    if command == "finetune":
        expected["records"] = RecordsConfig().model_dump(mode="json")
    expected["experts"] = ExpertsConfig().model_dump(mode="json")
    expected["recipe"] = RecipeConfig().model_dump(mode="json")
    assert loaded.model_dump(mode="json") == expected


def test_a_recipe_of_dpo_gives_what_it_says() -> None:
    config = load_config(DpoConfig, FIXTURES / "dpo.toml", {}, say=lambda _: None)
    assert (config.start.load, config.checkpoint.save) == (Path("run"), Path("dpo"))
    assert (config.preference.dpo_beta, config.preference.dpo_loss) == (0.2, "sigmoid")
    assert (config.batch.micro_batch_size, config.batch.global_batch_size) == (2, 4)
    assert (config.training.train_iters, config.training.seed, config.logging.log_interval) == (4, 13, 1)


def test_an_old_recipe_is_told_how_to_become_a_new_one(tmp_path: Path) -> None:
    said: list[str] = []
    old = load_config(PretrainConfig, FIXTURES / "pretrain.toml", {}, said.append)
    (line,) = said
    assert "save, save_interval, async_save, keep_checkpoints from [start] to [checkpoint]" in line
    assert "train_iters, exit_interval, seed from [batch] to [training]" in line
    assert "eval_interval, eval_iters from [batch] to [evaluation]" in line
    assert f"begin it with format_version = {FORMAT_VERSION}" in line

    new = tmp_path / "new.toml"
    text = (FIXTURES / "pretrain.toml").read_text()
    moved = {"checkpoint": "save", "training": "train_iters exit_interval seed", "logging": "log_interval"}
    moved |= {"evaluation": "eval_interval eval_iters"}
    moved["checkpoint"] += " save_interval keep_checkpoints async_save"
    lines = text.splitlines()
    for section, keys in moved.items():
        found = [x for x in lines if x.split(" = ")[0] in keys.split()]
        assert len(found) == len(keys.split())
        lines = [x for x in lines if x not in found] + [f"[{section}]", *found]
    new.write_text("\n".join([f"format_version = {FORMAT_VERSION}", *lines]))
    assert load_config(PretrainConfig, new, {}, said.append) == old
    assert said == [line]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("format_version = 3", "format_version=3; this release reads 1 to 2"),
        ("format_version = true", "format_version=True; this release reads 1 to 2"),
        ("format_version = 2\n[start]\nsave = 'a'", r"unknown key save in \[start\]; it belongs in \[checkpoint\]"),
        ("[start]\nsave = 'a'\n[checkpoint]\nsave = 'b'", r"save stands in \[start\] and in \[checkpoint\]"),
        ("[samples]\neval_promts = 'a'", r"unknown section \[samples\]"),
    ],
)  # fmt: skip
def test_versions_that_do_not_fit_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_config(PretrainConfig, recipe, {})


def test_prompts_of_an_old_recipe_are_read(tmp_path: Path) -> None:
    text = (FIXTURES / "pretrain.toml").read_text()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"{text}\n[samples]\neval_prompts = 'p.txt'\neval_generate_interval = 2\n")
    config = load_config(PretrainConfig, recipe, {}, say=lambda _: None)
    assert config.eval_prompts.eval_prompts == Path("p.txt")
    assert config.eval_prompts.eval_generate_interval == 2


def check_run(folder: Path, name: str) -> None:
    """Compare a run that went on with what the release computed."""
    expected = read_json(folder / "expected.json")[name]
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    for key, wanted in (
        ("lm_loss", "losses"),
        ("grad_norm", "norms"),
        ("validation_loss", "validation"),
    ):
        found = {r["iteration"]: r[key] for r in records if r.get(key) is not None}
        told = {number: value for number, value in enumerate(expected[wanted], 1) if value is not None}
        assert found == pytest.approx(told, rel=TOLERANCE), key
    source = NativeSource(folder / name, is_adapter=name == "lora")
    assert source.folder.name == "iter_0000006"
    weights = {key: source.read(key).contiguous() for key in sorted(source.tensors())}
    sums = {key: float(weight.double().square().sum()) for key, weight in weights.items()}
    assert sums == pytest.approx(expected["sums"], rel=TOLERANCE)
    digests = {key: hashlib.sha256(weight.numpy().tobytes()).hexdigest() for key, weight in weights.items()}
    equal = sum(digests[key] == digest for key, digest in expected["weights"].items())
    print(f"{name}: {equal} of {len(digests)} weights are those of release 0.1.0 bit for bit")
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")


def test_a_pretraining_run_goes_on_with_the_same_numbers(release: Path) -> None:
    done = call("asd-core", "pretrain", "--config", "pretrain.toml", "--auto-resume", "--exit-interval", 6)
    assert done.status == 0, done.stderr
    assert "resumed at iteration 3" in done.stderr
    assert done.stderr.count("read as a recipe of release 0.1.0") == 1
    check_run(release, "run")
    stored = read_json(release / "run" / "iter_0000006" / "checkpoint.json")["run"]
    assert stored["format_version"] == FORMAT_VERSION
    assert stored["checkpoint"]["save"] == "run"


def test_an_adapter_run_goes_on_with_the_same_numbers(release: Path) -> None:
    text = Path("finetune.toml").read_text()
    Path("finetune.toml").write_text(text.replace("exit_interval = 3", "exit_interval = 6"))
    done = call("asd-core", "finetune", "--config", "finetune.toml", "--auto-resume")
    assert done.status == 0, done.stderr
    assert "resumed at iteration 3" in done.stderr
    check_run(release, "lora")


def test_preference_tuning_starts_from_the_checkpoint(release: Path) -> None:
    done = call("asd-core", "dpo", "--config", "dpo.toml")
    assert done.status == 0, done.stderr
    records = [json.loads(line) for line in (release / "dpo" / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    # At the first step the model is its reference, and no answer is preferred.
    assert records[0]["lm_loss"] == pytest.approx(0.6931471805599453, rel=TOLERANCE)
