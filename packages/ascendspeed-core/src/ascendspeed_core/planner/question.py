"""Make a question for the planner of what a user asks: model by name or file, device, batch. No torch."""

from pathlib import Path
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.planning import PlanConfig
from ascendspeed_core.models.families import known_families
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.choose import family_of_hugging_face
from ascendspeed_core.planner.hardware import HardwareProfile, load_profile
from ascendspeed_core.planner.search import Question
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.small_files import JsonObject, read_json

DEFAULT_TOKENS_PER_STEP = 4 << 20
LONGEST_DEFAULT = 4096


def read_model(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    """Return a model by the name of a size, or of a Hugging Face folder or config.json, and its config.json.

    Raises:
        ConfigError: it is neither.
        AscendSpeedError: the file is damaged, or of a model that is not supported.
    """
    sizes = {size: family for family in known_families().values() for size in family.sizes}
    if name in sizes:
        family: Family = sizes[name]
        config = family.read_config(family.sizes[name])
        return config, family.write_config(config)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"model={name} is no size of `asd-core models`{did_you_mean(name, sizes)}, and no folder with a "
            "config.json; give one of them"
        )
    content = read_json(path, JsonObject, option="--model")
    family = family_of_hugging_face(content, str(path))
    return family.read_config(content, str(path)), content


def make_question(config: PlanConfig) -> tuple[Question, dict[str, Any]]:
    """Return what is to be planned, and the model's config.json.

    Raises:
        ConfigError: model, device or format is not there.
    """
    model, content = read_model(config.model)
    profile = load_profile(config.device)
    dtype = config.dtype or ("bfloat16" if "bfloat16" in profile.peak_tflops else "float16")
    profile.peak_flops(dtype)
    length = config.seq_length or min(model.max_position_embeddings, LONGEST_DEFAULT)
    batch = config.global_batch_size or _default_batch(config.devices, length)
    question = Question(
        model=model,
        profile=profile,
        devices=config.devices,
        seq_length=length,
        global_batch_size=batch,
        dtype=dtype,
        memory_bytes=None if config.memory_gib is None else int(config.memory_gib * (1 << 30)),
        fixed=config.fixed(),
        margin=config.allocator_margin,
        is_fused=is_fused(profile),
    )
    return question, content


def is_fused(profile: HardwareProfile) -> bool:
    """Whether norms and MLP are fused operators on a device: not where it was measured with plain torch."""
    return "plain torch" not in profile.note


def _default_batch(devices: int, length: int) -> int:
    """Return a batch of about four million tokens that the devices share out evenly."""
    wanted = max(DEFAULT_TOKENS_PER_STEP // length, 1)
    return max(wanted // devices, 1) * devices if devices > wanted else wanted // devices * devices or devices
