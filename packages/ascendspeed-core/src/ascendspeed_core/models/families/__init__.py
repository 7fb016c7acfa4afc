"""Families of models: tables that map them to and from Hugging Face folders."""

from ascendspeed_core.models.families.base import ConfigRule, Family, WeightRule
from ascendspeed_core.models.families.packing import Packed
from ascendspeed_core.models.families.registry import (
    FAMILIES,
    family_of_hugging_face,
    find_family,
    known_families,
)

__all__ = [
    "FAMILIES",
    "ConfigRule",
    "Family",
    "Packed",
    "WeightRule",
    "family_of_hugging_face",
    "find_family",
    "known_families",
]
