"""The formats' tables: name in the file, and our tensors in it. How they are cut follows from `config.sharding`.

`{layer}` is the layer's number within its pipeline stage in their names, its global number in ours; `{kind}` stands
for weight and bias. Rows whose tensors a model lacks are left out.

Sources: AscendSpeed of October 2023 (`llama_model.py`, `gpt_model.py`), ModelLink of December 2023, megatron-core 0.16
(`GPTModel` with its Transformer-Engine layers, and with its own).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import Partition, sharded_dim, tensor_sharding
from ascendspeed_core.weights.external.packing import Block, Cut, Packed, interleaved, padded, whole

ROTARY = "rotary.inv_freq"
"""Not a weight: the rotary frequencies, which some formats store beside the weights."""

HEAD = "output_head.weight"
EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        theirs: name in the file.
        ours: tensors that it holds. Of several, a tensor-parallel rank holds its rows of the first above its rows of
            the second.
        by_head: it holds for each key-value head its queries, its key, its value instead.
    """

    theirs: str
    ours: tuple[str, ...]
    by_head: bool = False


@dataclass(frozen=True)
class Table:
    """Names of a format for one kind of model.

    Attributes:
        first: of the first stage.
        layer: of every layer.
        last: of the last stage.
        head: name of the head's weight in the last stage.
        tied_head: name of the copy of the embedding that a last stage holds for a tied head, if it is not the first
            stage too; `None` when the format has no tied heads and always stores one.
        is_nested: a `/` in names separates dictionaries inside one another.
    """

    first: tuple[Row, ...]
    layer: tuple[Row, ...]
    last: tuple[Row, ...]
    head: str
    tied_head: str | None
    is_nested: bool = False

    def of_stage(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: ModelConfig,
        stage: "StageLayers",
        vocabulary_rows: int,
    ) -> Iterator[Packed]:
        """Yield all tensors of one stage or chunk, uncut.

        Args:
            shapes: of all logical tensors.
            config: the model.
            stage: which layers, and whether the ends are here.
            vocabulary_rows: rows of embedding and head with filling.
        """
        pack = Packing(shapes, config, vocabulary_rows)
        if stage.is_first:
            yield from pack.rows(self.first, 0, 0)
        for place, number in enumerate(stage.layers):
            yield from pack.rows(self.layer, number, place)
        if stage.is_last:
            yield from pack.rows(self.last, 0, 0)
            if HEAD in shapes:
                yield from pack.rows((Row(self.head, (HEAD,)),), 0, 0)
            elif self.tied_head is None or not stage.is_first:
                name = self.tied_head or self.head
                yield from pack.rows((Row(name, (EMBEDDING,)),), 0, 0)


@dataclass(frozen=True)
class StageLayers:
    """What one pipeline stage, or one virtual chunk of it, holds."""

    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Packing:
    """Makes stored tensors from the rows of a table; rows whose tensors a model lacks give none."""

    shapes: Mapping[str, tuple[int, ...]]
    config: ModelConfig
    vocabulary_rows: int

    def rows(self, rows: tuple[Row, ...], number: int, place: int) -> Iterator[Packed]:
        """Yield the tensors of some rows, of layer `number` of the model, which is layer `place` of its stage."""
        for row in rows:
            for kind in ("weight", "bias") if "{kind}" in row.theirs else ("",):
                names = [name.format(layer=number, kind=kind) for name in row.ours]
                names = [name for name in names if name in self.shapes]
                if names:
                    yield self._pack(row.theirs.format(layer=place, kind=kind), names, row.by_head)

    def _pack(self, key: str, names: list[str], by_head: bool) -> Packed:
        shapes, dim = [self.shapes[name] for name in names], sharded_dim(names[0])
        blocks = tuple(whole(name, shape) for name, shape in zip(names, shapes, strict=True))
        if dim is None:
            return Packed(key, (blocks,))
        if dim == 1:
            return Packed(key, (blocks,), Cut.COLUMNS)
        if tensor_sharding(names[0]).partition is Partition.VOCABULARY:
            return Packed(key, (padded(names[0], shapes[0], self.vocabulary_rows),), Cut.ROWS)
        if by_head:
            groups = self.config.num_key_value_heads
            parts = [(name, shape, shape[0] // groups) for name, shape in zip(names, shapes, strict=True)]
            return Packed(key, (interleaved(parts, groups),), Cut.ROWS)
        return Packed(key, tuple((block,) for block in blocks), Cut.ROWS)


_L = "layers.{layer}."
QKV = tuple(f"{_L}attention.{part}_proj.{{kind}}" for part in "qkv")
OUT = (f"{_L}attention.o_proj.{{kind}}",)
GATE, UP, DOWN = ((f"{_L}mlp.{part}_proj.{{kind}}",) for part in ("gate", "up", "down"))
NORM_1, NORM_2 = (f"{_L}attention_norm.{{kind}}",), (f"{_L}mlp_norm.{{kind}}",)
EMBEDDING_NORM, FINAL_NORM = ("embedding_norm.{kind}",), ("final_norm.{kind}",)


def ascendspeed_llama(merged_mlp: bool) -> Table:
    """Return AscendSpeed 2023's names for LLaMA-type models; with `--mlp-layer-fusion` gate and up are one tensor."""
    layer = "language_model.layers.{layer}."
    gate_up = (
        (Row(f"{layer}mlp.proj.{{kind}}", GATE + UP),)
        if merged_mlp
        else (
            Row(f"{layer}mlp.gate_proj.{{kind}}", GATE),
            Row(f"{layer}mlp.up_proj.{{kind}}", UP),
        )
    )
    return Table(
        first=(Row("embedding.word_embeddings.weight", (EMBEDDING,)),),
        layer=(
            Row(f"{layer}input_layernorm.{{kind}}", NORM_1),
            Row(f"{layer}attention.rotary_emb.inv_freq", (ROTARY,)),
            Row(f"{layer}attention.query_key_value.{{kind}}", QKV, by_head=True),
            Row(f"{layer}attention.dense.{{kind}}", OUT),
            Row(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            *gate_up,
            Row(f"{layer}mlp.down_proj.{{kind}}", DOWN),
        ),
        last=(Row("language_model.final_layernorm.{kind}", FINAL_NORM),),
        head="lm_head.lm_head.weight",
        tied_head=None,
    )


def ascendspeed_gpt() -> Table:
    """Return AscendSpeed 2023's names for `GPTModel` (Bloom): Megatron-LM's of that time, in nested dictionaries."""
    layer = "language_model/encoder/layers.{layer}."
    return Table(
        first=(
            Row("language_model/embedding/word_embeddings/weight", (EMBEDDING,)),
            Row("language_model/embedding/word_embeddings/norm.{kind}", EMBEDDING_NORM),
        ),
        layer=(
            Row(f"{layer}input_layernorm.{{kind}}", NORM_1),
            Row(f"{layer}self_attention.query_key_value.{{kind}}", QKV, by_head=True),
            Row(f"{layer}self_attention.dense.{{kind}}", OUT),
            Row(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            Row(f"{layer}mlp.dense_h_to_4h.{{kind}}", UP),
            Row(f"{layer}mlp.dense_4h_to_h.{{kind}}", DOWN),
        ),
        last=(Row("language_model/encoder/final_layernorm.{kind}", FINAL_NORM),),
        head="language_model/output_layer/weight",
        tied_head="word_embeddings_for_head/weight",
        is_nested=True,
    )


def modellink_llama(merged_mlp: bool) -> Table:
    """Return the names of December 2023 for LLaMA-type models, where `dense_h_to_4h` is the up projection."""
    layer = "language_model/encoder/layers.{layer}."
    gate_up = (
        (Row(f"{layer}mlp.proj.{{kind}}", GATE + UP),)
        if merged_mlp
        else (
            Row(f"{layer}mlp.gate_proj.{{kind}}", GATE),
            Row(f"{layer}mlp.dense_h_to_4h.{{kind}}", UP),
        )
    )
    return Table(
        first=(Row("language_model/embedding/word_embeddings/weight", (EMBEDDING,)),),
        layer=(
            Row(f"{layer}input_layernorm.{{kind}}", NORM_1),
            Row(f"{layer}self_attention.query_key_value.{{kind}}", QKV, by_head=True),
            Row(f"{layer}self_attention.dense.{{kind}}", OUT),
            Row(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            *gate_up,
            Row(f"{layer}mlp.dense_4h_to_h.{{kind}}", DOWN),
        ),
        last=(Row("language_model/encoder/final_layernorm.{kind}", FINAL_NORM),),
        head="language_model/output_layer/weight",
        tied_head=None,
        is_nested=True,
    )


def megatron(transformer_engine: bool) -> Table:
    """Return the names of megatron-core's `GPTModel`.

    Its Transformer-Engine layers keep the norms in the linear layers that follow them; its own layers do not.
    """
    layer = "decoder.layers.{layer}."
    norms = (
        ("self_attention.linear_qkv.layer_norm_{kind}", "mlp.linear_fc1.layer_norm_{kind}")
        if transformer_engine
        else ("input_layernorm.{kind}", "pre_mlp_layernorm.{kind}")
    )
    return Table(
        first=(Row("embedding.word_embeddings.weight", (EMBEDDING,)),),
        layer=(
            Row(f"{layer}self_attention.linear_proj.{{kind}}", OUT),
            Row(f"{layer}{norms[0]}", NORM_1),
            Row(f"{layer}self_attention.linear_qkv.{{kind}}", QKV, by_head=True),
            Row(f"{layer}self_attention.q_layernorm.{{kind}}", (f"{_L}attention.q_norm.{{kind}}",)),
            Row(f"{layer}self_attention.k_layernorm.{{kind}}", (f"{_L}attention.k_norm.{{kind}}",)),
            Row(f"{layer}{norms[1]}", NORM_2),
            Row(f"{layer}mlp.linear_fc1.{{kind}}", GATE + UP),
            Row(f"{layer}mlp.linear_fc2.{{kind}}", DOWN),
        ),
        last=(Row("decoder.final_layernorm.{kind}", FINAL_NORM),),
        head="output_layer.weight",
        tied_head="output_layer.weight",
    )


def filling(block: Block) -> bool:
    """Tell whether a block is filling, which stands for nothing."""
    return block.repeats > 0
