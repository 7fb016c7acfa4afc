"""What routers need of a training step: the load of the global batch before its first backward, and its end.

The balancing loss of the global batch is `E / K x sum over experts of load x mean score`, with load and mean over all
tokens of the batch. The load is a constant, so the loss is a sum over tokens, each with a gradient of its own, once the
load is known. It is known before any backward: a first pass without gradients runs all micro-batches through the
layers and counts, and one sum over the ranks of a stage adds the counts up. The second pass computes the same numbers
again, so it chooses the same experts. This holds for every schedule, since nothing of it depends on the order of
forwards and backwards. A step of one micro-batch and no pipeline needs no first pass: its layers add the counts up as
they go.

Shapes: E experts, L layers of the whole model.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.models.router import BALANCE, ROUTER_Z, Router, RouterStep
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages


def train_routers(model: Transformer, config: ExpertsConfig) -> None:
    """Let the routers of a model have losses and capacities in training steps, in place; all ranks call alike."""
    if model.config.experts is None:
        return
    coefficients = {BALANCE: config.moe_aux_loss_coeff, ROUTER_Z: config.moe_z_loss_coeff}
    names = {name for name, coefficient in coefficients.items() if coefficient}
    model.auxiliary_loss_names = tuple(sorted({*model.auxiliary_loss_names, *names}))
    model.needs_batch_load = BALANCE in names and config.moe_router_load_balancing_type == "global_aux_loss"
    for _, router in model.routers():
        router.training_config = config


def begin_router_step(
    model: Transformer, mesh: ParallelMesh, inputs: Sequence[ModelInput], count: int
) -> None:
    """Tell routers what they need of a step; all ranks call together.

    Args:
        model: this rank's part.
        mesh: of this rank.
        inputs: of this rank's micro-batches.
        count: what the losses of the step are divided by.
    """
    if model.config.experts is None:
        return
    routers = [router for _, router in model.routers()]
    tokens = torch.tensor(float(sum(given.tokens.numel() for given in inputs)), dtype=torch.float64)
    total = float(mesh.sum_over("replicas", tokens.to(mesh.device.torch)))
    for router in routers:
        router.step = RouterStep(token_weight=count / total)
    if not model.needs_batch_load:
        return
    if len(inputs) == 1 and mesh.layout.pp == 1:
        for router in routers:
            assert router.step is not None
            router.step.sums_batch = True
        return
    for given in inputs:
        # One token of each sequence is enough for the head, which has no part in this.
        read_at = given.tokens.new_zeros(len(given.tokens), 1)
        forward_through_stages(model, mesh, given._replace(read_at=read_at), is_shared=False)
    loads = _summed_loads(routers, mesh)
    for router, load in zip(routers, loads, strict=True):
        router.step = RouterStep(token_weight=count / total, batch_load=load)


@contextmanager
def balanced_routers(model: Transformer) -> Iterator[None]:
    """Let all experts have the same load for a while, for one whose memory or time is measured."""
    routers = [router for _, router in model.routers()]
    for router in routers:
        router.in_turn = True
    try:
        yield
    finally:
        for router in routers:
            router.in_turn = False


@contextmanager
def tried_routers(model: Transformer) -> Iterator[None]:
    """Let routers compute for a while what they do in a step, for one whose memory is measured."""
    experts = model.config.experts
    routers = [router for _, router in model.routers()]
    for router in routers:
        assert experts is not None
        load = None
        if model.needs_batch_load:
            load = torch.ones(experts.count, dtype=torch.float64, device=router.weight.device)
        router.step = RouterStep(batch_load=load)
    try:
        yield
    finally:
        for router in routers:
            router.step = None


def end_router_step(model: Transformer, mesh: ParallelMesh) -> torch.Tensor | None:
    """Return which load each expert had in the step, and take it from the routers; all ranks call together.

    Returns:
        Tokens that chose each expert of each layer, float64, [L, E], the same on all ranks; `None` without experts.
        Layers without experts have zeros.
    """
    experts = model.config.experts
    if experts is None:
        return None
    loads = torch.zeros(model.config.num_layers, experts.count, dtype=torch.float64, device=mesh.device.torch)
    for number, router in model.routers():
        if router.step is not None and router.step.load is not None:
            loads[number] = router.step.load
        router.step = None
    for axis in ("replicas", "tp", "pp"):
        mesh.sum_over(axis, loads)
    return loads


@torch.no_grad()
def update_router_biases(model: Transformer, loads: torch.Tensor) -> None:
    """Raise the bias of experts with less than the average load by a fixed rate, and lower those of the others.

    (Wang et al., 2024, Auxiliary-Loss-Free Load Balancing, algorithm 1, as DeepSeek-V3 trains.)

    Args:
        model: this rank's part.
        loads: of the step, [L, E].
    """
    for number, router in model.routers():
        config = router.training_config
        if router.bias is None or config is None or not config.moe_router_bias_update_rate:
            continue
        missing = loads[number].mean() - loads[number]
        router.bias.add_(missing.sign().to(router.bias.dtype), alpha=config.moe_router_bias_update_rate)


def _summed_loads(routers: Sequence[Router], mesh: ParallelMesh) -> Sequence[torch.Tensor]:
    """Add up the counts of all ranks of this stage; ranks of a stage have the same layers."""
    if not routers:
        return []
    found = []
    for router in routers:
        assert router.step is not None
        assert router.step.load is not None
        found.append(router.step.load)
    loads = torch.stack(found)
    for axis in ("replicas", "tp"):
        mesh.sum_over(axis, loads)
    return loads.unbind()
