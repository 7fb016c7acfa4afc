"""Prepare training data for large language models; installs and runs without torch.

The names in `__all__` are the public API. They are imported on first use, so that importing the package stays fast.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
"""True for type checkers, which know this name; `typing` would make the import several times slower."""

if TYPE_CHECKING:
    from ascendspeed_data.blend import BlendPart, open_blend
    from ascendspeed_data.chat_template import ChatTemplate
    from ascendspeed_data.dataset import Dataset, open_dataset
    from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
    from ascendspeed_data.handlers import (
        HandlerBase,
        SampleHandler,
        TextHandler,
        all_handlers,
        find_handler,
    )
    from ascendspeed_data.indexed import IndexedDataset, IndexedDatasetWriter
    from ascendspeed_data.manifest import DatasetManifest, load_manifest
    from ascendspeed_data.merge import merge_datasets
    from ascendspeed_data.preprocess import preprocess_dataset
    from ascendspeed_data.preprocessing.job import PreprocessJob
    from ascendspeed_data.prompting import PromptLayout, layout_named, recorded_layout
    from ascendspeed_data.sample import Sample, Segment
    from ascendspeed_data.tokenizer import Tokenizer, load_tokenizer
    from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece
    from ascendspeed_data.verify import verify_dataset

_MODULE_OF = {
    "AscendSpeedError": "errors",
    "BlendPart": "blend",
    "ChatTemplate": "chat_template",
    "ConfigError": "errors",
    "DataError": "errors",
    "Dataset": "dataset",
    "DatasetManifest": "manifest",
    "HandlerBase": "handlers",
    "IndexedDataset": "indexed",
    "IndexedDatasetWriter": "indexed",
    "PreprocessJob": "preprocessing.job",
    "PromptLayout": "prompting",
    "Sample": "sample",
    "SampleHandler": "handlers",
    "Segment": "sample",
    "TextHandler": "handlers",
    "Tokenizer": "tokenizer",
    "TokenizerTraining": "train_tokenizer",
    "all_handlers": "handlers",
    "find_handler": "handlers",
    "layout_named": "prompting",
    "load_manifest": "manifest",
    "load_tokenizer": "tokenizer",
    "merge_datasets": "merge",
    "open_blend": "blend",
    "open_dataset": "dataset",
    "preprocess_dataset": "preprocess",
    "recorded_layout": "prompting",
    "train_sentencepiece": "train_tokenizer",
    "verify_dataset": "verify",
}

__all__ = [
    "AscendSpeedError",
    "BlendPart",
    "ChatTemplate",
    "ConfigError",
    "DataError",
    "Dataset",
    "DatasetManifest",
    "HandlerBase",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PreprocessJob",
    "PromptLayout",
    "Sample",
    "SampleHandler",
    "Segment",
    "TextHandler",
    "Tokenizer",
    "TokenizerTraining",
    "__version__",
    "all_handlers",
    "find_handler",
    "layout_named",
    "load_manifest",
    "load_tokenizer",
    "merge_datasets",
    "open_blend",
    "open_dataset",
    "preprocess_dataset",
    "recorded_layout",
    "train_sentencepiece",
    "verify_dataset",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
