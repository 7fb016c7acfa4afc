"""A DeepSpeed JSON beside the run's own options: what it may say, and where it contradicts them; no DeepSpeed here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_data.errors import AscendSpeedError, did_you_mean
from ascendspeed_data.small_files import JsonObject, read_json

AUTO = "auto"
"""Value of a key that takes over what the run says, as in Hugging Face's examples."""

PASSED_ON = frozenset(
    [
        "communication_data_type",
        "data_types",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "comms_logger",
        "flops_profiler",
    ]
)
"""Sections that are DeepSpeed's business alone; it gets them as they are."""

ZERO_PASSED_ON = frozenset(
    [
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "reduce_scatter",
        "reduce_bucket_size",
        "contiguous_gradients",
        "sub_group_size",
        "ignore_unused_parameters",
        "multi_rank_bucket_allreduce",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_allgather_sequential",
    ]
)
"""Keys of `zero_optimization` that say how fast, not what; DeepSpeed gets them as they are."""

ZERO_WITHOUT_EFFECT = frozenset({"stage3_gather_16bit_weights_on_model_save", "elastic_checkpoint"})
"""Keys of `zero_optimization` about checkpoints of DeepSpeed's own format, which no run writes."""

REFUSED = {
    "scheduler": "the run has its own schedule: --lr-decay-style, --lr-warmup-iters, --min-lr",
    "zero_optimization.offload_optimizer": "moving optimizer state to the host or a disk is not supported",
    "zero_optimization.offload_param": "moving weights to the host or a disk is not supported",
    "zero_optimization.round_robin_gradients": "DeepSpeed's table of which rank holds what is wrong with it",
    "activation_checkpointing": "the run has its own: --checkpoint-activations",
    "tensor_parallel": "the run has its own: --tensor-model-parallel-size",
    "data_efficiency": "the run has its own data pipeline",
    "curriculum_learning": "the run has its own data pipeline",
    "amp": "use --fp16 or --bf16",
}
"""Keys that would change what is trained, or are not supported, and what to do instead."""


@dataclass(frozen=True)
class RunValues:
    """What a run says of things that a DeepSpeed JSON may say too.

    Attributes:
        micro_batch_size: samples of a forward pass.
        global_batch_size: samples of a step.
        dp: data-parallel devices.
        zero_stage: 1, 2 or 3.
        dtype: of the weights, as torch names it.
        clip_grad: largest norm; 0 does not clip.
        optimizer: `--optimizer`.
        lr: highest rate.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        loss_scale: fixed scale of fp16; 0 adapts it.
        initial_scale_power: power of two that an adapting scale starts with.
        loss_scale_window: steps until it grows.
        hysteresis: overflows until it falls.
        min_loss_scale: lowest scale.
    """

    micro_batch_size: int
    global_batch_size: int
    dp: int
    zero_stage: int
    dtype: str
    clip_grad: float
    optimizer: str
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    loss_scale: float
    initial_scale_power: float
    loss_scale_window: int
    hysteresis: int
    min_loss_scale: float

    def named(self) -> dict[str, tuple[str, Any]]:
        """Return by path in the JSON the name of the run's option and its value."""
        accumulated = self.global_batch_size // (self.micro_batch_size * self.dp)
        return {
            "train_micro_batch_size_per_gpu": ("micro_batch_size", self.micro_batch_size),
            "train_batch_size": ("global_batch_size", self.global_batch_size),
            "gradient_accumulation_steps": ("global_batch_size / micro_batch_size / dp", accumulated),
            "gradient_clipping": ("clip_grad", self.clip_grad),
            "zero_optimization.stage": ("zero_stage", self.zero_stage),
            "fp16.enabled": ("fp16", self.dtype == "float16"),
            "fp16.loss_scale": ("loss_scale", self.loss_scale),
            "fp16.initial_scale_power": ("the power of two of initial_loss_scale", self.initial_scale_power),
            "fp16.loss_scale_window": ("loss_scale_window", self.loss_scale_window),
            "fp16.hysteresis": ("hysteresis", self.hysteresis),
            "fp16.min_loss_scale": ("min_loss_scale", self.min_loss_scale),
            "bf16.enabled": ("bf16", self.dtype == "bfloat16"),
            "optimizer.params.lr": ("lr", self.lr),
            "optimizer.params.betas": ("adam_beta1, adam_beta2", list(self.betas)),
            "optimizer.params.eps": ("adam_eps", self.eps),
            "optimizer.params.weight_decay": ("weight_decay", self.weight_decay),
        }


def read_deepspeed_config(path: Path) -> dict[str, Any]:
    """Return what a DeepSpeed JSON says.

    Raises:
        AscendSpeedError: it cannot be read, or names no ZeRO stage that exists.
    """
    content = read_json(
        path, JsonObject, f"deepspeed_config={path}", "correct it", option="--deepspeed_config"
    )
    if not isinstance(content.get("zero_optimization", {}), dict):
        raise AscendSpeedError(f"{path} is no DeepSpeed config; it must be an object of objects")
    return content


def stage_of(content: Mapping[str, Any], path: Path) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON, 1, 2 or 3."""
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise AscendSpeedError(
            f"{path}: zero_optimization.stage={stage!r}; choose 1, 2 or 3, or train without --deepspeed"
        )
    return int(stage)


def check_deepspeed_config(content: Mapping[str, Any], path: Path, run: RunValues) -> None:
    """Compare a DeepSpeed JSON with the run's options.

    Raises:
        AscendSpeedError: a key contradicts an option, or is not taken over.
    """
    wanted = run.named()
    for key, value in _leaves(content):
        if key in wanted:
            name, ours = wanted[key]
            if (
                value != AUTO
                and not _same(value, ours)
                and not (key.startswith("fp16.") and not _fp16(content))
            ):
                raise AscendSpeedError(
                    f'{path}: {key}={_shown(value)} contradicts {name}={_shown(ours)}; make them equal, or write "auto"'
                )
        elif key == "optimizer.type":
            types = ("SGD",) if run.optimizer == "sgd" else ("Adam", "AdamW")
            if value not in types:
                raise AscendSpeedError(
                    f"{path}: optimizer.type={value!r} contradicts optimizer={run.optimizer}, which is {types[-1]}; "
                    "make them equal, or leave it out"
                )
        elif (reason := _refusal(key, value)) is not None:
            raise AscendSpeedError(f"{path}: {key} is refused: {reason}; leave it out")
        elif not _is_known(key):
            known = {*wanted, *PASSED_ON}
            known |= {f"zero_optimization.{name}" for name in ZERO_PASSED_ON}
            raise AscendSpeedError(
                f"{path}: {key} is not taken over{did_you_mean(key, known)}; leave it out, so that it does not seem to "
                "be in force"
            )


def engine_settings(
    content: Mapping[str, Any], run: RunValues, parameters: int, largest_unit: int
) -> dict[str, Any]:
    """Return the config of `deepspeed.initialize`.

    Gradients are added up and sent in fp32, as without DeepSpeed, unless the JSON says otherwise. How many
    micro-batches make a step the run says itself, before each of them. DeepSpeed's own bucket sizes would keep the
    weights of whole models below 1e9 parameters together on every device, under ZeRO-3 too; here a few units are.

    Args:
        content: the JSON, checked; empty without one.
        run: the run's options.
        parameters: of a device, without ZeRO.
        largest_unit: most parameters of a layer or of the embedding, on a device without ZeRO.
    """
    zero: dict[str, Any] = {
        "stage": run.zero_stage,
        # It would replace torch.nn.functional.linear for the whole process; see `parallel.deepspeed`.
        "memory_efficient_linear": False,
        "reduce_bucket_size": min(largest_unit, 500_000_000),
        "allgather_bucket_size": -(-min(parameters, 500_000_000) // 2) * 2,
    }
    if run.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": min(largest_unit, 50_000_000),
            "stage3_max_live_parameters": min(2 * largest_unit, 1_000_000_000),
            "stage3_max_reuse_distance": min(largest_unit, 1_000_000_000),
        }
    given = content.get("zero_optimization", {})
    zero |= {key: value for key, value in given.items() if key in ZERO_PASSED_ON and value != AUTO}
    is_fp16 = run.dtype == "float16"
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.clip_grad,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Scaled by the run's own LossScale, which sets the scale before each step.
        "fp16": {"enabled": is_fp16, "loss_scale": 1.0 if is_fp16 else 0},
        "bf16": {"enabled": run.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
    return settings | {key: value for key, value in content.items() if key in PASSED_ON and value != AUTO}


def inference_settings(content: Mapping[str, Any], stage: int, dtype: str) -> dict[str, Any]:
    """Return the config of `deepspeed.initialize` for a model that generates and is not trained.

    Args:
        content: DeepSpeed's JSON, of which only the buckets of `zero_optimization` matter; empty without one.
        stage: 1, 2 or 3.
        dtype: of the weights, as torch names it.
    """
    given = content.get("zero_optimization", {})
    zero = {key: value for key, value in given.items() if key in ZERO_PASSED_ON and value != AUTO}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False, **zero},
        "fp16": {"enabled": dtype == "float16"},
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": None,
    }


def _leaves(content: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return path and value of every key; sections that are passed on or refused as a whole count as one."""
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        path = f"{above}{key}"
        is_section = path in ("zero_optimization", "fp16", "bf16", "optimizer", "optimizer.params")
        if is_section and isinstance(value, Mapping):
            found += _leaves(value, f"{path}.")
        else:
            found.append((path, value))
    return found


def _refusal(key: str, value: Any) -> str | None:
    """Say why a key is refused; `None` when it is not, or is switched off."""
    is_off = value in (None, False) or (isinstance(value, Mapping) and value.get("device") == "none")
    is_off = is_off or (isinstance(value, Mapping) and value.get("enabled") is False)
    return None if is_off else REFUSED.get(key)


def _is_known(key: str) -> bool:
    section, _, name = key.rpartition(".")
    if section == "zero_optimization":
        return name in ZERO_PASSED_ON | ZERO_WITHOUT_EFFECT or key in REFUSED
    if section == "optimizer.params":
        return name in ("torch_adam", "adam_w_mode")
    return key in PASSED_ON or key in REFUSED or key == "zero_allow_untested_optimizer"


def _fp16(content: Mapping[str, Any]) -> bool:
    section = content.get("fp16", {})
    return bool(isinstance(section, Mapping) and section.get("enabled"))


def _same(value: Any, ours: Any) -> bool:
    if isinstance(ours, bool):
        return value is ours
    if isinstance(ours, list):
        return isinstance(value, list) and len(value) == len(ours) and all(map(_same, value, ours))
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value - ours) <= 1e-12 * abs(ours)
    )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
