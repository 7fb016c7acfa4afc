"""Options of the batch: how many samples make a step, and in which micro-batches."""

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.compute import ComputeConfig as ComputeConfig
from ascendspeed_core.config.recompute import RecomputeConfig as RecomputeConfig

MICRO_BATCH_EXAMPLES = {
    "example-config-1": (1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 4, 3, 2),
    "example-config-2": (1, 2, 2, 3, 4, *(5,) * 13, 4, 4, 3, 3, 3, 2),
}
"""The two of the 2023 system: small at both ends, where a pipeline fills and drains, large between."""


class BatchConfig(Config):
    """How many samples make a step, and how they are split into micro-batches."""

    micro_batch_size: int = Field(
        1, ge=1, description="Samples of one forward pass on one device (per-device batch size)."
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Samples of one optimizer step over all devices; what micro-batches do not cover is accumulated. "
        "[default: one micro-batch per data-parallel process]",
    )
    rampup_batch_size: tuple[int, ...] = Field(
        (),
        description="START INCREMENT SAMPLES: begin with a global batch of START and increase it by INCREMENT until "
        "SAMPLES samples were seen.",
    )
    optimized_pipeline: bool = Field(
        False,
        description="Use micro-batches of the different sizes in --manual-mbs, which reduces idle time with pp > 1.",
    )
    manual_mbs: str | None = Field(
        None,
        description="Sizes of one rank's micro-batches in order, 1,2,3,3,2,1, or example-config-1 (pp 4, 64 "
        "samples), example-config-2 (pp 8, 96 samples), or auto: measured, none above --micro-batch-size.",
    )

    @model_validator(mode="after")
    def _rampup_is_three(self) -> "BatchConfig":
        if self.rampup_batch_size and (len(self.rampup_batch_size) != 3 or min(self.rampup_batch_size) < 0):
            raise ValueError(
                f"rampup_batch_size={self.rampup_batch_size} is not START INCREMENT SAMPLES; "
                "write for example --rampup-batch-size 16 8 300000"
            )
        return self

    @model_validator(mode="after")
    def _sizes_are_numbers(self) -> "BatchConfig":
        if self.optimized_pipeline != (self.manual_mbs is not None):
            raise ValueError(
                "optimized_pipeline and manual_mbs go together; give --optimized-pipeline --manual-mbs SIZES, or "
                "neither"
            )
        if self.optimized_pipeline and self.rampup_batch_size:
            raise ValueError(
                "manual_mbs fixes the samples of a step, rampup_batch_size changes them; leave one of them out"
            )
        if any(size < 1 for size in self.manual_sizes()):
            raise ValueError(f"manual_mbs={self.manual_mbs}: every size must be 1 or more")
        return self

    @property
    def finds_sizes(self) -> bool:
        """Whether the sizes of micro-batches are found by measuring."""
        return self.manual_mbs == "auto"

    def manual_sizes(self) -> tuple[int, ...]:
        """Return the sizes of `manual_mbs`; none without it, or when they are still to be found."""
        if self.manual_mbs is None or self.finds_sizes:
            return ()
        if self.manual_mbs in MICRO_BATCH_EXAMPLES:
            return MICRO_BATCH_EXAMPLES[self.manual_mbs]
        try:
            return tuple(int(size) for size in self.manual_mbs.split(","))
        except ValueError:
            raise ValueError(
                f"manual_mbs={self.manual_mbs!r} is neither {' nor '.join(MICRO_BATCH_EXAMPLES)} nor auto nor numbers; "
                "write for example 1,2,3,3,2,1"
            ) from None

    def resolve_global_batch_size(self, dp: int) -> int:
        """Return the global batch size on `dp` data-parallel ranks, or raise `ValueError`."""
        step = self.micro_batch_size * dp
        size = self.global_batch_size or step
        start, increment, _ = self.rampup_batch_size or (size, step, 0)
        if size % step:
            raise ValueError(
                f"global_batch_size={size} is not a multiple of micro_batch_size x dp = "
                f"{self.micro_batch_size} x {dp} = {step}; choose {max(size // step, 1) * step}"
            )
        if start % step or increment % step or not 0 < start <= size or (size - start) % (increment or size):
            raise ValueError(
                f"rampup_batch_size={start} {increment}: both must be multiples of micro_batch_size x dp = {step}, "
                f"and lead in whole increments to global_batch_size={size}"
            )
        manual = self.manual_sizes()
        if manual and sum(manual) * dp != size:
            raise ValueError(
                f"manual_mbs={self.manual_mbs} makes {sum(manual)} samples per device, with dp = {dp} a step of "
                f"{sum(manual) * dp}, not global_batch_size={size}; change one of them"
            )
        return size
