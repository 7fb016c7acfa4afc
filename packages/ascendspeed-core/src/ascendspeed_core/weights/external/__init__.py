"""Checkpoints of Megatron-LM, AscendSpeed 2023 and DeepSpeed."""
