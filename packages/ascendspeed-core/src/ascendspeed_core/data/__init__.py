"""The samples of a run: megatron-core's text samples, instruction sets, preference pairs."""
