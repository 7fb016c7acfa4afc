"""Expert parallelism: the experts of a layer spread over ranks, tokens sent to them and back.

(Lepikhin et al., 2020, GShard; Rajbhandari et al., 2022, DeepSpeed-MoE.) The ranks of a pipeline stage are counted
twice: dp x cp x tp for all but experts, edp x ep x etp for these (`Layout.axes`). Each of ep ranks has a share of the
experts, and each of etp ranks a part of every one, cut like a plain MLP. A rank that has experts gets their tokens from
all ep x etp ranks by one all-to-all, and a second one takes the results back. Where etp is more than 1, a row goes to
all of these ranks, which give parts of its result that are added up: as many bytes as an all-gather and a
reduce-scatter would move.

Each rank sends the tokens that only it has. Tensor-parallel ranks without sequence parallelism all have the same, so
each takes its share of them, and all get all results. A router then sees other tokens on each rank, as with sequence
parallelism, and the gradient of its weight is added up over the tensor-parallel ranks.

Gradients of experts are of the tokens of all ep x etp ranks already; they are summed over edp, see `config.sharding`.

Shapes: B batch, S sequence, H hidden size, T tokens of this rank, N rows (a token for each of its experts), E experts,
n = ep x etp ranks.
"""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.sharding import chunk_range
from ascendspeed_core.kernels.experts import order_by_group
from ascendspeed_core.models.dropout import DropoutMasks
from ascendspeed_core.models.experts import ApplyExperts, ExpertsMLP, rows_of_sequences
from ascendspeed_core.models.linear import LoraLinear
from ascendspeed_core.models.router import Router, TokenRows
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.collectives import (
    NoteExchange,
    all_gather_rows,
    exchange_parts,
    exchange_rows,
    gather_shares,
    sum_over_group,
    take_share,
    unnoted,
)
from ascendspeed_core.parallel.mesh import ParallelMesh


def apply_expert_parallel(model: Transformer, mesh: ParallelMesh) -> None:
    """Leave to each rank its experts, in place; before weights are partitioned, on the meta device.

    Args:
        model: sizes must fit, see `ParallelConfig.check_model`.
        mesh: this rank's coordinates.
    """
    layout, tp = mesh.layout, mesh.group("tp")
    for module in model.modules():
        if not isinstance(module, ExpertsMLP):
            continue
        mine = local_experts(len(module.experts), layout.ep, mesh.index("ep"))
        module.experts = nn.ModuleDict({str(number): module.experts[str(number)] for number in mine})
        if mesh.index("etp") > 0 and module.router.experts.biases:
            for expert in module.experts.values():
                _leave_out_bias(expert.down_proj)  # type: ignore[arg-type]
        group = mesh.group("experts")
        if group is not None:
            module.exchange = TokenExchange(group, layout.ep, layout.expert_tp)
        if tp is not None and not layout.sequence_parallel:
            module.share = SharedTokens(tp)
            module.router.sum_loss = partial(sum_over_group, group=tp)
        join_router(module.router, mesh)


def join_router(router: Router, mesh: ParallelMesh) -> None:
    """Let a router count tokens, and rank them, over the ranks that have others of the batch, in place."""
    router.sum_load = partial(_sum_load, mesh=mesh)
    router.sum_batch = partial(_sum_batch, mesh=mesh)
    router.gather = partial(_gather_rows, mesh=mesh)


def note_exchanges(model: nn.Module, noting: NoteExchange) -> None:
    """Have all exchanges of rows of a model's experts timed."""
    for module in model.modules():
        if isinstance(module, ExpertsMLP) and isinstance(module.exchange, TokenExchange):
            module.exchange.noting = noting


def local_experts(count: int, ep: int, ep_rank: int) -> range:
    """Return the experts of a layer that a rank has."""
    share = count // ep
    return range(ep_rank * share, (ep_rank + 1) * share)


def _leave_out_bias(down: nn.Linear) -> None:
    """Let a part of an expert's last product lack the bias, which the first part adds; its gradient stays the same."""

    def forward(x: torch.Tensor, draws: DropoutMasks | None = None) -> torch.Tensor:
        share = down.product(x, draws) if isinstance(down, LoraLinear) else F.linear(x, down.weight)
        return share + (down.bias - down.bias.detach())

    down.forward = forward  # type: ignore[method-assign, assignment]


class TokenExchange:
    """Has rows computed where their experts are.

    Args:
        group: the ranks that have the experts of a layer, in order of the experts.
        ep: shares of the experts.
        etp: ranks that have parts of the same experts; neighbours in the group.

    Attributes:
        noting: times the exchanges of rows.
    """

    def __init__(self, group: dist.ProcessGroup, ep: int, etp: int) -> None:
        self._group, self._ep, self._etp = group, ep, etp
        self.noting: NoteExchange = unnoted

    def __call__(self, rows: torch.Tensor, counts: torch.Tensor, apply: ApplyExperts) -> torch.Tensor:
        """Return what experts give for rows.

        Args:
            rows: sorted by their experts, [N, H].
            counts: rows of each expert, [E].
            apply: the experts of this rank.

        Returns:
            [N, H].
        """
        sent = counts.view(self._ep, -1).repeat_interleave(self._etp, 0)
        received = exchange_rows(sent, self._group)
        outgoing, incoming, of_experts = (
            sizes.tolist() for sizes in (sent.sum(1), received.sum(1), received.sum(0))
        )
        if self._etp > 1:
            parts = rows.split(outgoing[:: self._etp])
            rows = torch.cat([part for part in parts for _ in range(self._etp)])
        arrived = exchange_parts(rows, outgoing, incoming, self._group, self.noting)
        # From each rank they come sorted; an expert wants its rows of all ranks together.
        numbers = torch.arange(received.shape[1], device=received.device).repeat(len(received))
        order = order_by_group(numbers.repeat_interleave(received.flatten()), received.shape[1])
        computed = order.restore(apply(order.sort(arrived), of_experts))
        returned = exchange_parts(computed, incoming, outgoing, self._group, self.noting)
        if self._etp == 1:
            return returned
        copies = returned.split(outgoing)
        # The parts of a result are added up in the order of the ranks.
        sums = [
            sum(copies[first + 1 : first + self._etp], copies[first])
            for first in range(0, len(copies), self._etp)
        ]
        return torch.cat(sums)


class SharedTokens:
    """Of tokens that all ranks of a group have, each takes its share; all get the results of all.

    Args:
        group: tensor-parallel ranks.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def enter(self, x: torch.Tensor) -> TokenRows:
        """Return this rank's tokens of [B, S, H]."""
        whole = rows_of_sequences(x)
        mine = chunk_range(len(whole.tokens), self._size, self._rank)
        tokens = take_share(whole.tokens, self._group)
        return TokenRows(tokens, whole.sequences[mine], whole.positions[mine], whole.num_sequences)

    def leave(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the results for all tokens, [B, S, H]."""
        return gather_shares(tokens, x.shape[0] * x.shape[1], self._group).view(x.shape)


def _sum_load(load: torch.Tensor, mesh: ParallelMesh) -> torch.Tensor:
    """Add up a count over the ranks that have other tokens of the same sequences."""
    load = load.clone()
    mesh.sum_over("cp", load)
    return mesh.sum_over("tp", load)


def _sum_batch(load: torch.Tensor, mesh: ParallelMesh) -> torch.Tensor:
    """Add up a count over the ranks that have other sequences."""
    return mesh.sum_over("dp", load.clone())


def _gather_rows(rows: torch.Tensor, mesh: ParallelMesh) -> tuple[torch.Tensor, slice]:
    """Put together the rows of the ranks that have other tokens of the same sequences, in the order of the tokens.

    Args:
        rows: [N, columns]; the last column is the position in this rank's part of the sequence.
        mesh: of this rank.
    """
    first, count = 0, len(rows)
    for axis in ("tp", "cp"):
        group = mesh.group(axis)
        if group is None:
            continue
        sizes = all_gather_rows(torch.tensor([len(rows)], device=rows.device), group).flatten().tolist()
        padded = torch.nn.functional.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
        parts = [part[:size] for part, size in zip(all_gather_rows(padded, group), sizes, strict=True)]
        if axis == "cp" or mesh.layout.sequence_parallel:
            parts = _behind_each_other(parts)
        first += sum(sizes[: mesh.index(axis)])
        rows = torch.cat(parts)
    return rows, slice(first, first + count)


def _behind_each_other(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Count positions of parts of a sequence through: the parts are of equal length."""
    length = max(float(part[:, -1].max()) for part in parts if len(part)) + 1
    offset = torch.zeros_like(parts[0][:1])
    offset[:, -1] = length
    return [part + offset * number for number, part in enumerate(parts)]
