"""Time the pipeline of a model on random tokens: for pictures, and to choose sizes of micro-batches."""

from collections.abc import Callable, Sequence

import torch

from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.parallel.collectives import unnoted
from ascendspeed_core.parallel.cross_entropy import losses_of
from ascendspeed_core.parallel.experts import note_exchanges
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
from ascendspeed_core.parallel.timeline import Recorder
from ascendspeed_core.planner.micro_batches import StageCost, best_sizes

WARM_UP_STEPS = 2


def record_step(
    model: Transformer,
    mesh: ParallelMesh,
    sizes: Sequence[int],
    seq_length: int,
    engine: Engine | None = None,
) -> Recorder:
    """Run steps of a pipeline on random tokens, up to the update, and return what this rank did in the last one.

    Args:
        model: this rank's stages; its gradients are dropped.
        mesh: of this rank.
        sizes: of this data-parallel rank's micro-batches.
        seq_length: tokens of a sample.
        engine: of the model; with several replicas it adds their gradients up.
    """
    vocab_size, group = model.config.vocab_size, mesh.group("tp")
    generator = torch.Generator().manual_seed(0)
    shape = (sum(sizes), seq_length // mesh.layout.cp)
    ids = torch.randint(vocab_size, shape, generator=generator).to(mesh.device.torch)
    inputs = [ModelInput(tokens, for_loss=True) for tokens in ids.split(list(sizes))]

    def loss_of(number: int, output: torch.Tensor) -> torch.Tensor:
        return losses_of(model, output, inputs[number].tokens, group).sum() / ids.numel()

    from ascendspeed_core.parallel.pipeline import run_pipeline

    reduces = engine is not None and mesh.layout.replicas > 1
    for _ in range(WARM_UP_STEPS + 1):
        recorder = Recorder(mesh.device.synchronize)
        note_exchanges(model, recorder.note_exchange)
        mesh.barrier()
        if mesh.layout.pp == 1:
            _run_alone(model, inputs, loss_of, recorder, engine)
        elif engine is not None and reduces:
            begin, end = engine.begin_last_backward, engine.end_last_backward
            run_pipeline(model, mesh, inputs, loss_of, recorder, begin, end)
        else:
            run_pipeline(model, mesh, inputs, loss_of, recorder)
        if engine is not None and reduces:
            # Waiting for ranks whose backward takes longer is no waiting for messages.
            mesh.barrier()
            recorder.reductions, recorder.seconds_alone = engine.wait_for_reductions()
        if engine is not None:
            engine.zero_grad()
        model.zero_grad(set_to_none=True)
    note_exchanges(model, unnoted)
    return recorder


def _run_alone(
    model: Transformer,
    inputs: Sequence[ModelInput],
    loss_of: Callable[[int, torch.Tensor], torch.Tensor],
    recorder: Recorder,
    engine: Engine | None,
) -> None:
    """Run micro-batches one after the other, the whole model on this rank."""
    for number, given in enumerate(inputs):
        with recorder.note("forward", 0, number):
            loss = loss_of(number, model(given).logits)
        with recorder.note("backward", 0, number):
            if engine is not None and number == len(inputs) - 1:
                engine.begin_last_backward(*model.stages)
            loss.backward()


def measure_stage_cost(
    model: Transformer,
    mesh: ParallelMesh,
    seq_length: int,
    largest: int,
    engine: Engine,
) -> StageCost:
    """Time micro-batches of one sample and of `largest` samples, and return what the slowest stage takes.

    All ranks call it alike, and get the same numbers.
    """
    seconds: dict[tuple[str, int], float] = {}
    for size in sorted({1, largest}):
        actions = record_step(model, mesh, (size,) * mesh.layout.pp, seq_length, engine).actions
        mine = {
            kind: sum(action.seconds for action in actions if action.kind == kind) / mesh.layout.pp
            for kind in ("forward", "backward")
        }
        for kind in mine:
            seconds[kind, size] = max(other[kind] for other in gather_objects(mine, mesh))

    def line(kind: str) -> tuple[float, float]:
        each = (
            (seconds[kind, largest] - seconds[kind, 1]) / (largest - 1) if largest > 1 else seconds[kind, 1]
        )
        each = max(each, 0.0)
        return max(seconds[kind, 1] - each, 0.0), each

    return StageCost(*line("forward"), *line("backward"))


def choose_sizes(
    model: Transformer,
    mesh: ParallelMesh,
    seq_length: int,
    samples: int,
    largest: int,
    engine: Engine,
) -> tuple[tuple[int, ...], StageCost]:
    """Return the sizes, none above `largest`, that leave this pipeline the least idle, and what they rest on."""
    cost = measure_stage_cost(model, mesh, seq_length, largest, engine)
    return best_sizes(samples, mesh.layout.pp, cost, largest), cost
