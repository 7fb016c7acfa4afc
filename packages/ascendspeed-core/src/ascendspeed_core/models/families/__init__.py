"""Families of models: tables that map them to and from Hugging Face folders."""

from ascendspeed_core.models.families.base import Family, WeightRule
from ascendspeed_core.models.families.registry import FAMILIES, family_of_hugging_face, find_family

__all__ = ["FAMILIES", "Family", "WeightRule", "family_of_hugging_face", "find_family"]
