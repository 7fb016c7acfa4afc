"""Options of the prompts that are completed while a model is trained."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config


class EvalPromptsConfig(Config):
    """Fixed prompts that the model completes at an interval, for people to read."""

    eval_prompts: Path | None = Field(
        None,
        description="File with one prompt per line (.jsonl: a string or an object with `prompt`), completed greedily "
        "while training; completions go to samples.jsonl and to the log. Needs ascendspeed-infer.",
    )
    eval_generate_interval: int | None = Field(
        None, ge=1, description="Steps between two completions of the prompts."
    )
    eval_max_new_tokens: int = Field(64, ge=1, description="Most new tokens of a completion.")

    @model_validator(mode="after")
    def _both_or_neither(self) -> Self:
        if (self.eval_prompts is None) != (self.eval_generate_interval is None):
            raise ValueError(
                "eval_prompts and eval_generate_interval go together; give --eval-prompts FILE "
                "--eval-generate-interval N, or neither"
            )
        if self.eval_prompts is None and "eval_max_new_tokens" in self.model_fields_set:
            raise ValueError("eval_max_new_tokens means nothing without --eval-prompts; give it too")
        return self
