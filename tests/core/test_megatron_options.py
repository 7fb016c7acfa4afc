"""What `--engine megatron` refuses, each by name, before any process starts; and its further fields."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.megatron import (
    LACKING_MODELS,
    LACKING_OPTIONS,
    check_megatron,
    read_megatron_args,
)
from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.models.families import find_family
from ascendspeed_core.optim.megatron.further_fields import UNSUPPORTED, check_fields
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from support.commands import call
from support.models import tiny_config
from support.tables import ReportTables
from support.versions import skip_before

EXPERTS = Experts(count=8, per_token=2, ffn_hidden_size=16)
EXAMPLES: dict[str, Any] = {
    "pipeline_schedule": {"pipeline_schedule": "zbv", "pipeline_model_parallel_size": 2},
    "foldx_mode": {
        "foldx_mode": "aiao", "pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1,
    },
    "manual_mbs": {"optimized_pipeline": True, "manual_mbs": "auto"},
    "checkpoint_policy": {"checkpoint_policy": "selective"},
    "cross_entropy": {"cross_entropy": "hidden"},
    "scaled_masked_softmax": {"attention": "reference", "scaled_masked_softmax": "reference"},
    "moe_pad_expert_input_to_capacity": {
        "moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.5,
    },
    "eval_prompts": {"eval_prompts": Path("prompts.txt"), "eval_generate_interval": 5},
}  # fmt: skip
"""Options of a run that ask for what the engine lacks; by default the option alone, as 0.1 or `reference`."""

MODELS: dict[str, Callable[[], ModelConfig]] = {
    "experts.biases": lambda: tiny_config(experts=EXPERTS.model_copy(update={"biases": True})),
    "rotary_scaling=yarn": lambda: tiny_config(
        rotary_scaling=RotaryScaling(kind="yarn", factor=4, original_max_position_embeddings=16)
    ),
    "window_layers": lambda: tiny_config(sliding_window=4, window_layers=(0,)),
    "rotary_interleaved=true": lambda: tiny_config(rotary_interleaved=True),
    "attention_softcap": lambda: tiny_config(attention_softcap=30.0),
    "qk_norm_kind": lambda: tiny_config(qk_norm=True, qk_norm_kind="all_heads"),
    "norm_placement": lambda: tiny_config(norm_placement="both"),
    "embedding_multiplier": lambda: tiny_config(logits_softcap=30.0),
    "normalised_head=true": lambda: tiny_config(normalised_head=True),
    "mlp_bias=true": lambda: tiny_config(mlp_bias=True),
}
"""A model for each row of the table, by the beginning of what it has."""


def run_config(**options: Any) -> PretrainConfig:
    required = {"model_config_file": "m.json", "data_path": ("d",), "seq_length": 16, "train_iters": 2}
    return load_config(PretrainConfig, None, {**required, "engine": "megatron", **options})


def complaint(config: PretrainConfig, model: ModelConfig, layout: Layout | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_megatron(config, layout or Layout(), model)
    return str(caught.value)


@pytest.mark.parametrize("option", LACKING_OPTIONS, ids=lambda option: option.name)
def test_options_that_it_lacks(option: Any, report: ReportTables) -> None:
    field = type(getattr(run_config(), option.section)).model_fields[option.name]
    simple = {option.name: 0.1 if isinstance(field.default, float) else "reference"}
    message = complaint(run_config(**EXAMPLES.get(option.name, simple)), tiny_config())
    assert message.startswith(f"engine=megatron with {option.name}=")
    assert message.endswith(f"{option.reason}; leave it out, or give --engine ascendspeed, which has it")
    report.add("What --engine megatron refuses", ("message",), message)


@pytest.mark.parametrize("lacking", LACKING_MODELS, ids=lambda lacking: lacking.what)
def test_models_that_it_lacks(lacking: Any, report: ReportTables) -> None:
    (make,) = [make for what, make in MODELS.items() if lacking.what.startswith(what)]
    message = complaint(run_config(), make())
    assert f"({lacking.what}): {lacking.reason}; give --engine ascendspeed, which has it" in message
    report.add("What --engine megatron refuses", ("message",), message)


def test_what_it_refuses_of_two_things_together(report: ReportTables) -> None:
    plain, experts = tiny_config(), tiny_config(experts=EXPERTS)
    latent = tiny_config(
        kv_latent_dim=8, rotary_dim=4, head_dim=8, value_head_dim=4, num_key_value_heads=8,
        rotary_interleaved=True,
    )  # fmt: skip
    messages = [
        complaint(run_config(dtype="float64"), plain, Layout(dp=2, sharded_optimizer=True)),
        complaint(run_config(), experts, Layout(tp=2)),
        complaint(run_config(), latent, Layout(tp=2)),
        complaint(
            run_config(optimized_pipeline=True, manual_mbs="1,2,1", global_batch_size=4), plain,
            Layout(pp=2, schedule="interleaved", layers_per_stage=1),
        ),
    ]  # fmt: skip
    parts = (
        "float64",
        "with experts: it wants a part",
        "with latent attention: it wants a part",
        "several shapes",
    )
    for message, part in zip(messages, parts, strict=True):
        assert part in message
        report.add("What --engine megatron refuses", ("message",), message)
    for wrong, said in (
        ({"zero_stage": 1}, "engine=megatron and zero_stage=1 name two engines"),
        ({"engine": "deepspeed"}, "engine=deepspeed needs a stage"),
        ({"engine": "ascendspeed", "megatron_args": Path("x")}, "means nothing without --engine megatron"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_config(**wrong)


def test_fields_of_its_configs(tmp_path: Path) -> None:
    path = tmp_path / "fields.json"

    def complaint_about(content: object) -> str:
        path.write_text(json.dumps(content))
        with pytest.raises(AscendSpeedError) as caught:
            check_fields(read_megatron_args(path), path)
        message = str(caught.value)
        assert message.startswith(str(path)) or message.startswith(f"megatron_args={path}")
        return message

    path.write_text('{"DistributedDataParallelConfig": {"pad_buckets_for_high_nccl_busbw": true}}')
    found = check_fields(read_megatron_args(path), path)
    assert found == {"DistributedDataParallelConfig": {"pad_buckets_for_high_nccl_busbw": True}}
    assert "did you mean TransformerConfig" in complaint_about({"TransformersConfig": {}})
    assert "must be an object of its fields" in complaint_about({"TransformerConfig": [1]})
    assert "has no field overlap_grads" in complaint_about(
        {"DistributedDataParallelConfig": {"overlap_grads": True}}
    )
    wrong = {"DistributedDataParallelConfig": {"check_for_nan_in_grad": "yes"}}
    assert "check_for_nan_in_grad='yes': input should be a valid boolean" in complaint_about(wrong)
    for kind, name, value in (
        ("DistributedDataParallelConfig", "overlap_grad_reduce", True),
        ("DistributedDataParallelConfig", "bucket_size", 1000),
        ("OptimizerConfig", "clip_grad", 1.0),
    ):
        assert f"{kind}.{name} is decided by the run's own options" in complaint_about({kind: {name: value}})
    assert "num_layers is decided by the run's own options" in complaint_about(
        {"TransformerConfig": {"num_layers": 2}}
    )
    assert "moe_router_topk is refused: routers are this project's" in complaint_about(
        {"TransformerConfig": {"moe_router_topk": 2}}
    )
    assert "batch_p2p_comm is decided" in complaint_about({"TransformerConfig": {"batch_p2p_comm": True}})
    assert "takes no value that a JSON file holds" in complaint_about(
        {"TransformerConfig": {"autocast_dtype": "x"}}
    )
    assert "no JSON" in complaint_about([]) or "object" in complaint_about([])


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_fields_that_the_engine_does_not_follow(name: str, tmp_path: Path) -> None:
    import dataclasses

    from ascendspeed_core.config.megatron import CONFIG_CLASSES
    from ascendspeed_core.optim.megatron.core import config_class

    kinds = [
        kind for kind in CONFIG_CLASSES if name in {f.name for f in dataclasses.fields(config_class(kind))}
    ]
    for kind in kinds:
        with pytest.raises(ConfigError, match=f"{kind}.{name} is refused: {UNSUPPORTED[name]}"):
            check_fields({kind: {name: True}}, tmp_path)
    if not kinds and name != "use_custom_fsdp":
        skip_before("megatron-core", "0.16", f"has no field {name}")
    # That of older versions.
    assert kinds or name == "use_custom_fsdp"


def test_adapters_are_refused() -> None:
    class Adapted(PretrainConfig):
        @property
        def adapters(self) -> LoraConfig:
            return LoraConfig(lora_target_modules=("q_proj",))

    config = run_config()
    adapted = Adapted.model_construct(**{name: getattr(config, name) for name in type(config).model_fields})
    assert "engine=megatron with adapters" in complaint(adapted, tiny_config())


def test_without_a_gpu_it_is_refused(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "m.json").write_text(
        json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400)))
    )
    done = call(
        "asd-core", "pretrain", "--model-config", tmp_path / "m.json", "--data-path", dataset, "--seq-length", 16,
        "--train-iters", 2, "--device", "cpu", "--engine", "megatron", "--split", "1,0,0",
    )  # fmt: skip
    assert done.status == 1
    assert done.complaint == (
        "asd-core: error: engine=megatron on this cpu: megatron-core computes on GPUs and NPUs only, it asks torch for "
        "a GPU wherever it makes a tensor; give --engine ascendspeed, which computes the same numbers"
    )
