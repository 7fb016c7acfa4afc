"""Options of texts that a model writes while it is trained."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config


class EvalPromptsConfig(Config):
    """Fixed prompts that are continued every so many steps, to be read by people."""

    eval_prompts: Path | None = Field(
        None,
        description="File with one prompt per line (.jsonl: a text or an object with `prompt`), continued greedily "
        "while training; what is written goes to samples.jsonl and to the log. Needs ascendspeed-infer.",
    )
    eval_generate_interval: int | None = Field(
        None, ge=1, description="Steps between two times that the prompts are continued."
    )
    eval_max_new_tokens: int = Field(64, ge=1, description="Longest continuation of a prompt.")

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
