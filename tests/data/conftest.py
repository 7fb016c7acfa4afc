from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.tokenizer import load_tokenizer
from support.corpus import make_chat_tokenizer
from support.records import PLAIN


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with ChatML's template."""
    made = tmp_path_factory.mktemp("byte-level")
    make_chat_tokenizer(made)
    return made


@pytest.fixture
def chat_tokenizer(byte_level_folder: Path) -> Any:
    """That tokenizer with a plain template, which a test may replace."""
    loaded = load_tokenizer(byte_level_folder)
    loaded.chat_template = PLAIN
    return loaded
