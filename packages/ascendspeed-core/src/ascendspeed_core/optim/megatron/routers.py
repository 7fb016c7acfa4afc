"""This project's routers in megatron-core's layers of experts, so that choices, weights and losses are those of a run.

megatron-core's own count the load of a micro-batch, without its other ranks; these count it in what the run asks for,
see `parallel.router_steps`.

Shapes: S sequence (a part of it where it is cut), B batch, H hidden size, T = S B tokens, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Stage
from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses
from ascendspeed_core.models.router import Router, TokenRows
from ascendspeed_core.optim.megatron.layers import mark_partial
from ascendspeed_core.parallel.auxiliary_losses import attach_losses
from ascendspeed_core.parallel.experts import join_router
from ascendspeed_core.parallel.mesh import ParallelMesh


class TokenRouter(nn.Module):
    """A router in the place of `TopKRouter`.

    Args:
        router: this project's.

    Attributes:
        choose: the router.
        loss_factor: of the gradient of its losses.
        note_losses: gets them, once for each micro-batch.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.choose = router
        self.loss_factor = 1.0
        self.note_losses: Callable[[AuxiliaryLosses], None] = _forget

    def forward(self, hidden: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Route: [S, B, H] -> the weight that each token gives to each expert, and whether it goes there, [T, E]."""
        batch = hidden.shape[1]
        tokens = hidden.reshape(-1, hidden.shape[-1])
        index = torch.arange(len(tokens), device=tokens.device)
        routing = self.choose(TokenRows(tokens, index % batch, index // batch, batch))
        self.note_losses(routing.losses)
        # What a capacity refuses goes to one expert more, which is left out.
        shape = len(tokens), self.choose.experts.count + 1
        weights = routing.weights.new_zeros(shape).scatter(1, routing.chosen, routing.weights)
        goes = torch.zeros(shape, dtype=torch.bool, device=tokens.device).scatter(1, routing.chosen, True)
        weights = weights[:, :-1]
        return attach_losses(weights, routing.losses, self.loss_factor), goes[:, :-1]


def replace_routers(
    chunk: nn.Module, experts: Experts, hidden_size: int, config: Any, mesh: ParallelMesh
) -> None:
    """Let the layers of a `GPTModel` have this project's routers, in place; they are not filled.

    Args:
        chunk: the model, on its device.
        experts: of its layers.
        hidden_size: H.
        config: its `TransformerConfig`.
        mesh: of this rank.
    """
    for layer in chunk.decoder.layers:  # type: ignore[union-attr]
        if not hasattr(layer.mlp, "router"):
            continue
        router = Router(experts, hidden_size).to(device=mesh.device.torch, dtype=config.params_dtype)
        if router.bias is not None:
            # Steps change it by less than a 16-bit number could show.
            router.bias = nn.Parameter(router.bias.float(), requires_grad=False)
        mark_partial(router, config)
        join_router(router, mesh)
        layer.mlp.router = TokenRouter(router)


def routers_of_chunks(
    chunks: Sequence[nn.Module], stages: Sequence[Stage]
) -> Iterator[tuple[int, TokenRouter]]:
    """Yield number of the layer in the whole model and router of each layer with experts.

    Args:
        chunks: a `GPTModel` for each stage, not wrapped.
        stages: of this rank.
    """
    for chunk, stage in zip(chunks, stages, strict=True):
        for number, layer in zip(stage.layers, chunk.decoder.layers, strict=True):  # type: ignore[union-attr, arg-type]
            router = getattr(layer.mlp, "router", None)
            if isinstance(router, TokenRouter):
                yield number, router


def _forget(losses: AuxiliaryLosses) -> None:
    pass
