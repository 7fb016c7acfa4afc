"""Find what a model is made of: weights of any kind, an adapter, a tokenizer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascendspeed_core.build import refuse_spread_int8
from ascendspeed_core.config.deepspeed import inference_settings, read_deepspeed_config
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import WeightSource, open_source, stored_source
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.adapters.lora import loaded_adapters
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.adapters.stacked import stacked_adapters
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.manifest import check_tokenizer
from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer
from ascendspeed_infer.config import AdapterConfig, LoadedModelConfig
from ascendspeed_infer.engines import EngineKind
from ascendspeed_infer.missing_tokenizer import MissingTokenizer
from ascendspeed_infer.text_generator import TextGenerator


def open_model_source(config: LoadedModelConfig, announces: bool = False) -> WeightSource:
    """Open the weights and the adapter that a command names.

    Args:
        config: the options.
        announces: log what the user should know of the adapter.
    """
    opened = open_source(config.source, config.sampling.seed, config.recipe.model)
    source = with_adapter(opened, config.adapter, announces)
    return with_named_adapters(source, config.adapter.by_name) if config.adapter.by_name else source


def with_adapter(source: WeightSource, config: AdapterConfig, announces: bool = False) -> WeightSource:
    """Put an adapter into a source: added to the weights, or computed beside them by the layers that it changes.

    Args:
        source: the model.
        config: the options.
        announces: log what the user should know of the adapter.
    """
    if config.lora_load is None:
        return source
    adapter = open_adapter(config.lora_load, source.config, source.path)
    if announces:
        adapter.announce(source.path)
    return MergedAdapter(source, adapter) if config.merge_adapter else loaded_adapters(source, adapter)


def with_named_adapters(source: WeightSource, folders: Mapping[str, Path]) -> WeightSource:
    """Put several adapters beside the weights of a source, of which each request uses one or none."""
    adapters = {name: open_adapter(folder, source.config, source.path) for name, folder in folders.items()}
    return stacked_adapters(source, adapters)


def check_source(config: LoadedModelConfig, is_own_layout: bool = True) -> None:
    """Find out before any process starts whether the model is there, fits its flags, and has a tokenizer.

    Args:
        config: the options.
        is_own_layout: whether this program distributes the model, which must then fit the layout.
    """
    source = open_model_source(config, announces=True)
    if config.precision.weight_quantization == "int8":
        refuse_spread_int8(config.parallel.resolved_zero_stage())
    config.model.check(source.config, str(source.path or config.source.model_config_file))
    if is_own_layout:
        config.parallel.check_model(source.config)
    given = config.tokenizer.tokenizer_name_or_path
    if config.needs_tokenizer or given is not None or source.tokenizer is not None:
        load_tokenizer(find_tokenizer(source, given), config.tokenizer.tokenizer_type)


@contextmanager
def open_with(kind: EngineKind, config: LoadedModelConfig) -> Iterator[tuple[TextGenerator, WeightSource]]:
    """Load the model with another engine; only its description is read here, not its weights."""
    source = open_model_source(config)
    dtype = wanted_dtype(config, source)
    tokenizer = open_tokenizer(source, config.tokenizer.tokenizer_name_or_path, config.needs_tokenizer)
    with kind.open(config, dtype) as engine:
        adapter = f", adapter {config.adapter.lora_load}" if config.adapter.lora_load else ""
        log(f"model: {source.config.num_parameters:,} parameters{adapter}, {dtype}, engine {kind.name}")
        yield TextGenerator(tokenizer, engine), source


def wanted_dtype(config: LoadedModelConfig, source: WeightSource) -> str:
    """Return the format to compute in: the one asked for, or the one that the weights are stored in."""
    asked = config.precision.dtype or config.precision.fp16 or config.precision.bf16
    return config.precision.dtype_name if asked else stored_dtype(source)


def stored_dtype(source: WeightSource) -> str:
    """Return the format that the weights are stored in."""
    return str(next(iter(source.tensors().values())).dtype).removeprefix("torch.")


def open_tokenizer(source: WeightSource, given: Path | None, is_needed: bool = True) -> Tokenizer:
    """Open the tokenizer to use, see `find_tokenizer`; where none is needed, a checkpoint may have come without one."""
    if not is_needed and given is None and source.tokenizer is None:
        reason = f"{source.path or 'random weights'} came without one; give --tokenizer-name-or-path"
        missing: Any = MissingTokenizer(reason)
        return missing  # type: ignore[no-any-return]
    return load_tokenizer(find_tokenizer(source, given))


def find_tokenizer(source: WeightSource, given: Path | None) -> Path:
    """Return the tokenizer to use: the one given, or the one that came with the checkpoint.

    Raises:
        AscendSpeedError: there is none, or the one given is not the one the run was trained with.
    """
    own = source.tokenizer
    if given is None and own is None:
        raise AscendSpeedError(
            f"{source.path or 'random weights'} came without a tokenizer; give --tokenizer-name-or-path"
        )
    if given is None:
        assert own is not None
        return own
    base = stored_source(source)
    if base.data_manifest is not None:
        check_tokenizer(
            base.data_manifest, load_tokenizer(given), f"the data that {source.path} was trained on"
        )
    elif base.kind == "native" and own is not None:
        trained, wanted = load_tokenizer(own), load_tokenizer(given)
        if trained.fingerprint != wanted.fingerprint:
            raise AscendSpeedError(
                f"tokenizer {given} is not the one that {source.path} was trained with ({own}); leave "
                "--tokenizer-name-or-path out"
            )
    return given


def zero_settings(parallel: ParallelConfig, mesh: ParallelMesh, dtype: str) -> dict[str, Any] | None:
    """Return DeepSpeed's settings for a model whose weights are spread (ZeRO-3); `None` for others.

    Args:
        parallel: the options.
        mesh: the layout and this rank's position in it; rank 0 logs what has no effect.
        dtype: of the weights.
    """
    stage = mesh.layout.zero_stage
    if stage is None:
        return None
    path = parallel.deepspeed_config
    content = read_deepspeed_config(path) if path is not None else {}
    idle = sorted(set(content) - {"zero_optimization", "fp16", "bf16"})
    if idle and mesh.rank == 0:
        log(f"{path}: no effect without training: {', '.join(idle)}")
    if stage < 3:
        if mesh.rank == 0:
            log(
                f"zero_stage={stage} cuts what only training has: each of {mesh.layout.dp} data-parallel processes "
                "holds the whole model, or its tensor-parallel part"
            )
        return None
    return inference_settings(content, stage, dtype)
