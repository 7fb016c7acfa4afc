"""Cases that worker processes run: train a tiny model under a layout and report everything about it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.build import apply_kernels, load_model, parameter_slices
from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.layout import Layout, Stage
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import Slice, tensor_sharding
from ascendspeed_core.config.training import ComputeConfig, DropoutConfig, LossScaleConfig, RecomputeConfig
from ascendspeed_core.data.documents import document_positions
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.registry import KernelContext
from ascendspeed_core.models.transformer import ModelInput, ModelOutput
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.objectives.objective import ObjectiveLoss
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.cross_entropy import cross_entropy
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.parallel.router_steps import train_routers
from ascendspeed_core.training.step import forward_backward, train_step
from ascendspeed_core.weights import InitialWeights, WeightSource

SAMPLES, LENGTH = 16, 24


@dataclass(frozen=True)
class Trained:
    """What a layout computed."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    auxiliary_losses: list[dict[str, float]] = field(default_factory=list)


END_OF_DOCUMENT = 7


def micro_batches(
    vocab_size: int,
    step: int,
    mesh: ParallelMesh,
    size: int | Sequence[int],
    masked: bool,
    documents: bool = False,
) -> list[MicroBatch]:
    """This rank's share, in micro-batches of one size or of several, of a global batch that depends on the step.

    With `documents` each row holds several of random lengths, between which attention does not look.
    """
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab_size, (SAMPLES, LENGTH + 1), generator=generator)
    if documents:
        ids = torch.where(ids % 8 == 0, END_OF_DOCUMENT, ids)
    positions, segments = document_positions(ids[:, :-1], END_OF_DOCUMENT)
    mask = torch.ones(SAMPLES, LENGTH)
    if masked:
        # Rows differ in how many tokens count, one counts none: a mean per micro-batch would be wrong.
        for row in range(SAMPLES):
            mask[row, (row * 5) % LENGTH :] = 0
    sizes = [size] * (SAMPLES // (size * mesh.layout.dp)) if isinstance(size, int) else size
    starts = [sum(sizes[:number]) * mesh.layout.dp + mesh.dp_rank * own for number, own in enumerate(sizes)]
    rows = [slice(start, start + own) for start, own in zip(starts, sizes, strict=True)]
    numbers = torch.arange(SAMPLES) + step * SAMPLES
    batches = [
        MicroBatch(
            ids[r, :-1],
            ids[r, 1:],
            mask[r],
            positions[r] if documents else None,
            segments[r] if documents else None,
            numbers[r],
        )
        for r in rows
    ]
    return [batch.part_of_sequence(mesh) for batch in batches]


TensorShard = tuple[Slice, torch.Tensor]
"""A part of a tensor, and which part it is."""


def join(pieces: list[TensorShard], add_copies: bool = False) -> torch.Tensor:
    """Put a tensor together; copies of a part must be equal, or are added up."""
    result = torch.zeros(pieces[0][0].shape, dtype=pieces[0][1].dtype)
    seen = torch.zeros(pieces[0][0].shape, dtype=torch.bool)
    for place, piece in pieces:
        here = seen[place.index]
        if add_copies:
            result[place.index] += piece
        else:
            assert torch.equal(result[place.index][here], piece[here]), "copies differ"
            result[place.index] = piece
        seen[place.index] = True
    assert seen.all(), "a part is missing"
    return result


def whole(
    part: torch.Tensor, place: Slice, group: dist.ProcessGroup | None, add_copies: bool = False
) -> torch.Tensor:
    """The whole of a tensor whose parts are in a group, on every rank."""
    mine = (place, part.detach().clone())
    shared: list[Any] = [mine]
    if group is not None:
        shared = [None] * dist.get_world_size(group)
        dist.all_gather_object(shared, mine, group=group)
    return join(shared, add_copies)


def train(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    steps: int = 10,
    micro_batch_size: int | Sequence[int] = 4,
    masked: bool = True,
    joined: bool = False,
    recompute: RecomputeConfig | None = None,
    compute: ComputeConfig | None = None,
    dropout: DropoutConfig | None = None,
    lora: LoraConfig | None = None,
    experts: ExpertsConfig | None = None,
    scale: float = 1.0,
    documents: bool = False,
    **optimizer_options: Any,
) -> Trained:
    """Train from seeded weights and return losses, norms, first-step gradients and final weights."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    source: WeightSource = InitialWeights(config, seed=5)
    if lora is not None:
        from core.finetune_cases import used_adapters

        source = used_adapters(source, lora)
    model = load_model(source, mesh, getattr(torch, dtype_name), joined)
    dropout = dropout or DropoutConfig()
    apply_kernels(
        model,
        compute or ComputeConfig(),
        KernelContext(tp=layout.tp, drops_attention=dropout.attention_dropout > 0),
    )
    train_routers(model, experts or ExpertsConfig())
    apply_dropout(model, dropout, 1234, mesh)
    apply_recompute(model, recompute or RecomputeConfig(), mesh.pp_rank)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}
    batches = micro_batches(config.vocab_size, 0, mesh, micro_batch_size, masked, documents)
    gradients = first_gradients(model, batches, mesh, scale=scale)
    engine = NativeEngine(model, OptimizerConfig(**(options | optimizer_options)), mesh)
    losses, norms, auxiliary = [], [], []
    loss_scale = LossScale.create(LossScaleConfig(loss_scale=scale), is_fp16=scale != 1.0)
    for step in range(steps):
        batches = micro_batches(config.vocab_size, step, mesh, micro_batch_size, masked, documents)
        result = train_step(model, engine, batches, mesh, loss_scale)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        auxiliary.append(result.auxiliary_losses)
    slices = parameter_slices(model, mesh)
    weights = {name: whole(p, slices[name], sharing(name, mesh)) for name, p in model.named_parameters()}
    return Trained(losses, norms, gradients, weights, auxiliary)


class PlainPasses:
    """Gradients as torch makes them: an optimizer would keep those of 16-bit weights to itself."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def forward_backward(self, inputs: Any, share: Any, scale: float, auxiliary_scale: float) -> None:
        """Leave the order of micro-batches to the trainer."""

    def forward(self, given: ModelInput) -> ModelOutput:
        output: ModelOutput = self._model(given)
        return output

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        (loss * scale).backward()

    def begin_last_backward(self, *stages: Stage) -> None:
        """Wait: `first_gradients` adds up over all devices at the end."""

    def end_last_backward(self, *stages: Stage) -> None:
        """Wait, as above."""


def sharing(name: str, mesh: ParallelMesh) -> dist.ProcessGroup | None:
    """The ranks that have the parts of a tensor."""
    return mesh.group(tensor_sharding(name).axis)


def first_gradients(
    model: Any,
    batches: list[MicroBatch],
    mesh: ParallelMesh,
    objective: ObjectiveLoss | None = None,
    scale: float = 1.0,
) -> dict[str, torch.Tensor]:
    """This stage's gradients of the first step, whole and added up over dp and cp, without an update."""
    count, loss_of = (objective or NextTokenLoss(model, mesh)).prepare(batches)
    passes: Any = PlainPasses(model)
    forward_backward(model, passes, batches, mesh, count, loss_of, scale)
    sums, slices = {}, parameter_slices(model, mesh)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None
            continue
        place = slices[name]
        gradient = whole(
            parameter.grad / scale, place, sharing(name, mesh), add_copies=place.has_partial_gradient
        )
        sums[name] = mesh.sum_over(place.replica_axes, gradient.double())
        parameter.grad = None
    return sums


def join_stages(ranks: list[Trained], layout: Layout) -> Trained:
    """Put together what the devices of one pipeline reported; a tied weight's gradient has two parts."""
    per_stage = layout.tp * layout.replicas
    stages = [ranks[number * per_stage : (number + 1) * per_stage] for number in range(layout.pp)]
    gradients: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    for stage in stages:
        # Each device has its own experts, and all the rest.
        of_stage: dict[str, torch.Tensor] = {}
        for rank in stage:
            of_stage |= {name: part for name, part in rank.gradients.items() if name not in of_stage}
            for name, weight in rank.weights.items():
                assert torch.equal(weights.setdefault(name, weight), weight), f"copies of {name} differ"
        for name, gradient in of_stage.items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    first = ranks[0]
    return Trained(first.losses, first.norms, gradients, weights, first.auxiliary_losses)


def vocabulary_cross_entropy(vocab_size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Our loss and gradient, and megatron-core's, on the same cut logits: ([loss, gradient], [loss, gradient])."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    world = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    try:
        mesh = ParallelMesh.create(Device("cpu"), Layout(tp=world))
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(4, 7, vocab_size, generator=generator) * 4
        targets = torch.randint(0, vocab_size, (4, 7), generator=generator)
        weights = torch.rand(4, 7, generator=generator)
        mine = logits.chunk(world, dim=-1)[rank]
        ours = mine.clone().requires_grad_()
        loss = cross_entropy(ours, targets, vocab_size, mesh.group("tp"))
        (loss * weights).sum().backward()
        theirs = mine.clone().requires_grad_()
        # megatron-core works in place on what it is given.
        their_loss = vocab_parallel_cross_entropy(theirs * 1.0, targets)
        (their_loss * weights).sum().backward()
        assert ours.grad is not None
        assert theirs.grad is not None
        return [loss.detach(), ours.grad], [their_loss.detach(), theirs.grad]
    finally:
        parallel_state.destroy_model_parallel()
