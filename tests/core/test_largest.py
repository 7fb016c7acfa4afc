"""The largest number of a row, found by C++ or by blocks, is torch's."""

import random

import pytest
import torch

from ascendspeed_core.kernels.largest import largest, largest_of_blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_largest_is_the_first_of_torch(dtype: torch.dtype) -> None:
    draw = random.Random(str(dtype))
    torch.manual_seed(0)
    for _ in range(60):
        count = draw.choice([1, 5, 127, 128, 129, 255, 256, 1000, 1024, 32000, 32001])
        rows = torch.randn(draw.randint(1, 5), count).to(dtype)
        if draw.random() < 0.5:
            # Few different numbers: the largest stands in many positions.
            rows = rows.round()
        for row in rows:
            if draw.random() < 0.3:
                row[draw.randrange(count)] = draw.choice([torch.nan, torch.inf, -torch.inf])
            if draw.random() < 0.1:
                row.fill_(-torch.inf)
        apart = [row.clone() if draw.random() < 0.5 else row for row in rows]
        for numbers, positions in (largest(apart), largest_of_blocks(rows)):
            assert torch.equal(positions, rows.argmax(-1))
            torch.testing.assert_close(numbers, rows.max(-1).values, rtol=0, atol=0, equal_nan=True)


def test_rows_that_are_no_pieces_of_memory() -> None:
    rows = torch.randn(300, 3).T
    numbers, positions = largest(list(rows))
    assert torch.equal(numbers, rows.amax(-1))
    assert torch.equal(positions, rows.argmax(-1))
