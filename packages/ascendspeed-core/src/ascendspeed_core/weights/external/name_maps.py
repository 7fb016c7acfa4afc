"""Name maps: for each external format its tensor names, and our tensors in each.

How tensors are cut over tensor-parallel ranks follows from `config.sharding`.

Names in braces are indices. `{layer}` is a global number in our names, and the number within its pipeline stage in
theirs; `{kind}` stands for weight and bias. A model may have further ones, such as `{expert}`, which count alike. An
index that only our names have is a leading dimension of their tensor, which is fused:

    NameRule("decoder.layers.{layer}.mlp.experts.linear_fc2.weight",            # [experts, H, F]
             ("layers.{layer}.mlp.experts.{expert}.down_proj.weight",))         # [H, F] each

An index that only their names have is a leading dimension of our tensor. Rules whose tensors a model lacks are left
out.

Sources: AscendSpeed of October 2023 (`llama_model.py`, `gpt_model.py`), ModelLink of December 2023, megatron-core 0.16
(`GPTModel` with its Transformer-Engine layers, and with its own).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import SHARDING, ModuleSharding, Partition, sharded_dim, tensor_sharding
from ascendspeed_core.models.families.base import index_names
from ascendspeed_core.weights.external.packing import Cut, PackedTensor, interleaved, padded, whole
from ascendspeed_core.weights.shard_layout import PipelineChunk, ShardLayout

ROTARY = "rotary.inv_freq"
"""Not a weight: the rotary frequencies, which some formats store beside the weights."""

HEAD = "output_head.weight"
EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class NameRule:
    """One line of a name map.

    Attributes:
        theirs: name in the file.
        ours: tensors that it holds. Of several, a tensor-parallel rank holds its rows of the first above its rows of
            the second.
        by_head: it holds for each key-value head its queries, its key, its value instead.
        transposed: its matrices are stored as [in, out], ours as [out, in].
        only: layers of which kind have it: dense or of experts, whose keys are made for heads or from latents; `None`
            for all.
    """

    theirs: str
    ours: tuple[str, ...]
    by_head: bool = False
    transposed: bool = False
    only: Literal["dense", "experts", "heads", "latents"] | None = None


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
        is_nested: a `/` in names separates nested dictionaries.
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
        chunk: PipelineChunk,
        vocabulary_rows: int,
        indices: Mapping[str, range] | None = None,
        sharding: Mapping[str, ModuleSharding] = SHARDING,
    ) -> Iterator[PackedTensor]:
        """Yield all tensors of one pipeline stage or chunk, before they are cut over tensor-parallel ranks.

        Args:
            shapes: of all logical tensors, by name.
            config: the model.
            chunk: which layers it holds, and whether the embedding and the head are among them.
            vocabulary_rows: rows of embedding and head with padding.
            indices: values of the indices besides `{layer}` and `{kind}`, by name.
            sharding: how each module is cut.
        """
        indices = expert_indices(config) if indices is None else indices
        packer = Packer(shapes, config, vocabulary_rows, indices, sharding)
        if chunk.is_first:
            yield from packer.pack(self.first)
        for position, number in enumerate(chunk.layers):
            yield from packer.pack(self.layer, number, position)
        if chunk.is_last:
            yield from packer.pack(self.last)
            if HEAD in shapes:
                yield from packer.pack((NameRule(self.head, (HEAD,)),))
            elif self.tied_head is None or not chunk.is_first:
                yield from packer.pack((NameRule(self.tied_head or self.head, (EMBEDDING,)),))


def expert_indices(
    config: ModelConfig, layout: ShardLayout | None = None, ep_rank: int = 0
) -> dict[str, range]:
    """Return the values of `{expert}`: of all experts of a layer, or of those that one expert-parallel rank has."""
    if config.experts is None:
        return {}
    count = config.experts.count
    return {"expert": range(count) if layout is None else layout.experts(count, ep_rank)}


@dataclass(frozen=True)
class Packer:
    """Describes stored tensors by the rules of a name map; rules whose tensors a model lacks give none.

    Attributes:
        shapes: of all logical tensors, by name.
        config: the model.
        vocabulary_rows: rows of embedding and head with padding.
        indices: values of the indices besides `{layer}` and `{kind}`, by name.
        sharding: how each module is cut.
    """

    shapes: Mapping[str, tuple[int, ...]]
    config: ModelConfig
    vocabulary_rows: int
    indices: Mapping[str, range] = field(default_factory=dict)
    sharding: Mapping[str, ModuleSharding] = field(default_factory=lambda: SHARDING)

    def pack(self, rules: Sequence[NameRule], layer: int = 0, position: int = 0) -> Iterator[PackedTensor]:
        """Yield the stored tensors of some rules.

        Args:
            rules: of the name map.
            layer: global number of the layer.
            position: number of the layer within its stage.
        """
        for rule in rules:
            if rule.only is not None and rule.only not in self._kinds(layer):
                continue
            in_theirs, in_ours = _further_indices(rule.theirs), _further_indices(rule.ours[0])
            fused = [name for name in in_ours if name not in in_theirs]
            ranges = [self.indices.get(name, range(0)) for name in in_theirs]
            leading = tuple(len(self.indices.get(name, ())) for name in fused)
            for kind in ("weight", "bias") if "{kind}" in rule.theirs else ("",):
                for values in itertools.product(*map(enumerate, ranges)):
                    key = {name: at for name, (at, _) in zip(in_theirs, values, strict=True)}
                    known = {name: value for name, (_, value) in zip(in_theirs, values, strict=True)}
                    stack = tuple(value for name, value in known.items() if name not in in_ours)
                    names = self._names(rule, {**known, "layer": layer, "kind": kind}, fused)
                    if names:
                        theirs = rule.theirs.format(**key, layer=position, kind=kind)
                        packed = self._pack(theirs, names, stack, rule.by_head)
                        yield replace(packed, leading=leading, transposed=rule.transposed)

    def _kinds(self, layer: int) -> tuple[str, str]:
        """Return which kinds a layer is of, see `NameRule.only`."""
        return (
            "experts" if self.config.has_experts(layer) else "dense",
            "heads" if self.config.kv_latent_dim is None else "latents",
        )

    def _names(self, rule: NameRule, indices: Mapping[str, object], fused: Sequence[str]) -> list[str]:
        """Return our tensors in a stored one, in order; those that the model lacks are left out."""
        names = [
            name.format(**indices, **dict(zip(fused, values, strict=True)))
            for values in itertools.product(*(self.indices.get(name, ()) for name in fused))
            for name in rule.ours
        ]
        return [name for name in names if name in self.shapes]

    def _pack(self, key: str, names: list[str], stack: tuple[int, ...], by_head: bool) -> PackedTensor:
        shapes, dim = (
            [self.shapes[name][len(stack) :] for name in names],
            sharded_dim(names[0], self.sharding),
        )
        slices = tuple(whole(name, shape, stack) for name, shape in zip(names, shapes, strict=True))
        if dim is None:
            return PackedTensor(key, (slices,))
        if dim == 1:
            return PackedTensor(key, (slices,), Cut.COLUMNS)
        if tensor_sharding(names[0], self.sharding).partition is Partition.VOCABULARY:
            return PackedTensor(key, (padded(names[0], shapes[0], self.vocabulary_rows),), Cut.ROWS)
        if by_head:
            groups = self.config.num_key_value_heads
            parts = [(name, shape, shape[0] // groups) for name, shape in zip(names, shapes, strict=True)]
            return PackedTensor(key, (interleaved(parts, groups),), Cut.ROWS)
        return PackedTensor(key, tuple((piece,) for piece in slices), Cut.ROWS)


def _further_indices(pattern: str) -> tuple[str, ...]:
    """Return the indices of a name pattern besides the layer's number and the kind."""
    return tuple(name for name in index_names(pattern) if name not in ("layer", "kind"))


_L = "layers.{layer}."
QKV = tuple(f"{_L}attention.{part}_proj.{{kind}}" for part in "qkv")
OUT = (f"{_L}attention.o_proj.{{kind}}",)
GATE, UP, DOWN = ((f"{_L}mlp.{part}_proj.{{kind}}",) for part in ("gate", "up", "down"))
NORM_1, NORM_2 = (f"{_L}attention_norm.{{kind}}",), (f"{_L}mlp_norm.{{kind}}",)
EMBEDDING_NORM, FINAL_NORM = ("embedding_norm.{kind}",), ("final_norm.{kind}",)


def _gate_up(layer: str, merged_mlp: bool, up: str) -> tuple[NameRule, ...]:
    """Return the rules of the gate and up projections, one tensor with `--mlp-layer-fusion`."""
    if merged_mlp:
        return (NameRule(f"{layer}mlp.proj.{{kind}}", GATE + UP),)
    return NameRule(f"{layer}mlp.gate_proj.{{kind}}", GATE), NameRule(f"{layer}mlp.{up}.{{kind}}", UP)


def ascendspeed_llama(merged_mlp: bool) -> NameMap:
    """Return AscendSpeed 2023's names for LLaMA-type models; with `--mlp-layer-fusion` gate and up are one tensor."""
    layer = "language_model.layers.{layer}."
    return NameMap(
        first=(NameRule("embedding.word_embeddings.weight", (EMBEDDING,)),),
        layer=(
            NameRule(f"{layer}input_layernorm.{{kind}}", NORM_1),
            NameRule(f"{layer}attention.rotary_emb.inv_freq", (ROTARY,)),
            NameRule(f"{layer}attention.query_key_value.{{kind}}", QKV, by_head=True),
            NameRule(f"{layer}attention.dense.{{kind}}", OUT),
            NameRule(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            *_gate_up(layer, merged_mlp, up="up_proj"),
            NameRule(f"{layer}mlp.down_proj.{{kind}}", DOWN),
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
            NameRule("language_model/embedding/word_embeddings/weight", (EMBEDDING,)),
            NameRule("language_model/embedding/word_embeddings/norm.{kind}", EMBEDDING_NORM),
        ),
        layer=(
            NameRule(f"{layer}input_layernorm.{{kind}}", NORM_1),
            NameRule(f"{layer}self_attention.query_key_value.{{kind}}", QKV, by_head=True),
            NameRule(f"{layer}self_attention.dense.{{kind}}", OUT),
            NameRule(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            NameRule(f"{layer}mlp.dense_h_to_4h.{{kind}}", UP),
            NameRule(f"{layer}mlp.dense_4h_to_h.{{kind}}", DOWN),
        ),
        last=(NameRule("language_model/encoder/final_layernorm.{kind}", FINAL_NORM),),
        head="language_model/output_layer/weight",
        tied_head="word_embeddings_for_head/weight",
        is_nested=True,
    )


def modellink_llama(merged_mlp: bool) -> NameMap:
    """Return the names of December 2023 for LLaMA-type models, where `dense_h_to_4h` is the up projection."""
    layer = "language_model/encoder/layers.{layer}."
    return NameMap(
        first=(NameRule("language_model/embedding/word_embeddings/weight", (EMBEDDING,)),),
        layer=(
            NameRule(f"{layer}input_layernorm.{{kind}}", NORM_1),
            NameRule(f"{layer}self_attention.query_key_value.{{kind}}", QKV, by_head=True),
            NameRule(f"{layer}self_attention.dense.{{kind}}", OUT),
            NameRule(f"{layer}post_attention_layernorm.{{kind}}", NORM_2),
            *_gate_up(layer, merged_mlp, up="dense_h_to_4h"),
            NameRule(f"{layer}mlp.dense_4h_to_h.{{kind}}", DOWN),
        ),
        last=(NameRule("language_model/encoder/final_layernorm.{kind}", FINAL_NORM),),
        head="language_model/output_layer/weight",
        tied_head=None,
        is_nested=True,
    )


def _megatron_experts(layer: str, grouped: bool) -> tuple[NameRule, ...]:
    """Return the rules of router and experts; these are one module (`TEGroupedMLP`) or many (`SequentialMLP`)."""
    gate, up, down = (f"{_L}mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down"))
    shared = tuple(f"{_L}mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down"))
    first, second = (
        f"{layer}mlp.experts.linear_fc{number}.weight{{expert}}"
        if grouped
        else f"{layer}mlp.experts.local_experts.{{expert}}.linear_fc{number}.weight"
        for number in (1, 2)
    )
    return (
        NameRule(f"{layer}mlp.router.weight", (f"{_L}mlp.router.weight",)),
        NameRule(f"{layer}mlp.router.expert_bias", (f"{_L}mlp.router.bias",)),
        NameRule(first, (gate, up)),
        NameRule(second, (down,)),
        NameRule(f"{layer}mlp.shared_experts.linear_fc1.weight", shared[:2]),
        NameRule(f"{layer}mlp.shared_experts.linear_fc2.weight", shared[2:]),
        NameRule(f"{layer}mlp.shared_experts.gate_weight", (f"{_L}mlp.shared_expert_gate.weight",)),
    )


def _megatron_latents(layer: str) -> tuple[NameRule, ...]:
    """Return the rules of multi-head latent attention, for megatron-core's own layers."""
    names = {
        "linear_q_proj": "q_proj", "linear_q_down_proj": "q_down_proj", "q_layernorm": "q_latent_norm",
        "linear_q_up_proj": "q_up_proj", "linear_kv_down_proj": "kv_down_proj", "kv_layernorm": "kv_latent_norm",
        "linear_kv_up_proj": "kv_up_proj",
    }  # fmt: skip
    return tuple(
        NameRule(
            f"{layer}self_attention.{theirs}.{{kind}}", (f"{_L}attention.{ours}.{{kind}}",), only="latents"
        )
        for theirs, ours in names.items()
    )


def megatron(transformer_engine: bool, grouped_experts: bool | None = None) -> NameMap:
    """Return the names of megatron-core's `GPTModel`.

    Its Transformer-Engine layers keep the norms in the linear layers that follow them, except before experts; its own
    layers do not.

    Args:
        transformer_engine: which layers.
        grouped_experts: whether the experts of a layer are one module; by default those of Transformer Engine are.
    """
    layer = "decoder.layers.{layer}."
    norms = (
        ("self_attention.linear_qkv.layer_norm_{kind}", "mlp.linear_fc1.layer_norm_{kind}")
        if transformer_engine
        else ("input_layernorm.{kind}", "pre_mlp_layernorm.{kind}")
    )
    return NameMap(
        first=(NameRule("embedding.word_embeddings.weight", (EMBEDDING,)),),
        layer=(
            NameRule(f"{layer}self_attention.linear_proj.{{kind}}", OUT),
            NameRule(f"{layer}{norms[0]}", NORM_1),
            NameRule(f"{layer}self_attention.linear_qkv.{{kind}}", QKV, by_head=True, only="heads"),
            *_megatron_latents(layer),
            NameRule(f"{layer}self_attention.q_layernorm.{{kind}}", (f"{_L}attention.q_norm.{{kind}}",)),
            NameRule(f"{layer}self_attention.k_layernorm.{{kind}}", (f"{_L}attention.k_norm.{{kind}}",)),
            NameRule(f"{layer}{norms[1]}", NORM_2, only="dense"),
            NameRule(f"{layer}pre_mlp_layernorm.{{kind}}", NORM_2, only="experts"),
            *_megatron_experts(layer, transformer_engine if grouped_experts is None else grouped_experts),
            NameRule(f"{layer}mlp.linear_fc1.{{kind}}", GATE + UP),
            NameRule(f"{layer}mlp.linear_fc2.{{kind}}", DOWN),
        ),
        last=(NameRule("decoder.final_layernorm.{kind}", FINAL_NORM),),
        head="output_layer.weight",
        tied_head="output_layer.weight",
    )


def megatron_distributed(own_layers: bool = False) -> NameMap:
    """Return the names in `torch_dist` checkpoints of `GPTModel`: those of its Transformer-Engine layers.

    The experts of a layer are one tensor, [E, out, in], whatever their modules are.

    Args:
        own_layers: of megatron-core's own layers, where the norm before experts is called like that of an MLP.
    """

    def renamed(rule: NameRule) -> NameRule:
        theirs = rule.theirs
        if ".mlp.experts." in theirs:
            theirs = theirs.replace(".mlp.experts.", ".mlp.experts.experts.").replace("{expert}", "")
        if own_layers:
            theirs = theirs.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        return replace(rule, theirs=theirs)

    names = megatron(transformer_engine=True)
    return replace(names, layer=tuple(map(renamed, names.layer)))
