"""Recipes of generation fit their models, and run at a scale that a test can run."""

from pathlib import Path

import pytest

from ascendspeed_core.config.load import NamedRecipe, load_config
from ascendspeed_core.config.recipes import find_recipe, read_recipe, recipe_names
from ascendspeed_infer.commands.generate import RECIPES
from ascendspeed_infer.config import GenerateConfig
from support.commands import call
from support.models import save_hugging_face, tiny_config
from support.recipes import published

NAMES = recipe_names(RECIPES)


def test_every_row_of_2023_has_its_recipe() -> None:
    modes = ["llama-7b-ptd", "llama-13b-zero", "llama-7b-zero-tp", "llama-13b-lora"]
    assert sorted(NAMES) == sorted(["bloom-7b1", "bloom-176b", *modes])


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_model_and_devices(name: str) -> None:
    config = load_config(
        GenerateConfig, None, {"load": Path("model")}, named=NamedRecipe(name, "generate", RECIPES)
    )
    assert config.recipe.model is not None
    assert config.recipe.devices is not None
    config.parallel.check_model(published(config.recipe.model))
    layout = config.parallel.layout(config.recipe.devices)
    assert layout.dp == 1 or layout.zero_stage == 3
    assert read_recipe(find_recipe(name, RECIPES))["recipe"]["command"] == "generate"


def test_a_recipe_runs_by_its_path_and_flags_win(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "model", tokenizer=tokenizer_folder)
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[sampling]\nmax_new_tokens = 3\n[precision]\ndtype = 'float32'\n")
    asked: list[object] = [
        "asd-infer",
        "generate",
        recipe,
        "--load",
        tmp_path / "model",
        "--prompt",
        "the",
        "--json",
    ]
    done = call(*asked, "--device", "cpu", "--ignore-eos")
    assert done.status == 0, done.stderr
    assert done.stdout == call(*asked, "--device", "cpu", "--ignore-eos", "--max-new-tokens", 3).stdout
    assert done.stdout != call(*asked, "--device", "cpu", "--ignore-eos", "--max-new-tokens", 5).stdout


def test_a_checkpoint_of_another_model_and_a_misspelt_name(tmp_path: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "model")
    done = call("asd-infer", "generate", "llama-13b-lora", "--load", tmp_path / "model", "--prompt", "a")
    assert done.status == 1
    assert "is another model than llama-13b" in done.complaint
    done = call("asd-infer", "generate", "lama-13b-lora", "--load", tmp_path / "model", "--prompt", "a")
    assert "lama-13b-lora is no recipe; did you mean llama-13b-lora?" in done.complaint
