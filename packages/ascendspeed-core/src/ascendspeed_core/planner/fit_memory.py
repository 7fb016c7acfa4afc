"""Choose how much is recomputed so that a step fits a budget: `--checkpoint-policy auto`.

Each part of this rank's stages runs forwards and backwards once, and every tensor that comes into being is counted
from its making to its end. `planner.memory` puts a step together from these sizes. What a fused operator takes
for itself while it runs, and what an allocator leaves unused between tensors, is not seen. Experts are measured with
equal loads; a rank whose experts are chosen more often holds more.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.next_token import masked_sum
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.parallel.auxiliary_losses import attach_losses
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
from ascendspeed_core.parallel.recompute import recompute, recomputed
from ascendspeed_core.parallel.router_steps import balanced_routers, tried_routers
from ascendspeed_core.parallel.stages import hidden_shape, output_shape
from ascendspeed_core.parallel.timeline import Recorder
from ascendspeed_core.planner.memory import (
    PartMemory,
    PipelineAction,
    StageMemory,
    StepMemory,
    can_be_selective,
    first_plan_within,
    recompute_plans,
)
from ascendspeed_data.errors import ConfigError

GIB = 1 << 30
ACCELERATOR_SHARE = 0.9
"""Of an accelerator's memory, when no budget is given: the rest is for its libraries and for gaps between tensors."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made while it is on, as long as they exist.

    Attributes:
        now: bytes of those that exist.
        peak: most of them so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and note what it made."""
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                # Not made here, or noted already.
                self._known.setdefault(tensor.untyped_storage(), None)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = _CountedStorage(self, storage.nbytes())


class _CountedStorage:
    """The bytes of a storage; lives as long as the storage does."""

    def __init__(self, live: LiveBytes, size: int) -> None:
        self._live, self._size = live, size
        live.now += size
        live.peak = max(live.peak, live.now)

    def __del__(self) -> None:
        self._live.now -= self._size


def memory_budget(given_gib: float | None, device: Device) -> int:
    """Return the bytes that a step may take on each rank.

    Raises:
        ConfigError: no budget was given on a device whose memory is shared with everything else.
    """
    if given_gib is not None:
        return int(given_gib * GIB)
    whole = device.memory_bytes()
    if whole is None:
        raise ConfigError(
            f"checkpoint_policy=auto on {device.kind}, whose memory all processes of the machine share; give "
            "--memory-budget-gib, what the tensors of one rank may take"
        )
    return int(whole * ACCELERATOR_SHARE)


def full_step(
    sample: MicroBatch, sizes: Sequence[int], seq_length: int, mesh: ParallelMesh
) -> list[MicroBatch]:
    """Return micro-batches like a sample of the data, but as long as samples can be.

    Args:
        sample: a micro-batch of the largest size.
        sizes: of the micro-batches of a step.
        seq_length: S, of whole sequences.
        mesh: of this rank.
    """

    def stretched(name: str, part: torch.Tensor) -> torch.Tensor:
        if part.dim() == 1:
            return part
        # Attention sees the segments of whole sequences.
        length = seq_length if name == "segments" else seq_length // mesh.layout.cp
        return torch.nn.functional.pad(part, (0, length - part.shape[1]))

    parts = {name: stretched(name, part) for name, part in vars(sample).items() if part is not None}
    return [MicroBatch(**{name: part[:size] for name, part in parts.items()}) for size in sizes]


def fit_recompute(
    model: Transformer,
    engine: Engine,
    mesh: ParallelMesh,
    micro_batches: Sequence[MicroBatch],
    budget: int,
) -> list[str]:
    """Make layers drop as little as the budget allows, in place; all ranks call together.

    Args:
        model: this rank's stages, nothing recomputed yet.
        engine: of the model.
        mesh: of this rank.
        micro_batches: of a step, as large as they get.
        budget: bytes of each rank.

    Returns:
        Lines for the log.

    Raises:
        ConfigError: a step does not fit even with all layers recomputed.
    """
    memory = measure_step(model, engine, mesh, micro_batches)
    # Ranks of one stage send the same again, so they recompute the same; sizes differ a little between them.
    choices = recompute_plans(memory.num_layers, all(gather_objects(can_be_selective(memory), mesh)))
    chosen = first_plan_within(memory, choices, budget)
    least = memory.peak(choices[-1])
    found = gather_objects((mesh.pp_rank, chosen, least), mesh)
    worst = max(found, key=lambda one: one[2])
    if any(plan is None for _, plan, _ in found):
        raise ConfigError(
            f"memory_budget_gib={budget / GIB:.4g}: pipeline stage {worst[0]} needs {worst[2] / GIB:.4g} with all "
            "layers recomputed; give more, or a smaller --micro-batch-size, or more devices for tensor or pipeline "
            "parallelism or --use-distributed-optimizer"
        )
    agreed = max(plan for pp_rank, plan, _ in found if pp_rank == mesh.pp_rank)
    modes = choices[agreed]
    for layer, mode in zip(layers_of(model), modes, strict=True):
        recompute(layer, mode)
    balance = "" if model.config.experts is None else "; experts are taken to have equal loads"
    mine = (mesh.pp_rank, _describe_plan(modes), memory.peak(modes), memory.peak(choices[0]), memory.resident)
    return [
        f"recompute: pipeline stage {stage}: {text}; {planned / GIB:.4g} GiB planned at the peak of a step, "
        f"{whole / GIB:.4g} without recompute, {resident / GIB:.4g} of it weights, optimizer state and message buffers"
        f"{balance}"
        for stage, text, planned, whole, resident in sorted(set(gather_objects(mine, mesh)))
    ]


def _describe_plan(modes: Sequence[Mode]) -> str:
    full, selective = modes.count("full"), modes.count("selective")
    if not full and not selective:
        return f"nothing in {len(modes)} layers"
    return f"{full} layers whole, {selective} all but products and attention, of {len(modes)}"


def layers_of(model: Transformer) -> list[torch.nn.Module]:
    """Return the layers of all stages, in order."""
    return [model.layers[str(number)] for stage in model.stages for number in stage.layers]


def measure_step(
    model: Transformer, engine: Engine, mesh: ParallelMesh, micro_batches: Sequence[MicroBatch]
) -> StepMemory:
    """Measure what a step takes on this rank; gradients are dropped, weights stay as they are.

    Args:
        model: this rank's stages.
        engine: of the model.
        mesh: of this rank.
        micro_batches: of a step.
    """
    taken = engine.memory
    if taken is None:
        raise ConfigError(
            "checkpoint_policy=auto needs an engine that knows what its optimizer takes; leave DeepSpeed out, or "
            "choose another policy"
        )
    rows = [len(micro_batch.tokens) for micro_batch in micro_batches]
    largest = micro_batches[rows.index(max(rows))]
    with tried_routers(model), balanced_routers(model):
        stages = [_measure_stage(model, mesh, stage, largest) for stage in model.stages]
    actions = _pipeline_actions(model, mesh, micro_batches)
    engine.zero_grad()
    return StepMemory(
        stages=stages,
        actions=actions,
        sizes=[count / max(rows) for count in rows],
        resident=_model_bytes(model) + taken.state_bytes,
        update=taken.update_bytes,
        gathered=taken.gathered_bytes,
    )


def _measure_stage(model: Transformer, mesh: ParallelMesh, stage: Stage, batch: MicroBatch) -> StageMemory:
    dtype = next(model.parameters()).dtype
    hidden = torch.zeros(hidden_shape(batch.tokens, model, mesh), dtype=dtype, device=mesh.device.torch)

    def run(x: torch.Tensor | None, part: Stage) -> torch.Tensor:
        out, losses = model.run_stage(part, batch.input_for_loss, x)
        return attach_losses(out, losses, 1.0)

    def head(x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output = run(x, Stage(2, 3, range(0)))
        # A pipeline keeps what a stage gave until its backward.
        return masked_sum(model, output, batch, mesh), output if mesh.layout.pp > 1 else None

    def measure_layer(number: int) -> dict[Mode, PartMemory]:
        layer = model.layers[str(number)]
        found: dict[Mode, PartMemory] = {}
        modes: tuple[Mode, ...] = ("none", "selective", "full")
        for mode in modes:
            with recomputed(layer, mode):
                found[mode] = _measure(
                    lambda x: (run(x, Stage(1, 3, range(number, number + 1))), None),
                    hidden,
                    gradient_bytes([layer]),
                )
        return found

    # Layers of one model may differ; those of one kind are measured once.
    first_of_kind: dict[tuple[type, ...], int] = {}
    for number in stage.layers:
        first_of_kind.setdefault(_kind_of(model.layers[str(number)]), number)
    by_kind = {kind: measure_layer(number) for kind, number in first_of_kind.items()}
    # A layer that is computed again keeps what it gives, and the tables that all layers share.
    shared = next(iter(by_kind.values()))["full"].kept - hidden.nbytes
    by_kind = {kind: _without_shared(found, shared) for kind, found in by_kind.items()}
    kinds = [_kind_of(model.layers[str(number)]) for number in stage.layers]
    layers = by_kind[kinds[0]]
    others = {at: by_kind[kind] for at, kind in enumerate(kinds) if kind != kinds[0]}
    before = after = None
    # A tied weight has its gradient from the head, whose backward comes first.
    of_head = [m for m in (model.final_norm, model.output_head) if m is not None]
    if stage.is_first:
        of_embedding = [m for m in (model.embedding, model.embedding_norm) if m is not None]
        own = gradient_bytes([*of_head, *of_embedding]) - gradient_bytes(of_head)
        before = _measure(lambda _: (run(None, Stage(0, 3, range(0))), None), hidden, own)
    if stage.is_last:
        after = _measure(head, hidden, gradient_bytes(of_head))
    if mesh.layout.pp == 1:
        return StageMemory(layers, len(stage.layers), before, after, shared, others=others)
    inner, outer = (0 if is_end else hidden.nbytes for is_end in (stage.is_first, stage.is_last))
    return StageMemory(
        layers, len(stage.layers), before, after, shared,
        output=prod(output_shape(batch.tokens, model, mesh)) * hidden.itemsize if stage.is_last else outer,
        received=inner, gradient=outer,
        # With several stages on a rank torch keeps what it sent, hidden states and gradients, until the step ends.
        sent=inner + outer if len(model.stages) > 1 else 0,
        others=others,
    )  # fmt: skip


def _kind_of(layer: torch.nn.Module) -> tuple[type, ...]:
    """Return what layers have in common that take the same."""
    return type(layer.get_submodule("attention")), type(layer.get_submodule("mlp"))


def _without_shared(found: Mapping[Mode, PartMemory], shared: int) -> dict[Mode, PartMemory]:
    """Return what a layer alone takes, without what all layers share; no `selective` where it saves nothing."""
    own = {
        mode: replace(part, kept=part.kept - shared, forward=part.forward - shared)
        for mode, part in found.items()
    }
    if own["selective"].kept >= own["none"].kept:
        del own["selective"]
    return own


def _measure(
    run: Callable[[torch.Tensor], tuple[torch.Tensor, Any]], hidden: torch.Tensor, gradients: int
) -> PartMemory:
    """Run a part forwards and backwards twice, for in the first backward the gradients of its weights come to stay.

    Args:
        run: gives its result, and what is kept besides.
        hidden: what goes in.
        gradients: bytes of those of its weights.
    """
    x = hidden.detach().requires_grad_()
    for _ in range(2):
        x.grad = None
        with LiveBytes() as live:
            out, besides = run(x)
            kept, forward = live.now, live.peak
            live.peak = live.now
            if out.requires_grad:
                out.backward(torch.ones_like(out))
            backward = live.peak - kept
        del out, besides
    return PartMemory(kept, forward, backward, gradients)


def gradient_bytes(modules: Sequence[torch.nn.Module]) -> int:
    """Bytes of the gradients of some modules' weights: as wide as master weights, each weight once."""
    weights = {
        id(weight): weight for module in modules for weight in module.parameters() if weight.requires_grad
    }
    return sum(weight.numel() * max(weight.itemsize, 4) for weight in weights.values())


def _pipeline_actions(
    model: Transformer, mesh: ParallelMesh, micro_batches: Sequence[MicroBatch]
) -> list[PipelineAction]:
    """Return the order of forwards and backwards on this rank, by running a step with all layers recomputed."""
    if mesh.layout.pp == 1:
        return [
            PipelineAction(is_forward, 0, number)
            for number in range(len(micro_batches))
            for is_forward in (True, False)
        ]
    from ascendspeed_core.parallel.pipeline import run_pipeline

    recorder = Recorder(mesh.device.synchronize)
    with ExitStack() as stack:
        for layer in layers_of(model):
            stack.enter_context(recomputed(layer, "full"))
        run_pipeline(
            model,
            mesh,
            [micro_batch.input_for_loss for micro_batch in micro_batches],
            lambda number, output: masked_sum(model, output, micro_batches[number], mesh),
            recorder,
        )
    local_stage = {stage.index: number for number, stage in enumerate(model.stages)}
    return [
        PipelineAction(action.kind == "forward", local_stage[action.stage], action.micro_batch)
        for action in recorder.actions
    ]


def _model_bytes(model: Transformer) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
