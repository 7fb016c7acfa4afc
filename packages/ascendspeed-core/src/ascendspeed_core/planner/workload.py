"""What a micro-batch asks of a rank: matrix products, attention, operators over memory, messages. No torch.

Each part of a model, the embedding, a layer, the head with the loss, is a list of them for one layout; `step_time`
makes seconds of it. Shapes follow `models/` and `parallel/`: column-parallel projections, row-parallel ones, and one
exchange at each end of a block.

T tokens of a micro-batch on this rank, H hidden size, N query heads, K key-value heads, D head size, F width of the
MLP, V vocabulary, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ascendspeed_core.config.layout import Layout, Stage
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.planner.hardware import FORMAT_BYTES, Collective
from ascendspeed_core.planner.part_work import (
    ALL_WEIGHTS,
    AttentionWork,
    Message,
    PartWork,
    Product,
    Tuning,
)


@dataclass(frozen=True)
class Workload:
    """One micro-batch of a model under a layout.

    Attributes:
        model: the architecture.
        layout: of all ranks.
        rows: samples of the micro-batch.
        seq_length: S.
        dtype: of weights and arithmetic.
        tuning: what is trained.
        large_logits: bytes of fp32 logits from which on the loss is made of hidden states.
    """

    model: ModelConfig
    layout: Layout
    rows: int
    seq_length: int
    dtype: str
    tuning: Tuning = ALL_WEIGHTS
    large_logits: int = 1 << 30
    _parts: dict[Any, PartWork] = field(default_factory=dict, compare=False, repr=False)
    _known: dict[Any, tuple[float, float]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tokens(self) -> float:
        """T: tokens of the micro-batch on this rank."""
        return self.sequences * self.seq_length / self.layout.cp

    @property
    def sequences(self) -> int:
        """Of the micro-batch: two of each pair."""
        return self.rows * (2 if self.tuning.pairs else 1)

    @property
    def between_blocks(self) -> float:
        """Tokens on this rank where sequence parallelism cuts them."""
        return self.tokens / (self.layout.tp if self.layout.sequence_parallel else 1)

    @property
    def hidden_bytes(self) -> float:
        """Bytes of the hidden states of all tokens of this rank."""
        return self.tokens * self.model.hidden_size * FORMAT_BYTES[self.dtype]

    @property
    def sent_bytes(self) -> float:
        """Bytes that travel from stage to stage."""
        return self.between_blocks * self.model.hidden_size * FORMAT_BYTES[self.dtype]

    @property
    def vocabulary(self) -> int:
        """Rows of the vocabulary on the rank that has most."""
        return -(-self.model.vocab_size // self.layout.tp)

    def layer(self, number: int) -> PartWork:
        """Return the work of a layer, by its number in the whole model."""
        kind = (self.model.has_experts(number), self.model.has_window(number))
        if kind not in self._parts:
            part = self._make_layer(*kind)
            has_adapters = part.products[
                : None if self.tuning.adapts_mlp and not kind[0] else part.attention_products
            ]
            self._parts[kind] = self._tuned(part, has_adapters)
        return self._parts[kind]

    def _tuned(self, part: PartWork, has_adapters: Sequence[Product] = ()) -> PartWork:
        """Return a part with what of it is trained: all, or the adapters beside some of its products."""
        rank = self.tuning.adapter_rank
        if rank is None:
            return replace(part, trained=part.parameters)
        adapters = tuple(
            half
            for m, n, k, times, _ in has_adapters
            for half in (Product(m, rank, k, times), Product(m, n, rank, times))
        )
        trained = _weights(adapters)
        frozen = tuple(product._replace(is_frozen=True) for product in part.products)
        return replace(
            part,
            products=frozen,
            parameters=part.parameters + trained,
            trained=trained,
            adapters=adapters,
        )

    def _make_layer(self, has_experts: bool, has_window: bool) -> PartWork:
        model = self.model
        attention, weights = self._attention_products()
        mlp, operators, mlp_weights, expert_weights, exchanged = (
            self._experts() if has_experts else self._dense_mlp(model.ffn_hidden_size, model.mlp_bias)
        )
        norms = 1 if model.parallel_blocks else 4 if model.norm_placement == "both" else 2
        hidden = model.hidden_size
        of_heads = self._heads * model.head_dim + self._key_heads * model.head_dim
        rotary = self.tokens * of_heads * (model.position == "rotary")
        operators = [
            ("norm", norms * self.between_blocks * hidden),
            ("norm", self.tokens * of_heads * model.qk_norm),
            ("rotary", rotary),
            ("add", 2 * self.between_blocks * hidden + self._copies(of_heads)),
            *operators,
        ]
        norm_weights = norms * hidden * (2 if model.norm == "layernorm" and model.norm_bias else 1)
        forward, backward = self._block_messages(1 if has_experts or model.parallel_blocks else 2)
        cut = self._context_messages()
        return PartWork(
            products=(*attention, *mlp),
            attention=self._attention(has_window),
            operators=tuple((name, elements) for name, elements in operators if elements),
            forward_messages=(*forward, *cut, *exchanged),
            backward_messages=(*backward, *cut, *exchanged),
            parameters=weights + mlp_weights + norm_weights + expert_weights,
            expert_parameters=expert_weights,
            attention_products=len(attention),
            stops_early=not has_experts and model.norm_placement == "before",
            block_messages=len(forward),
        )

    @property
    def _heads(self) -> float:
        return self.model.num_attention_heads / self.layout.tp

    @property
    def _key_heads(self) -> float:
        return max(self.model.num_key_value_heads / self.layout.tp, 1)

    def _attention_products(self) -> tuple[list[Product], float]:
        model, tokens = self.model, self.tokens
        hidden, width = model.hidden_size, model.head_dim
        queries, keys = self._heads * width, self._key_heads * width
        if model.kv_latent_dim is None:
            bias = model.qkv_bias * (queries + 2 * keys) + model.output_bias * hidden
            products = [
                Product(tokens, queries, hidden),
                Product(tokens, keys, hidden, 2),
                Product(tokens, hidden, queries),
            ]
            return products, _weights(products) + bias
        assert model.value_head_dim is not None
        assert model.rotary_dim is not None
        latent, rotary = model.kv_latent_dim, model.rotary_dim
        values = self._heads * model.value_head_dim
        of_queries = [Product(tokens, queries, hidden)]
        if model.q_latent_dim is not None:
            of_queries = [
                Product(tokens, model.q_latent_dim, hidden),
                Product(tokens, queries, model.q_latent_dim),
            ]
        products = [
            *of_queries,
            Product(tokens, latent + rotary, hidden),
            Product(tokens, self._heads * (width - rotary) + values, latent),
            Product(tokens, hidden, values),
        ]
        return products, _weights(products) + latent + (model.q_latent_dim or 0)

    def _attention(self, has_window: bool) -> AttentionWork:
        """Heads are cut by tp, and inside attention by cp (Ulysses), which leaves whole sequences."""
        model, length = self.model, self.seq_length
        window = min(model.sliding_window or length, length) if has_window else length
        seen = window - window * window / (2 * length)
        width = (model.head_dim + (model.value_head_dim or model.head_dim)) // 2
        return AttentionWork(self.sequences, self._heads / self.layout.cp, length, seen, width)

    def _dense_mlp(
        self, inner: int, has_bias: bool = False
    ) -> tuple[list[Product], list[tuple[str, float]], float, float, tuple[Message, ...]]:
        model, part, tokens = self.model, inner / self.layout.tp, self.tokens
        ways_in = 2 if model.is_gated else 1
        products = [
            Product(tokens, part, model.hidden_size, ways_in),
            Product(tokens, model.hidden_size, part),
        ]
        operator = "gated" if model.is_gated else "activation"
        bias = has_bias * (ways_in * part + model.hidden_size)
        return products, [(operator, tokens * part)], _weights(products) + bias, 0.0, ()

    def _experts(
        self,
    ) -> tuple[list[Product], list[tuple[str, float]], float, float, tuple[Message, ...]]:
        """Each rank sends the tokens that only it has, and computes those of all for its experts, with equal loads."""
        model, layout, experts = self.model, self.layout, self.model.experts
        assert experts is not None
        hidden, inner = model.hidden_size, experts.ffn_hidden_size / layout.expert_tp
        mine = self.tokens / layout.tp
        rows = mine * experts.per_token * layout.expert_tp
        count = experts.count // layout.ep
        of_each = rows / count
        products = [
            Product(mine, experts.count, hidden),
            Product(of_each, inner, hidden, 2 * count),
            Product(of_each, hidden, inner, count),
        ]
        router = experts.count * hidden
        weights = _weights(products[1:])
        operators = [("gated", rows * inner), ("permute", 2 * rows * hidden)]
        shared_weights = 0.0
        if experts.shared_ffn_hidden_size is not None:
            shared, more, shared_weights, _, _ = self._dense_mlp(experts.shared_ffn_hidden_size)
            products, operators = products + shared, operators + more
        size = mine * experts.per_token * layout.expert_tp * hidden * FORMAT_BYTES[self.dtype]
        messages: tuple[Message, ...] = ()
        if layout.ep * layout.expert_tp > 1:
            messages = (Message("all_to_all", "experts", size),) * 2
        if layout.tp > 1 and not layout.sequence_parallel:
            messages += (Message("all_gather", "tp", self.hidden_bytes),)
        return products, operators, router + shared_weights, weights, messages

    def _copies(self, of_heads: float) -> float:
        """Return the numbers that are laid out anew around messages: at both ends of a block, and for swapped heads.

        (`parallel.collectives`: `_join_sequence`, `_sum_and_cut_sequence`, `_swap_cut`.)
        """
        copied = 4 * self.tokens * self.model.hidden_size * self.layout.sequence_parallel
        if self.layout.cp > 1:
            queries = self._heads * self.model.head_dim
            copied += self.tokens * (3 * (2 * of_heads - queries) + 2 * queries)
        return copied

    def _block_messages(self, blocks: int) -> tuple[list[Message], list[Message]]:
        """Both ends of attention and MLP: as many bytes with sequence parallelism as without."""
        if self.layout.tp == 1:
            return [], []
        size = self.hidden_bytes
        if self.layout.sequence_parallel:
            both = [Message("all_gather", "tp", size), Message("reduce_scatter", "tp", size)] * blocks
            return both, both
        return [Message("all_reduce", "tp", size)] * blocks, [Message("all_reduce", "tp", size)] * blocks

    def _context_messages(self) -> tuple[Message, ...]:
        """One all-to-all of queries, keys and values, one of results (Jacobs et al., 2023, section 3.1)."""
        if self.layout.cp == 1:
            return ()
        width = self.model.head_dim * FORMAT_BYTES[self.dtype]
        keys = max(self._key_heads, self.layout.cp)
        return (
            Message("all_to_all", "cp", self.tokens * (self._heads + 2 * keys) * width),
            Message("all_to_all", "cp", self.tokens * self._heads * width),
        )

    def embedding(self) -> PartWork:
        """Return the work of the embedding."""
        if "embedding" not in self._parts:
            self._parts["embedding"] = self._tuned(self._make_embedding())
        return self._parts["embedding"]

    def head(self) -> PartWork:
        """Return the work of final norm, head and loss."""
        if "head" not in self._parts:
            self._parts["head"] = self._tuned(self._make_head())
        return self._parts["head"]

    def _make_embedding(self) -> PartWork:
        hidden = self.model.hidden_size
        forward: tuple[Message, ...] = ()
        backward: tuple[Message, ...] = ()
        if self.layout.tp > 1:
            name: Collective = "reduce_scatter" if self.layout.sequence_parallel else "all_reduce"
            forward = (Message(name, "tp", self.hidden_bytes),)
            if self.layout.sequence_parallel:
                backward = (Message("all_gather", "tp", self.hidden_bytes),)
        operators = [("embedding", self.tokens * hidden)]
        if self.model.embedding_norm:
            operators.append(("norm", self.between_blocks * hidden))
        return PartWork(
            operators=tuple(operators),
            forward_messages=forward,
            backward_messages=backward,
            parameters=self.vocabulary * hidden,
        )

    def _make_head(self) -> PartWork:
        hidden, logits = self.model.hidden_size, self.tokens * self.vocabulary
        forward: tuple[Message, ...] = ()
        backward: tuple[Message, ...] = ()
        if self.layout.tp > 1:
            if self.layout.sequence_parallel:
                forward = (Message("all_gather", "tp", self.hidden_bytes),)
            backward = (
                Message("reduce_scatter" if self.layout.sequence_parallel else "all_reduce", "tp", self.hidden_bytes),
            )  # fmt: skip
            forward = (*forward, Message("all_reduce", "tp", self.tokens * 4 * 3))
        return PartWork(
            products=(Product(self.tokens, self.vocabulary, hidden),),
            operators=(("norm", self.between_blocks * hidden), ("cross_entropy", logits)),
            forward_messages=forward,
            backward_messages=backward,
            parameters=self.vocabulary * hidden + hidden,
            hidden_loss=logits * 4 >= self.large_logits,
        )

    def parameters(self, stages: Sequence[Stage]) -> tuple[float, float]:
        """Return the weights of a rank's stages on it, and how many of them are of experts."""
        key = ("parameters", *stages)
        if key not in self._known:
            parts = [part for one in stages for part in self.parts(one.layers, one.is_first, one.is_last)]
            total = sum(part.parameters for part in parts)
            if self.shares_embedding(stages):
                total -= self.vocabulary * self.model.hidden_size
            self._known[key] = total, sum(part.expert_parameters for part in parts)
        return self._known[key]

    def trained(self, stages: Sequence[Stage]) -> tuple[float, float]:
        """Return the same of the weights that get gradients; experts do not beside adapters."""
        if self.tuning.adapter_rank is None:
            return self.parameters(stages)
        key = ("trained", *stages)
        if key not in self._known:
            parts = [part for one in stages for part in self.parts(one.layers, one.is_first, one.is_last)]
            self._known[key] = sum(part.trained for part in parts), 0.0
        return self._known[key]

    def shares_embedding(self, stages: Sequence[Stage]) -> bool:
        """Tell whether a rank has both the embedding and a head with the same weight."""
        is_both = any(stage.is_first for stage in stages) and any(stage.is_last for stage in stages)
        return self.model.tie_word_embeddings and is_both

    def parts(self, layers: range, is_first: bool, is_last: bool) -> Iterator[PartWork]:
        """Yield the parts of a stage in order."""
        if is_first:
            yield self.embedding()
        for number in layers:
            yield self.layer(number)
        if is_last:
            yield self.head()


def _weights(products: Sequence[Product]) -> float:
    return sum(product.n * product.k * product.times for product in products)
