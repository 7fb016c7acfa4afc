"""Plan before the first step: memory of a step, sizes of micro-batches, the time of a pipeline."""
