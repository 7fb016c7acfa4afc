"""Counts of token ids in a `.bin` file, and ids that no tokenizer of that size gives."""

from pathlib import Path

import numpy as np
import pytest

from ascendspeed_data.errors import DataError
from ascendspeed_data.token_frequencies import count_ids_in_file


def test_ids_are_counted(tmp_path: Path) -> None:
    ids = np.random.default_rng(3).integers(0, 40, 5_000).astype(np.int32)
    ids.tofile(tmp_path / "a.bin")
    assert np.array_equal(count_ids_in_file(tmp_path / "a.bin", np.int32, 40), np.bincount(ids, minlength=40))


@pytest.mark.parametrize("wrong", [-1, 40, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, wrong: int) -> None:
    np.array([1, wrong, 39], np.int32).tofile(tmp_path / "a.bin")
    with pytest.raises(
        DataError, match=rf"a.bin holds ids from .*{wrong}.*, the tokenizer has 40; .*preprocess again"
    ):
        count_ids_in_file(tmp_path / "a.bin", np.int32, 40)
