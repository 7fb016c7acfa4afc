"""Memory of each rank in a step, by formula: weights, optimizer, gradients, activations, messages. No torch.

The parts come from `planner.activations`, the walk through a step from `planner.memory`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ascendspeed_core.config.layout import SPLIT_BACKWARD_SCHEDULES, Stage, stages_of_ranks
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.planner.activations import ActivationBytes
from ascendspeed_core.planner.hardware import FORMAT_BYTES
from ascendspeed_core.planner.memory import PartMemory, PipelineAction, StageMemory, StepMemory
from ascendspeed_core.planner.pipeline_order import PipelineWork, order_of_rank
from ascendspeed_core.planner.workload import Workload

ALLOCATOR_MARGIN = 0.08
"""Of what tensors take: gaps that torch's caching allocator leaves between blocks of other sizes, workspaces of
libraries, and the buffers of collectives. Stated, not measured."""

BETWEEN_BACKWARDS = 0.2
"""Of activations, under schedules that take input and weight gradients apart: gradients of the results of products stay
until the latter are computed. Without it the formula is up to 16 % too low there (counted in real steps)."""

FIXED_BYTES = 1 << 30
"""Of an accelerator's memory: its context and its libraries."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank at the peak of a step.

    Attributes:
        weights: that the model computes with.
        optimizer: master weights and moments.
        gradients: of all weights of the rank.
        activations: what micro-batches keep, hidden states from other stages included, with the largest transient.
        messages: of gradients on their way, as far as they take more than activations leave.
        margin: of the allocator.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    messages: int
    margin: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(vars(self).values())


class MemoryPlanner:
    """Plans the memory of ranks for one workload.

    Args:
        work: a micro-batch under its layout.
        is_fused: see `ActivationBytes`.
        margin: share for the allocator.
    """

    def __init__(self, work: Workload, is_fused: bool, margin: float = ALLOCATOR_MARGIN) -> None:
        self.work, self._margin = work, margin
        self._activations = ActivationBytes(work, is_fused)
        self._held = stages_of_ranks(work.model.num_layers, work.layout)
        self._layers: dict[tuple[int, Mode], PartMemory] = {}
        self._kinds: dict[tuple[bool, bool], int] = {}
        self._steps: dict[tuple[int, int], StepMemory] = {}

    def ranks(self) -> Sequence[int]:
        """Return the pipeline ranks that can have the peak: the first two, and the last."""
        last = len(self._held) - 1
        return sorted({0, min(1, last), last})

    def worst(self, micro_batches: int, mode: Mode) -> tuple[int, RankMemory]:
        """Return the pipeline rank that needs most, and what it needs, with one mode of all layers."""
        found = [(self.rank(rank, micro_batches, mode), rank) for rank in self.ranks()]
        memory, rank = max(found, key=lambda one: one[0].total)
        return rank, memory

    def least(self) -> float:
        """Return bytes that the first rank needs whatever is recomputed: weights, optimizer state, gradients."""
        trained, of_experts = self._trained(0)
        return self._weights(0) + self._state(trained, of_experts) + self._gradients(trained)

    def rank(self, rank: int, micro_batches: int, mode: Mode | Sequence[Mode]) -> RankMemory:
        """Return what a pipeline rank needs, with one mode of all its layers, or one of each."""
        if (rank, micro_batches) not in self._steps:
            self._steps[rank, micro_batches] = self.step(rank, micro_batches)
        step = self._steps[rank, micro_batches]
        modes: Sequence[Mode] = (mode,) * step.num_layers if isinstance(mode, str) else mode
        peak = step.walked(modes)
        trained, of_experts = self._trained(rank)
        width = FORMAT_BYTES[self.work.dtype]
        zero = self.work.layout.zero_stage or 0
        weights = self._weights(rank)
        state = self._state(trained, of_experts)
        gradients = self._gradients(trained)
        activations = max(peak - step.resident - gradients, 0)
        if self.work.layout.schedule in SPLIT_BACKWARD_SCHEDULES:
            waiting = BETWEEN_BACKWARDS * max(activations - step.left, 0)
            activations, peak = activations + waiting, peak + int(waiting)
        if zero:
            # What was counted for gradients of this rank is DeepSpeed's own, see `_gradients`.
            walked = peak - self._kept_gradients(trained) + gradients
            if zero == 3:
                # The weights of a layer and of the head are there whole while they compute.
                whole = self.work.layer(0).parameters + self.work.head().parameters
                walked += whole * width
            peak = int(max(walked, step.resident + self._zero_update(trained)))
            activations = max(peak - step.resident - int(gradients), 0)
        messages = max(step.update - gradients - activations, 0) if not zero else 0
        peak = max(peak, step.resident + step.update)
        return RankMemory(
            weights=int(weights),
            optimizer=int(state),
            gradients=int(gradients),
            activations=int(activations),
            messages=int(messages),
            margin=int(self._margin * peak),
        )

    def _weights(self, rank: int) -> float:
        """Return bytes of the weights of a rank, those of a reference included, which stay whole."""
        parameters, _ = self.work.parameters(self._held[rank])
        layout, copies = self.work.layout, int(self.work.tuning.has_reference_copy)
        each = 1 / layout.dp if layout.zero_stage == 3 else 1
        return parameters * FORMAT_BYTES[self.work.dtype] * (each + copies)

    def _kept_gradients(self, parameters: float) -> float:
        return parameters * max(FORMAT_BYTES[self.work.dtype], 4)

    def _gradients(self, parameters: float) -> float:
        """Return bytes of gradients: as wide as master weights.

        DeepSpeed has them in the model's format; of stage 1 in bf16 it adds them up in fp32 besides, from stage 2 on it
        keeps a share, and in 16 bits another one on its way (counted in real steps, `tests/core/test_plan_memory.py`).
        """
        layout, width = self.work.layout, FORMAT_BYTES[self.work.dtype]
        if not layout.zero_stage:
            return self._kept_gradients(parameters)
        if layout.zero_stage == 1:
            return parameters * (width if width > 2 else width + 4)
        return parameters * (width if width > 2 else 2 * width) / layout.dp

    def _trained(self, rank: int) -> tuple[float, float]:
        return self.work.trained(self._held[rank])

    def _zero_update(self, parameters: float) -> float:
        """Return bytes that DeepSpeed's update takes, its gradients included; counted like them."""
        layout, width = self.work.layout, FORMAT_BYTES[self.work.dtype]
        share = parameters / layout.dp
        if layout.zero_stage == 1:
            return 10 * parameters if width == 2 else width * (parameters + share)
        copies = 3 if layout.zero_stage == 2 else 2
        return 6 * share if width == 2 else copies * width * share

    def _state(self, parameters: float, of_experts: float) -> float:
        """Return bytes of two moments and, of a narrow format, master weights; sharded ones over the replicas."""
        layout, width = self.work.layout, FORMAT_BYTES[self.work.dtype]
        each = 2 * max(width, 4) + (4 if width == 2 else 0)
        if layout.zero_stage:
            # DeepSpeed's master weights are a copy in any format.
            return parameters * (3 * max(width, 4)) / layout.dp
        if not layout.sharded_optimizer:
            return parameters * each
        of_each = layout.tp * layout.cp * layout.dp // (layout.ep * layout.expert_tp)
        return each * ((parameters - of_experts) / (layout.dp * layout.cp) + of_experts / of_each)

    def _kind(self, number: int) -> int:
        """Return the first layer that was seen of the kind of one."""
        kind = (self.work.model.has_experts(number), self.work.model.has_window(number))
        return self._kinds.setdefault(kind, number)

    def _layer(self, first: int, mode: Mode) -> PartMemory:
        key = (first, mode)
        if key not in self._layers:
            part = self._activations.layer(first, mode)
            if mode == "none" and self._activations.copies_wide and self.work.layout.pp == 1:
                # The next norm copies what the layer gives, which then goes.
                part = replace(part, kept=part.kept - int(self.work.sent_bytes))
            self._layers[key] = part
        return self._layers[key]

    def _stage(self, stage: Stage, own_stages: Sequence[Stage], is_shared: bool) -> StageMemory:
        modes: tuple[Mode, ...] = ("none", "selective", "full")
        kinds = [self._kind(number) for number in stage.layers]
        by_kind = {kind: {mode: self._layer(kind, mode) for mode in modes} for kind in set(kinds)}
        own = [by_kind[kind] for kind in kinds]
        before = self._activations.embedding() if stage.is_first else None
        if before is not None and is_shared:
            before = PartMemory(before.kept, before.forward, before.backward, 0)
        after = self._activations.head() if stage.is_last else None
        others = {number: parts for number, parts in enumerate(own) if parts is not own[0]}
        inputs = int(self._activations.attention_inputs)
        if self.work.layout.pp == 1:
            return StageMemory(own[0], len(own), before, after, inputs, others=others)
        hidden = int(self.work.sent_bytes)
        inner, outer = (0 if is_end else hidden for is_end in (stage.is_first, stage.is_last))
        logits = int(self.work.tokens * self.work.vocabulary * FORMAT_BYTES[self.work.dtype])
        output = (hidden if self.work.head().hidden_loss else logits) if stage.is_last else outer
        mine = {one.index for one in own_stages}
        # With several stages on a rank torch keeps what it sent until the step ends; neighbours on a rank send nothing.
        sent = inner * (stage.index - 1 not in mine) + outer * (stage.index + 1 not in mine)
        return StageMemory(
            own[0], len(own), before, after, inputs, output=output, received=inner, gradient=outer,
            sent=sent if len(mine) > 1 else 0, others=others,
        )  # fmt: skip

    def step(self, rank: int, micro_batches: int) -> StepMemory:
        """Return what decides the memory of a pipeline rank."""
        layout, width = self.work.layout, FORMAT_BYTES[self.work.dtype]
        stages = self._held[rank]
        per_rank = len(stages)
        # Memory repeats once the pipeline is full; GPipe and breadth-first keep every micro-batch.
        keeps_all = layout.schedule in ("gpipe", "looped-bfs")
        walked = micro_batches
        if not keeps_all:
            walked = min(micro_batches, layout.pp + 1 if layout.schedule == "1f1b" else 2 * layout.pp)
        order = order_of_rank(layout, per_rank, max(walked, 1), rank)
        local = {stage.index: number for number, stage in enumerate(stages)}
        trained, of_experts = self._trained(rank)
        shared = self.work.shares_embedding(stages)
        gathered = 0.0
        if layout.sharded_optimizer and layout.overlap_param_gather and layout.dp * layout.cp > 1:
            gathered = trained * width
        held = [self._stage(stage, stages, shared) for stage in stages]
        return StepMemory(
            stages=held,
            actions=[
                PipelineAction(work.kind == "forward", local[work.stage], work.micro_batch)
                for work in order
                if _frees_or_keeps(work, layout.schedule in SPLIT_BACKWARD_SCHEDULES)
            ],
            sizes=[1.0] * max(walked, 1),
            resident=int(self._weights(rank) + self._state(trained, of_experts)),
            update=int(self._update(trained, of_experts)),
            gathered=int(gathered),
            left=(micro_batches - walked) * sum(stage.sent for stage in held),
        )

    def _update(self, parameters: float, of_experts: float) -> float:
        """Return bytes of summing and applying gradients: themselves, and messages that are made beside them."""
        layout, width = self.work.layout, max(FORMAT_BYTES[self.work.dtype], 4)
        gradients = parameters * width
        if layout.zero_stage:
            return 0.0
        summed = parameters if layout.dp * layout.cp // layout.ep > 1 else parameters - of_experts
        if layout.dp * layout.cp == 1:
            return gradients
        # A bucket may exceed its size by its last parameter; the messages of experts are others.
        largest = self.work.vocabulary * self.work.model.hidden_size
        bucket = min(max(summed - of_experts, of_experts), layout.bucket_elements + largest)
        if not layout.sharded_optimizer:
            return gradients + bucket * width
        if not self._activations.is_fused:
            # Under gloo the parts of all ranks arrive, and are added up.
            return gradients + summed * width
        return gradients + (bucket + summed / (layout.dp * layout.cp)) * width


def _frees_or_keeps(work: PipelineWork, is_split: bool) -> bool:
    """Whether a piece of work changes what is kept: under a split backward the gradient of the weights frees it."""
    return work.kind != "input gradient" or not is_split
