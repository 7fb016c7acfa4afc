"""What `--zero-stage` and a DeepSpeed JSON may say, and what is refused with which words."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.optim.build_engine import check_engine, zero_settings
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from support.models import tiny_config

BASE = {
    "model_config_file": Path("m.json"), "data_path": ("d",), "seq_length": 8, "train_iters": 1, "micro_batch_size": 2,
    "global_batch_size": 16,
}  # fmt: skip


def checked(world_size: int = 2, **options: Any) -> tuple[PretrainConfig, Any]:
    config = load_config(PretrainConfig, None, BASE | options)
    layout = config.parallel.layout(world_size)
    config.parallel.check_model(tiny_config())
    check_engine(config, layout, tiny_config())
    return config, layout


def complaint(**options: Any) -> str:
    with pytest.raises(AscendSpeedError) as caught:
        checked(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_stage": 1, "pipeline_model_parallel_size": 2}, "which a pipeline's stages would wait for"),
        ({"zero_stage": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}, "leave one of them out"),
        ({"zero_stage": 3, "use_distributed_optimizer": True}, "both cut the optimizer's state"),
        ({"zero_stage": 1, "dtype": "float64"}, "DeepSpeed keeps master weights in fp32"),
        ({"zero_stage": 1, "mlp_layer_fusion": True}, "zero_stage=1 with mlp_layer_fusion=true"),
        ({"deepspeed": True}, "needs a stage; give --zero-stage 1, 2 or 3, or --deepspeed_config FILE"),
        ({"deepspeed_config": Path("ds.json")}, "means nothing without --deepspeed"),
        ({"zero_stage": 1, "tensor_model_parallel_size": 8, "world_size": 8}, "choose 1, 2, 4 with ZeRO"),
    ],
)  # fmt: skip
def test_options_that_exclude_each_other(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        checked(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "zero_optimization.stage=0; choose 1, 2 or 3"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage=4; choose 1, 2 or 3"),
        ({"train_batch_size": 32}, "train_batch_size=32 contradicts global_batch_size=16"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu=4 contradicts micro_batch_size=2"),
        ({"gradient_accumulation_steps": 2}, "=2 contradicts global_batch_size / micro_batch_size / dp=4"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 contradicts clip_grad=1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true contradicts bf16=false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=true contradicts fp16=false"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, "optimizer.params.lr=1e-05 contradicts lr=0.0003"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type='Lamb' contradicts optimizer=adam, which is AdamW"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is refused: the run has its own schedule"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is refused"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients is refused"),
        ({"zero_optimisation": {"stage": 1}}, "zero_optimisation is not taken over"),
        ({"zero_optimization": {"reduce_bucket_sise": 1}}, "did you mean zero_optimization.reduce_bucket_size?"),
    ],
)  # fmt: skip
def test_a_json_that_contradicts(content: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    if content and "stage" not in content.get("zero_optimization", {}):
        content = content | {"zero_optimization": {"stage": 1, **content.get("zero_optimization", {})}}
    path.write_text(json.dumps(content))
    message = complaint(deepspeed=True, deepspeed_config=path)
    assert words in message
    assert str(path) in message
    assert "\n" not in message


def test_files_that_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    assert "does not exist; check --deepspeed_config" in complaint(deepspeed=True, deepspeed_config=path)
    path.write_text("{")
    assert "is not JSON" in complaint(deepspeed=True, deepspeed_config=path)
    path.write_text("[]")
    assert "it must be an object" in complaint(deepspeed=True, deepspeed_config=path)


def test_flag_and_json_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    words = "zero_optimization.stage=2 contradicts zero_stage=3"
    assert words in complaint(deepspeed=True, deepspeed_config=path, zero_stage=3)


def test_a_config_in_the_field_s_words(tmp_path: Path) -> None:
    """What Hugging Face's examples and the 2023 scripts write, with values of the run or "auto"."""
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto",
                "gradient_clipping": 1.0, "steps_per_print": 2000, "wall_clock_breakdown": False,
                "zero_allow_untested_optimizer": True,
                "fp16": {"enabled": False, "loss_scale": 128, "initial_scale_power": 16}, "bf16": {"enabled": True},
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01},
                },
                "zero_optimization": {
                    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9,
                    "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 1000,
                    "stage3_gather_16bit_weights_on_model_save": True, "offload_optimizer": {"device": "none"},
                },
            }
        )
    )  # fmt: skip
    config, layout = checked(deepspeed=True, deepspeed_config=path, bf16=True)
    assert layout.zero_stage == 3
    assert str(layout) == "tp1 x pp1 x dp2 + zero3"
    settings = zero_settings(config, tiny_config(), layout)
    assert settings is not None
    zero = settings["zero_optimization"]
    given = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9}
    assert {name: zero[name] for name in given} == given
    assert zero["stage3_prefetch_bucket_size"] == 1000
    assert zero["reduce_bucket_size"] == zero["stage3_max_live_parameters"] // 2
    assert zero["reduce_bucket_size"] * 4 < tiny_config().num_parameters
    assert "stage3_gather_16bit_weights_on_model_save" not in zero
    assert "offload_optimizer" not in zero
    assert settings["steps_per_print"] == 2000
    assert settings["bf16"] == {"enabled": True}


def test_without_deepspeed_nothing_is_asked() -> None:
    config, layout = checked()
    assert zero_settings(config, tiny_config(), layout) is None
