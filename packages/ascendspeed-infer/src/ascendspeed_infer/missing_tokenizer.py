"""What stands for the tokenizer of a checkpoint that came without one, while only ids are given and wanted."""

from collections.abc import Mapping
from typing import Any, NoReturn

from ascendspeed_data.errors import AscendSpeedError


class MissingTokenizer:
    """A tokenizer that refuses every text.

    Args:
        reason: why there is none, and the remedy; the error of whoever needs it.
    """

    vocab_size = 0
    bos_id = eos_id = unk_id = pad_id = None
    special_ids: Mapping[str, int] = {}

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AscendSpeedError(f"a text needs a tokenizer: {self._reason}")
