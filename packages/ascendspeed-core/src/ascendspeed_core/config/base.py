"""What all configs have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """A frozen config that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def spellings(*flags: str, **more: Any) -> Any:
    """Further flags under which a field's option is accepted."""
    return {"flags": list(flags), **more}
