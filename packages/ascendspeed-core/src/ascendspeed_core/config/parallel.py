"""How one model is spread over devices; pure arithmetic, no torch."""

from dataclasses import dataclass

from pydantic import Field

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import ConfigError


class ParallelConfig(Config):
    """Sizes of the parallel dimensions; what is left of the devices is data parallel."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Devices that share every layer (tp).")
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="Stages that the layers are cut into (pp); they need not be equally long."
    )
    sequence_parallel: bool = Field(
        False,
        description="Cut the sequence too, where layers are not cut: less memory for activations. Needs tp > 1.",
    )
    use_distributed_optimizer: bool = Field(
        False, description="Cut optimizer state and master weights over the data-parallel devices (ZeRO-1)."
    )

    def layout(self, world_size: int) -> "Layout":
        """Return the layout on `world_size` devices.

        Raises:
            ConfigError: tp times pp does not divide the number of devices, or a flag needs more of them.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if pp == 1 and world_size % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} does not divide the {world_size} processes; "
                f"choose one of {', '.join(map(str, divisors(world_size)))} or start a multiple of {tp}"
            )
        if world_size % (tp * pp):
            raise ConfigError(
                f"tensor_model_parallel_size={tp} times pipeline_model_parallel_size={pp} is {tp * pp}, which does not "
                f"divide the {world_size} processes; start a multiple of {tp * pp}"
            )
        if self.sequence_parallel and tp == 1:
            raise ConfigError(
                "sequence_parallel=true cuts the sequence over the tensor-parallel devices, of which there is one; "
                "give --tensor-model-parallel-size 2 or more, or leave it out"
            )
        return Layout(
            tp=tp,
            pp=pp,
            dp=world_size // (tp * pp),
            sequence_parallel=self.sequence_parallel,
            sharded_optimizer=self.use_distributed_optimizer,
        )

    def check_model(self, model: ModelConfig) -> None:
        """Raise `ConfigError` when the model cannot be cut this way."""
        stages(model.num_layers, self.pipeline_model_parallel_size)
        tp, heads = self.tensor_model_parallel_size, model.num_key_value_heads
        for name in ("num_attention_heads", "ffn_hidden_size"):
            size = getattr(model, name)
            if size % tp:
                raise ConfigError(
                    f"tensor_model_parallel_size={tp} does not divide {name}={size}; {_fitting(model)}"
                )
        if tp % heads and heads % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} neither divides num_key_value_heads={heads} nor is a multiple of it; "
                f"{_fitting(model)}"
            )

    def check_sequence(self, seq_length: int) -> None:
        """Raise `ConfigError` when the sequence cannot be cut."""
        tp = self.tensor_model_parallel_size
        if self.sequence_parallel and seq_length % tp:
            raise ConfigError(
                f"sequence_parallel=true cuts seq_length={seq_length} into tensor_model_parallel_size={tp} equal "
                f"parts, which it does not divide into; choose {seq_length // tp * tp or tp}"
            )


@dataclass(frozen=True)
class Layout:
    """Number of devices along each dimension; tp varies fastest with the rank, then dp, then pp, as in Megatron-LM.

    Attributes:
        tp: devices that share every layer.
        pp: stages of layers.
        dp: shares of the batch.
        sequence_parallel: the tp devices cut the sequence between layers.
        sharded_optimizer: the dp devices cut the optimizer's state.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    sharded_optimizer: bool = False

    @property
    def world_size(self) -> int:
        """All devices."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = f"tp{self.tp} x pp{self.pp} x dp{self.dp}"
        return sizes + " + sp" * self.sequence_parallel + " + sharded optimizer" * self.sharded_optimizer


@dataclass(frozen=True)
class Stage:
    """The part of a model that one pipeline stage holds.

    Attributes:
        index: number of the stage.
        count: stages in all.
        layers: global numbers of its layers.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the final norm and the head are here."""
        return self.index == self.count - 1


def stages(num_layers: int, pp: int) -> list[Stage]:
    """Cut the layers into stages as equal as can be; the first ones are longer, as the head works in the last.

    Raises:
        ConfigError: a stage would be without a layer.
    """
    if pp > num_layers:
        raise ConfigError(
            f"pipeline_model_parallel_size={pp} leaves a stage without any of the num_layers={num_layers} layers; "
            f"choose {num_layers} or less"
        )
    edges = [-(-num_layers * number // pp) for number in range(pp + 1)]
    return [Stage(number, pp, range(edges[number], edges[number + 1])) for number in range(pp)]


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _fitting(model: ModelConfig) -> str:
    heads = model.num_key_value_heads
    fitting = [
        n
        for n in divisors(model.num_attention_heads)
        if model.ffn_hidden_size % n == 0 and (heads % n == 0 or n % heads == 0)
    ]
    return f"choose {', '.join(map(str, fitting))}"
