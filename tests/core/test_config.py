"""One definition per option: recipe, flags and `--help` all come from it."""

from pathlib import Path

import pytest
import typer

from ascendspeed_core.commands.pretrain import pretrain
from ascendspeed_core.config.layout import Layout, stages
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_data.command_line.options import walk_fields
from ascendspeed_data.errors import ConfigError
from support.commands import call
from support.models import tiny_config

RECIPE = """
[start]
model_config_file = "model.json"

[data]
data_path = ["corpus"]
seq_length = 64

[batch]
micro_batch_size = 2

[training]
train_iters = 100

[optimizer]
lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def test_flags_win_over_the_recipe(recipe: Path) -> None:
    config = load_config(PretrainConfig, recipe, {"lr": 5e-4, "min_lr": 1e-5, "seq_length": 128})
    assert (config.optimizer.lr, config.optimizer.min_lr, config.data.seq_length) == (5e-4, 1e-5, 128)
    assert (config.training.train_iters, config.batch.micro_batch_size) == (100, 2)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("[optimizr]\nlr = 1", r"unknown section \[optimizr\]; did you mean optimizer"),
        ("[parallel]\ntensor_model_paralel_size = 2", "did you mean tensor_model_parallel_size"),
        ("[parallel]\nlr = 2", r"unknown key lr in \[parallel\]; it belongs in \[optimizer\]"),
        (
            "[parallel]\ntensor_model_parallel_size = 0",
            "tensor_model_parallel_size=0: input should be greater",
        ),
        ("[precision]\ndtype = 'float31'", "dtype='float31'"),
        ("[parallel]\npipeline_model_parallel_size = 0", "pipeline_model_parallel_size=0"),
        ("lr = 1", "unknown section"),
        ("[launch", "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_recipe(recipe: Path, line: str, complaint: str) -> None:
    recipe.write_text(f"{line}\n{RECIPE}" if line.startswith("lr") else f"{RECIPE}\n{line}\n")
    with pytest.raises(ConfigError, match=complaint) as raised:
        load_config(PretrainConfig, recipe, {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"model_config_file": None, "load": "a", "orig_vocab_size": 0}, "orig_vocab_size=0"),
        ({"orig_vocab_size": 5}, "but no --load was given"),
        ({"model_config_file": None}, "neither of --load and --model-config given"),
        ({"seq_length": 0}, "seq_length=0"),
        ({"min_lr": 1.0}, r"min_lr=1.0 is above lr=0.001"),
        ({"bf16": True, "dtype": "float64"}, "float64 and bfloat16 were both asked for"),
        ({"data_path": ("0.3", "a", "0.7")}, "neither one prefix nor pairs"),
        ({"data_path": ("-1", "a", "0.7", "b")}, "neither one prefix nor pairs"),
        ({"split": "1,2"}, "is not three numbers"),
        ({"rampup_batch_size": (1, 2)}, "is not START INCREMENT SAMPLES"),
        ({"auto_resume": True}, "needs --save DIR"),
        ({"lr_warmup_iters": 3, "lr_warmup_fraction": 0.1}, "give one"),
    ],
)
def test_options_that_contradict_each_other(recipe: Path, given: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(PretrainConfig, recipe, given)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; check --config"):
        load_config(PretrainConfig, tmp_path / "none.toml", {})


def test_every_field_is_a_flag_with_help() -> None:
    app = typer.Typer()
    app.command()(pretrain)
    command = typer.main.get_command(app)
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for name, field, _ in walk_fields(PretrainConfig):
        assert f"--{name.replace('_', '-')}" in flags
        assert field.description, name
    assert all(getattr(parameter, "help", None) for parameter in command.params)


FLAGS_OF_2023 = """
    --tensor-model-parallel-size --pipeline-model-parallel-size --num-layers --hidden-size --ffn-hidden-size
    --num-attention-heads --micro-batch-size --global-batch-size --seq-length --max-position-embeddings --train-iters
    --save --load --data-path --tokenizer-name-or-path --tokenizer-not-use-fast --split --lr --lr-decay-style --min-lr
    --initial-loss-scale --loss-scale --min-loss-scale --loss-scale-window --hysteresis
    --weight-decay --clip-grad --lr-warmup-fraction --lr-warmup-iters --lr-decay-iters --adam-beta1 --adam-beta2
    --log-interval --save-interval --eval-interval --eval-iters --bf16 --fp16 --seed --no-load-optim --no-load-rng
    --finetune --layernorm-epsilon --rampup-batch-size --exit-interval --tokenizer-type --adam-eps
""".split()


@pytest.mark.parametrize("flag", FLAGS_OF_2023)
def test_flags_of_the_2023_scripts_are_accepted(flag: str) -> None:
    app = typer.Typer()
    app.command()(pretrain)
    command = typer.main.get_command(app)
    assert flag in {f for parameter in command.params for f in (*parameter.opts, *parameter.secondary_opts)}


def test_layouts() -> None:
    late = {"overlap_grad_reduce": False, "overlap_param_gather": False}
    assert ParallelConfig(**late, tensor_model_parallel_size=2).layout(8) == Layout(tp=2, dp=4)
    with pytest.raises(ConfigError, match=r"does not divide the 6 processes; choose one of 1, 2, 3, 6"):
        ParallelConfig(tensor_model_parallel_size=4).layout(6)
    ParallelConfig(tensor_model_parallel_size=8).check_model(tiny_config())
    six = tiny_config(num_attention_heads=12, num_key_value_heads=6)
    with pytest.raises(
        ConfigError,
        match=r"neither divides num_key_value_heads=6 nor is a multiple of it; choose 1, 2, 3, 6, 12",
    ):
        ParallelConfig(tensor_model_parallel_size=4).check_model(six)
    sequence = ParallelConfig(**late, tensor_model_parallel_size=2, sequence_parallel=True)
    assert sequence.layout(4) == Layout(tp=2, dp=2, sequence_parallel=True)
    with pytest.raises(ConfigError, match="cuts seq_length=33 into tensor_model_parallel_size=2 equal parts"):
        sequence.check_sequence(33)
    pipeline = ParallelConfig(**late, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    assert pipeline.layout(8) == Layout(2, 2, 2)
    with pytest.raises(
        ConfigError, match=r"times pipeline_model_parallel_size=3 is 6, .* start a multiple of 6"
    ):
        ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3).layout(8)
    with pytest.raises(
        ConfigError, match="leaves a stage without any of the num_layers=4 layers; choose 4 stages or less"
    ):
        ParallelConfig(pipeline_model_parallel_size=5).check_model(tiny_config())
    with pytest.raises(ConfigError, match="does not divide ffn_hidden_size=46"):
        ParallelConfig(tensor_model_parallel_size=4).check_model(tiny_config(ffn_hidden_size=46))


def test_list_options_and_underscores_on_the_command_line() -> None:
    done = call(
        "asd-core", "pretrain", "--model-config", "none.json", "--data_path", "0.5", "a", "0.5", "--seq-length", 8,
        "--train_iters", 1,
    )  # fmt: skip
    assert done.status == 2
    assert "data_path=0.5 a 0.5 is neither one prefix nor pairs" in done.complaint


@pytest.mark.parametrize("num_layers", range(1, 14))
def test_stages_hold_every_layer_once_and_are_nearly_equal(num_layers: int) -> None:
    for pp in range(1, num_layers + 1):
        cut = stages(num_layers, pp, "pp")
        assert [layer for stage in cut for layer in stage.layers] == list(range(num_layers))
        lengths = [len(stage.layers) for stage in cut]
        assert max(lengths) - min(lengths) <= 1
        assert lengths[0] >= lengths[-1] >= 1
        assert [stage.is_first for stage in cut] == [n == 0 for n in range(pp)]
        assert [stage.is_last for stage in cut] == [n == pp - 1 for n in range(pp)]
