"""megatron-core as a training engine: the only package whose code calls its model, schedules and optimizer."""
