"""What a part of a model asks of a rank for a micro-batch, and what of a model is trained. No torch."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ascendspeed_core.planner.hardware import Collective

Axis = Literal["tp", "cp", "experts"]


class Product(NamedTuple):
    """A linear layer, [m, k] with weights [n, k], some times.

    Attributes:
        m: rows.
        n: outputs.
        k: inputs.
        times: how often.
        is_frozen: its weights get no gradient, which leaves out one of the backward's two products.
    """

    m: float
    n: float
    k: float
    times: int = 1
    is_frozen: bool = False


class AttentionWork(NamedTuple):
    """Attention of whole sequences.

    Attributes:
        rows: sequences.
        heads: of this rank.
        queries: tokens of a sequence.
        keys: that a query sees on average.
        width: of a head; the mean of keys and values.
    """

    rows: int
    heads: float
    queries: float
    keys: float
    width: int


class Message(NamedTuple):
    """A collective among the ranks of an axis.

    Attributes:
        name: which.
        axis: whose ranks.
        size: bytes, as `HardwareProfile.collective_seconds` counts them.
    """

    name: Collective
    axis: Axis
    size: float


@dataclass(frozen=True)
class Tuning:
    """What of a model a run trains, and on what.

    Attributes:
        adapter_rank: of low-rank adapters, beside weights that stay as they are; `None` trains all weights.
        adapts_mlp: MLPs have adapters too, not only attention; experts never have.
        adapter_dropout: what is given to an adapter is dropped at random.
        pairs: a sample is two sequences, which a reference reads too (DPO).
    """

    adapter_rank: int | None = None
    adapts_mlp: bool = True
    adapter_dropout: bool = False
    pairs: bool = False

    @property
    def has_reference_copy(self) -> bool:
        """Whether the reference is a model of its own; with adapters it is the model without them."""
        return self.pairs and self.adapter_rank is None


ALL_WEIGHTS = Tuning()


@dataclass(frozen=True)
class PartWork:
    """What one part asks for, forwards and backwards of one micro-batch.

    Attributes:
        products: linear layers; a backward has two products for each.
        attention: without scores in memory.
        operators: over memory: name and elements.
        forward_messages: what the forward waits for.
        backward_messages: what the backward waits for.
        parameters: numbers of weights on this rank.
        expert_parameters: of them, those that are summed over `edp` instead of all replicas.
        trained: of `parameters`, those of which the backward adds up gradients.
        adapters: products of adapters, beside `products`.
        attention_products: how many of `products`, counted from the first, are of the attention.
        hidden_loss: the logits are made again in the backward.
        stops_early: the last product, and the message behind it, are not computed again by recompute, which ends when
            the backward has what it needs (torch.utils.checkpoint's early stop); the first messages are of the blocks.
        block_messages: how many of `forward_messages`, counted from the first, are of the blocks.
    """

    products: tuple[Product, ...] = ()
    attention: AttentionWork | None = None
    operators: tuple[tuple[str, float], ...] = ()
    forward_messages: tuple[Message, ...] = ()
    backward_messages: tuple[Message, ...] = ()
    parameters: float = 0
    expert_parameters: float = 0
    trained: float = 0
    adapters: tuple[Product, ...] = ()
    attention_products: int = 0
    hidden_loss: bool = False
    stops_early: bool = False
    block_messages: int = 0
