"""What one training step holds in memory, and the least recompute that fits a budget; pure arithmetic, no torch.

A step is walked through in the order of its forwards and backwards: a forward leaves what its backward will need, the
first backward of a stage leaves gradients, a backward frees what its forward left. (Korthikanti et al., 2022, section
4.2, count the same by formula; here the sizes are measured, so that they hold for any model, kernel and layout.)

Layers are recomputed in turn, first `selective`, which costs little time, then `full`. The first layers of
a rank's first stage go first: their activations wait the longest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ascendspeed_core.config.recompute import Mode


@dataclass(frozen=True)
class PartMemory:
    """Bytes of a part of a stage, the embedding, a layer, or the head with its loss, for one micro-batch.

    Attributes:
        kept: from its forward to its backward, what it gives to the next part included.
        forward: most that its forward adds to what is there before.
        backward: most that its backward adds to what is there before, the gradient it is given included.
        gradients: of its weights, from its first backward to the update.
    """

    kept: int
    forward: int
    backward: int
    gradients: int = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one stage, for one micro-batch of the largest size.

    Attributes:
        layers: what a layer takes, by what of it is computed again; without `selective` where that is no choice.
        num_layers: how many of them.
        others: the same of layers that take other than the rest, by their number in the stage.
        before: the embedding, in the first stage.
        after: the head and the loss, in the last stage.
        attention_inputs: masks and rotary angles, kept while a micro-batch is between its forward and its backward.
        output: what a stage of a pipeline gives, which is kept to the end of its backward.
        received: what a stage of a pipeline is given by another, which is kept to the end of its backward.
        gradient: what a backward is given by another stage, which is kept to its end.
        sent: what is kept after the backward to the end of the step, because it was sent.
    """

    layers: Mapping[Mode, PartMemory]
    num_layers: int
    before: PartMemory | None = None
    after: PartMemory | None = None
    attention_inputs: int = 0
    output: int = 0
    received: int = 0
    gradient: int = 0
    sent: int = 0
    others: Mapping[int, Mapping[Mode, PartMemory]] = field(default_factory=dict)

    def parts(self, modes: Sequence[Mode]) -> list[PartMemory]:
        """Return all parts in the order of the forward, for a mode of each layer."""
        layers = [self.others.get(number, self.layers)[mode] for number, mode in enumerate(modes)]
        return [part for part in (self.before, *layers, self.after) if part is not None]


@dataclass(frozen=True)
class PipelineAction:
    """One forward or backward of a step.

    Attributes:
        is_forward: which.
        stage: of which of the rank's stages, counted from its first.
        micro_batch: for which micro-batch.
    """

    is_forward: bool
    stage: int
    micro_batch: int


@dataclass(frozen=True)
class StepMemory:
    """What decides how much memory a rank needs in a step.

    Attributes:
        stages: of the rank.
        actions: its forwards and backwards, in order.
        sizes: of the micro-batches, as shares of the largest one.
        resident: bytes that are always there: weights, optimizer state.
        update: most that reducing and applying the gradients takes besides, the gradients included.
        gathered: of messages with new parameters, which the first forward of each stage uses up.
        left: of micro-batches before those of `actions`: what their stages sent and torch keeps.
    """

    stages: Sequence[StageMemory]
    actions: Sequence[PipelineAction]
    sizes: Sequence[float]
    resident: int
    update: int
    gathered: int = 0
    left: int = 0

    @property
    def num_layers(self) -> int:
        """Layers of all stages."""
        return sum(stage.num_layers for stage in self.stages)

    def peak(self, modes: Sequence[Mode]) -> int:
        """Return the most bytes of a step, for a mode of each layer, stage after stage."""
        return max(self.walked(modes), self.resident + self.update)

    def walked(self, modes: Sequence[Mode]) -> int:
        """Return the most bytes of its forwards and backwards."""
        by_stage, start = [], 0
        for stage in self.stages:
            by_stage.append(stage.parts(modes[start : start + stage.num_layers]))
            start += stage.num_layers
        held = most = float(self.resident + self.left)
        started: set[int] = set()
        waiting = [self.gathered * len(parts) / sum(map(len, by_stage)) for parts in by_stage]
        for action in self.actions:
            stage, parts, share = (
                self.stages[action.stage],
                by_stage[action.stage],
                self.sizes[action.micro_batch],
            )
            if action.is_forward:
                held += (stage.attention_inputs + stage.received) * share
                for part in parts:
                    most = max(most, held + part.forward * share + sum(waiting))
                    held += part.kept * share
                    waiting[action.stage] = max(
                        waiting[action.stage] - self.gathered / sum(map(len, by_stage)), 0.0
                    )
                continue
            for number in reversed(range(len(parts))):
                part = parts[number]
                # What the last part gives stays to the end; its backward counts the gradient that it is given.
                is_last = number == len(parts) - 1
                output, given = (stage.output, 0) if is_last else (0, stage.gradient)
                # Gradients of weights do not shrink with the micro-batch, so `backward` is not scaled.
                most = max(most, held + part.backward + given * share)
                held -= (part.kept - output) * share
                held += 0 if action.stage in started else part.gradients
            started.add(action.stage)
            held += (stage.sent - stage.output - stage.attention_inputs - stage.received) * share
        return int(most)


def recompute_plans(num_layers: int, can_be_selective: bool) -> list[tuple[Mode, ...]]:
    """Return modes of all layers, from no recompute to all of it.

    Args:
        num_layers: of a rank.
        can_be_selective: whether `selective` is a choice.
    """
    none: Mode = "none"
    selective: Mode = "selective"
    full: Mode = "full"

    def steps(heavy: Mode, light: Mode) -> list[tuple[Mode, ...]]:
        return [(heavy,) * count + (light,) * (num_layers - count) for count in range(1, num_layers + 1)]

    nothing = [(none,) * num_layers]
    if not can_be_selective:
        return nothing + steps(full, none)
    return nothing + steps(selective, none) + steps(full, selective)


def first_plan_within(memory: StepMemory, choices: Sequence[tuple[Mode, ...]], budget: int) -> int | None:
    """Return the index of the first plan that fits.

    Args:
        memory: of the rank.
        choices: of `recompute_plans`.
        budget: bytes that a step may take.

    Returns:
        The index; `None` when not even the last one fits.
    """
    return next((index for index, modes in enumerate(choices) if memory.peak(modes) <= budget), None)


def can_be_selective(memory: StepMemory) -> bool:
    """Whether `selective` is a choice for all layers."""
    kinds = (kind for stage in memory.stages for kind in (stage.layers, *stage.others.values()))
    return all("selective" in kind for kind in kinds)
