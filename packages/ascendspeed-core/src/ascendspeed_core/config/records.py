"""Options of runs that begin with records: which files, and how they become samples or pairs."""

from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_data.template_values import DATE_HELP, KWARGS_HELP, Reasoning


class RecordsConfig(Config):
    """Records to preprocess before the run, in place of --data-path; options are those of asd-data preprocess."""

    data: tuple[str, ...] = Field(
        (),
        description="Files, folders or globs of records (messages, ShareGPT, Alpaca, prompts with completions or "
        "responses, pairs); made into samples once, in the folder SAVE-data beside --save, named by their hash.",
    )
    handler_name: str | None = Field(
        None,
        description="Handler of the records, a name of `asd-data handlers`. [default: found by their columns]",
    )
    columns: tuple[str, ...] = Field(
        (), description="NAME=COLUMN,...: the handler reads COLUMN of the records as its column NAME."
    )
    chat_template: str | None = Field(
        None,
        description="File with a chat template to use instead of the tokenizer's, or the name of one of its own.",
    )
    chat_template_kwargs: str | None = Field(None, description=KWARGS_HELP)
    chat_template_date: str | None = Field(None, description=DATE_HELP)
    reasoning: Reasoning = Field(
        "keep", description="Thoughts of answers: keep, drop, or those of the last turn."
    )
    pack: bool = Field(
        False,
        description="Pack several samples into each sequence of --seq-length.",
        json_schema_extra={"off": ""},
    )
    parse_special: bool = Field(
        False,
        description="Read special pieces that records spell as control; without it they are text.",
        json_schema_extra={"off": ""},
    )
    workers: int = Field(1, ge=1, description="Processes that preprocess; does not change the samples.")

    @model_validator(mode="after")
    def _have_records(self) -> Self:
        idle = sorted(self.model_fields_set - {"data"})
        if idle and not self.data:
            raise ValueError(
                f"{idle[0]} is for records, but no --data was given; give it too, or leave it out"
            )
        return self
