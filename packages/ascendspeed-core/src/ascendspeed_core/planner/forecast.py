"""What a plan says of a run with all its options: a workload, the memory of its ranks, its speed. No torch."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_core.config.layout import Layout, Stage, stages_of_ranks
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.recompute import Mode, RecomputeConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.planner.hardware import HardwareProfile
from ascendspeed_core.planner.part_work import Tuning
from ascendspeed_core.planner.question import is_fused
from ascendspeed_core.planner.rank_memory import ALLOCATOR_MARGIN, MemoryPlanner, RankMemory
from ascendspeed_core.planner.step_time import StepSeconds, StepTimer
from ascendspeed_core.planner.workload import Workload

ATTENTION_NAMES = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "dense"))
"""Layers of attention by their names in `--lora-target-modules`."""


def tuning_of(config: PretrainConfig, adapted: Collection[str] | None = None) -> Tuning:
    """Return what a run trains; adapters count as those of all layers of attention, or of the MLP too.

    Args:
        config: of the run.
        adapted: names of the layers with adapters, where they are known; else those that its options name count.
    """
    lora = config.adapters
    pairs = config.objective == "dpo"
    if lora is None:
        return Tuning(pairs=pairs)
    if adapted is None:
        names = {name.rpartition(".")[2] for name in lora.lora_target_modules}
        adapts_mlp = not names <= ATTENTION_NAMES
    else:
        adapts_mlp = any(".mlp." in name for name in adapted)
    return Tuning(
        adapter_rank=lora.lora_r,
        adapts_mlp=adapts_mlp,
        adapter_dropout=lora.lora_dropout > 0,
        pairs=pairs,
    )


def workload_of(
    config: PretrainConfig, model: ModelConfig, layout: Layout, adapted: Collection[str] | None = None
) -> Workload:
    """Return the largest micro-batch of a run."""
    sizes = config.batch.manual_sizes() or (config.batch.micro_batch_size,)
    tuning = tuning_of(config, adapted)
    return Workload(model, layout, max(sizes), config.data.seq_length, config.precision.dtype_name, tuning)


def micro_batches_of(config: PretrainConfig, layout: Layout) -> int:
    """Return how many micro-batches a data-parallel rank has in a step."""
    sizes = config.batch.manual_sizes()
    if sizes:
        return len(sizes)
    return config.batch.resolve_global_batch_size(layout.dp) // layout.dp // config.batch.micro_batch_size


def modes_of_rank(config: RecomputeConfig, stages: Sequence[Stage], pp_rank: int) -> tuple[Mode, ...] | None:
    """Return what each layer of a rank computes again.

    Policy `auto` counts as the most that it may choose. `None` stands for a policy whose memory no formula knows.
    """
    modes: list[Mode] = []
    policy = config.checkpoint_policy if config.checkpoint_activations else None
    if policy == "attention":
        return None
    left = config.recomputation_layer_num[pp_rank] if policy == "custom" else 0
    for stage in stages:
        layers = len(stage.layers)
        count = {
            None: 0,
            "block": min(layers, config.checkpoint_block_layer),
            "custom": min(layers, left),
        }.get(policy, layers)
        left = max(left - layers, 0)
        again: Mode = "selective" if policy == "selective" else "full"
        modes += [again] * count + ["none"] * (layers - count)
    return tuple(modes)


def modes_of_ranks(config: RecomputeConfig, num_layers: int, layout: Layout) -> list[tuple[Mode, ...]] | None:
    """Return the same of all pipeline ranks."""
    held = enumerate(stages_of_ranks(num_layers, layout))
    found = [modes_of_rank(config, stages, rank) for rank, stages in held]
    return None if None in found else [modes for modes in found if modes is not None]


def planned_memory(
    config: PretrainConfig,
    model: ModelConfig,
    layout: Layout,
    is_fused: bool,
    margin: float = 0.0,
    adapted: Collection[str] | None = None,
) -> list[RankMemory] | None:
    """Return the memory of each pipeline rank in a step of a run; `None` where a formula is missing.

    Args:
        config: of the run.
        model: that it trains.
        layout: of all ranks.
        is_fused: see `ActivationBytes`.
        margin: share for the allocator.
        adapted: see `tuning_of`.
    """
    planner = MemoryPlanner(workload_of(config, model, layout, adapted), is_fused, margin)
    count = micro_batches_of(config, layout)
    modes = modes_of_ranks(config.recompute, model.num_layers, layout)
    return None if modes is None else [planner.rank(rank, count, own) for rank, own in enumerate(modes)]


@dataclass(frozen=True)
class Forecast:
    """What a run takes of each device.

    Attributes:
        memory: of the rank that needs most, the allocator's margin included.
        seconds: of a step.
        tokens_per_second: of one device; of pairs the tokens of both answers count.
    """

    memory: RankMemory
    seconds: StepSeconds
    tokens_per_second: float

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "tokens_per_second_per_device": self.tokens_per_second,
            "step_seconds": vars(self.seconds) | {"total": self.seconds.total},
            "memory_bytes": vars(self.memory) | {"total": self.memory.total},
        }


def forecast(
    config: PretrainConfig, model: ModelConfig, layout: Layout, profile: HardwareProfile
) -> Forecast | None:
    """Return what a run takes on devices of a profile; `None` where a formula is missing.

    Raises:
        ConfigError: the devices do not have the run's format.
    """
    profile.peak_flops(config.precision.dtype_name)
    modes = modes_of_ranks(config.recompute, model.num_layers, layout)
    memory = planned_memory(config, model, layout, is_fused(profile), ALLOCATOR_MARGIN)
    if modes is None or memory is None:
        return None
    work = workload_of(config, model, layout)
    seconds = StepTimer(work, profile).step(micro_batches_of(config, layout), modes)
    sequences = config.batch.resolve_global_batch_size(layout.dp) * (2 if work.tuning.pairs else 1)
    rate = sequences * config.data.seq_length / seconds.total / layout.world_size
    return Forecast(max(memory, key=lambda one: one.total), seconds, rate)
