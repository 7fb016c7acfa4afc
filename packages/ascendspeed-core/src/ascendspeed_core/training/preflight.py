"""What a run needs of its machine, and a list of all that is wrong rather than of the first problem only.

What a rank holds in any case, weights, gradients and optimizer state, is counted tensor by tensor: a run whose share is
more than the memory there is cannot fit. Activations and messages come on top by the planner's formulas.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ParamSpec, TypeVar

from ascendspeed_core.config.layout import Layout, Stage, stages_of_ranks
from ascendspeed_core.config.sharding import tensor_sharding, tensor_slice
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.device import Device
from ascendspeed_core.launch import announce
from ascendspeed_core.planner.forecast import planned_memory
from ascendspeed_core.weights import WeightSource
from ascendspeed_core.weights.adapters.lora import AdaptedWeights
from ascendspeed_data.errors import AscendSpeedError, ConfigError

GIB = 1 << 30
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_MOMENTS = {"adam": 2, "fused_adam": 2, "sgd": 1}

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


class SeveralProblemsError(ConfigError):
    """A run has several problems; the message lists them."""


class Problems:
    """The problems of a run, gathered from checks that do not need each other."""

    def __init__(self) -> None:
        self.found: list[AscendSpeedError] = []

    def value(
        self, check: Callable[Arguments, Value], *args: Arguments.args, **options: Arguments.kwargs
    ) -> Value | None:
        """Return what a check returns, or `None` and keep its error."""
        try:
            return check(*args, **options)
        except AscendSpeedError as error:
            if str(error) not in map(str, self.found):
                self.found.append(error)
            return None

    def raise_found(self) -> None:
        """Raise what was found: one error as it is, several as one line.

        Raises:
            AscendSpeedError: there is a problem.
        """
        if not self.found:
            return
        if len(self.found) == 1:
            raise self.found[0]
        raise SeveralProblemsError("; also: ".join(map(str, self.found)))


def check_space(config: PretrainConfig, source: WeightSource) -> None:
    """Refuse a run whose checkpoints cannot be written where --save lies; say so where not all of them can.

    Raises:
        AscendSpeedError: not even one fits.
    """
    folder = config.checkpoint.save
    if folder is None:
        return
    there = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))
    free, one = shutil.disk_usage(there).free, checkpoint_bytes(config, source)
    if one > free:
        raise AscendSpeedError(
            f"save={folder}: a checkpoint of this run takes {one / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB "
            "free; free some, or choose another folder"
        )
    kept = checkpoints_at_once(config)
    if kept * one > free:
        announce(
            f"save: the {kept} checkpoints of this run take {kept * one / 1e9:.1f} GB, and {there} has "
            f"{free / 1e9:.1f} GB free; --keep-checkpoints N deletes older ones"
        )


def checkpoints_at_once(config: PretrainConfig) -> int:
    """Return how many checkpoints a run has on the disk at once, the one that is being written included."""
    interval, steps = config.checkpoint.save_interval, config.training.train_iters
    written = 1 if interval is None else max(-(-steps // interval), 1)
    limit = config.checkpoint.keep_checkpoints
    return written if limit is None else min(written, limit + 1)


def checkpoint_bytes(config: PretrainConfig, source: WeightSource) -> int:
    """Return the bytes of one checkpoint: weights, or adapters and their copy for peft, with the optimizer's state."""
    size = _BYTES[config.precision.dtype_name]
    master = 4 if size == 2 else 0
    state = max(size, 4) * _MOMENTS[config.optimizer.optimizer]
    trained = sum(elements for _, elements, is_trained in _tensors(source) if is_trained)
    copies = 1 if source.adapters is None else 2
    return trained * (copies * size + master + state)


def resident_bytes(config: PretrainConfig, source: WeightSource, layout: Layout) -> list[int]:
    """Return the bytes of weights, gradients and optimizer state of each pipeline rank.

    Args:
        config: of the run.
        source: the model's weights, adapters included.
        layout: of all ranks.
    """
    size = _BYTES[config.precision.dtype_name]
    wide = max(size, 4)
    state = wide * _MOMENTS[config.optimizer.optimizer] + (wide if size == 2 else 0)
    zero = layout.zero_stage or 0
    model = source.config
    stages = stages_of_ranks(model.num_layers, layout)
    by_rank = [0.0] * len(stages)
    experts = model.experts.count // layout.ep if model.experts is not None else 0
    reference = getattr(config, "objective", "") == "dpo" and not isinstance(source, AdaptedWeights)
    expert_replicas = max(layout.dp * layout.cp * layout.tp // (layout.ep * layout.expert_tp), 1)
    for (name, _, is_trained), info in zip(_tensors(source), source.tensors().values(), strict=True):
        parts = name.split(".")
        is_expert = tensor_sharding(name).axis == "etp"
        if is_expert and int(parts[parts.index("experts") + 1]) >= experts:
            continue
        held = prod(tensor_slice(name, info.shape, model, layout, 0, etp_rank=0).sizes)
        replicas = expert_replicas if is_expert else layout.dp * layout.cp
        cut = replicas if layout.sharded_optimizer or zero else 1
        bytes_of_one = size / (replicas if zero == 3 else 1) + reference * size
        if is_trained:
            bytes_of_one += wide / (replicas if zero >= 2 else 1) + state / cut
        for rank, own in enumerate(stages):
            if _is_in(parts, own, model.tie_word_embeddings):
                by_rank[rank] += held * bytes_of_one
    return list(map(int, by_rank))


def _is_in(parts: list[str], stages: Sequence[Stage], tied: bool) -> bool:
    """Whether a tensor lies in one of the stages of a rank."""
    if parts[0] == "layers":
        return any(int(parts[1]) in stage.layers for stage in stages)
    at_begin = parts[0] in ("embedding", "embedding_norm")
    at_end = parts[0] in ("final_norm", "output_head") or (tied and parts[0] == "embedding")
    return any((at_begin and stage.is_first) or (at_end and stage.is_last) for stage in stages)


def _tensors(source: WeightSource) -> list[tuple[str, int, bool]]:
    """Return name, number of elements, and whether it is trained, of each tensor."""
    adapters = source.adapters
    return [
        (name, prod(info.shape), adapters is None or adapters.is_trained(name))
        for name, info in source.tensors().items()
    ]


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a step of a run needs.

    Attributes:
        held: of each pipeline rank: weights, gradients, optimizer state.
        beside: of each pipeline rank: activations and messages, as planned; `None` where no formula is known.
        ranks: processes of each of these pipeline ranks.
    """

    held: list[int]
    beside: list[int] | None
    ranks: int

    def largest(self) -> int:
        """Bytes of the rank that needs most."""
        return max(map(sum, zip(self.held, self.beside or [0] * len(self.held), strict=True)))

    def __str__(self) -> str:
        held = f"weights, gradients and optimizer state take {max(self.held) / GIB:.2f} GiB on each rank"
        if self.beside is None:
            return f"{held}, activations not counted"
        return f"{held}, with activations and messages {self.largest() / GIB:.2f}"


def memory_need(config: PretrainConfig, source: WeightSource, layout: Layout, device: Device) -> MemoryNeed:
    """Return what the ranks of a run need.

    Args:
        config: of the run.
        source: the model's weights, adapters included.
        layout: of all ranks.
        device: that they run on; an accelerator has fused operators, which keep less. A CPU has them with a compiler
            only, and is planned without.
    """
    held = resident_bytes(config, source, layout)
    planned = planned_memory(
        config, source.config, layout, is_fused=device.memory_bytes() is not None,
        adapted=None if source.adapters is None else source.adapters.layers,
    )  # fmt: skip
    if planned is None:
        return MemoryNeed(held, None, layout.world_size // layout.pp)
    # DeepSpeed holds more than tensors tell, which the plan knows; trained embeddings are known to the tensors alone.
    beside = [
        max(one.total - own, one.activations + one.messages) for one, own in zip(planned, held, strict=True)
    ]
    return MemoryNeed(held, beside, layout.world_size // layout.pp)


def check_memory(
    config: PretrainConfig, source: WeightSource, layout: Layout, device: Device, trusts_plan: bool = False
) -> MemoryNeed:
    """Refuse a run whose weights, gradients and optimizer state alone are more than the memory that is there.

    Activations are planned, not known; where they do not fit a line of the log says so, or an error if it is to.

    Args:
        config: of the run.
        source: the model's weights.
        layout: of all ranks.
        device: of this process.
        trusts_plan: refuse what does not fit as planned.

    Returns:
        What the run needs.

    Raises:
        ConfigError: it does not fit.
    """
    need = memory_need(config, source, layout, device)
    whole = device.memory_bytes()
    here, where = 1.0, f"a device has {(whole or 0) / GIB:.1f}"
    held, largest = max(need.held), need.largest()
    if whole is None:
        # All ranks of a machine share its memory.
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", str(layout.world_size)))
        here = need.ranks * ranks / layout.world_size
        held, largest = sum(need.held), sum(need.held) + sum(need.beside or [])
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        several = "its one process" if ranks == 1 else f"its {ranks} processes"
        where = f"this machine has {whole / GIB:.1f} for {several}"
    if held * here > whole:
        raise ConfigError(
            f"weights, gradients and optimizer state take {max(need.held) / GIB:.1f} GiB on each rank, and {where}; "
            "take more devices for tensor or pipeline parallelism, --use-distributed-optimizer, or "
            "--lora-target-modules"
        )
    if largest * here > whole:
        line = (
            f"activations and messages of a step bring a rank from {max(need.held) / GIB:.1f} to "
            f"{need.largest() / GIB:.1f} GiB as planned, and {where}; take --checkpoint-activations, a smaller "
            "--micro-batch-size, --seq-length, or more devices (`asd-core plan` compares them)"
        )
        if trusts_plan:
            raise ConfigError(line)
        announce(f"warning: this run may run out of memory: {line}")
    return need
