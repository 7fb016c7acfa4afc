"""What gives the micro-batches of each step, whatever the kind of data."""

from collections.abc import Sequence
from typing import Protocol

from ascendspeed_core.data.micro_batch import MicroBatch


class BatchLoader(Protocol):
    """Training and validation micro-batches of one run on this rank."""

    def micro_batches(self, consumed: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches, of those sizes, of the step that follows `consumed` samples."""
        ...

    def validation_batches(self, evaluated: int, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the evaluation that follows `evaluated` samples."""
        ...

    def test_batches(self, sizes: Sequence[int]) -> list[MicroBatch]:
        """Return this rank's micro-batches of the test data."""
        ...

    def order_digest(self, consumed: int) -> str:
        """Return a digest of which samples the first `consumed` ones are; equal digests continue each other."""
        ...

    def content_digest(self, num_samples: int) -> str:
        """Return a digest of the order of all samples and of the tokens of some of them, to compare machines."""
        ...
