"""How model-parallel checkpoints distribute layers over files; pure arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from ascendspeed_core.config.layout import stages
from ascendspeed_data.errors import ConfigError


@dataclass(frozen=True)
class PipelineChunk:
    """What one pipeline stage, or one chunk of it under a virtual pipeline, holds.

    Attributes:
        layers: global numbers of its layers.
        is_first: the embedding is here.
        is_last: the final norm and the head are here.
    """

    layers: range
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class ShardLayout:
    """Tensor-parallel ranks, pipeline stages, chunks of each stage, and expert-parallel ranks.

    Attributes:
        tp: tensor-parallel ranks, which cut experts too.
        chunks: for each stage the layers of each of its chunks; one chunk without a virtual pipeline.
        ep: ranks over which the experts of a layer are spread; what is no expert each of them has whole.
    """

    tp: int
    chunks: tuple[tuple[range, ...], ...]
    ep: int = 1

    @property
    def pp(self) -> int:
        """Pipeline stages."""
        return len(self.chunks)

    @property
    def vpp(self) -> int:
        """Chunks of each stage."""
        return len(self.chunks[0])

    def stage(self, pp_rank: int, chunk: int) -> PipelineChunk:
        """Return what a chunk holds; the embedding is in the first one of all, norm and head in the last."""
        return PipelineChunk(
            self.chunks[pp_rank][chunk],
            is_first=pp_rank == 0 and chunk == 0,
            is_last=pp_rank == self.pp - 1 and chunk == self.vpp - 1,
        )

    def folder(self, tp_rank: int, pp_rank: int, ep_rank: int = 0) -> str:
        """Return the name of a rank's folder, as Megatron-LM writes it."""
        stage = f"_{pp_rank:03d}" if self.pp > 1 else ""
        return f"mp_rank_{tp_rank:02d}{stage}" + (f"_{ep_rank:03d}" if self.ep > 1 else "")

    def record(self, tp_rank: int, pp_rank: int, ep_rank: int = 0) -> dict[str, int]:
        """Return what a rank's file says of itself, where asd-ckpt wrote it."""
        of_experts = {"expert_rank": ep_rank} if self.ep > 1 else {}
        return {"tensor_rank": tp_rank, "stage": pp_rank, **of_experts}

    def experts(self, count: int, ep_rank: int) -> range:
        """Return which of a layer's experts an expert-parallel rank has.

        Raises:
            ConfigError: the ranks do not divide them.
        """
        if count % self.ep:
            raise ConfigError(
                f"expert_model_parallel_size={self.ep} does not divide the {count} experts of a layer; choose a divisor"
            )
        share = count // self.ep
        return range(ep_rank * share, (ep_rank + 1) * share)

    def __str__(self) -> str:
        uneven = len({len(layers) for stage in self.chunks for layers in stage}) > 1
        sizes = f" ({', '.join(str(sum(map(len, stage))) for stage in self.chunks)} layers)" if uneven else ""
        virtual = f" x vpp{self.vpp}" if self.vpp > 1 else ""
        return f"tp{self.tp} x pp{self.pp}{sizes}{virtual}" + (f" x ep{self.ep}" if self.ep > 1 else "")


def shard_layout(
    num_layers: int,
    tp: int = 1,
    pp: int = 1,
    layers_per_chunk: int | None = None,
    layers_of_stages: Sequence[int] | None = None,
    ep: int = 1,
) -> ShardLayout:
    """Return the layout of a checkpoint to be written.

    Args:
        num_layers: layers of the model.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        layers_per_chunk: `--num-layers-per-virtual-pipeline-stage`.
        layers_of_stages: layers of each stage; by default as equal as possible.
        ep: expert-parallel ranks.

    Raises:
        ConfigError: the sizes do not fit.
    """
    if layers_of_stages is not None:
        if layers_per_chunk is not None:
            raise ConfigError(
                "partition_layers and num_layers_per_virtual_pipeline_stage exclude each other; give one of them"
            )
        if len(layers_of_stages) != pp or sum(layers_of_stages) != num_layers or min(layers_of_stages) < 1:
            raise ConfigError(
                f"partition_layers={','.join(map(str, layers_of_stages))} must be pipeline_model_parallel_size={pp} "
                f"numbers from 1 that add up to the model's {num_layers} layers"
            )
        return from_counts(tp, [[count] for count in layers_of_stages], ep)
    if layers_per_chunk is None:
        return ShardLayout(
            tp,
            tuple((stage.layers,) for stage in stages(num_layers, pp, f"pipeline_model_parallel_size={pp}")),
            ep,
        )
    if layers_per_chunk < 1 or pp < 2 or num_layers % (pp * layers_per_chunk):
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={layers_per_chunk} times pipeline_model_parallel_size={pp} must "
            f"divide the model's {num_layers} layers, with 2 stages or more; choose another size"
        )
    return from_counts(tp, [[layers_per_chunk] * (num_layers // (pp * layers_per_chunk))] * pp, ep)


def from_counts(tp: int, counts: Sequence[Sequence[int]], ep: int = 1) -> ShardLayout:
    """Return the layout with these numbers of layers by stage and chunk; layers fill chunk 0 of all stages first."""
    found: list[list[range]] = [[] for _ in counts]
    start = 0
    for chunk in range(len(counts[0])):
        for stage, of_stage in enumerate(counts):
            found[stage].append(range(start, start + of_stage[chunk]))
            start += of_stage[chunk]
    return ShardLayout(tp, tuple(tuple(stage) for stage in found), ep)
