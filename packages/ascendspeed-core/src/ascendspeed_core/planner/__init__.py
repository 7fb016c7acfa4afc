"""Know before the start: memory of a step, sizes of micro-batches, the time a pipeline takes."""
