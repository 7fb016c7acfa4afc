"""Families of models: tables that map them to and from Hugging Face folders."""

from ascendspeed_core.models.families.base import ConfigRule, Family, TensorMapping, WeightRule
from ascendspeed_core.models.families.choose import family_of_hugging_face
from ascendspeed_core.models.families.packing import EqualParts, Packed
from ascendspeed_core.models.families.registry import FAMILIES, find_family, known_families

__all__ = [
    "FAMILIES",
    "ConfigRule",
    "EqualParts",
    "Family",
    "Packed",
    "TensorMapping",
    "WeightRule",
    "family_of_hugging_face",
    "find_family",
    "known_families",
]
