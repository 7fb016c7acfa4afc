"""Generate text and score it from any checkpoint, under any layout.

The names below are imported when they are first used, so that importing this package imports neither torch nor
pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ascendspeed_infer.beams import BeamSettings
    from ascendspeed_infer.chat import Chat, choose_layout
    from ascendspeed_infer.config import AnswerConfig, SamplingConfig
    from ascendspeed_infer.engine.llm_engine import LLMEngine, RequestOutput
    from ascendspeed_infer.engine.scoring_request import Score, ScoringRequest
    from ascendspeed_infer.engine.sequence import (
        BeamSearchRequest,
        CompletionOutput,
        GenerationSettings,
        SamplingRequest,
        TokenOutput,
    )
    from ascendspeed_infer.language_model import LanguageModel
    from ascendspeed_infer.requests import Completion, GenerationRequest, StreamedText
    from ascendspeed_infer.sampling import SamplingParams
    from ascendspeed_infer.scoring import TextPair
    from ascendspeed_infer.text_generator import TextGenerator

_MODULES = {
    "AnswerConfig": "config",
    "BeamSearchRequest": "engine.sequence",
    "BeamSettings": "beams",
    "Chat": "chat",
    "Completion": "requests",
    "CompletionOutput": "engine.sequence",
    "GenerationRequest": "requests",
    "GenerationSettings": "engine.sequence",
    "LLMEngine": "engine.llm_engine",
    "LanguageModel": "language_model",
    "RequestOutput": "engine.llm_engine",
    "SamplingConfig": "config",
    "SamplingParams": "sampling",
    "SamplingRequest": "engine.sequence",
    "Score": "engine.scoring_request",
    "ScoringRequest": "engine.scoring_request",
    "StreamedText": "requests",
    "TextGenerator": "text_generator",
    "TextPair": "scoring",
    "TokenOutput": "engine.sequence",
    "choose_layout": "chat",
}
"""The module of each public name."""

__all__ = [
    "AnswerConfig",
    "BeamSearchRequest",
    "BeamSettings",
    "Chat",
    "Completion",
    "CompletionOutput",
    "GenerationRequest",
    "GenerationSettings",
    "LLMEngine",
    "LanguageModel",
    "RequestOutput",
    "SamplingConfig",
    "SamplingParams",
    "SamplingRequest",
    "Score",
    "ScoringRequest",
    "StreamedText",
    "TextGenerator",
    "TextPair",
    "TokenOutput",
    "choose_layout",
]


def __getattr__(name: str) -> Any:
    """Import a public name (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names before they are imported."""
    return sorted({*globals(), *__all__})
