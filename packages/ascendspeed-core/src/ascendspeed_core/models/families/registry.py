"""The families that are known."""

from types import MappingProxyType
from typing import Any

from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.llama import LLAMA
from ascendspeed_data.errors import AscendSpeedError, did_you_mean

FAMILIES = MappingProxyType({family.name: family for family in (LLAMA,)})
"""Families by name."""


def find_family(name: str) -> Family:
    """Return the family of that name, or raise `AscendSpeedError`."""
    if name not in FAMILIES:
        raise AscendSpeedError(
            f"family={name} is unknown; known are {', '.join(FAMILIES)}{did_you_mean(name, FAMILIES)}"
        )
    return FAMILIES[name]


def family_of_hugging_face(hf_config: dict[str, Any], where: str) -> Family:
    """Return the family that a Hugging Face config names in `architectures`.

    Raises:
        AscendSpeedError: no family claims it.
    """
    named = [str(name) for name in hf_config.get("architectures") or []]
    for family in FAMILIES.values():
        if any(name in family.architectures for name in named):
            return family
    known = [name for family in FAMILIES.values() for name in family.architectures]
    raise AscendSpeedError(
        f"{where}: architectures={named} is not supported; supported are {', '.join(known)}"
    )
