"""The model sizes that the 2023 scripts name, and checks of the flags that describe an input."""

from dataclasses import dataclass
from types import MappingProxyType

from ascendspeed_ckpt.config import InputOptions
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.shard_layout import ShardLayout
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError, did_you_mean


@dataclass(frozen=True)
class Size:
    """Sizes of a model; `ffn_hidden_size` of LLaMA."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int


SIZES = MappingProxyType(
    {
        "7B": (Size(32, 4096, 32, 11008), Size(30, 4096, 32, 16384)),
        "13B": (Size(40, 5120, 40, 13824), Size(40, 5120, 40, 13696)),
        "30B": (Size(60, 6656, 52, 17920),),
        "33B": (Size(60, 6656, 52, 17920),),
        "65B": (Size(80, 8192, 64, 22016),),
        "70B": (Size(80, 8192, 64, 28672),),
        "176B": (Size(70, 14336, 112, 57344),),
    }
)
"""By name: LLaMA's size first, then those of other families that share the name."""

LLAMA_VOCABULARY = 32000


def config_of_type(options: InputOptions) -> ModelConfig | None:
    """Return LLaMA of a named size, for checkpoints of 2023 that say nothing of themselves, or `None`.

    Raises:
        ConfigError: no such size.
    """
    if options.type is None:
        return None
    size = _sizes(options.type)[0]
    config = ModelConfig(
        family="llama",
        vocab_size=options.orig_vocab_size or LLAMA_VOCABULARY,
        hidden_size=size.hidden_size,
        ffn_hidden_size=size.ffn_hidden_size,
        num_layers=size.num_layers,
        num_attention_heads=size.num_attention_heads,
        num_key_value_heads=size.num_attention_heads,
        head_dim=size.hidden_size // size.num_attention_heads,
        max_position_embeddings=2048,
        norm_epsilon=1e-5,
        rotary_base=10000.0,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    log(
        f"--type {options.type}: unless the input says otherwise, it is LLaMA with {config.vocab_size:,} ids, "
        "norm_epsilon=1e-5 as AscendSpeed of 2023 computed, and 2,048 positions; --model-config says more"
    )
    return config


def check_description(options: InputOptions, config: ModelConfig, layout: ShardLayout | None) -> None:
    """Compare the flags that describe an input with the input.

    Args:
        options: the flags.
        config: what the input is.
        layout: its tensor- and pipeline-parallel layout, if it has one.

    Raises:
        AscendSpeedError: one contradicts it.
    """
    where = options.input_model_dir
    found = (config.num_layers, config.hidden_size, config.num_attention_heads)
    if options.type is not None:
        sizes = [(s.num_layers, s.hidden_size, s.num_attention_heads) for s in _sizes(options.type)]
        if found not in sizes:
            raise AscendSpeedError(
                f"type={options.type} is a model of {sizes[0][0]} layers, hidden size {sizes[0][1]} and {sizes[0][2]} "
                f"heads; {where} has {found[0]}, {found[1]} and {found[2]}; leave --type out"
            )
    if options.bias and not config.qkv_bias:
        raise AscendSpeedError(
            f"bias=true contradicts {where}, whose attention has no biases; leave --bias out"
        )
    if options.pse and config.position != "alibi":
        raise AscendSpeedError(f"pse=true contradicts {where}, which has no ALiBi positions; leave --pse out")
    said = (options.src_tensor_model_parallel_size, options.src_pipeline_model_parallel_size)
    found_layout = (layout.tp, layout.pp) if layout is not None else (1, 1)
    for name, value, real in zip(("tensor", "pipeline"), said, found_layout, strict=True):
        if value is not None and value != real:
            raise AscendSpeedError(
                f"src_{name}_model_parallel_size={value} contradicts {where}, which has {real}; leave it out"
            )


def _sizes(name: str) -> tuple[Size, ...]:
    key = name.upper()
    if key not in SIZES:
        raise ConfigError(f"type={name} is unknown; known: {', '.join(SIZES)}{did_you_mean(key, SIZES)}")
    return SIZES[key]
