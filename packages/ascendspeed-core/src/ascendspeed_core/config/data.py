"""Options of the data: which files, how they are shared out, how their documents are read."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.split import SPLITS, WHOLE, parse_split
from ascendspeed_data.data_path import Blend, parse_blend
from ascendspeed_data.errors import ConfigError

OWN_PATHS = ("train_data_path", "valid_data_path", "test_data_path")
"""By split the option that gives it data of its own."""

DOCUMENT_OPTIONS = ("reset_attention_mask", "reset_position_ids", "eod_mask_loss")
"""Options that need to know where documents end."""


class DataConfig(Config):
    """Which tokens are trained on."""

    data_path: tuple[str, ...] = Field(
        (),
        description="Prefix of a .bin/.idx pair, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...; divided by "
        "--split into training, validation and test data.",
    )
    train_data_path: tuple[str, ...] = Field(
        (), description="Prefix or blend used only for training, instead of --data-path and --split."
    )
    valid_data_path: tuple[str, ...] = Field(
        (), description="Prefix or blend used only for validation, together with --train-data-path."
    )
    test_data_path: tuple[str, ...] = Field(
        (),
        description="Prefix or blend used only for testing: its loss is measured once after the last step, over "
        "--eval-iters batches. Together with --train-data-path.",
    )
    split: str = Field(
        "969,30,1",
        description="Percentages or proportions of the documents for training, validation and test.",
    )
    seq_length: int = Field(ge=1, description="Tokens of one sample, S.")
    no_shuffle: bool = Field(
        False,
        description="Do not shuffle: take samples in the order of the files in every pass.",
        json_schema_extra={"off": ""},
    )
    data_cache_path: Path | None = Field(
        None, description="Folder for the cached sample index. [default: a folder `cache` next to the data]"
    )
    reset_attention_mask: bool = Field(
        False,
        description="Tokens attend only to tokens of their own document (documents end at end-of-document tokens).",
    )
    reset_position_ids: bool = Field(
        False, description="Restart position ids at 0 after each end-of-document token."
    )
    eod_mask_loss: bool = Field(False, description="Do not count the loss at end-of-document tokens.")
    tokenizer_type: str | None = Field(
        None, description="PretrainedFromHF; checked against the data's manifest."
    )
    tokenizer_name_or_path: Path | None = Field(
        None, description="Tokenizer folder; compared with the one that made the data."
    )
    tokenizer_not_use_fast: bool = Field(
        False,
        description="Accepted for old scripts: no tokenizer runs while training.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _paths_go_together(self) -> Self:
        own = [name for name in OWN_PATHS if getattr(self, name)]
        if not self.data_path and not own:
            raise ValueError("data_path is missing; give --data-path, or --train-data-path")
        if self.data_path and own:
            raise ValueError(
                f"data_path and {own[0]} were both given; give --data-path with --split, or data of its own for each: "
                "--train-data-path, --valid-data-path, --test-data-path"
            )
        if own and not self.train_data_path:
            raise ValueError(f"{own[0]} was given without train_data_path; give --train-data-path too")
        if own and "split" in self.model_fields_set:
            raise ValueError(
                f"split={self.split} shares --data-path out; beside train_data_path leave --split out"
            )
        parse_split(self.split)
        for split_index in range(len(SPLITS)):
            self.blend(split_index)
        return self

    @property
    def lengths_vary(self) -> bool:
        """Whether samples are padded to the longest of their step, rather than to `seq_length`."""
        return False

    @property
    def has_own_paths(self) -> bool:
        """Whether each split has data of its own."""
        return bool(self.train_data_path)

    @property
    def document_options(self) -> list[str]:
        """Options that are given and need to know where documents end."""
        return [name for name in DOCUMENT_OPTIONS if getattr(self, name)]

    def words(self, split_index: int = 0) -> tuple[str, ...]:
        """Return the prefix or blend of a split as it was given; empty where it has no data."""
        own: tuple[str, ...] = getattr(self, OWN_PATHS[split_index])
        return own if self.has_own_paths else self.data_path

    def blend(self, split_index: int = 0) -> Blend:
        """Return the prefixes of a split, and their weights when there are several; no prefix where it has no data."""
        words = self.words(split_index)
        if not words:
            return [], None
        name = OWN_PATHS[split_index] if self.has_own_paths else "data_path"
        try:
            prefixes, weights = parse_blend(words, name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return [str(Path(prefix)) for prefix in prefixes], weights

    def prefixes(self) -> list[str]:
        """Return the prefixes of all splits, each once."""
        return list(dict.fromkeys(prefix for index in range(len(SPLITS)) for prefix in self.blend(index)[0]))

    def shares(self, split_index: int) -> str:
        """Return how documents are shared out for a split: all to it where it has data of its own."""
        return WHOLE[split_index] if self.has_own_paths else self.split

    def describe_split(self, split_index: int) -> str:
        """Say where the documents of a split come from, for messages."""
        return OWN_PATHS[split_index] if self.has_own_paths else f"split={self.split}"
