"""Bytes of the parts of a model by formula, so that a plan needs neither torch nor the model.

`planner.fit_memory` counts the same by running the parts; tests compare the two. What is kept follows from what each
operator of `models/` saves for its backward (Korthikanti et al., 2022, section 4.1, list them for their model):

- A norm in plain torch saves a wide copy of its input (16 bits only), what it normed, and what it gives; a fused one
  saves its input and what it gives. With sequence parallelism a block saves the whole sequence that it gathered.
- Attention saves rotated queries and keys, values, its result, and a logarithm for each query and head.
- A gated MLP in plain torch saves gate, up, the activated gate and their product; a fused one all but the third.
- Recompute of policy `selective` saves the results of products and of attention; of policy `full` what the layer gives.
- Beside adapters nothing is saved for gradients of frozen weights: no normed copies, no inputs but those of adapters.
"""

from dataclasses import dataclass
from functools import cached_property

from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.planner.hardware import FORMAT_BYTES
from ascendspeed_core.planner.memory import PartMemory
from ascendspeed_core.planner.part_work import PartWork
from ascendspeed_core.planner.workload import Workload


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes of parts for one micro-batch on one rank.

    Attributes:
        work: the micro-batch.
        is_fused: norms, rotary embedding and MLP are fused operators, as `auto` takes on accelerators, and with a
            compiler on a CPU.
    """

    work: Workload
    is_fused: bool

    @cached_property
    def _width(self) -> int:
        return FORMAT_BYTES[self.work.dtype]

    @cached_property
    def _hidden(self) -> float:
        """Of hidden states of all tokens of this rank."""
        return self.work.hidden_bytes

    @cached_property
    def _between(self) -> float:
        """Of hidden states between blocks, which sequence parallelism cuts."""
        return self.work.sent_bytes

    @property
    def _is_narrow(self) -> bool:
        return self._width == 2

    @property
    def copies_wide(self) -> bool:
        """Whether a norm keeps a wide copy of its input, which itself is not needed again."""
        return self._is_narrow and not self.is_fused and self.work.model.norm == "rmsnorm"

    def gradients(self, part: PartWork) -> float:
        """Of a part's weights: as wide as master weights."""
        return part.trained * max(self._width, 4)

    @property
    def attention_inputs(self) -> float:
        """Cosines and sines of a micro-batch."""
        model = self.work.model
        if model.position != "rotary":
            return 0.0
        return 2.0 * self.work.tokens * (model.rotary_dim or model.head_dim) * self._width

    def _norm(self, gathered: bool) -> tuple[float, float]:
        """Return what a norm keeps of what it is given, and of what it gives to a block."""
        given = self._hidden if gathered else self._between
        if self.work.model.norm == "layernorm" or self.is_fused:
            return self._between, given
        if self._is_narrow:
            # The narrow input is not needed again: its wide copy is.
            return self._between * (2 + 1), given
        return self._between * 2, given

    def layer(self, number: int, mode: Mode) -> PartMemory:
        """Return the bytes of a layer, for what of it is computed again."""
        model, layout = self.work.model, self.work.layout
        part = self.work.layer(number)
        attention, attention_products = self._attention()
        mlp, mlp_products, inner = self._experts() if model.has_experts(number) else self._dense()
        norm_kept, norm_given = self._norm(layout.sequence_parallel)
        norms = 1 if model.parallel_blocks else 2
        kept = norms * (norm_kept + norm_given) + attention + mlp + self._between
        if model.norm_placement == "both":
            kept += 2 * norm_kept
        if not self.copies_wide:
            # The input of the first norm is the output of the layer before, which counts there.
            kept -= self._between
        selective = attention_products + mlp_products + self._between
        if self._is_frozen:
            kept -= norms * self._normed
            kept += self._beside_adapters(part, norm_given, inner)
            # Results of the frozen product and of both of the adapter.
            selective += sum(m * n * times for m, n, _, times, _ in part.adapters) * self._width
        # Inputs and results of both blocks; a sequence that is gathered is there twice while its sum is scattered.
        forward = kept + (3 if self.copies_wide else 2) * self._between
        if layout.sequence_parallel:
            forward = kept + 2 * self._hidden + (0 if self.copies_wide else 3) * self._between
        # The MLP of a layer that keeps nothing, beside what its block and its residuals hold.
        bare = (3 if self.is_fused else 4) * inner + norm_given + 3 * self._between
        bare += self._hidden if layout.tp > 1 else 0.0
        backward = self._backward(inner, part)
        gradients = int(self.gradients(part))
        if mode == "full":
            again = kept - self._between + backward + self._hashes(part)
            return PartMemory(int(self._between), int(min(bare, forward)), int(again), gradients)
        if mode == "selective":
            peak = kept - selective + backward + self._hidden
            forward = min(bare + attention_products - self._hidden, forward)
            return PartMemory(int(selective), int(forward), int(peak), gradients)
        return PartMemory(int(kept), int(forward), int(backward), gradients)

    @property
    def _is_frozen(self) -> bool:
        return self.work.tuning.adapter_rank is not None

    @property
    def _normed(self) -> float:
        """What a norm keeps for the gradient of its weight alone."""
        return 0.0 if self.is_fused or self.work.model.norm == "layernorm" else self._between

    def _hashes(self, part: PartWork) -> float:
        """Return what choosing the numbers to drop takes for a moment, two hashes of 4 bytes for each of an input."""
        if not self.work.tuning.adapter_dropout:
            return 0.0
        return max((one.m * one.k for one in part.adapters[::2]), default=0.0) * 8

    def _beside_adapters(self, part: PartWork, norm_given: float, inner: float) -> float:
        """Return what a layer keeps more, or less, where its products are frozen and some have adapters."""
        into, width = part.adapters[::2], self._width
        kept = sum(one.m * one.n * one.times for one in into) * width
        of_mlp = len(into) > part.attention_products
        if not of_mlp:
            # Neither what the MLP is given nor what its last product is given is needed.
            kept -= inner + (0.0 if self.work.model.parallel_blocks else norm_given)
        if self.work.tuning.adapter_dropout:
            # Each adapter keeps its own input, and which numbers of it were dropped.
            kept += sum(one.m * one.k * one.times for one in into) * (width + 1)
            blocks = 2 if of_mlp and not self.work.model.parallel_blocks else 1
            kept -= blocks * norm_given + (inner if of_mlp else 0.0)
        return kept

    def _attention(self) -> tuple[float, float]:
        """Return what attention keeps, and of it the results of products and of the operator."""
        work, model = self.work, self.work.model
        tokens, width = work.tokens, self._width
        heads = model.num_attention_heads / work.layout.tp
        key_heads = max(model.num_key_value_heads / work.layout.tp, 1)
        key_width = model.value_head_dim or model.head_dim
        queries, keys = tokens * heads * model.head_dim * width, tokens * key_heads * model.head_dim * width
        values, result = tokens * key_heads * key_width * width, tokens * heads * key_width * width
        logarithms = tokens * heads * 4
        kept = queries + keys + values + result + logarithms
        if work.layout.cp > 1:
            # What the all-to-all of results gives, and copies where there are fewer key heads than ranks.
            copies = max(work.layout.cp / key_heads, 1)
            kept += result + (copies - 1) * (keys + values)
        if model.qk_norm:
            kept += (queries + keys) * (1 if self.is_fused else 3 if self._is_narrow else 2)
        products = queries + keys + values + result + logarithms + self._hidden
        if model.kv_latent_dim is not None:
            latent = (
                (model.kv_latent_dim + (model.rotary_dim or 0) + 2 * (model.q_latent_dim or 0))
                * tokens
                * width
            )
            kept, products = kept + 2 * latent, products + latent
        return kept, products

    def _dense(self, inner_width: float | None = None) -> tuple[float, float, float]:
        """Return what an MLP keeps, of it the results of products, and its width in bytes."""
        work, model = self.work, self.work.model
        width = (inner_width or model.ffn_hidden_size) / work.layout.tp
        inner = work.tokens * width * self._width
        if model.is_gated:
            return (3 if self.is_fused else 4) * inner, 2 * inner + self._hidden, inner
        return 2 * inner, inner + self._hidden, inner

    def _experts(self) -> tuple[float, float, float]:
        """Return the same of experts with equal loads."""
        work, experts = self.work, self.work.model.experts
        assert experts is not None
        layout = work.layout
        mine = work.tokens / layout.tp
        sent = mine * experts.per_token
        rows = sent * layout.expert_tp
        hidden = work.model.hidden_size * self._width
        inner = rows * experts.ffn_hidden_size / layout.expert_tp * self._width
        crosses = layout.ep * layout.expert_tp > 1
        kept = (3 if self.is_fused else 4) * inner
        # Sorted rows on both sides of the exchange, results, and the router's scores.
        kept += rows * hidden * (2 if crosses else 1) + sent * hidden + mine * experts.count * 4 * 3
        if crosses:
            kept += sent * hidden
        products = 2 * inner + rows * hidden
        if experts.shared_ffn_hidden_size is not None:
            more, results, _ = self._dense(experts.shared_ffn_hidden_size)
            kept, products = kept + more, products + results
        return kept, products, inner

    def _backward(self, inner: float, part: PartWork) -> float:
        """Most that a layer's backward adds: at the product that ends the MLP, or in the middle of it.

        There are then the gradient that is given, whole if sequence parallelism gathers it, that of the product's input
        and that of its weight; or those of gate, up and activated gate.
        """
        layout = self.work.layout
        given = self._between + (self._hidden if layout.sequence_parallel else 0.0)
        largest = (
            max((one.n * one.k for one in part.products if not one.is_frozen), default=0.0) * self._width
        )
        product = given + inner + largest
        middle = given + (2 if self.work.model.is_gated else 1) * inner
        return max(product, middle)

    def embedding(self) -> PartMemory:
        """Return the bytes of the embedding."""
        part = self.work.embedding()
        kept = self._between
        weight = 0.0 if self._is_frozen else self.work.vocabulary * self.work.model.hidden_size * self._width
        whole = self._hidden if self.work.layout.tp > 1 else 0.0
        if self.work.model.embedding_norm:
            kept += sum(self._norm(gathered=False)) - (0.0 if self.copies_wide else self._between)
        return PartMemory(
            int(kept), int(kept + whole), int(weight + self._between + whole), int(self.gradients(part))
        )

    def head(self) -> PartMemory:
        """Return the bytes of final norm, head and loss."""
        part, width = self.work.head(), self._width
        norm_kept, norm_given = self._norm(self.work.layout.sequence_parallel)
        kept = norm_kept + norm_given - (0.0 if self.copies_wide else self._between)
        logits = self.work.tokens * self.work.vocabulary
        weight: float = self.work.vocabulary * self.work.model.hidden_size * width
        if self._is_frozen:
            kept, weight = kept - self._normed - norm_given, 0.0
        gradients = int(self.gradients(part))
        whole = self._hidden
        if part.hidden_loss:
            # A part of the logits at a time, and gradients of weight and hidden states.
            some = min(logits, 1 << 24) * 4
            return PartMemory(int(kept), int(kept + some), int(weight + whole + 2 * some), gradients)
        saved = logits * max(width, 4)
        if self.work.layout.pp > 1:
            # A pipeline keeps what a stage gave until its backward.
            kept += logits * width
        narrow = logits * width if self._is_narrow else 0.0
        forward = kept + 2 * saved + narrow
        # In the middle of the loss two gradients of its logits; at the head's product its weight's and its input's.
        in_loss = saved * (1 if self.work.layout.tp > 1 else 2)
        at_product = weight + narrow + whole - (saved if self._is_narrow else 0.0)
        backward = max(in_loss, at_product)
        return PartMemory(int(kept + saved), int(forward), int(backward), gradients)
