"""Convert, inspect and verify checkpoints of large language models.

    from ascendspeed_ckpt import Conversion, convert

    verdict = convert(Conversion(Path("run"), Path("model-hf"), "huggingface"))

Names are imported when they are first used, so that importing the package alone loads neither torch nor pydantic.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ascendspeed_ckpt.comparison import Comparison, compare
    from ascendspeed_ckpt.conversion import Conversion, Verdict, convert
    from ascendspeed_ckpt.resize_vocab import ResizedVocabulary
    from ascendspeed_ckpt.writers.huggingface import write_hugging_face
    from ascendspeed_ckpt.writers.mp_rank import write_mp_rank
    from ascendspeed_ckpt.writers.native import write_native
    from ascendspeed_ckpt.writers.torch_dist import write_torch_dist
    from ascendspeed_ckpt.writers.write_plan import WritePlan

__version__ = "0.1.0"

__all__ = [
    "Comparison",
    "Conversion",
    "ResizedVocabulary",
    "Verdict",
    "WritePlan",
    "compare",
    "convert",
    "write_hugging_face",
    "write_mp_rank",
    "write_native",
    "write_torch_dist",
]

_MODULES = {
    "Comparison": "comparison",
    "Conversion": "conversion",
    "ResizedVocabulary": "resize_vocab",
    "Verdict": "conversion",
    "WritePlan": "writers.write_plan",
    "compare": "comparison",
    "convert": "conversion",
    "write_hugging_face": "writers.huggingface",
    "write_mp_rank": "writers.mp_rank",
    "write_native": "writers.native",
    "write_torch_dist": "writers.torch_dist",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
