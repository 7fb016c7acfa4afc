"""`--fp8` under megatron-core, which cannot run here: what is refused, and what its source says of the calls.

Transformer Engine needs CUDA to be installed, so its layers are read as source and never made.
"""

import ast
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.megatron import LayerOptions, check_megatron
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.megatron import megatron
from ascendspeed_core.optim.megatron.core import check_transformer_engine, config_class, submodules_of
from ascendspeed_core.optim.megatron.settings import layer_fields
from ascendspeed_core.optim.megatron.specs import block_spec
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from support.models import tiny_config
from support.versions import skip_before

CALLERS = {
    "transformer/attention.py": ("linear_qkv", "linear_proj"),
    "transformer/mlp.py": ("linear_fc1", "linear_fc2"),
    "transformer/multi_latent_attention.py": (
        "linear_q_proj",
        "linear_q_up_proj",
        "linear_kv_up_proj",
        "linear_proj",
    ),
}
ROWS = ("linear_proj", "linear_fc2")


def source(name: str) -> ast.Module:
    folder = Path(megatron("package_info").__file__).parent
    return ast.parse((folder / name).read_text(encoding="utf-8"))


def parameters(name: str) -> tuple[set[str], set[str]]:
    """Which arguments a layer takes by name, and which of them it wants."""
    (found,) = [
        node
        for node in ast.walk(source("extensions/transformer_engine.py"))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    (init,) = [node for node in found.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    defaults = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    wanted = {argument.arg for argument, default in defaults if default is None}
    return {argument.arg for argument in init.args.kwonlyargs}, wanted


@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file, names in CALLERS.items() for name in names]
)
def test_layers_take_what_they_are_called_with(file: str, name: str) -> None:
    known, wanted = parameters("TERowParallelLinear" if name in ROWS else "TEColumnParallelLinear")
    calls = [
        node.value
        for node in ast.walk(source(file))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and any(isinstance(target, ast.Attribute) and target.attr == name for target in node.targets)
        and ast.unparse(node.value.func) in ("build_module", f"submodules.{name}")
    ]
    assert calls
    for call in calls:
        given = {keyword.arg for keyword in call.keywords}
        # Inputs and outputs, behind the spec.
        assert len(call.args) == 2 + isinstance(call.func, ast.Name)
        assert wanted <= given <= known, (file, name)


def test_specs_and_fields() -> None:
    skip_before("megatron-core", "0.14", "does not name its layers of Transformer Engine without it")
    layers: Any = megatron("extensions.transformer_engine")
    options = LayerOptions(fp8="hybrid", fp8_recipe="tensorwise")
    (spec,) = block_spec(tiny_config(), [0], options).layer_specs
    attention, mlp = spec.submodules.self_attention.submodules, submodules_of(spec.submodules.mlp)
    assert attention.linear_qkv is layers.TEColumnParallelLinear
    assert attention.linear_proj is layers.TERowParallelLinear
    assert mlp.linear_fc1 is layers.TEColumnParallelLinear
    assert mlp.linear_fc2 is layers.TERowParallelLinear
    (plain,) = block_spec(tiny_config(), [0], LayerOptions()).layer_specs
    assert submodules_of(plain.submodules.mlp).linear_fc1 is not layers.TEColumnParallelLinear
    fields = layer_fields(tiny_config(), options)
    assert fields == {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    made = config_class("TransformerConfig")(num_layers=1, hidden_size=8, num_attention_heads=1, **fields)
    assert (made.fp8, made.fp8_recipe) == ("hybrid", "tensorwise")
    # Those that megatron-core compares with.
    known = {recipe.value for recipe in megatron("enums").Fp8Recipe}
    (recipes, _) = ParallelConfig.model_fields["fp8_recipe"].annotation.__args__  # type: ignore[union-attr]
    assert set(recipes.__args__) <= known


def test_what_is_refused() -> None:
    with pytest.raises(
        AscendSpeedError, match=r"fp8=hybrid: Transformer Engine, whose linear layers .* cannot be"
    ):
        check_transformer_engine("hybrid")
    required = {"model_config_file": "m.json", "data_path": ("d",), "seq_length": 16, "train_iters": 2}
    for wrong, said in (
        ({"fp8": "hybrid"}, "fp8=hybrid needs --engine megatron"),
        ({"engine": "megatron", "fp8_recipe": "mxfp8"}, "fp8_recipe=mxfp8 means nothing without --fp8"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_config(PretrainConfig, None, {**required, **wrong})
    exact = load_config(
        PretrainConfig, None, {**required, "engine": "megatron", "fp8": "e4m3", "dtype": "float64"}
    )
    with pytest.raises(ConfigError, match="fp8=e4m3 and dtype=float64"):
        check_megatron(exact, Layout(), tiny_config())
    config = load_config(
        PretrainConfig, None, {**required, "engine": "megatron", "fp8": "e4m3", "bf16": True}
    )
    experts = tiny_config(experts=Experts(count=4, per_token=2, ffn_hidden_size=16))
    with pytest.raises(ConfigError, match="fp8=e4m3 for a model with experts"):
        check_megatron(config, Layout(), experts)
    check_megatron(config, Layout(), tiny_config())
