"""Options of `asd-infer serve`."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, field_validator

from ascendspeed_core.config.base import Config
from ascendspeed_infer.config import AdapterConfig, LoadedModelConfig, TemplateConfig

API_KEYS_VARIABLE = "ASCENDSPEED_API_KEYS"
"""Environment variable with keys, separated by commas."""


class ServedAdaptersConfig(AdapterConfig):
    """LoRA adapters on top of the weights."""

    lora_modules: tuple[str, ...] = Field(
        (),
        description="NAME=DIR: a LoRA adapter that requests choose as their model; several share one base, and run "
        "in the same passes.",
    )

    @field_validator("lora_modules")
    @classmethod
    def _has_names(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        names = [one.partition("=")[0] for one in given]
        for one, name in zip(given, names, strict=True):
            if not name or not one.partition("=")[2]:
                raise ValueError(f"lora_modules={one} is not NAME=DIR; correct it")
            if names.count(name) > 1:
                raise ValueError(f"lora_modules: {name} is given twice; keep one")
        return given

    @property
    def by_name(self) -> Mapping[str, Path]:
        """Folders of adapters that requests choose by name."""
        parts = (one.partition("=") for one in self.lora_modules)
        return {name: Path(folder) for name, _, folder in parts}


class ServerConfig(Config):
    """Where the server listens, and what it allows."""

    host: str = Field("127.0.0.1", description="Address to listen on; the default is reached from here only.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    served_model_name: str | None = Field(
        None, description="Name of the model in requests and answers. [default: the name of its folder]"
    )
    api_key_file: Path | None = Field(
        None,
        description=f"File with one API key per line, of which a request gives one; {API_KEYS_VARIABLE} too.",
    )
    lenient: bool = Field(
        False,
        description="Accept fields of requests that the server does not know, with a line in the log.",
        json_schema_extra={"off": ""},
    )
    batch_invariant: bool = Field(
        False,
        description="Give each answer the same bit for bit whatever is computed with it. Slower.",
        json_schema_extra={"off": ""},
    )
    cache_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of all texts that run side by side, prompts included. [default: 65,536, at least one text "
        "of the model's longest, at most 64 of them]",
    )
    optimistic_admission: bool = Field(
        False,
        description="Let a text run once it fits as it is, not the longest that it can become; when memory runs "
        "out, the latest one waits and is computed again.",
        json_schema_extra={"off": ""},
    )
    max_num_seqs: int = Field(64, ge=1, description="Most texts in one pass.")
    max_queue: int = Field(256, ge=1, description="Most texts that wait; more are refused with status 429.")
    request_seconds: float = Field(600.0, gt=0, description="Longest time that a request may take.")
    drain_seconds: float = Field(
        30.0, ge=0, description="Time for open requests after SIGTERM or Ctrl-C; no new ones are taken then."
    )
    max_body_bytes: int = Field(4_000_000, ge=1, description="Largest body of a request.")
    max_choices: int = Field(128, ge=1, description="Most texts of one request: prompts times best_of.")
    max_logprobs: int = Field(20, ge=0, description="Most alternatives of a token.")
    max_stop: int = Field(16, ge=0, description="Most stop strings of a request.")
    max_stop_characters: int = Field(256, ge=1, description="Longest stop string.")


class ServeConfig(LoadedModelConfig):
    """Everything `asd-infer serve` takes."""

    adapter: ServedAdaptersConfig = ServedAdaptersConfig()
    conversation: TemplateConfig = TemplateConfig()
    server: ServerConfig = ServerConfig()
