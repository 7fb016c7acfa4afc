"""Make the records of `--data` into the samples or pairs of a run."""

from pathlib import Path
from typing import Any, TypeVar

from ascendspeed_core.config.finetune import TuneConfig
from ascendspeed_core.config.load import NamedRecipe, merged_sections, validate
from ascendspeed_core.config.records import RecordsConfig
from ascendspeed_core.launch import announce, is_worker, world_of_environment
from ascendspeed_data.column_names import columns_of_flag
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.handlers import kind_of
from ascendspeed_data.handlers.detection import Wanted
from ascendspeed_data.preprocessing.cached import cached_dataset, with_detected_handler
from ascendspeed_data.preprocessing.job import PreprocessJob
from ascendspeed_data.tokenizer import DEFINING_FILES

Tuned = TypeVar("Tuned", bound=TuneConfig)


def config_with_records(
    config: type[Tuned],
    recipe: Path | None,
    given: dict[str, Any],
    wanted: Wanted,
    named: NamedRecipe | None = None,
) -> Tuned:
    """Return the config of a run; if it begins with records, they are preprocessed, or found as they were.

    Args:
        config: of the command.
        recipe: TOML file, or `None`.
        given: flags by field name.
        wanted: what the command trains on.
        named: recipe that the command runs by name.

    Raises:
        ConfigError: an option is wrong, or the run has no folder or no tokenizer.
        AscendSpeedError: the records cannot be read.
    """
    merged = merged_sections(config, recipe, given, announce, named)
    records = validate(RecordsConfig, merged["records"])
    if records.data:
        prefix = _made(records, merged, wanted)
        merged["data"]["data_path"] = (str(prefix),)
        if wanted == "samples":
            merged["data"]["is_instruction_dataset"] = True
    return validate(config, merged)


def _made(records: RecordsConfig, merged: dict[str, dict[str, Any]], wanted: Wanted) -> Path:
    """Return the prefix of the samples or pairs of records."""
    data, save = merged["data"], merged["checkpoint"].get("save")
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        if data.get(name):
            raise ConfigError(f"data and {name} were both given; give records, or data that is preprocessed")
    if save is None:
        raise ConfigError("data is made into samples beside the run's folder; give --save")
    load = merged["start"].get("load")
    tokenizer = data.get("tokenizer_name_or_path") or _tokenizer_beside(load)
    job = PreprocessJob(
        inputs=records.data,
        output_prefix=Path(save),
        tokenizer=Path(tokenizer),
        handler_name=records.handler_name or "",
        seq_length=int(data["seq_length"]) if records.pack and "seq_length" in data else None,
        pack=records.pack,
        chat_template=records.chat_template,
        parse_special=records.parse_special,
        chat_template_kwargs=records.chat_template_kwargs,
        chat_template_date=records.chat_template_date,
        reasoning=records.reasoning,
        columns=tuple(columns_of_flag(records.columns).items()),
        workers=records.workers,
    )
    if records.handler_name is None:
        job = with_detected_handler(job, wanted)
    handler = job.handler()
    if kind_of(handler) != wanted:
        raise ConfigError(
            f"handler_name={job.handler_name} makes {kind_of(handler)}, and this command trains on {wanted}; choose "
            "another handler (see asd-data handlers)"
        )
    only_waits = is_worker() and world_of_environment().rank > 0
    folder = Path(save).with_name(f"{Path(save).name}-data")
    return cached_dataset(job, folder, only_waits)[0]


def _tokenizer_beside(load: Any) -> Path:
    """Return the tokenizer of a checkpoint's folder.

    Raises:
        ConfigError: there is none.
    """
    folder = None if load is None else Path(load)
    for candidate in () if folder is None else (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if any((candidate / name).is_file() for name in DEFINING_FILES):
            return candidate
    raise ConfigError(
        f"--load {load} has no tokenizer to read --data with; give --tokenizer-name-or-path DIR"
    )
