"""Weights by logical name and slice, whatever holds them: a Hugging Face folder, a native checkpoint, a seed."""

from ascendspeed_core.weights.detect import open_source, open_weights
from ascendspeed_core.weights.huggingface.source import HuggingFaceSource
from ascendspeed_core.weights.load import load_weights
from ascendspeed_core.weights.native.source import NativeSource
from ascendspeed_core.weights.random_init import InitialWeights
from ascendspeed_core.weights.source import BaseWeightSource, Index, TensorInfo, WeightSource, stored_source

__all__ = [
    "BaseWeightSource",
    "HuggingFaceSource",
    "Index",
    "InitialWeights",
    "NativeSource",
    "TensorInfo",
    "WeightSource",
    "load_weights",
    "open_source",
    "open_weights",
    "stored_source",
]
