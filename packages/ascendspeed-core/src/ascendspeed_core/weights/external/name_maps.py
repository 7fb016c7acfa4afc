"""The formats' tables: name in the file, our tensors in it, how they are packed and cut.

`{layer}` is the layer's number within its pipeline stage in their names, its global number in ours; `{kind}` stands
for weight and bias. Rows whose tensors a model lacks are left out.

Sources: AscendSpeed of October 2023 (`llama_model.py`, `gpt_model.py`), ModelLink of December 2023, megatron-core 0.16
(`GPTModel` with its Transformer-Engine layers, and with its own).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.external.packing import Cut, PackedTensor, interleaved, padded, whole
from ascendspeed_core.weights.shard_layout import PipelineChunk

ROTARY = "rotary.inv_freq"
"""Not a weight: the rotary frequencies, which some formats store beside the weights."""

HEAD = "output_head.weight"
EMBEDDING = "embedding.weight"


class How(Enum):
    """Packer of a row's tensors, and how the result is cut over tensor-parallel ranks."""

    WHOLE = "whole on every rank"
    ROWS = "cut by rows"
    COLUMNS = "cut by columns; a bias is whole on every rank"
    HEADS = "for each key-value head its queries, its key, its value; cut by rows"
    HALVES = "a rank holds its rows of the first above its rows of the second"
    VOCABULARY = "a row for each id and filling, cut by rows"


@dataclass(frozen=True)
class NameRule:
    """One line of a table."""

    theirs: str
    ours: tuple[str, ...]
    how: How = How.WHOLE


@dataclass(frozen=True)
class NameMap:
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

    first: tuple[NameRule, ...]
    layer: tuple[NameRule, ...]
    last: tuple[NameRule, ...]
    head: str
    tied_head: str | None
    is_nested: bool = False

    def of_chunk(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        config: ModelConfig,
        stage: PipelineChunk,
        vocabulary_rows: int,
    ) -> Iterator[PackedTensor]:
        """Yield all tensors of one stage or chunk, uncut.

        Args:
            shapes: of all logical tensors.
            config: the model.
            stage: which layers, and whether the ends are here.
            vocabulary_rows: rows of embedding and head with filling.
        """
        pack = Packer(shapes, config, vocabulary_rows)
        if stage.is_first:
            yield from pack.rows(self.first, 0, 0)
        for place, number in enumerate(stage.layers):
            yield from pack.rows(self.layer, number, place)
        if stage.is_last:
            yield from pack.rows(self.last, 0, 0)
            if HEAD in shapes:
                yield from pack.rows((NameRule(self.head, (HEAD,), How.VOCABULARY),), 0, 0)
            elif self.tied_head is None or not stage.is_first:
                name = self.tied_head or self.head
                yield from pack.rows((NameRule(name, (EMBEDDING,), How.VOCABULARY),), 0, 0)


@dataclass(frozen=True)
class Packer:
    """Makes stored tensors from the rows of a table; rows whose tensors a model lacks give none."""

    shapes: Mapping[str, tuple[int, ...]]
    config: ModelConfig
    vocabulary_rows: int

    def rows(self, rows: tuple[NameRule, ...], number: int, place: int) -> Iterator[PackedTensor]:
        """Yield the tensors of some rows, of layer `number` of the model, which is layer `place` of its stage."""
        for row in rows:
            for kind in ("weight", "bias") if "{kind}" in row.theirs else ("",):
                names = [name.format(layer=number, kind=kind) for name in row.ours]
                names = [name for name in names if name in self.shapes]
                if names:
                    yield self._pack(row.theirs.format(layer=place, kind=kind), names, row.how, kind)

    def _pack(self, key: str, names: list[str], how: How, kind: str) -> PackedTensor:
        shapes = [self.shapes[name] for name in names]
        slices = tuple(whole(name, shape) for name, shape in zip(names, shapes, strict=True))
        if how is How.WHOLE or (how is How.COLUMNS and kind == "bias"):
            return PackedTensor(key, (slices,))
        if how is How.VOCABULARY:
            return PackedTensor(key, (padded(names[0], shapes[0], self.vocabulary_rows),), Cut.ROWS)
        if how is How.COLUMNS:
            return PackedTensor(key, (slices,), Cut.COLUMNS)
        if how is How.HEADS:
            groups = self.config.num_key_value_heads
            parts = [(name, shape, shape[0] // groups) for name, shape in zip(names, shapes, strict=True)]
            return PackedTensor(key, (interleaved(parts, groups),), Cut.ROWS)
        return PackedTensor(key, tuple((block,) for block in slices), Cut.ROWS)


_L = "layers.{layer}."
QKV = tuple(f"{_L}attention.{part}_proj.{{kind}}" for part in "qkv")
OUT = (f"{_L}attention.o_proj.{{kind}}",)
GATE, UP, DOWN = ((f"{_L}mlp.{part}_proj.{{kind}}",) for part in ("gate", "up", "down"))
NORM_1, NORM_2 = (f"{_L}attention_norm.{{kind}}",), (f"{_L}mlp_norm.{{kind}}",)
EMBEDDING_NORM, FINAL_NORM = ("embedding_norm.{kind}",), ("final_norm.{kind}",)


def ascendspeed_llama(merged_mlp: bool) -> NameMap:
    """Return AscendSpeed 2023's names for LLaMA-type models; with `--mlp-layer-fusion` gate and up are one tensor."""
    layer = "language_model.layers.{layer}."
    gate_up = (
        (NameRule(f"{layer}mlp.proj.{{kind}}", GATE + UP, How.HALVES),)
        if merged_mlp
        else (
            NameRule(f"{layer}mlp.gate_proj.{{kind}}", GATE, How.ROWS),
            NameRule(f"{layer}mlp.up_proj.{{kind}}", UP, How.ROWS),
        )
    )
    return NameMap(
        first=(NameRule("embedding.word_embeddings.weight", (EMBEDDING,), How.VOCABULARY),),
        layer=(
            NameRule(f"{layer}input_layernorm.{{kind}}", NORM_1),
            NameRule(f"{layer}attention.rotary_emb.inv_freq", (ROTARY,)),
            NameRule(f"{layer}attention.query_key_value.{{kind}}", QKV, How.HEADS),
            NameRule(f"{layer}attention.dense.{{kind}}", OUT, How.COLUMNS),
            NameRule(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            *gate_up,
            NameRule(f"{layer}mlp.down_proj.{{kind}}", DOWN, How.COLUMNS),
        ),
        last=(NameRule("language_model.final_layernorm.{kind}", FINAL_NORM),),
        head="lm_head.lm_head.weight",
        tied_head=None,
    )


def ascendspeed_gpt() -> NameMap:
    """Return AscendSpeed 2023's names for `GPTModel` (Bloom): Megatron-LM's of that time, in nested dictionaries."""
    layer = "language_model/encoder/layers.{layer}."
    return NameMap(
        first=(
            NameRule("language_model/embedding/word_embeddings/weight", (EMBEDDING,), How.VOCABULARY),
            NameRule("language_model/embedding/word_embeddings/norm.{kind}", EMBEDDING_NORM),
        ),
        layer=(
            NameRule(f"{layer}input_layernorm.{{kind}}", NORM_1),
            NameRule(f"{layer}self_attention.query_key_value.{{kind}}", QKV, How.HEADS),
            NameRule(f"{layer}self_attention.dense.{{kind}}", OUT, How.COLUMNS),
            NameRule(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            NameRule(f"{layer}mlp.dense_h_to_4h.{{kind}}", UP, How.ROWS),
            NameRule(f"{layer}mlp.dense_4h_to_h.{{kind}}", DOWN, How.COLUMNS),
        ),
        last=(NameRule("language_model/encoder/final_layernorm.{kind}", FINAL_NORM),),
        head="language_model/output_layer/weight",
        tied_head="word_embeddings_for_head/weight",
        is_nested=True,
    )


def modellink_llama(merged_mlp: bool) -> NameMap:
    """Return the names of December 2023 for LLaMA-type models, where `dense_h_to_4h` is the up projection."""
    layer = "language_model/encoder/layers.{layer}."
    gate_up = (
        (NameRule(f"{layer}mlp.proj.{{kind}}", GATE + UP, How.HALVES),)
        if merged_mlp
        else (
            NameRule(f"{layer}mlp.gate_proj.{{kind}}", GATE, How.ROWS),
            NameRule(f"{layer}mlp.dense_h_to_4h.{{kind}}", UP, How.ROWS),
        )
    )
    return NameMap(
        first=(NameRule("language_model/embedding/word_embeddings/weight", (EMBEDDING,), How.VOCABULARY),),
        layer=(
            NameRule(f"{layer}input_layernorm.{{kind}}", NORM_1),
            NameRule(f"{layer}self_attention.query_key_value.{{kind}}", QKV, How.HEADS),
            NameRule(f"{layer}self_attention.dense.{{kind}}", OUT, How.COLUMNS),
            NameRule(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            *gate_up,
            NameRule(f"{layer}mlp.dense_4h_to_h.{{kind}}", DOWN, How.COLUMNS),
        ),
        last=(NameRule("language_model/encoder/final_layernorm.{kind}", FINAL_NORM),),
        head="language_model/output_layer/weight",
        tied_head=None,
        is_nested=True,
    )


def megatron(transformer_engine: bool) -> NameMap:
    """Return the names of megatron-core's `GPTModel`.

    Its Transformer-Engine layers keep the norms in the linear layers that follow them; its own layers do not.
    """
    layer = "decoder.layers.{layer}."
    norms = (
        ("self_attention.linear_qkv.layer_norm_{kind}", "mlp.linear_fc1.layer_norm_{kind}")
        if transformer_engine
        else ("input_layernorm.{kind}", "pre_mlp_layernorm.{kind}")
    )
    return NameMap(
        first=(NameRule("embedding.word_embeddings.weight", (EMBEDDING,), How.VOCABULARY),),
        layer=(
            NameRule(f"{layer}self_attention.linear_proj.{{kind}}", OUT, How.COLUMNS),
            NameRule(f"{layer}{norms[0]}", NORM_1),
            NameRule(f"{layer}self_attention.linear_qkv.{{kind}}", QKV, How.HEADS),
            NameRule(f"{layer}self_attention.q_layernorm.{{kind}}", (f"{_L}attention.q_norm.{{kind}}",)),
            NameRule(f"{layer}self_attention.k_layernorm.{{kind}}", (f"{_L}attention.k_norm.{{kind}}",)),
            NameRule(f"{layer}{norms[1]}", NORM_2),
            NameRule(f"{layer}mlp.linear_fc1.{{kind}}", GATE + UP, How.HALVES),
            NameRule(f"{layer}mlp.linear_fc2.{{kind}}", DOWN, How.COLUMNS),
        ),
        last=(NameRule("decoder.final_layernorm.{kind}", FINAL_NORM),),
        head="output_layer.weight",
        tied_head="output_layer.weight",
    )
